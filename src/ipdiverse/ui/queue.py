"""Who draws when: one turn for everybody, jobs on threads, and the visitors whose jobs they are."""

from __future__ import annotations

import hashlib
import shutil
import sys
import threading
import time
import traceback
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ipdiverse.dial import dial_of
from ipdiverse.errors import IpdiverseError
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

MAX_SESSIONS = 128
"""Visitors whose results are kept; beyond that, the one away longest is forgotten."""
_WAIT, _LOOK = 0.1, 0.2
"""Seconds between two tries for a turn, and between two looks at a job."""


class Turns:
    """The one turn to draw, and the base that whoever has it draws with.

    Gradio's own queue cannot hold the turn: it frees the place of a cancelled event at once, while
    the job's thread is still inside a denoising step.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = LastBase()

    @contextmanager
    def turn(self, check: Callable[[], None]) -> Iterator[None]:
        """Wait until nobody else draws, and keep others waiting for the length of the block.

        Args:
            check: Called while waiting; an error that it raises ends the wait.
        """
        while not self._lock.acquire(timeout=_WAIT):
            check()
        try:
            yield
        finally:
            self._lock.release()

    @property
    def busy(self) -> bool:
        """Whether somebody is drawing."""
        return self._lock.locked()

    def base(self, request: Request) -> Base:
        """Open a request's base and keep it open for the next. Call it inside `turn` only.

        Raises:
            IpdiverseError: It cannot be opened.
        """
        return self._last.open(request)


class Stopped(Exception):  # noqa: N818 - an event, not an error
    """Somebody asked the job to stop."""


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
    """Requests drawn one after the other, on a thread.

    Args:
        turns: Waited for before drawing.
        requests: By the folder inside `folder` that each one's images go to; references as files.
        names: What a visitor calls the references.
        folder: For the images.
    """

    def __init__(
        self, turns: Turns, requests: Mapping[str, Request], names: tuple[str, ...], folder: Path
    ) -> None:
        self.requests, self.names, self.folder = requests, names, folder
        self.total = sum(request.n * (request.steps or 0) for request in requests.values())
        self.done = 0
        self.sheets: dict[str, Sheet] = {}
        self.files: dict[str, list[Path]] = {}
        self.error: IpdiverseError | None = None
        self._turns = turns
        self._began: tuple[float, int] | None = None
        self._stop, self._ended = threading.Event(), threading.Event()

    def start(self) -> None:
        """Begin as soon as nobody else draws."""
        threading.Thread(target=self._run, daemon=True).start()

    def stop(self) -> None:
        """Stop after the current denoising step; finished images stay."""
        self._stop.set()

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
        return (time.monotonic() - since) / timed * (self.total - self.done) if timed else None

    def _run(self) -> None:
        try:
            with self._turns.turn(self._check):
                for inside, request in self.requests.items():
                    self._check()
                    self._draw(inside, request)
        except Stopped:
            pass
        except IpdiverseError as error:
            self.error = error
        except Exception as error:  # whatever else happens must not leave the visitor waiting
            traceback.print_exc(file=sys.stderr)
            self.error = IpdiverseError("drawing failed", found=type(error).__name__)
        finally:
            self._ended.set()

    def _draw(self, inside: str, request: Request) -> None:
        out = ensure_writable_folder(self.folder / inside)
        with drawing(request, self._turns.base(request)) as work:
            images: list[Image.Image] = []
            files = self.files.setdefault(inside, [])
            named = replace(work.request, image=self.names)
            stopped = False
            run = Run(out, fingerprint(named), request.n)
            run.begin(replace(work, request=named).record(inside))
            try:
                for number, image in work.images(progress=False, on_step=self._step):
                    file = run.add(number, image)
                    images.append(image)
                    files.append(file)  # only now: the page's thread shows what is in this list
            except Stopped:
                stopped = True
            if images:
                self.sheets[inside] = _sheet(work, named, images, files, inside, run)
        if stopped:
            raise Stopped

    def _step(self, images: int) -> None:
        self.done += images
        if self._began is None:
            self._began = (time.monotonic(), self.done)
        self._check()

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
) -> Sheet:
    """Write the finished images' record, and compare them with the reference and the prompt."""
    # image i does not depend on how many follow, so a stopped job is a request for fewer images
    indices = [job.index for job in work.jobs[: len(images)]]
    fewer = replace(named, n=len(images))
    made = Generation(fewer, work.references, images, work.notes, indices)
    run.begin(made.record(inside))
    run.finish(made.sheet(), work.notes)
    calibrated = dial_of(work.attachment.adapters[0].spec, "adapter") is not None
    closeness = judged(work.attachment, images, work.references, fewer)
    usual = work.task.base.guidance_scale
    return Sheet(fewer, list(files), work.notes, calibrated, closeness, usual)


@dataclass
class Session:
    """One visitor's work.

    Args:
        folder: For references and results.
        jobs: The last one of each tab.
    """

    folder: Path
    jobs: dict[str, Job] = field(default_factory=dict)


class Sessions:
    """All visitors, and the turns that they take.

    Args:
        folder: Private; each session's is inside it.
    """

    def __init__(self, folder: Path) -> None:
        self.turns = Turns()
        self._folder = folder
        self._lock = threading.Lock()
        self._sessions: OrderedDict[str, Session] = OrderedDict()

    def of(self, key: str | None) -> Session:
        """A visitor's session; a new one for a new visitor.

        Args:
            key: What the browser calls it: any text.
        """
        name = _folder_name(key)
        with self._lock:
            if name not in self._sessions:
                folder = self._folder / name
                folder.mkdir(parents=True, exist_ok=True)
                self._sessions[name] = Session(folder)
            self._sessions.move_to_end(name)
            while len(self._sessions) > MAX_SESSIONS:
                self._forget(next(iter(self._sessions)))
            return self._sessions[name]

    def leave(self, key: str | None) -> None:
        """A visitor has gone: stop their jobs and delete their files."""
        with self._lock:
            self._forget(_folder_name(key))

    def close(self) -> None:
        """Stop and delete everything."""
        with self._lock:
            for name in list(self._sessions):
                self._forget(name)

    def _forget(self, name: str) -> None:
        session = self._sessions.pop(name, None)
        if session is None:
            return
        for job in session.jobs.values():
            job.stop()
        shutil.rmtree(session.folder, ignore_errors=True)


def _folder_name(key: str | None) -> str:
    """A safe name for whatever a browser calls itself."""
    return hashlib.sha256(str(key).encode("utf-8", "replace")).hexdigest()[:24]
