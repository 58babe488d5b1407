"""What the page says while it works: a bar, a line that screen readers hear, and errors."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from ipdiverse.ui.closeness import plot
from ipdiverse.ui.hints import why_alike

if TYPE_CHECKING:
    from ipdiverse.ui.jobs import Job, Sheet


def bar(job: Job) -> str:
    """How far a job is, with an estimate of what is left; not read aloud at every step."""
    percent = 100 * job.done // max(1, job.total)
    words = f"{job.images} of {job.wanted} images, {percent} %"
    if not job.begun:
        words = "opening the model"
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
    """A line of the status, read aloud when it changes."""
    return f"<p>{escape(text)}</p>"


def problem(text: str) -> str:
    """What went wrong, read aloud at once."""
    return f'<p class="problem" role="alert">{escape(text)}</p>'


def going(job: Job) -> str:
    """The line of a job that goes on; it changes with each image, not with each step."""
    if not job.begun:
        return line(f"Drawing {_count(job.wanted)}.")
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
    return line(f"Done: {_count(job.images)}. {said}".strip())


def report(sheet: Sheet) -> str:
    """Under the images: how close they are, in words and as a plot, and why they are alike."""
    seen = sheet.closeness
    if seen is None:
        return "<p>The adapter's encoder gives nothing to compare images by.</p>"
    hints = ""
    if seen.narrow:
        causes = why_alike(sheet.request, sheet.calibrated, sheet.usual_guidance)
        listed = "".join(f"<li>{escape(text)}</li>" for text in causes)
        hints = f'<div class="hint"><h3>Why are these alike?</h3><ul>{listed}</ul></div>'
    told = f"<div><h3>How close they are</h3><p>{escape(seen.summary())}</p></div>"
    return f'<div class="report">{told}{plot(seen)}{hints}</div>'


def _count(images: int) -> str:
    return "1 image" if images == 1 else f"{images} images"
