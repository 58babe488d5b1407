"""What the tabs that draw share: where results go, and a job from its start to its end."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from ipdiverse.ui import status
from ipdiverse.ui.inputs import LIVE, PRIVATE
from ipdiverse.ui.jobs import Job
from ipdiverse.ui.recipes import as_commands, as_python, packed
from ipdiverse.ui.references import Given
from ipdiverse.writing import write_bytes_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ipdiverse.sampling.request import Request
    from ipdiverse.ui.studio import Session, Studio

TAKES_TURNS: dict[str, Any] = {"concurrency_id": "drawing", "concurrency_limit": 1}
_PATIENCE = 60.0
"""Seconds that cancelling waits for the denoising step that is at work."""


@dataclass(frozen=True)
class Results:
    """Where results go, as components.

    Args:
        progress: A bar.
        told: What screen readers hear.
        command: The command that repeats the result.
        python: The same in Python.
        download: The set as a zip.
    """

    progress: gr.HTML
    told: gr.HTML
    command: gr.Code
    python: gr.Code
    download: gr.DownloadButton

    def all(self) -> list[Any]:
        """Every one of them."""
        return [self.progress, self.told, self.command, self.python, self.download]


def progress_parts(tab: str) -> tuple[gr.HTML, gr.HTML]:
    """The bar, and the line that is read aloud."""
    progress = gr.HTML(elem_id=f"{tab}-progress", min_height=36)
    return progress, gr.HTML(elem_id=f"{tab}-status", elem_classes=["told"], js_on_load=LIVE)


def recipe_parts(tab: str) -> tuple[gr.Code, gr.Code, gr.DownloadButton]:
    """Buttons that copy and download, and what they copy."""
    copied = gr.HTML(elem_id=f"{tab}-copied", js_on_load=LIVE, render=False)
    with gr.Row():
        copy_command = gr.Button("Copy as command", size="sm", elem_id=f"{tab}-copy-command")
        copy_python = gr.Button("Copy as Python", size="sm", elem_id=f"{tab}-copy-python")
        download = gr.DownloadButton(
            "Download the set", size="sm", interactive=False, elem_id=f"{tab}-download"
        )
    copied.render()
    with gr.Accordion("How to repeat this", open=False, elem_id=f"{tab}-recipes"):
        gr.Markdown(
            "In a folder that holds the reference, or in the unpacked set, either draws the same "
            "images into `out`, pixel by pixel."
        )
        command = _recipe("shell", "Command", f"{tab}-command")
        python = _recipe("python", "Python", f"{tab}-python")
    copy_command.click(None, command, copied, js=_COPY, **PRIVATE)
    copy_python.click(None, python, copied, js=_COPY, **PRIVATE)
    return command, python, download


def _recipe(language: Any, label: str, elem_id: str) -> gr.Code:
    return gr.Code(
        language=language,
        label=label,
        interactive=False,
        wrap_lines=True,
        show_line_numbers=False,
        lines=1,
        elem_id=elem_id,
    )


_COPY = """async (text) => {
  if (!text) return '<p>There is nothing to copy yet.</p>';
  try { await navigator.clipboard.writeText(text); }
  catch {
    const area = document.createElement('textarea');
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand('copy');
    area.remove();
  }
  return '<p>Copied.</p>';
}"""


def new_job(
    studio: Studio,
    session: Session,
    tab: str,
    requests: Mapping[str, Request],
    given: Sequence[Given],
) -> Job:
    """Begin a job in place of the tab's last one, whose files go."""
    if (before := session.jobs.get(tab)) is not None:
        before.stop()
    shutil.rmtree(session.folder / tab, ignore_errors=True)
    folder = session.folder / tab / uuid.uuid4().hex
    job = Job(studio, requests, tuple(one.name for one in given), folder)
    session.jobs[tab] = job
    job.start()
    return job


def watched(
    job: Job, results: Results, shown: Callable[[], dict[Any, Any]]
) -> Iterator[dict[Any, Any]]:
    """What changes while a job goes on; closed, as when its visitor leaves, it stops the job."""
    images, line = -1, ""
    with closing(job.watch()) as looks:
        for _ in looks:
            update: dict[Any, Any] = {results.progress: status.bar(job)}
            if status.going(job) != line:
                line = status.going(job)
                update[results.told] = line
            if job.images != images:
                images = job.images
                update |= shown()
            yield update


def emptied(results: Results) -> dict[Any, Any]:
    """Nothing of the last job is left."""
    nothing = gr.DownloadButton(value=None, interactive=False)
    return {results.command: "", results.python: "", results.download: nothing}


def ended(job: Job, results: Results) -> dict[Any, Any]:
    """The status and the recipes of a job that has ended."""
    update = {results.progress: "", results.told: status.ended(job)}
    if not job.sheets:
        return update | emptied(results)
    requests = {inside: sheet.request for inside, sheet in job.sheets.items()}
    first = next(iter(requests.values()))
    stem = f"ipdiverse-{_slug(first.prompt[0]) or 'set'}-seed-{first.seed}"
    sources = next(iter(job.requests.values())).image
    files = dict(zip(job.names, map(Path, sources), strict=True))
    archive = job.folder / f"{stem}.zip"
    write_bytes_atomic(archive, packed(job.folder, files, requests, stem))
    return update | {
        results.command: as_commands(requests),
        results.python: as_python(requests),
        results.download: gr.DownloadButton(value=str(archive), interactive=True),
    }


def settled(job: Job) -> bool:
    """Stop a job; whether it has ended, after the step that was at work."""
    job.stop()
    return job.wait(_PATIENCE)


def cancelled(job: Job | None, results: Results) -> dict[Any, Any]:
    """What is said of a job that was cancelled before it began, or none at all."""
    if job is not None:  # it is still at work on its step, and will say so itself
        return {}
    return {results.progress: "", results.told: status.line("Cancelled; nothing was drawn.")}


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:40].strip("-")
