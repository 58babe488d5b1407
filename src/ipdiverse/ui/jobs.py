"""Drawing on a thread of its own: watched while it goes on, stopped at the next denoising step."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ipdiverse.dial import dial_of
from ipdiverse.errors import IpdiverseError
from ipdiverse.provenance import save_png
from ipdiverse.sampling.draw import Drawing, Generation, drawing
from ipdiverse.ui.closeness import Closeness, judged
from ipdiverse.writing import ensure_writable_folder

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping
    from pathlib import Path

    from PIL import Image

    from ipdiverse.sampling.request import Request
    from ipdiverse.ui.studio import Studio

_LOOK = 0.2
"""Seconds between two looks at a job."""


class Stopped(Exception):  # noqa: N818 - what happened, not what went wrong
    """Somebody asked the job to stop."""


@dataclass(frozen=True)
class Sheet:
    """What came of one request.

    Args:
        request: Defaults filled in, references by the names a visitor gave them. Of a stopped one,
            `n` is what was finished.
        files: The images.
        notes: What the visitor should know.
        calibrated: The adapter carries a dial of its own.
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
    """Requests drawn one after the other.

    Args:
        studio: Whose turn is waited for.
        requests: By the folder inside `folder` that each one's images go to; references as files.
        names: What a visitor calls the references.
        folder: For the images.
    """

    def __init__(
        self,
        studio: Studio,
        requests: Mapping[str, Request],
        names: tuple[str, ...],
        folder: Path,
    ) -> None:
        self.requests, self.names, self.folder = requests, names, folder
        self.total = sum(request.n * (request.steps or 0) for request in requests.values())
        self.done = 0
        self.sheets: dict[str, Sheet] = {}
        self.files: dict[str, list[Path]] = {}
        self.error: IpdiverseError | None = None
        self._studio = studio
        self._began: tuple[float, int] | None = None
        self._stop, self._ended = threading.Event(), threading.Event()

    def start(self) -> None:
        """Begin, as soon as nobody else draws."""
        threading.Thread(target=self._run, daemon=True).start()

    def stop(self) -> None:
        """Stop after the current denoising step; what is finished stays."""
        self._stop.set()

    def watch(self) -> Generator[None]:
        """Look again and again until it has ended; whoever stops looking stops it."""
        try:
            while not self._ended.wait(_LOOK):
                yield
        finally:
            self.stop()

    def wait(self, seconds: float) -> bool:
        """Wait until it has ended, but not for ever.

        Returns:
            Whether it has.
        """
        return self._ended.wait(seconds)

    @property
    def stopped(self) -> bool:
        """Whether it ended, or will, before everything was drawn."""
        return self._stop.is_set() and self.done < self.total

    @property
    def begun(self) -> bool:
        """Whether the first step is done; before, the model is opened."""
        return self._began is not None

    @property
    def images(self) -> int:
        """How many there are."""
        return sum(map(len, self.files.values()))

    @property
    def wanted(self) -> int:
        """How many there shall be."""
        return sum(request.n for request in self.requests.values())

    @property
    def seconds_left(self) -> float | None:
        """An estimate, from the steps that were timed; None before there are two of them."""
        if self._began is None:
            return None
        since, at = self._began
        timed = self.done - at
        return (time.monotonic() - since) / timed * (self.total - self.done) if timed else None

    def _run(self) -> None:
        try:
            with self._studio.turn(self._check):
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
        with drawing(request, self._studio.base(request)) as work:
            images: list[Image.Image] = []
            files = self.files.setdefault(inside, [])
            named = replace(work.request, image=self.names)
            stopped = False
            try:
                for number, image in work.images(progress=False, on_step=self._step):
                    about = {
                        "tool": "ipdiverse",
                        "prompt": request.prompt[0],
                        "image_index": number,
                    }
                    file = out / f"{number:04d}.png"
                    save_png(image, file, about | {"command": named.command(inside)})
                    images.append(image)
                    files.append(file)
            except Stopped:
                stopped = True
            if images:
                self.sheets[inside] = _sheet(work, named, images, files, inside, out)
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
    out: Path,
) -> Sheet:
    """Write what is finished with its record, and say what it is like.

    Image i does not depend on how many there are, so fewer of them are a request of their own.
    """
    indices = [job.index for job in work.jobs[: len(images)]]
    fewer = replace(named, n=len(images))
    Generation(fewer, work.references, images, work.notes, indices).save(out, inside)
    calibrated = dial_of(work.attachment.adapters[0].spec, "adapter") is not None
    closeness = judged(work.attachment, images, work.references, fewer)
    usual = work.task.base.guidance_scale
    return Sheet(fewer, list(files), work.notes, calibrated, closeness, usual)
