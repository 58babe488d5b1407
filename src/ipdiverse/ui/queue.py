"""Who draws when: one turn for everybody, and jobs on threads that take it.

Turns are fair between visitors, not first come, first served: next is who has had least of the
machine and asks for least. A turn lasts for one batch of images, so nobody waits for the whole of
somebody else's work, and one who wants much more than the next in line is interrupted.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

from ipdiverse.dial import dial_of
from ipdiverse.errors import ArgumentError, IpdiverseError
from ipdiverse.sampling.draw import Drawing, Generation, drawing
from ipdiverse.sampling.saving import Run, fingerprint
from ipdiverse.sampling.task import LastBase
from ipdiverse.ui.closeness import Closeness, judged
from ipdiverse.writing import ensure_writable_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping
    from pathlib import Path

    from PIL import Image

    from ipdiverse.base.bases import Base
    from ipdiverse.sampling.request import Request

PLACES = 2
"""Drawings that one visitor may have in the line: one for each tab that draws."""
USUAL = 200
"""Denoising steps times images: asking for fewer gives nobody an earlier turn, and who asks when
all their places are taken is charged for so many."""
_PASSED = 25
"""By how many steps times images each turn of others brings the next turn nearer."""
_INTERRUPTIONS = 3
"""How often a batch of images is begun again for the sake of others."""
_PASSED_ON = 10.0
"""Seconds in which gradio passes a request on, or its visitor has gone."""
_WAIT, _LOOK = 0.1, 0.2
"""Seconds between two tries for a turn, and between two looks at a job."""


class Asker(Protocol):
    """Whoever asks for images, and how much of the machine they have had (`visitors.Visitor`)."""

    since: float

    @property
    def used(self) -> float:
        """Denoising steps times images, lately."""
        ...

    def charge(self, steps: float) -> None:
        """Count what was drawn."""
        ...


class Turns:
    """The one turn to draw, the line of jobs for it, and the base that whoever has it draws with.

    Gradio's own queue cannot hold the turn: it frees the place of a cancelled event at once, while
    the job's thread is still inside a denoising step; and it knows no visitors.

    Args:
        waiting: How many jobs may wait while another one draws.
    """

    def __init__(self, waiting: int = 8) -> None:
        self._lock, self._line_lock = threading.Lock(), threading.Lock()
        self._line: list[Job] = []
        self._expected: list[float] = []  # when each was admitted that has not arrived
        self._waiting = waiting
        self._last = LastBase()

    @contextmanager
    def turn(self, check: Callable[[], None], job: Job | None = None) -> Iterator[None]:
        """Wait until nobody else draws, and keep others waiting for the length of the block."""
        while not (self._is_next(job) and self._lock.acquire(timeout=_WAIT)):
            check()
            if not self._is_next(job):
                time.sleep(_WAIT)
        try:
            for other in self._others(job):
                other.passed += 1
            if job is not None:
                job.passed = 0
            yield
        finally:
            self._lock.release()

    def join(self, job: Job) -> None:
        """Put a job into the line, if need be in place of one that wants much more."""
        with self._line_lock:
            if refusal := self.refusal(job.visitor, job):
                raise ArgumentError(refusal[1])
            if len(self._active()) > self._waiting:
                self._worst().refuse()
            self._line.append(job)

    def leave(self, job: Job) -> None:
        """Take a job out of the line."""
        with self._line_lock:
            if job in self._line:
                self._line.remove(job)

    def admit(self, visitor: Asker | None) -> tuple[int, str] | None:
        """As `refusal`, before gradio passes a request on; if there is none, a place is kept."""
        recent = time.monotonic() - _PASSED_ON
        self._expected = [at for at in self._expected if at > recent]
        refusal = self.refusal(visitor, expected=len(self._expected))
        if refusal is None:
            self._expected.append(time.monotonic())
        return refusal

    def arrived(self) -> None:
        """A request that was admitted is about to ask for its place."""
        if self._expected:
            self._expected.pop(0)

    def refusal(
        self, visitor: Asker | None, job: Job | None = None, expected: int = 0
    ) -> tuple[int, str] | None:
        """Why another job of a visitor would not get a place: a status of HTTP, and words."""
        active = self._active()
        if visitor is not None and sum(one.visitor is visitor for one in active) >= PLACES:
            visitor.charge(USUAL)
            return 429, f"{PLACES} of your drawings are waiting; cancel one, or wait for it"
        if len(active) + expected <= self._waiting:
            return None
        used = 0.0 if visitor is None else visitor.used
        need = used + USUAL / 2 if job is None else job.need
        # one newcomer at a time may take the place of whoever has had most
        if active and expected == 0 and 2 * need <= self._worst().need:
            return None
        return 503, "Queue is full: others are drawing. Try again in a minute."

    def gives_way(self, job: Job, within: bool) -> bool:
        """Whether the job that has the turn should let another one draw."""
        others = self._others(job)
        if within:
            return job.interrupted < _INTERRUPTIONS and any(2 * o.need < job.need for o in others)
        return any(other.rank < job.rank for other in others)

    def before(self, job: Job) -> int:
        """Number of jobs that are to draw before one, if nobody else comes."""
        return sum(other.rank < job.rank for other in self._others(job))

    @property
    def busy(self) -> bool:
        """Whether somebody is drawing."""
        return self._lock.locked()

    def base(self, request: Request) -> Base:
        """Open a request's base and keep it open for the next. Call it inside `turn` only."""
        return self._last.open(request)

    def _active(self) -> list[Job]:
        return [job for job in list(self._line) if not job.stopping]

    def _others(self, job: Job | None) -> list[Job]:
        return [other for other in self._active() if other is not job]

    def _worst(self) -> Job:
        return max(self._active(), key=lambda job: (job.need, job.since))

    def _is_next(self, job: Job | None) -> bool:
        if job is None or job.stopping:
            return True
        mine = (job.rank, job.since)
        return all(mine <= (other.rank, other.since) for other in self._others(job))


class Stopped(Exception):  # noqa: N818 - an event, not an error
    """Somebody asked the job to stop."""


class GaveWay(Exception):  # noqa: N818 - an event, not an error
    """Somebody else is to draw first; the job goes on afterwards."""


@dataclass(frozen=True)
class Sheet:
    """The images of one request.

    Args:
        request: Defaults filled in, references by the names a visitor gave them. After a stop, `n`
            is the number of finished images.
        files: The images.
        notes: What the visitor should know.
        calibrated: The adapter carries its own dial.
        closeness: To the reference and the prompt; None where no encoder sees images.
        usual_guidance: The base's default.
    """

    request: Request
    files: list[Path]
    notes: list[str]
    calibrated: bool
    closeness: Closeness | None
    usual_guidance: float


class Job:
    """Requests drawn one after the other, on a thread, in as many turns as it takes.

    Args:
        turns: Waited for before drawing.
        requests: By the folder inside `folder` that each one's images go to; references as files.
        names: What a visitor calls the references.
        folder: For the images.
        visitor: Whose it is.
    """

    def __init__(
        self,
        turns: Turns,
        requests: Mapping[str, Request],
        names: tuple[str, ...],
        folder: Path,
        visitor: Asker | None = None,
    ) -> None:
        self.requests, self.names, self.folder = requests, names, folder
        self.visitor, self.passed, self.interrupted = visitor, 0, 0
        self.total = sum(request.n * (request.steps or 0) for request in requests.values())
        self.done = 0
        self.sheets: dict[str, Sheet] = {}
        self.files: dict[str, list[Path]] = {}
        self.error: IpdiverseError | None = None
        self._turns = turns
        self._drawn: list[Image.Image] = []  # of the request that is being drawn
        self._saved: Run | None = None
        self._finished = self._turn_from = 0  # steps times images
        self._so_far: Callable[[], dict[str, Sheet]] | None = None
        self._began: tuple[float, int] | None = None
        self._stop, self._ended = threading.Event(), threading.Event()

    def start(self) -> None:
        """Get into the line, and begin when it is this job's turn."""
        self._turns.join(self)
        threading.Thread(target=self._run, daemon=True).start()

    def stop(self) -> None:
        """Stop after the current denoising step; finished images stay."""
        self._stop.set()

    def refuse(self) -> None:
        """Stop to make room for others."""
        self.error = IpdiverseError(
            "your drawing has lost its place, as others who have drawn less are waiting",
            fix="Try again in a minute.",
        )
        self.stop()

    @property
    def need(self) -> float:
        """What the visitor has had, and half of what is asked; halves, so that turns alternate."""
        used = 0.0 if self.visitor is None else self.visitor.used
        return used + max(self.total - self.done, USUAL) / 2

    @property
    def rank(self) -> float:
        """The lowest draws next: who needs little, or has waited for many turns of others."""
        return self.need - _PASSED * self.passed

    @property
    def since(self) -> float:
        """When the visitor first came: of equals, the one who has been here longer is first."""
        return 0.0 if self.visitor is None else self.visitor.since

    @property
    def stopping(self) -> bool:
        """Whether it was told to stop."""
        return self._stop.is_set()

    @property
    def before(self) -> int:
        """Number of other jobs that come first."""
        return self._turns.before(self)

    def watch(self) -> Generator[None]:
        """Yield every now and then until the job has ended; closing the generator stops the job."""
        try:
            while not self._ended.wait(_LOOK):
                yield
        finally:
            self.stop()

    def wait(self, seconds: float) -> bool:
        """Wait at most so long for the end; whether it has come."""
        return self._ended.wait(seconds)

    @property
    def stopped(self) -> bool:
        """Whether it ended, or will end, before everything was drawn."""
        return self._stop.is_set() and self.done < self.total

    @property
    def begun(self) -> bool:
        """Whether the first step is done; until then the model is being opened."""
        return self._began is not None

    @property
    def images(self) -> int:
        """Number of finished images."""
        return sum(map(len, self.files.values()))

    @property
    def wanted(self) -> int:
        """Number of images asked for."""
        return sum(request.n for request in self.requests.values())

    @property
    def seconds_left(self) -> float | None:
        """An estimate from the steps so far; None before there are two.

        The first step is left out: it also pays for what the libraries set up once.
        """
        if self._began is None:
            return None
        since, at = self._began
        timed = self.done - at
        return (time.monotonic() - since) / timed * (self.total - self.done) if timed > 0 else None

    def _run(self) -> None:
        try:
            for inside, request in self.requests.items():
                self._drawn, self._finished, self._so_far = [], self.done, None
                self._saved = None
                while len(self._drawn) < request.n:
                    with self._turns.turn(self._check, self):
                        self._check()
                        self._turn_from = self._finished
                        self._draw(inside, request)
        except Stopped:
            if self._so_far is not None:  # stopped while others drew
                self.sheets |= self._so_far()
        except IpdiverseError as error:
            self.error = error
        except Exception as error:  # whatever else happens must not leave the visitor waiting
            traceback.print_exc(file=sys.stderr)
            self.error = IpdiverseError("drawing failed", found=type(error).__name__)
        finally:
            self._turns.leave(self)
            self._ended.set()

    def _draw(self, inside: str, request: Request) -> None:
        """Draw a request's images, those that are left, or until it is somebody else's turn."""
        out = ensure_writable_folder(self.folder / inside)
        with drawing(request, self._turns.base(request)) as work:
            files, skip = self.files.setdefault(inside, []), range(len(self._drawn))
            named = replace(work.request, image=self.names)
            if self._saved is None:  # not one that goes on after others had their turn
                self._saved = Run(out, fingerprint(named), request.n)
                self._saved.begin(replace(work, request=named).record(inside))
            run, ended = self._saved, None
            try:
                for number, image in work.images(skip, progress=False, on_step=self._step):
                    file = run.add(number, image)
                    self._drawn.append(image)
                    self._finished, self.interrupted = self._finished + (request.steps or 0), 0
                    files.append(file)  # only now: the page's thread shows what is in this list
            except (Stopped, GaveWay) as error:
                ended = error
                self._charge(self._finished - self.done)  # what was begun is not paid for
            if self._drawn:
                sheet = partial(_sheet, work, named, self._drawn, files, inside, run)
                self._so_far = lambda: {inside: sheet(compared=False)}
                if not isinstance(ended, GaveWay):
                    self.sheets[inside], self._so_far = sheet(), None
        if isinstance(ended, Stopped):
            raise ended

    def _step(self, images: int) -> None:
        within = self.done != self._finished
        first = self._finished == self._turn_from
        self._charge(images)
        if self._began is None:
            self._began = (time.monotonic(), self.done)
        self._check()
        # after the first batch of a turn, others may be next; within a batch, hardly ever
        if (within or not first) and self._turns.gives_way(self, within):
            self.interrupted += within
            raise GaveWay

    def _charge(self, steps: int) -> None:
        self.done += steps
        if self.visitor is not None:
            self.visitor.charge(steps)

    def _check(self) -> None:
        if self._stop.is_set():
            raise Stopped


def _sheet(
    work: Drawing,
    named: Request,
    images: list[Image.Image],
    files: list[Path],
    inside: str,
    run: Run,
    compared: bool = True,
) -> Sheet:
    """Write the finished images' record, and compare them with the reference and the prompt."""
    # image i does not depend on how many follow, so a stopped job is a request for fewer images
    indices = [job.index for job in work.jobs[: len(images)]]
    fewer = replace(named, n=len(images))
    made = Generation(fewer, work.references, images, work.notes, indices)
    run.begin(made.record(inside))
    run.finish(made.sheet(), work.notes)
    calibrated = dial_of(work.attachment.adapters[0].spec, "adapter") is not None
    # the pipeline is somebody else's when a job is stopped while it waits
    closeness = judged(work.attachment, images, work.references, fewer) if compared else None
    usual = work.task.base.guidance_scale
    return Sheet(fewer, list(files), work.notes, calibrated, closeness, usual)
