"""The second tab: diversity × scale for one reference, the same noise in every cell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from ipdiverse.errors import ArgumentError, IpdiverseError
from ipdiverse.evaluation.report import inline
from ipdiverse.ui import status
from ipdiverse.ui.inputs import PRIVATE, Advanced, advanced, asked, text_inputs
from ipdiverse.ui.references import Given, Picker, picker
from ipdiverse.ui.results import (
    TAKES_TURNS,
    Results,
    cancelled,
    emptied,
    ended,
    new_job,
    progress_parts,
    recipe_parts,
    settled,
    watched,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ipdiverse.sampling.request import Request
    from ipdiverse.ui.installed import Installed
    from ipdiverse.ui.jobs import Job
    from ipdiverse.ui.studio import Studio

TAB = "grid"
DIVERSITIES = (0.0, 0.25, 0.5, 0.75, 1.0)
SCALES = (0.25, 0.5, 0.75, 1.0, 1.25)
_SIDE = 256


@dataclass(frozen=True)
class _Asks:
    """What a visitor gives."""

    chosen: Picker
    prompt: gr.Textbox
    negative: gr.Textbox
    diversities: gr.CheckboxGroup
    scales: gr.CheckboxGroup
    more: Advanced
    go: gr.Button
    cancel: gr.Button

    def given(self) -> list[Any]:
        """What is drawn from, in the order in which `start` takes it."""
        texts = [self.prompt, self.negative]
        return [self.chosen.given, *texts, self.diversities, self.scales, *self.more.all()]


def grid_tab(studio: Studio, installed: Installed) -> None:
    """Lay the tab out and say what its buttons do."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            asks = _asks(studio, installed)
        with gr.Column(scale=3, min_width=300):
            table, results = _shows(asks.chosen)

    def start(
        request: gr.Request,
        given: list[Given],
        prompt: str,
        negative: str,
        diversities: list[str],
        scales: list[str],
        *others: Any,
    ) -> Iterator[dict[Any, Any]]:
        session = studio.session(request.session_hash)
        try:
            requests = cells(
                _numbers("diversity", diversities, DIVERSITIES),
                _numbers("scale", scales, SCALES),
                lambda **cell: asked(installed, given, prompt, negative, *others, n=1, **cell),
            )
        except IpdiverseError as error:
            yield {results.told: status.problem(str(error)), results.progress: ""}
            return
        job = new_job(studio, session, TAB, requests, given)
        yield {table: "", results.told: status.going(job), **emptied(results)}
        yield from watched(job, results, lambda: {table: as_table(job)})
        yield {table: as_table(job), **ended(job, results)}

    def stop(request: gr.Request) -> dict[Any, Any]:
        job = studio.session(request.session_hash).jobs.get(TAB)
        if job is None or not settled(job):
            return cancelled(job, results)
        return {table: as_table(job), **ended(job, results)}

    outputs = [table, *results.all()]
    options = PRIVATE | TAKES_TURNS
    options |= {"show_progress": "minimal", "show_progress_on": results.progress}
    drawing = asks.go.click(start, asks.given(), outputs, **options)
    asks.cancel.click(stop, None, outputs, cancels=[drawing], queue=False, **PRIVATE)


def _asks(studio: Studio, installed: Installed) -> _Asks:
    """The left column."""
    chosen = picker(studio, TAB)
    prompt, negative = text_inputs(TAB)
    diversities = gr.CheckboxGroup(
        [f"{value:g}" for value in DIVERSITIES],
        value=["0", "0.5", "1"],
        label="Diversity, across",
        elem_id="grid-diversities",
    )
    scales = gr.CheckboxGroup(
        [f"{value:g}" for value in SCALES],
        value=["0.5", "1"],
        label="Adapter scale, down",
        elem_id="grid-scales",
    )
    with gr.Row():
        go = gr.Button("Draw the grid", variant="primary", elem_id="grid-go")
        cancel = gr.Button("Cancel", elem_id="grid-cancel")
    with gr.Accordion("Advanced", open=False):
        negative.render()
        more = advanced(installed, TAB)
    return _Asks(chosen, prompt, negative, diversities, scales, more, go, cancel)


def _shows(chosen: Picker) -> tuple[gr.HTML, Results]:
    """The right column: the reference that was chosen stands beside the table."""
    progress, told = progress_parts(TAB)
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=110):
            chosen.shown.render()
        with gr.Column(scale=4, min_width=240):
            table = gr.HTML(elem_id="grid-table")
    return table, Results(progress, told, *recipe_parts(TAB))


def cells(diversities: Sequence[float], scales: Sequence[float], ask: Any) -> dict[str, Request]:
    """A request for each cell, row by row, by the folder of its image.

    Args:
        diversities: Across.
        scales: Down.
        ask: Makes a request of `diversity` and `scale`.
    """
    return {
        f"out/diversity-{diversity:g}-scale-{scale:g}": ask(diversity=diversity, scale=scale)
        for scale in scales
        for diversity in diversities
    }


def as_table(job: Job) -> str:
    """A table with a heading for each row and column; what is not drawn yet is empty."""
    requests = list(job.requests.items())
    across = list(dict.fromkeys(request.diversity for _, request in requests))
    down = list(dict.fromkeys(request.scale for _, request in requests))
    heads = "".join(f'<th scope="col">{value:g}</th>' for value in across)
    rows = ""
    for scale in down:
        row = "".join(_cell(job, inside) for inside, one in requests if one.scale == scale)
        rows += f'<tr><th scope="row">{scale:g}</th>{row}</tr>'
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="grid of diversity and scale">'
        "<table><caption>Diversity across, adapter scale down; the same noise in every cell"
        f'</caption><tr><th scope="col">scale</th>{heads}</tr>{rows}</table></div>'
    )


def _cell(job: Job, inside: str) -> str:
    files = job.files.get(inside)
    if not files:
        return "<td></td>"
    request, sheet = job.requests[inside], job.sheets.get(inside)
    words = f"diversity {request.diversity:g}, scale {request.scale:g}"
    said = sheet.closeness.words(0) if sheet is not None and sheet.closeness is not None else ""
    alt = escape(f"{words}: {said}" if said else words)
    return f'<td><img src="{_thumbnail(files[0])}" alt="{alt}"><small>{escape(said)}</small></td>'


def _thumbnail(file: Path) -> str:
    with Image.open(file) as image:
        small = image.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    return inline(small)


def _numbers(name: str, chosen: Sequence[str], offered: Sequence[float]) -> list[float]:
    """What was ticked, in the order in which it is offered."""
    found = [value for value in offered if f"{value:g}" in (chosen or ())]
    if not found:
        raise ArgumentError("nothing is chosen", where=name, fix="Tick one or more.")
    return found
