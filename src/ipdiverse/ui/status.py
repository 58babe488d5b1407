"""What the page says: progress, lines that screen readers hear, errors, why images are alike."""

from __future__ import annotations

import inspect
import tomllib
from contextlib import contextmanager
from functools import wraps
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.context import Context

from ipdiverse.errors import IpdiverseError
from ipdiverse.ui.closeness import plot
from ipdiverse.ui.safety import log_failure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ipdiverse.sampling.request import Request
    from ipdiverse.ui.queue import Job, Sheet

PRIVATE: dict[str, Any] = {
    "api_visibility": "private",
    "show_progress": "hidden",
    "preprocess": False,
}
"""Options of every event: no API for programs, no veil over images while more are drawn, and values
as they were sent: they are checked, and gradio's own checks end in tracebacks."""
# Set by script, because gr.HTML takes no ARIA attributes; on the element and not on its content,
# because screen readers announce only what changes inside a live region that was there before.
LIVE = "element.setAttribute('role', 'status'); element.setAttribute('aria-live', 'polite');"

HIGH_SCALE = 0.8
HIGH_GUIDANCE = 1.5
"""Times the base's own default."""
LOW_DIAL, WIDE_DIAL = 0.2, 0.9
DETAILED = 12
"""Number of words from which a prompt is detailed."""


@contextmanager
def _in_a_line(name: str) -> Iterator[None]:
    try:
        yield
    except IpdiverseError as error:
        line = str(error)
    except Exception as error:  # of a library, or of ours: the visitor is told, the log says where
        log_failure(name, error)
        line = f"this did not work; found {type(error).__name__}"
    else:
        return
    raise gr.Error(escape(line), print_exception=False)


def answered(handler: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose failures are one line each, for the visitor and for the log."""
    name = f"event {handler.__name__}"
    if inspect.isgeneratorfunction(handler):

        @wraps(handler)
        def stepwise(*args: Any) -> Iterator[Any]:
            with _in_a_line(name):
                yield from handler(*args)

        return stepwise

    return _in_a_line(name)(handler)


def on_load(handler: Callable[..., Any], inputs: Any, outputs: Any) -> None:
    """Let something happen when the page that is being built is opened, or reloaded."""
    page: Any = Context.root_block  # it is there inside `gr.Blocks`
    page.load(handler, inputs, outputs, queue=False, **PRIVATE)


def bar(job: Job) -> str:
    """How far a job is, with an estimate of the rest; not read aloud at every step."""
    percent = 100 * job.done // max(1, job.total)
    words = f"{job.images} of {job.wanted} images, {percent} %"
    if not job.begun:
        before = job.before
        words = f"waiting; {before} before you" if before else "opening the model"
    elif job.seconds_left is not None:
        words += f", about {duration(job.seconds_left)} left"
    return (
        f'<div class="bar" role="progressbar" aria-label="drawing" aria-valuemin="0" '
        f'aria-valuemax="100" aria-valuenow="{percent}" aria-valuetext="{words}">'
        f'<div style="width:{percent}%"></div></div><p class="small">{words}</p>'
    )


def duration(seconds: float) -> str:
    """Seconds for people, never less than one."""
    whole = max(1, round(seconds))
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


def line(text: str) -> str:
    """A line that is read aloud when it changes."""
    return f"<p>{escape(text)}</p>"


def problem(text: str) -> str:
    """An error, read aloud at once."""
    return f'<p class="problem" role="alert">{escape(text)}</p>'


def going(job: Job) -> str:
    """The line of a running job; it changes with each image, not with each step."""
    if not job.begun:
        before = job.before
        place = f" Others come first: {before} before you." if before else ""
        return line(f"Drawing {_count(job.wanted)}.{place}")
    return line(f"{job.images} of {_count(job.wanted)} finished.")


def ended(job: Job) -> str:
    """The line of a job that has ended."""
    if job.error is not None:
        return problem(str(job.error))
    notes = [note for sheet in job.sheets.values() for note in sheet.notes]
    said = " ".join(f"Note: {note}." for note in dict.fromkeys(notes))
    if job.stopped:
        kept = f" {_count(job.images).capitalize()} finished before that." if job.images else ""
        return line(f"Cancelled.{kept} {said}".strip())
    seeds = ", ".join(dict.fromkeys(str(sheet.request.seed) for sheet in job.sheets.values()))
    return line(f"Done: {_count(job.images)}. Seed {seeds}. {said}".strip())


def report(sheet: Sheet) -> str:
    """Under the images: how close they are, in words and as a plot, and why they are alike."""
    seen = sheet.closeness
    if seen is None:
        return "<p>This adapter has no image encoder that can compare images.</p>"
    hints = ""
    if seen.narrow:
        causes = why_alike(sheet.request, sheet.calibrated, sheet.usual_guidance)
        listed = "".join(f"<li>{escape(text)}</li>" for text in causes)
        hints = f'<div class="hint"><h3>Why are these alike?</h3><ul>{listed}</ul></div>'
    rests = f'<p class="small">These words rest on {escape(seen.rests_on)}.</p>'
    told = f"<div><h3>How close they are</h3><p>{escape(seen.summary())}</p>{rests}</div>"
    return f'<div class="report">{told}{plot(seen)}{hints}</div>'


def why_alike(request: Request, calibrated: bool, usual_guidance: float) -> list[str]:
    """Which settings made a set narrow, most likely first, and what to change; a sentence each."""
    dial, scale = request.diversity or 0.0, request.scale or 0.0
    guidance = request.guidance_scale or 0.0
    words = len(" ".join(request.prompt).split())
    holds = {
        "close": dial <= LOW_DIAL,
        "wider": calibrated and LOW_DIAL < dial < WIDE_DIAL,
        "decided": scale >= HIGH_SCALE and not calibrated,
        "guided": guidance >= HIGH_GUIDANCE * usual_guidance,
        "several": len(request.image) > 1 and request.combine == "concat",
        "detailed": words >= DETAILED,
        "no_prompt": not words,
        "cautious": not calibrated,
    }
    hints = tomllib.loads(Path(__file__).with_name("hints.toml").read_text("utf-8"))
    values = {"dial": dial, "scale": scale, "guidance": guidance, "words": words}
    told = [name for name, held in holds.items() if held] or ["unknown"]
    return [hints[name].format(**values, usual=usual_guidance) for name in told]


def script(name: str) -> str:
    """A function of `page.js`, by whose text gradio runs it in the browser."""
    text = Path(__file__).with_name("page.js").read_text("utf-8")
    return text.partition(f"\n{name} = ")[2].partition("\n\n")[0]


def _count(images: int) -> str:
    return "1 image" if images == 1 else f"{images} images"
