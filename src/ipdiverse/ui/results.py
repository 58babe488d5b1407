"""What the drawing tabs share: a job from its start to its end, its status, and what it leaves."""

from __future__ import annotations

import io
import re
import shutil
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from ipdiverse.errors import ArgumentError, IpdiverseError
from ipdiverse.ui import status
from ipdiverse.ui.queue import SCENES, Job
from ipdiverse.ui.status import LIVE, PRIVATE, on_load, script
from ipdiverse.writing import write_bytes_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from ipdiverse.sampling.request import Request
    from ipdiverse.ui.visitors import Session, Sessions

_PATIENCE = 60.0
"""Seconds that cancelling waits for the running denoising step."""
_EARLIER = 8
"""Sets of a visit that are kept besides the last one."""


class Results(NamedTuple):
    """Components that both tabs fill; screen readers hear `told`."""

    progress: gr.HTML
    told: gr.HTML
    command: gr.Code
    python: gr.Code
    download: gr.DownloadButton

    def emptied(self) -> dict[Any, Any]:
        """Nothing of the last job is left."""
        nothing = gr.DownloadButton(value=None, interactive=False)
        return {self.command: "", self.python: "", self.download: nothing}


def progress_parts(tab: str) -> tuple[gr.HTML, gr.HTML]:
    """The bar, and the line that is read aloud."""
    progress = gr.HTML(elem_id=f"{tab}-progress", min_height=36)
    return progress, gr.HTML(elem_id=f"{tab}-status", elem_classes=["told"], js_on_load=LIVE)


def recipe_parts(tab: str) -> tuple[gr.Code, gr.Code, gr.DownloadButton]:
    """Buttons that copy and download, and the recipes that they copy."""
    # rendered below the buttons, but needed above: their events name it
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
            "Run either one in a folder that holds the reference, or in the unpacked set: it draws "
            "the same images into `out`, pixel by pixel."
        )
        command = _recipe("shell", "Command", f"{tab}-command")
        python = _recipe("python", "Python", f"{tab}-python")
    copy_command.click(None, command, copied, js=script("copied"), **PRIVATE)
    copy_python.click(None, python, copied, js=script("copied"), **PRIVATE)
    return command, python, download


def _recipe(language: Any, label: str, elem_id: str) -> gr.Code:
    options: dict[str, Any] = {"interactive": False, "wrap_lines": True, "lines": 1}
    options |= {"show_line_numbers": False, "label": label, "elem_id": elem_id}
    return gr.Code(language=language, **options)


@dataclass(frozen=True)
class Drawn:
    """How one tab draws: its handlers, of which each answers with what changes on the page.

    Args:
        tab: Its name.
        sessions: Its visitors'.
        results: Components that this fills.
        seed: Shows the seed that was drawn.
        requests_of: Makes requests of a session and the values of the tab's inputs.
        shown: What else there is to see, as it is now.
    """

    tab: str
    sessions: Sessions
    results: Results
    seed: gr.Number
    requests_of: Callable[..., Mapping[str, Request]]
    shown: Callable[[Session], dict[Any, Any]]

    def start(self, request: gr.Request, *values: Any) -> Iterator[dict[Any, Any]]:
        """A new set."""

        def ask(session: Session) -> Any:
            names = tuple(one.name for one in session.chosen.get(self.tab, []))
            return self.requests_of(session, *values), names

        yield from self._run(request, ask)

    def start_again(self, request: gr.Request, diversity: float) -> Iterator[dict[Any, Any]]:
        """The last set's seeds at another diversity."""
        yield from self._run(request, lambda one: _again(one.jobs.get(self.tab), diversity))

    def stop(self, request: gr.Request) -> dict[Any, Any]:
        """Cancel: gradio closes the generator at once, so its last word has to be said here."""
        session = self.sessions.asking(request)
        if (job := session.jobs.get(self.tab)) is None:
            told = status.line("Cancelled; nothing to stop.")
            return {self.results.progress: "", self.results.told: told}
        job.stop()
        return self._ended(session, job) if job.wait(_PATIENCE) else gr.skip()

    def restore(self, request: gr.Request) -> dict[Any, Any]:
        """After a reload; what was drawing then ends with the step that is at work."""
        session = self.sessions.asking(request)
        job = session.jobs.get(self.tab)
        known = job is not None and job.wait(_PATIENCE)
        return self._ended(session, job) if job and known else gr.skip()

    def _run(self, request: gr.Request, ask: Callable[[Session], Any]) -> Iterator[dict[Any, Any]]:
        session, results = self.sessions.asking(request), self.results
        self.sessions.turns.arrived(session.visitor.name)
        try:
            job = _new_job(self.sessions, session, self.tab, *ask(session))
        except IpdiverseError as error:
            yield {results.told: status.problem(str(error)), results.progress: ""}
            return
        told = {self.seed: first_of(job).seed, results.told: status.going(job)}
        yield {**self.shown(session), **told, **results.emptied()}
        yield from _watched(job, results, lambda: self.shown(session))
        yield self._ended(session, job)
        session.visitor.weigh()

    def _ended(self, session: Session, job: Job) -> dict[Any, Any]:
        return {**self.shown(session), **_last_words(job, self.results)}


def draw_on(
    drawn: Drawn,
    triggers: Sequence[Any],
    cancel: gr.Button,
    inputs: Sequence[Any],
    outputs: Sequence[Any],
    again: tuple[Any, gr.Slider] | None = None,
) -> None:
    """Say what happens when a visitor draws, draws the same seeds `again`, cancels, and reloads."""
    every = [*outputs, drawn.seed, *drawn.results]
    # no limit of gradio's: its queue is first come, first served; `Turns` decides who draws
    options = PRIVATE | {"concurrency_id": "drawing", "concurrency_limit": None}
    drawing = [trigger(drawn.start, list(inputs), every, **options) for trigger in triggers]
    if again is not None:
        drawing.append(again[0](drawn.start_again, again[1], every, **options))
    for one in drawing:
        one.then(None, None, None, js=script("intoView") % drawn.tab, **PRIVATE)
    cancel.click(drawn.stop, None, every, cancels=drawing, queue=False, **PRIVATE)
    on_load(drawn.restore, None, every)


def first_of(job: Job) -> Request:
    """The first of a job's requests: its images differ from the others' in numbers alone."""
    return next(iter(job.requests.values()))


def _again(last: Job | None, diversity: float) -> tuple[dict[str, Request], tuple[str, ...], Job]:
    if last is None or not last.images:
        raise ArgumentError("nothing is drawn yet", fix="Press Draw first.")
    requests = {inside: replace(one, diversity=diversity) for inside, one in last.requests.items()}
    return requests, last.names, last


def _new_job(
    sessions: Sessions,
    session: Session,
    tab: str,
    requests: Mapping[str, Request],
    names: tuple[str, ...],
    beside: Job | None = None,
) -> Job:
    """Start a job in place of the tab's last one; those before the last few lose their files."""
    if (before := session.jobs.get(tab)) is not None:
        before.stop()
    # a new folder each time: the browser keeps images by their address
    folder = session.folder / tab / uuid.uuid4().hex
    job = Job(sessions.turns, requests, names, folder, session.visitor.name, session.listens)
    job.beside = beside
    job.start()
    session.jobs[tab] = job
    gone = [] if before is None else [before]
    if before is not None and before.images and tab == "vary":
        before.beside = None  # else no earlier set would ever be given up
        session.earlier.insert(0, before)
        gone, session.earlier = session.earlier[_EARLIER:], session.earlier[:_EARLIER]
    for one in gone:
        shutil.rmtree(one.folder, ignore_errors=True)
    return job


def _watched(
    job: Job, results: Results, shown: Callable[[], dict[Any, Any]]
) -> Iterator[dict[Any, Any]]:
    """What changes while a job runs. When its visitor leaves, gradio closes this: the job stops."""
    seen, line = (-1, job.previews), ""
    with closing(job.watch()) as looks:
        for _ in looks:
            update: dict[Any, Any] = {results.progress: status.bar(job)}
            if status.going(job) != line:
                line = status.going(job)
                update[results.told] = line
            if (now := (job.images, job.previews)) != seen:
                seen = now
                update |= shown()
            yield update


def _last_words(job: Job, results: Results) -> dict[Any, Any]:
    """The status and the recipes of a job that has ended."""
    update = {results.progress: "", results.told: status.ended(job)}
    if not job.sheets:
        return update | results.emptied()
    requests = {inside: sheet.request for inside, sheet in job.sheets.items()}
    return update | {
        results.command: as_commands(requests),
        results.python: as_python(requests),
        results.download: gr.DownloadButton(value=archive_of(job), interactive=True),
    }


def archive_of(job: Job, only: Collection[int] | None = None) -> str:
    """Write a job's set as a zip, or only some of its images; the file."""
    requests = {inside: sheet.request for inside, sheet in job.sheets.items()}
    first, asked = next(iter(requests.values())), first_of(job)
    words = re.sub(r"[^a-z0-9]+", "-", first.prompt[0].lower())[:40].strip("-")
    starred = "" if only is None else "-starred"
    stem = f"ipdiverse-{words or 'set'}-seed-{first.seed}{starred}"
    files = dict(zip(job.names, map(Path, asked.image), strict=True))
    if asked.scenes:
        files |= {f"{SCENES}/{file.name}": file for file in Path(asked.scenes).iterdir()}
    archive = job.folder / f"{stem}.zip"
    write_bytes_atomic(archive, packed(job.folder, files, requests, stem, only))
    return str(archive)


def as_commands(requests: Mapping[str, Request]) -> str:
    """A line of shell for each request.

    Args:
        requests: By the folder that each one's images go to; references by their bare names.
    """
    return "\n".join(request.command(folder) for folder, request in requests.items())


def as_python(requests: Mapping[str, Request]) -> str:
    """A program that draws the same images.

    Args:
        requests: As `as_commands` takes them.
    """
    program = ["import ipdiverse\n"]
    for folder, request in requests.items():
        stated = request.stated(*_STATED).items()
        named = [f"{k}={value!r}" for k, value in stated if k not in ("image", "prompt")]
        given = [_one_or_list(request.image), _one_or_list(request.prompt), *named]
        listed = "".join(f"    {one},\n" for one in given)
        program.append(f"result = ipdiverse.generate(\n{listed})\nresult.save({folder!r})\n")
    return "\n".join(program)


_STATED = ("n", "seed", "base", "adapter", "scale", "steps", "guidance_scale")
"""Arguments that a program states even when they are at their default."""


def _one_or_list(values: tuple[str, ...]) -> str:
    return repr(values[0]) if len(values) == 1 else repr(list(values))


def packed(
    folder: Path,
    references: Mapping[str, Path],
    requests: Mapping[str, Request],
    stem: str,
    only: Collection[int] | None = None,
) -> bytes:
    """A zip of images with their records, the references, and both recipes.

    Unpacked, either recipe run in its folder draws the same images into the same places; all of
    them, even where `only` some are packed.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, file in references.items():
            archive.write(file, f"{stem}/{name}")
        for inside in requests:
            for file in sorted((folder / inside).iterdir()):
                image = re.fullmatch(r"(\d+)\.png", file.name)
                if only is not None and not (image and int(image[1]) in only):
                    continue
                archive.write(file, f"{stem}/{inside}/{file.name}")
        archive.writestr(f"{stem}/command.sh", as_commands(requests) + "\n")
        archive.writestr(f"{stem}/repeat.py", as_python(requests))
    return buffer.getvalue()
