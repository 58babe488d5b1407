"""The third tab: reports of studies, each in a frame that can do nothing but be read."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import gradio as gr

from ipdiverse.evaluation.report import TITLE
from ipdiverse.ui import status
from ipdiverse.ui.inputs import PRIVATE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MAX_REPORTS = 200
MAX_BYTES = 64 * 2**20
_NAME = "report.html"
_MARK = f"<h1>{TITLE}</h1>"
_HEAD_BYTES = 4096


def find_reports(folders: Sequence[Path]) -> dict[str, Path]:
    """Reports that `ipdiverse evaluate` wrote, by what a visitor reads.

    Links that lead out of a folder are left alone.

    Args:
        folders: Looked through with all that is in them; one that is missing holds nothing.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        root = folder.resolve()
        for file in sorted(root.rglob(_NAME)) if root.is_dir() else ():
            real = file.resolve()
            if len(found) < MAX_REPORTS and real.is_relative_to(root) and _is_report(real):
                found[(folder / file.relative_to(root)).parent.as_posix()] = real
    return found


def _is_report(file: Path) -> bool:
    try:
        if not file.is_file() or file.stat().st_size > MAX_BYTES:
            return False
        with file.open("rb") as opened:
            return _MARK.encode() in opened.read(_HEAD_BYTES)
    except OSError:
        return False


def framed(label: str, page: str) -> str:
    """A page inside this one: no scripts, no forms, no origin, and nothing is loaded for it."""
    return (
        f'<iframe class="report-frame" title="report {escape(label)}" sandbox="" '
        f'referrerpolicy="no-referrer" srcdoc="{escape(page)}"></iframe>'
    )


def reports_tab(reports: dict[str, Path]) -> None:
    """Lay the tab out."""
    if not reports:
        gr.Markdown(
            "No report was found. `ipdiverse evaluate --quick` writes one into `out/evaluation`; "
            "start the page again to see it, or name a folder with `--reports`."
        )
        return
    chosen = gr.Dropdown(list(reports), value=None, label="Report", elem_id="reports-chosen")
    shown = gr.HTML(elem_id="reports-shown")

    def show(label: str | None) -> str:
        if label not in reports:
            return status.problem("There is no such report.")
        try:
            return framed(label, reports[label].read_text("utf-8", "replace"))
        except OSError as error:
            return status.problem(f"{label}: cannot be read; found {error.strerror}")

    chosen.change(show, chosen, shown, queue=False, **PRIVATE)
