"""The page as a whole: its three tabs, their look, and the tab of reports."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from ipdiverse.evaluation import report
from ipdiverse.ui.status import PRIVATE, answered, problem, script
from ipdiverse.ui.tabs import grid_tab, vary_tab
from ipdiverse.ui.visitors import visitor_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ipdiverse.ui import Installed
    from ipdiverse.ui.visitors import Sessions

TITLE = "ipdiverse"
CACHE_SECONDS = (600, 3600)
"""How often gradio's cache is looked through, and the age at which a file in it is deleted."""

MAX_EVENTS = 200
"""Drawings that gradio has accepted and not yet begun; `Turns` has its own line after that."""
MAX_REPORTS = 200
MAX_BYTES = 64 * 2**20
_NAME = "report.html"
_MARK = f"<h1>{report.TITLE}</h1>"
_HEAD_BYTES = 4096
_NO_REPORTS = "None found. `ipdiverse evaluate --quick` writes one; --reports names other folders."


def build(sessions: Sessions, installed: Installed, reports: Sequence[Path]) -> gr.Blocks:
    """The page."""
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, delete_cache=CACHE_SECONDS, fill_width=True
    ) as page:
        gr.Markdown("# ipdiverse\nImage prompts with variety, without losing what you asked for.")
        with gr.Tab("Vary", elem_id="tab-vary"):
            prompt = vary_tab(sessions, installed)
        with gr.Tab("Grid", elem_id="tab-grid") as opened:
            grid_tab(sessions, installed, opened, prompt)
        with gr.Tab("Reports", elem_id="tab-reports") as opened:
            _reports_tab(opened, reports)

        def leave(request: gr.Request) -> None:
            sessions.leave(request.session_hash, visitor_of(request))

        page.unload(leave)
    for event in page.fns.values():
        event.fn = event.fn and answered(event.fn)
    return page.queue(max_size=MAX_EVENTS, default_concurrency_limit=1, api_open=False)


def look() -> dict[str, Any]:
    """Theme, style and language of the page, as `launch` takes them."""
    orange = gr.themes.colors.orange
    theme = gr.themes.Default(
        primary_hue=orange,
        neutral_hue=gr.themes.colors.slate,
        # gradio's own fonts come from Google's servers, which would learn of every visit
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        # the hue's own shade has too little contrast with white text
        button_primary_background_fill="#c2410c",
        button_primary_background_fill_hover="#9a3412",
        button_primary_background_fill_dark="#c2410c",
        button_primary_text_color="#ffffff",
        slider_color="#c2410c",
    )
    style = (Path(__file__).parent / "style.css").read_text("utf-8")
    return {"theme": theme, "css": style, "js": script("spoken")}


def find_reports(folders: Sequence[Path]) -> dict[str, Path]:
    """Reports that `ipdiverse evaluate` wrote, by the label that a visitor reads.

    Links that lead out of a folder are left alone.
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


def _reports_tab(opened: gr.Tab, folders: Sequence[Path]) -> None:
    chosen = gr.Dropdown(
        [], value=None, label="Report", elem_id="reports-chosen", info="Of `ipdiverse evaluate`."
    )
    shown = gr.HTML(elem_id="reports-shown")

    def look_again() -> Any:
        found = list(find_reports(folders))
        said = f"{len(found)} found." if found else _NO_REPORTS
        return gr.Dropdown(choices=found, info=said)

    def show(label: str | None) -> str:
        if not label:
            return ""
        file = find_reports(folders).get(label)
        if file is None:
            return problem("There is no such report.")
        try:
            return framed(label, file.read_text("utf-8", "replace"))
        except OSError as error:
            return problem(f"{label}: cannot be read; found {error.strerror}")

    opened.select(look_again, None, chosen, queue=False, **PRIVATE)
    chosen.change(show, chosen, shown, queue=False, **PRIVATE)
