"""Who draws when: one turn for everybody, and jobs on threads that take it.

Turns go round over visitors, however many jobs each has. A turn lasts for one batch of images, so
nobody waits for the whole of somebody else's work.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ipdiverse.dial import dial_of
from ipdiverse.errors import ArgumentError, IpdiverseError
from ipdiverse.sampling.draw import Drawing, Generation, drawing
from ipdiverse.sampling.saving import Run, fingerprint
from ipdiverse.sampling.task import LastBase
from ipdiverse.ui.closeness import Closeness, judged, watched
from ipdiverse.writing import ensure_writable_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping

    from PIL import Image

    from ipdiverse.base.bases import Base
    from ipdiverse.sampling.request import Request

PROGRAMS = "programs"
"""The one visitor that all programs without a cookie are: each could be a new one at every try."""
PLACES = 2
"""Drawings that one visitor may have in the line: one for each tab that draws."""
_MORE = 2
"""Turns that somebody must have had more than a newcomer to lose the place to them."""
_MEMORY = 1000
"""Turns after which those of each visitor count half."""
_PASSED_ON = 10.0
"""Seconds in which gradio passes a request on, or its visitor has gone."""
_UNHEARD = 15.0
"""Seconds after which a job is dropped whose page does not wait for it."""
_WAIT, _LOOK = 0.1, 0.2
"""Seconds between two tries for a turn, and between two looks at a job."""
_SIGHTS = 4
"""Previews come so often for each batch, less one."""
SCENES = "scenes"
"""What recipes and archives call the folder of a visitor's own scenes."""


class Turns:
    """The one turn to draw, the line of jobs for it, and the base that whoever has it draws with.

    Gradio's own queue cannot hold the turn: it frees the place of a cancelled event at once, while
    the job's thread is still inside a denoising step; and it knows no visitors.

    All that decides is read and changed under one lock. Somebody is always next: the first in the
    line who is still there. Who is not leaves by themselves, as each looks every `_WAIT` seconds.

    Args:
        waiting: How many jobs may wait while another one draws.
    """

    def __init__(self, waiting: int = 5) -> None:
        self._changed = threading.Condition()
        self._line: dict[str, list[Job]] = {}  # visitors in the order of their next turns
        self._drawing: object | None = None
        self._promised: list[tuple[str, float]] = []  # who was admitted and has not arrived; when
        self._had: Counter[str] = Counter()  # turns, lately
        self._waiting = waiting
        self._last = LastBase()

    @contextmanager
    def turn(self, check: Callable[[], None], job: Job | None = None) -> Iterator[None]:
        """Wait until nobody else draws, and keep others waiting for the length of the block."""
        with self._changed:
            while self._drawing is not None or (job is not None and self._next() is not job):
                check()
                self._changed.wait(_WAIT)
            self._drawing = self if job is None else job
        try:
            yield
        finally:
            with self._changed:
                self._drawing = None
                if job is not None:
                    self._count(job.visitor)
                self._changed.notify_all()

    def join(self, job: Job) -> None:
        """Put a job into the line, if need be in place of one whose visitor has had more.

        Raises:
            ArgumentError: There is no place.
        """
        with self._changed:
            if refusal := self._refusal(job.visitor):
                raise ArgumentError(refusal[1])
            if len(self._jobs()) > self._waiting and (loser := self._loser(job.visitor)):
                loser.refuse()
            self._line.setdefault(job.visitor, []).append(job)

    def leave(self, job: Job) -> None:
        """Take a job out of the line."""
        with self._changed:
            own = self._line.get(job.visitor, [])
            if job in own:
                own.remove(job)
            if not own:
                self._line.pop(job.visitor, None)
            self._changed.notify_all()

    def admit(self, visitor: str) -> tuple[int, str] | None:
        """Before gradio passes a request on: a refusal (HTTP status, words), or a place is kept."""
        with self._changed:
            recent = time.monotonic() - _PASSED_ON
            self._promised = [(who, at) for who, at in self._promised if at > recent]
            refusal = self._refusal(visitor)
            if refusal is None:
                self._promised.append((visitor, time.monotonic()))
            return refusal

    def arrived(self, visitor: str) -> None:
        """A visitor who was admitted is about to join."""
        with self._changed:
            own = next((one for one in self._promised if one[0] == visitor), None)
            if own is not None:
                self._promised.remove(own)

    def others_wait(self, job: Job) -> bool:
        """Whether another visitor is to draw before this job goes on."""
        with self._changed:
            return any(other.visitor != job.visitor and other.ready for other in self._jobs())

    def before(self, job: Job) -> int:
        """Number of jobs that are to draw before one, if nobody else comes."""
        with self._changed:
            # the second jobs of all visitors come after the first ones
            rounds = zip_longest(*self._line.values())
            ranked = [one for same in rounds for one in same if one and (one is job or one.ready)]
            first = ranked[: ranked.index(job)] if job in ranked else []
            return len({self._drawing, *first} - {None, job})

    @property
    def busy(self) -> bool:
        """Whether somebody is drawing."""
        return self._drawing is not None

    def base(self, request: Request) -> Base:
        """Open a request's base and keep it open for the next. Call it inside `turn` only."""
        return self._last.open(request)

    def _jobs(self) -> list[Job]:
        """Those in the line that were not told to stop, in the order of their visitors' turns."""
        return [job for own in self._line.values() for job in own if not job.stopping]

    def _next(self) -> Job | None:
        return next((job for job in self._jobs() if job.ready), None)

    def _count(self, visitor: str) -> None:
        self._line[visitor] = self._line.pop(visitor)  # to the end, after who came meanwhile
        self._had[visitor] += 1
        if self._had.total() >= _MEMORY:
            self._had = Counter({who: had // 2 for who, had in self._had.items() if had > 1})

    def _refusal(self, visitor: str) -> tuple[int, str] | None:
        jobs, promised = self._jobs(), [who for who, _ in self._promised]
        if sum(one.visitor == visitor for one in jobs) + promised.count(visitor) >= PLACES:
            whose = "those of programs" if visitor == PROGRAMS else "your drawings"
            return 429, f"{PLACES} of {whose} are waiting; cancel one, or wait for it"
        if len(jobs) + len(promised) <= self._waiting:
            return None
        # one newcomer at a time takes somebody's place
        if not promised and self._loser(visitor) is not None:
            return None
        return 503, "Queue is full: others are drawing. Try again in a minute."

    def _loser(self, newcomer: str) -> Job | None:
        """Who loses the place to a newcomer: of visitors with two, or with more turns, the last."""
        jobs = self._jobs()
        places = Counter(job.visitor for job in jobs)
        enough = self._had[newcomer] + _MORE
        worse = [one for one in jobs if places[one.visitor] > 1 or self._had[one.visitor] >= enough]
        if newcomer in places or not worse:
            return None
        # of equals the last in the line, which comes first here
        return max(worse[::-1], key=lambda one: (places[one.visitor], self._had[one.visitor]))


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
        notes: What the visitor should know.
        calibrated: The adapter carries its own dial.
        closeness: To the reference and the prompt; None where no encoder sees images.
        usual_guidance: The base's default.
    """

    request: Request
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
        heard: Whether the visitor's page waits for messages; nothing is drawn for nobody.
    """

    def __init__(
        self,
        turns: Turns,
        requests: Mapping[str, Request],
        names: tuple[str, ...],
        folder: Path,
        visitor: str = PROGRAMS,
        heard: Callable[[], bool] = lambda: True,
    ) -> None:
        self.requests, self.names, self.folder = requests, names, folder
        self.visitor, self._heard, self._last_heard = visitor, heard, time.monotonic()
        self.total = sum(request.n * (request.steps or 0) for request in requests.values())
        self.done = 0
        self.beside: Job | None = None
        """Shown next to it: the same seeds at another diversity, or whatever was chosen."""
        self.chosen: int | None = None
        self.starred: set[int] = set()
        self.sheets: dict[str, Sheet] = {}
        self.files: dict[str, list[Path]] = {}
        self.error: IpdiverseError | None = None
        self._turns = turns
        self.previews: list[Image.Image] = []
        """What the batch that is being drawn looks like so far."""
        self._guessed: Callable[[int], list[Image.Image]] = lambda _: []
        self._drawn: list[Image.Image] = []  # of the request that is being drawn
        self._saved: Run | None = None
        self._finished = self._turn_from = 0  # steps times images
        self._so_far: Callable[[], dict[str, Sheet]] | None = None
        self._began: tuple[float, int] | None = None
        self._stop, self._ended = threading.Event(), threading.Event()

    def start(self) -> None:
        """Get into the line, and begin when it is this job's turn."""
        self._turns.join(self)
        try:
            threading.Thread(target=self._run, daemon=True).start()
        except RuntimeError:  # no more threads: nobody would ever take this place's turn
            self._turns.leave(self)
            raise

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
    def ready(self) -> bool:
        """Whether somebody is there who would see what is drawn."""
        return not self.stopping and self._heard()

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
        with (
            drawing(request, self._turns.base(request)) as work,
            watched(work.task.base) as self._guessed,
        ):
            files, skip = self.files.setdefault(inside, []), range(len(self._drawn))
            named = replace(work.request, image=self.names, scenes=request.scenes and SCENES)
            if self._saved is None:  # not one that goes on after others had their turn
                # of the files and not of their names: in an unpacked set, the command finds its own
                self._saved = Run(out, fingerprint(work.request), request.n)
                self._saved.begin(replace(work, request=named).finished([]).record(inside))
            run, ended = self._saved, None
            try:
                for number, image in work.images(skip, progress=False, on_step=self._step):
                    file = run.add(number, image)
                    self._drawn.append(image)
                    self._finished += request.steps or 0
                    self.previews = []
                    files.append(file)  # only now: the page's thread shows what is in this list
            except (Stopped, GaveWay) as error:
                ended, self.previews = error, []
                self.done = self._finished  # what was begun is drawn again, or never
            if self._drawn:
                sheet = partial(_sheet, work, named, self._drawn, inside, run)
                self._so_far = lambda: {inside: sheet(compared=False)}
                if not isinstance(ended, GaveWay):
                    self.sheets[inside], self._so_far = sheet(), None
        if isinstance(ended, Stopped):
            raise ended

    def _step(self, images: int) -> None:
        # at the first step of a further batch: the image before it says that the last one is done
        further = self.done == self._finished > self._turn_from
        self.done += images
        if self._began is None:
            self._began = (time.monotonic(), self.done)
        self._check()
        if further and self._turns.others_wait(self):
            raise GaveWay
        steps = self.total // self.wanted
        done, gap = (self.done - self._finished) // images, max(1, steps // _SIGHTS)
        if done % gap == 0 and done + gap <= steps:
            self.previews = self._guessed(images)

    def _check(self) -> None:
        now = time.monotonic()
        if self._heard():
            self._last_heard = now
        if now - self._last_heard > _UNHEARD:
            self.stop()
        if self._stop.is_set():
            raise Stopped


def _sheet(
    work: Drawing,
    named: Request,
    images: list[Image.Image],
    inside: str,
    run: Run,
    compared: bool = True,
) -> Sheet:
    """Write the finished images' record, and compare them with the reference and the prompt."""
    # image i does not depend on how many follow, so a stopped job is a request for fewer images
    indices = [job.index for job in work.jobs[: len(images)]]
    fewer = replace(named, n=len(images))
    made = Generation(fewer, work.references, images, work.notes, indices)
    if len(images) < run.total:
        run = _whole(run, replace(work.request, n=len(images)), made.record(inside))
    run.begin(made.record(inside))
    run.finish(made.sheet(), work.notes)
    calibrated = dial_of(work.attachment.adapters[0].spec, "adapter") is not None
    # the pipeline is somebody else's when a job is stopped while it waits
    closeness = judged(work.attachment, images, work.references, fewer) if compared else None
    usual = work.task.base.guidance_scale
    return Sheet(fewer, work.notes, calibrated, closeness, usual)


def _whole(run: Run, request: Request, record: dict[str, Any]) -> Run:
    """A set that was stopped, as a request for its images alone writes it, file by file."""
    own = Run(run.folder, fingerprint(request), request.n, run.images)
    # beside it, and moved: at no time is a file missing that the page may be showing
    with TemporaryDirectory(dir=run.folder.parent) as folder:
        beside = replace(own, folder=Path(folder), images={})
        beside.begin(record)
        for number, image in run.images.items():
            file = beside.add(number, image)
            file.replace(run.folder / file.name)
    return own
