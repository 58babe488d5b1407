"""The first tab: a reference, a prompt and the dial; a grid that fills beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from ipdiverse.base.bases import defaults_of
from ipdiverse.errors import IpdiverseError
from ipdiverse.ui import status
from ipdiverse.ui.inputs import MAX_SET, PRIVATE, Advanced, advanced, asked, text_inputs
from ipdiverse.ui.jobs import Job
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

    from ipdiverse.ui.installed import Installed
    from ipdiverse.ui.studio import Studio

TAB = "vary"
_SMALL = 128
"""Pictures up to this side are shown with hard pixels."""


@dataclass(frozen=True)
class _Asks:
    """What a visitor gives."""

    chosen: Picker
    prompt: gr.Textbox
    negative: gr.Textbox
    diversity: gr.Slider
    count: gr.Slider
    scale: gr.Slider
    more: Advanced
    go: gr.Button
    cancel: gr.Button

    def given(self) -> list[Any]:
        """What is drawn from, in the order in which `start` takes it."""
        texts = [self.prompt, self.negative]
        return [self.chosen.given, *texts, self.diversity, self.count, self.scale, *self.more.all()]


@dataclass(frozen=True)
class _Shows:
    """What comes back."""

    gallery: gr.Gallery
    report: gr.HTML
    results: Results


def vary_tab(studio: Studio, installed: Installed) -> None:
    """Lay the tab out and say what its buttons do."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            asks = _asks(studio, installed)
        with gr.Column(scale=3, min_width=300):
            shows = _shows(asks.chosen)
    gallery, report, results = shows.gallery, shows.report, shows.results

    def start(
        request: gr.Request,
        given: list[Given],
        prompt: str,
        negative: str,
        diversity: float,
        count: int,
        scale: float,
        *others: Any,
    ) -> Iterator[dict[Any, Any]]:
        session = studio.session(request.session_hash)
        try:
            wanted = asked(
                installed,
                given,
                prompt,
                negative,
                *others,
                diversity=diversity,
                n=count,
                scale=scale,
            )
        except IpdiverseError as error:
            yield {results.told: status.problem(str(error)), results.progress: ""}
            return
        job = new_job(studio, session, TAB, {"out": wanted}, given)
        yield {gallery: [], report: "", results.told: status.going(job), **emptied(results)}
        yield from watched(job, results, lambda: {gallery: _pictures(job)})
        yield finished(job)

    def finished(job: Job) -> dict[Any, Any]:
        sheet = job.sheets.get("out")
        shown = {gallery: _pictures(job), report: status.report(sheet) if sheet else ""}
        return shown | ended(job, results)

    def stop(request: gr.Request) -> dict[Any, Any]:
        job = studio.session(request.session_hash).jobs.get(TAB)
        return finished(job) if job is not None and settled(job) else cancelled(job, results)

    def on_base(label: str) -> float:
        return defaults_of(installed.bases[label]).scale

    asks.more.base.change(on_base, asks.more.base, asks.scale, queue=False, **PRIVATE)
    outputs = [gallery, report, *results.all()]
    options = PRIVATE | TAKES_TURNS
    options |= {"show_progress": "minimal", "show_progress_on": results.progress}
    drawing: list[Any] = [
        trigger(start, asks.given(), outputs, **options)
        for trigger in (asks.go.click, asks.prompt.submit)
    ]
    asks.cancel.click(stop, None, outputs, cancels=drawing, queue=False, **PRIVATE)


def _asks(studio: Studio, installed: Installed) -> _Asks:
    """The left column."""
    chosen = picker(studio, TAB)
    prompt, negative = text_inputs(TAB)
    diversity = gr.Slider(
        0,
        1,
        0.5,
        step=0.05,
        label="Diversity",
        info="0 is the image prompt as it is; 1 varies most.",
        buttons=[],
        elem_id="vary-diversity",
    )
    count = gr.Slider(
        1, MAX_SET, 4, step=1, label="Number of images", buttons=[], elem_id="vary-count"
    )
    with gr.Row():
        go = gr.Button("Draw", variant="primary", elem_id="vary-go")
        cancel = gr.Button("Cancel", elem_id="vary-cancel")
    with gr.Accordion("Advanced", open=False, elem_id="vary-advanced"):
        negative.render()
        scale = gr.Slider(
            0,
            2,
            defaults_of(next(iter(installed.bases.values()))).scale,
            step=0.05,
            label="Adapter scale",
            info="Weight of the reference.",
            buttons=[],
            elem_id="vary-scale",
        )
        more = advanced(installed, TAB)
    return _Asks(chosen, prompt, negative, diversity, count, scale, more, go, cancel)


def _shows(chosen: Picker) -> _Shows:
    """The right column: the reference that was chosen stands beside the images."""
    progress, told = progress_parts(TAB)
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=110):
            chosen.shown.render()
        with gr.Column(scale=4, min_width=240):
            gallery = gr.Gallery(
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
    report = gr.HTML(elem_id="vary-report")
    return _Shows(gallery, report, Results(progress, told, *recipe_parts(TAB)))


def _pictures(job: Job) -> Any:
    """The images so far, each with what it is like once that is known."""
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
    from PIL import Image

    if not files:
        return True
    with Image.open(files[0]) as image:
        return max(image.size) <= _SMALL
