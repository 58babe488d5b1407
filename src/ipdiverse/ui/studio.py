"""What all visitors share: one open base, one turn to draw, and a folder for what each has made."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ipdiverse.sampling.task import LastBase

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from ipdiverse.base.bases import Base
    from ipdiverse.sampling.request import Request
    from ipdiverse.ui.jobs import Job

MAX_SESSIONS = 128
"""Visitors whose results are kept; the one who was away longest is forgotten."""
_WAIT = 0.1


@dataclass
class Session:
    """One visitor's.

    Args:
        folder: For references and results.
        jobs: What was last drawn, by tab.
    """

    folder: Path
    jobs: dict[str, Job] = field(default_factory=dict)


class Studio:
    """Everything that outlives a request.

    Args:
        folder: Private; each session's is inside it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._turn, self._lock = threading.Lock(), threading.Lock()
        self._sessions: OrderedDict[str, Session] = OrderedDict()
        self._bases = LastBase()

    @contextmanager
    def turn(self, check: Callable[[], None]) -> Iterator[None]:
        """Wait until nobody else draws, and keep others waiting for the length of the block.

        Args:
            check: Called while waiting; what it raises ends that.
        """
        while not self._turn.acquire(timeout=_WAIT):
            check()
        try:
            yield
        finally:
            self._turn.release()

    @property
    def busy(self) -> bool:
        """Whether somebody's turn it is."""
        return self._turn.locked()

    def base(self, request: Request) -> Base:
        """Open a request's base; the last one stays open. Only for whose turn it is.

        Raises:
            IpdiverseError: It cannot be opened.
        """
        return self._bases.open(request)

    def session(self, key: str | None) -> Session:
        """A visitor's session, begun if need be.

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
        """A visitor has gone: stop what is drawn for them, and delete what was."""
        name = _folder_name(key)
        with self._lock:
            self._forget(name)

    def close(self) -> None:
        """Stop everything, and delete it."""
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
