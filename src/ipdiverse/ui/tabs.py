"""The two tabs that draw.

Vary: a reference, a prompt and the dial; images appear as they finish. Grid: diversity × scale for
one reference, the same noise in every cell.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import gradio as gr
from gradio.processing_utils import save_file_to_cache
from PIL import Image

from ipdiverse.base.bases import defaults_of
from ipdiverse.errors import ArgumentError
from ipdiverse.ui.inputs import (
    MAX_SET,
    advanced,
    models,
    remembered,
    request_from,
    seeds,
    slider,
    text_inputs,
)
from ipdiverse.ui.results import (
    Drawn,
    Results,
    archive_of,
    draw_on,
    first_of,
    progress_parts,
    recipe_parts,
)
from ipdiverse.ui.status import PRIVATE, report
from ipdiverse.ui.uploads import choose, picker, reading, scenes_picker, shown_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ipdiverse.sampling.request import Request
    from ipdiverse.ui import Installed
    from ipdiverse.ui.queue import Job
    from ipdiverse.ui.visitors import Session, Sessions

DIVERSITIES = (0.0, 0.25, 0.5, 0.75, 1.0)
SCALES = (0.25, 0.5, 0.75, 1.0, 1.25)
_SMALL = 128
"""Pictures up to this side are shown with hard pixels."""


def vary_tab(sessions: Sessions, installed: Installed) -> gr.Textbox:
    """Lay the first tab out and say what its buttons do; its prompt."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            model = models(installed, "vary")
            references, named, uploaded, take = picker(sessions, "vary")
            prompt, negative = text_inputs("vary")
            info = "0 follows the reference as plain IP-Adapter does; 1 varies most."
            diversity = slider("vary-diversity", "Diversity", (0, 1, 0.05), 0.5, info)
            count = slider("vary-count", "Number of images", (1, MAX_SET, 1), 4)
            seed = seeds("vary")
            with gr.Row():
                draw = gr.Button("Draw", variant="primary", elem_id="vary-go")
                cancel = gr.Button("Cancel", elem_id="vary-cancel")
            with gr.Accordion("Advanced", open=False, elem_id="vary-advanced"):
                negative.render()
                usual = defaults_of(next(iter(installed.bases.values()))).scale
                info = "How strongly the images follow the reference."
                scale = slider("vary-scale", "Adapter scale", (0, 2, 0.05), usual, info)
                more = advanced(installed, "vary", seed, model)
            with gr.Accordion("Scenes of your own", open=False, elem_id="vary-own-scenes"):
                scenes_picker(sessions)
        with gr.Column(scale=3, min_width=300):
            progress, told = progress_parts("vary")
            made = _made(references)
            results = Results(progress, told, *recipe_parts("vary"))

    def requests_of(session: Session, *values: Any) -> dict[str, Request]:
        prompt, negative, diversity, n, scale, *others = values
        own: dict[str, Any] = {"diversity": diversity, "n": n, "scale": scale}
        for one in session.chosen.get("scenes", []):
            own["scenes"] = one.file
        given = session.chosen.get("vary", [])
        return {"out": request_from(installed, given, prompt, negative, *others, **own)}

    def on_base(label: str) -> float:
        return defaults_of(installed.bases[label]).scale

    more.base.input(on_base, more.base, scale, queue=False, **PRIVATE)
    fields = [prompt, negative, diversity, count, scale, *more]
    remembered(sessions, installed, "vary", fields, more, [references, named])
    made.say_what_happens(sessions, [references, named, uploaded], take)
    drawn = Drawn("vary", sessions, results, more.seed, requests_of, made.shown)
    again = (made.again.click, made.other)
    draw_on(drawn, [draw.click, prompt.submit], cancel, fields, made.all(), again)
    return prompt


class Made(NamedTuple):
    """What the first tab has drawn, and what can be done with it, as components."""

    other: gr.Slider
    again: gr.Button
    gallery: gr.Gallery
    beside: gr.Column
    compared: gr.Gallery
    actions: gr.Column
    reference: gr.Button
    star: gr.Button
    starred: gr.DownloadButton
    described: gr.HTML
    earlier: gr.Gallery

    def all(self) -> list[Any]:
        """Every one that changes with a drawing."""
        return list(self[2:])

    def shown(self, session: Session) -> dict[Any, Any]:
        """All of it, as it is now."""
        job = session.jobs.get("vary")
        if job is None:
            return {}
        sheet = job.sheets.get("out")
        return {
            self.gallery: _pictures(job, "vary-images"),
            self.beside: gr.Column(visible=job.beside is not None),
            self.compared: _pictures(job.beside or job, "vary-compared"),
            self.actions: gr.Column(visible=sheet is not None),
            self.described: report(sheet) if sheet else "",
            self.earlier: _strip(session.earlier),
            **self._choice(job),
        }

    def say_what_happens(
        self, sessions: Sessions, references: list[Any], take: Callable[..., tuple[Any, Any]]
    ) -> None:
        """When an image, an earlier set or a button is clicked."""

        def choose(request: gr.Request, event: gr.SelectData) -> Any:
            job = _last(sessions.asking(request))
            if job is None:
                return gr.skip()
            job.chosen = event.index % job.images
            return self._choice(job)

        def mark(request: gr.Request) -> Any:
            job = _last(sessions.asking(request))
            if job is None:
                return gr.skip()
            if job.chosen is not None:
                job.starred ^= {job.chosen}
            return {**self._choice(job), self.gallery: _pictures(job, "vary-images")}

        buttons = [self.reference, self.star, self.starred]
        self.gallery.select(choose, None, buttons, queue=False, **PRIVATE)
        self.star.click(mark, None, [*buttons, self.gallery], queue=False, **PRIVATE)
        self._say_what_else(sessions, references, take)

    def _say_what_else(
        self, sessions: Sessions, references: list[Any], take: Callable[..., tuple[Any, Any]]
    ) -> None:
        """When an image becomes the reference, and when an earlier set is put beside this one."""

        def use(request: gr.Request) -> Any:
            job = _last(sessions.asking(request))
            if job is None:
                return gr.skip()
            file = job.files["out"][job.chosen or 0]
            name = f"seed-{job.sheets['out'].request.seed}-image-{(job.chosen or 0) + 1}.png"
            return *take([(name, file)], sessions.asking(request)), None

        def compare(request: gr.Request, event: gr.SelectData) -> Any:
            session = sessions.asking(request)
            job = _last(session)
            if job is None:
                return gr.skip()
            if session.earlier:
                job.beside = session.earlier[event.index % len(session.earlier)]
            return self.shown(session)

        self.reference.click(use, None, references, queue=False, **PRIVATE)
        self.earlier.select(compare, None, self.all(), queue=False, **PRIVATE)

    def _choice(self, job: Job) -> dict[Any, Any]:
        """Buttons that say which image they are about."""
        number, stars = job.chosen, job.starred
        which = "an image" if number is None else f"image {number + 1}"
        chosen = number is not None
        verb = "Unstar" if number in stars else "Star"
        archive = archive_of(job, stars) if stars and job.sheets else None
        label = f"Download the {len(stars)} starred" if stars else "Download the starred"
        return {
            self.reference: gr.Button(f"Use {which} as reference", interactive=chosen),
            self.star: gr.Button(f"{verb} {which}", interactive=chosen),
            self.starred: gr.DownloadButton(label, value=archive, interactive=bool(stars)),
        }


def _made(references: gr.Gallery) -> Made:
    """Lay out the images next to their references, and what can be done with them."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=110):
            references.render()
        with gr.Column(scale=4, min_width=240, visible=False) as beside:
            compared = _gallery("vary-compared")
        with gr.Column(scale=4, min_width=240):
            gallery = _gallery("vary-images")
    with gr.Column(visible=False) as actions:
        with gr.Row():
            reference = gr.Button(size="sm", min_width=120, elem_id="vary-use")
            star = gr.Button(size="sm", min_width=120, elem_id="vary-star")
            starred = gr.DownloadButton(size="sm", min_width=120, elem_id="vary-starred")
        with gr.Row(equal_height=True):
            other = slider("vary-other", "The same seeds at diversity", (0, 1, 0.05), 0.8)
            again = gr.Button("Draw them beside these", elem_id="vary-again")
    described = gr.HTML(elem_id="vary-report")
    earlier = _gallery("vary-earlier", ["small-pictures"], visible=False, allow_preview=False)
    return Made(
        *(other, again, gallery, beside, compared, actions, reference, star, starred),
        *(described, earlier),
    )


def _gallery(elem_id: str, look: Sequence[str] = ("images",), **others: Any) -> gr.Gallery:
    options: dict[str, Any] = {"format": "png", "interactive": False, "object_fit": "contain"}
    options |= {"columns": 4, "height": "auto", "buttons": ["download", "fullscreen"]}
    named = {"label": "Images", "elem_id": elem_id, "elem_classes": list(look)}
    return gr.Gallery(**options | named | others)


def _last(session: Session) -> Job | None:
    """A visitor's last job with images; None for a program that clicks what the page hides."""
    job = session.jobs.get("vary")
    return job if job is not None and job.sheets else None


def _pictures(job: Job, elem_id: str) -> Any:
    """The images so far, and previews; once they are compared, each with how close it is."""
    files = [file for found in job.files.values() for file in found]
    sheet = next(iter(job.sheets.values()), None)
    seen = None if sheet is None else sheet.closeness
    captions = [
        f"{number + 1}{' ★' if number in job.starred else ''}: {seen.words(number)}"
        if seen
        else f"image {number + 1}"
        for number in range(len(files))
    ]
    pictures: list[Any] = list(zip(map(str, files), captions, strict=True))
    for number, preview in enumerate(job.previews, len(files) + 1):
        pictures.append((preview, f"{number}: being drawn"))
    look = ["images", "pixels"] if _are_small(files) else ["images"]
    return gr.Gallery(value=pictures, label=_title(job), elem_classes=look, elem_id=elem_id)


def _title(job: Job) -> str:
    """As `Diversity 0.5, seed 12`."""
    first = first_of(job)
    return f"Diversity {first.diversity or 0:g}, seed {first.seed}"


def _strip(earlier: Sequence[Job]) -> gr.Gallery:
    pictures = [(str(next(iter(job.files.values()))[0]), _title(job)) for job in earlier]
    label = "Earlier sets of this visit: click one to see it beside the last"
    return gr.Gallery(value=pictures, label=label, visible=bool(pictures))


def _are_small(files: Sequence[Path]) -> bool:
    if not files:
        return True
    with Image.open(files[0]) as image:
        return max(image.size) <= _SMALL


def grid_tab(sessions: Sessions, installed: Installed, opened: gr.Tab, theirs: gr.Textbox) -> None:
    """Lay the second tab out and say what its buttons do; `theirs` is the first tab's prompt."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=300):
            model = models(installed, "grid")
            over = gr.Button("Take over reference and prompt", size="sm", elem_id="grid-over")
            references, named, uploaded, _ = picker(sessions, "grid")
            prompt, negative = text_inputs("grid")
            diversities = _choice("Diversity, across", "diversities", DIVERSITIES, (0, 0.5, 1))
            scales = _choice("Adapter scale, down", "scales", SCALES, (0.5, 1))
            seed = seeds("grid")
            with gr.Row():
                draw = gr.Button("Draw the grid", variant="primary", elem_id="grid-go")
                cancel = gr.Button("Cancel", elem_id="grid-cancel")
            with gr.Accordion("Advanced", open=False):
                negative.render()
                more = advanced(installed, "grid", seed, model)
        with gr.Column(scale=3, min_width=300):
            progress, told = progress_parts("grid")
            with gr.Row(equal_height=False):
                with gr.Column(scale=1, min_width=110):
                    references.render()
                with gr.Column(scale=4, min_width=240):
                    table = gr.HTML(elem_id="grid-table")
            results = Results(progress, told, *recipe_parts("grid"))

    def take_over(request: gr.Request, prompt: str) -> Any:
        session = sessions.asking(request)
        with reading(session.visitor):
            choose(session, "grid", list(session.chosen.get("vary", [])))
        return *shown_of(session.chosen["grid"]), None, prompt

    def on_opened(request: gr.Request, prompt: str, own: str) -> Any:
        if sessions.asking(request).chosen.get("grid"):
            return gr.skip()
        return take_over(request, own or prompt)

    taken = [references, named, uploaded, prompt]
    over.click(take_over, theirs, taken, queue=False, **PRIVATE)
    opened.select(on_opened, [theirs, prompt], taken, queue=False, **PRIVATE)

    def requests_of(session: Session, *values: Any) -> dict[str, Request]:
        prompt, negative, across, down, *others = values
        given = session.chosen.get("grid", [])
        one = request_from(installed, given, prompt, negative, *others, n=1)  # of one seed for all
        rows, columns = _numbers("scale", down, SCALES), _numbers("diversity", across, DIVERSITIES)
        return cells(columns, rows, one)

    fields = [prompt, negative, diversities, scales, *more]
    remembered(sessions, installed, "grid", fields, more, [references, named])

    def shown(session: Session) -> dict[Any, Any]:
        return {table: as_table(session.jobs["grid"], table.GRADIO_CACHE)}

    drawn = Drawn("grid", sessions, results, more.seed, requests_of, shown)
    draw_on(drawn, [draw.click], cancel, fields, [table])


def _choice(
    label: str, name: str, offered: Sequence[float], ticked: Sequence[float]
) -> gr.CheckboxGroup:
    return gr.CheckboxGroup(
        [f"{value:g}" for value in offered],
        value=[f"{value:g}" for value in ticked],
        label=label,
        elem_id=f"grid-{name}",
    )


def cells(across: Sequence[float], down: Sequence[float], one: Request) -> dict[str, Request]:
    """A request for each diversity and scale, row by row, by the folder of its image."""
    return {
        f"out/diversity-{dial:g}-scale-{scale:g}": replace(one, diversity=dial, scale=scale)
        for scale in down
        for dial in across
    }


def as_table(job: Job, cache: str) -> str:
    """A table with a heading for each row and column; cells are empty until they are drawn.

    Args:
        job: Whose requests are the cells.
        cache: Folder from which gradio serves files.
    """
    requests = list(job.requests.items())
    across = list(dict.fromkeys(request.diversity for _, request in requests))
    down = list(dict.fromkeys(request.scale for _, request in requests))
    heads = "".join(f'<th scope="col">{value:g}</th>' for value in across)
    drawn = {inside: _cell(job, inside, cache) for inside, _ in requests if job.files.get(inside)}
    rows = ""
    for scale in down:
        row = [inside for inside, one in requests if one.scale == scale]
        shown = "".join(f"<td>{drawn[one][0] if one in drawn else ''}</td>" for one in row)
        rows += f'<tr><th scope="row">{scale:g}</th>{shown}</tr>'
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="grid of diversity and scale">'
        "<table><caption>Diversity across, adapter scale down; the same noise in every cell. Press "
        f'an image to see it large.</caption><tr><th scope="col">scale</th>{heads}</tr>{rows}'
        f"</table></div>{''.join(large for _, large in drawn.values())}"
    )


def _cell(job: Job, inside: str, cache: str) -> tuple[str, str]:
    """What stands in a cell, and what it opens: the image large, to look at and to save."""
    request, sheet, name = job.requests[inside], job.sheets.get(inside), Path(inside).name
    named = job.folder / f"{name}.png"  # a browser saves it under the name that gradio's header has
    if not named.exists():
        shutil.copyfile(job.files[inside][0], named)
    file = quote(save_file_to_cache(named, cache))
    words = f"diversity {request.diversity:g}, scale {request.scale:g}"
    said = sheet.closeness.words(0) if sheet is not None and sheet.closeness is not None else ""
    alt = escape(f"{words}: {said}" if said else words)
    look = "pixels" if _are_small(job.files[inside]) else ""
    image = f'<img src="gradio_api/file={file}" alt="{alt}">'
    target = f'popovertarget="{name}"'
    return (
        f'<button type="button" {target}>{image}</button><small>{escape(said)}</small>',
        f'<div popover id="{name}" class="large {look}">{image}<p>{alt}</p>'
        f'<p><a href="gradio_api/file={file}" download>Save this image</a> '
        f'<button type="button" {target} popovertargetaction="hide">Close</button></p></div>',
    )


def _numbers(name: str, chosen: Sequence[str], offered: Sequence[float]) -> list[float]:
    """The ticked values, in the order in which they are offered."""
    found = [value for value in offered if f"{value:g}" in (chosen or ())]
    if not found:
        raise ArgumentError("nothing is chosen", where=name, fix="Tick one or more.")
    return found
