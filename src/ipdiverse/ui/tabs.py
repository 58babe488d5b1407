"""The two tabs that draw.

Vary: a reference, a prompt and the dial; images appear as they finish. Grid: diversity × scale for
one reference, the same noise in every cell.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import gradio as gr
from PIL import Image

from ipdiverse.base.bases import defaults_of
from ipdiverse.errors import ArgumentError
from ipdiverse.evaluation.report import inline
from ipdiverse.ui.inputs import MAX_SET, advanced, remembered, request_from, text_inputs
from ipdiverse.ui.results import Results, draw_on, progress_parts, recipe_parts
from ipdiverse.ui.status import PRIVATE, report
from ipdiverse.ui.uploads import picker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ipdiverse.sampling.request import Request
    from ipdiverse.ui import Installed
    from ipdiverse.ui.queue import Job
    from ipdiverse.ui.visitors import Sessions

_Component = TypeVar("_Component")

DIVERSITIES = (0.0, 0.25, 0.5, 0.75, 1.0)
SCALES = (0.25, 0.5, 0.75, 1.0, 1.25)
_CELL_SIDE = 256
"""Pixels of a picture in the grid: it is inlined into the table."""
_SMALL = 128
"""Pictures up to this side are shown with hard pixels."""


def vary_tab(sessions: Sessions, installed: Installed) -> None:
    """Lay the first tab out and say what its buttons do."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            references, named = picker(sessions, "vary")
            prompt, negative = text_inputs("vary")
            diversity, count = _sliders()
            with gr.Row():
                draw = gr.Button("Draw", variant="primary", elem_id="vary-go")
                cancel = gr.Button("Cancel", elem_id="vary-cancel")
            with gr.Accordion("Advanced", open=False, elem_id="vary-advanced"):
                negative.render()
                scale = _scale(defaults_of(next(iter(installed.bases.values()))).scale)
                more = advanced(installed, "vary")
        with gr.Column(scale=3, min_width=300):
            progress, told = progress_parts("vary")
            gallery = _next_to(references, _gallery)
            described = gr.HTML(elem_id="vary-report")
            results = Results(progress, told, *recipe_parts("vary"))

    def requests_of(
        given: Any, prompt: str, negative: str, diversity: float, n: int, scale: float, *others: Any
    ) -> dict[str, Request]:
        own: dict[str, Any] = {"diversity": diversity, "n": n, "scale": scale}
        return {"out": request_from(installed, given, prompt, negative, *others, **own)}

    def shown(job: Job | None) -> dict[Any, Any]:
        if job is None:
            return {gallery: [], described: ""}
        sheet = job.sheets.get("out")
        return {gallery: _pictures(job), described: report(sheet) if sheet else ""}

    def on_base(label: str) -> float:
        return defaults_of(installed.bases[label]).scale

    more.base.input(on_base, more.base, scale, queue=False, **PRIVATE)
    fields = [prompt, negative, diversity, count, scale, *more.all()]
    remembered(sessions, installed, "vary", fields, more, [references, named])
    draw_on(
        [draw.click, prompt.submit],
        cancel,
        fields,
        [gallery, described],
        results,
        tab="vary",
        sessions=sessions,
        requests_of=requests_of,
        shown=shown,
    )


def _next_to(references: gr.Gallery, result: Callable[[], _Component]) -> _Component:
    """The chosen references, and a result to their right."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=110):
            references.render()
        with gr.Column(scale=4, min_width=240):
            return result()


def _sliders() -> tuple[gr.Slider, gr.Slider]:
    diversity = gr.Slider(
        0,
        1,
        0.5,
        step=0.05,
        label="Diversity",
        info="0 follows the reference as plain IP-Adapter does; 1 varies most.",
        buttons=[],
        elem_id="vary-diversity",
    )
    count = gr.Slider(
        1, MAX_SET, 4, step=1, label="Number of images", buttons=[], elem_id="vary-count"
    )
    return diversity, count


def _scale(usual: float) -> gr.Slider:
    return gr.Slider(
        0,
        2,
        usual,
        step=0.05,
        label="Adapter scale",
        info="How strongly the images follow the reference.",
        buttons=[],
        elem_id="vary-scale",
    )


def _gallery() -> gr.Gallery:
    return gr.Gallery(
        label="Images",
        columns=4,
        format="png",
        interactive=False,
        object_fit="contain",
        height="auto",
        buttons=["download", "fullscreen"],
        elem_id="vary-images",
        elem_classes=["images"],
    )


def _pictures(job: Job) -> Any:
    """The images so far; once they are compared, each with how close it is."""
    files = [file for found in job.files.values() for file in found]
    sheet = next(iter(job.sheets.values()), None)
    seen = None if sheet is None else sheet.closeness
    captions = [
        f"{number + 1}: {seen.words(number)}" if seen else f"image {number + 1}"
        for number in range(len(files))
    ]
    pictures = list(zip(map(str, files), captions, strict=True))
    return gr.Gallery(
        value=pictures, elem_classes=["images", "pixels"] if _are_small(files) else ["images"]
    )


def _are_small(files: Sequence[Path]) -> bool:
    if not files:
        return True
    with Image.open(files[0]) as image:
        return max(image.size) <= _SMALL


def grid_tab(sessions: Sessions, installed: Installed) -> None:
    """Lay the second tab out and say what its buttons do."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            references, named = picker(sessions, "grid")
            prompt, negative = text_inputs("grid")
            diversities = _choice("Diversity, across", "diversities", DIVERSITIES, (0, 0.5, 1))
            scales = _choice("Adapter scale, down", "scales", SCALES, (0.5, 1))
            with gr.Row():
                draw = gr.Button("Draw the grid", variant="primary", elem_id="grid-go")
                cancel = gr.Button("Cancel", elem_id="grid-cancel")
            with gr.Accordion("Advanced", open=False):
                negative.render()
                more = advanced(installed, "grid")
        with gr.Column(scale=3, min_width=300):
            progress, told = progress_parts("grid")
            table = _next_to(references, lambda: gr.HTML(elem_id="grid-table"))
            results = Results(progress, told, *recipe_parts("grid"))

    def requests_of(
        given: Any, prompt: str, negative: str, across: list[str], down: list[str], *others: Any
    ) -> dict[str, Request]:
        return cells(
            _numbers("diversity", across, DIVERSITIES),
            _numbers("scale", down, SCALES),
            lambda **cell: request_from(installed, given, prompt, negative, *others, n=1, **cell),
        )

    fields = [prompt, negative, diversities, scales, *more.all()]
    remembered(sessions, installed, "grid", fields, more, [references, named])
    draw_on(
        [draw.click],
        cancel,
        fields,
        [table],
        results,
        tab="grid",
        sessions=sessions,
        requests_of=requests_of,
        shown=lambda job: {table: "" if job is None else as_table(job)},
    )


def _choice(
    label: str, name: str, offered: Sequence[float], ticked: Sequence[float]
) -> gr.CheckboxGroup:
    return gr.CheckboxGroup(
        [f"{value:g}" for value in offered],
        value=[f"{value:g}" for value in ticked],
        label=label,
        elem_id=f"grid-{name}",
    )


def cells(diversities: Sequence[float], scales: Sequence[float], ask: Any) -> dict[str, Request]:
    """A request for each cell, row by row, by the folder of its image."""
    return {
        f"out/diversity-{diversity:g}-scale-{scale:g}": ask(diversity=diversity, scale=scale)
        for scale in scales
        for diversity in diversities
    }


def as_table(job: Job) -> str:
    """A table with a heading for each row and column; cells are empty until they are drawn."""
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
    small.thumbnail((_CELL_SIDE, _CELL_SIDE))
    return inline(small)


def _numbers(name: str, chosen: Sequence[str], offered: Sequence[float]) -> list[float]:
    """The ticked values, in the order in which they are offered."""
    found = [value for value in offered if f"{value:g}" in (chosen or ())]
    if not found:
        raise ArgumentError("nothing is chosen", where=name, fix="Tick one or more.")
    return found
