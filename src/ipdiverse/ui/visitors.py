"""Visitors: what each has chosen and drawn, and who is forgotten when there are too many.

A visitor is a browser, known by its cookie; a program without one is a visitor for each session. A
session is one open page. A reload closes it and opens another, which takes over what it left.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipdiverse.ui.queue import PROGRAMS, Job, Turns
from ipdiverse.ui.safety import MAX_UPLOAD, Refused

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MAX_VISITORS = 1000
MAX_SESSIONS = 8
"""Pages that one visitor may have open."""
MAX_BYTES = 2 * 2**30
"""References and results of all visitors together, on disk."""
FORGOTTEN_AFTER = 3600.0
"""Seconds for which somebody without an open page finds their references again."""
MAX_UPLOADS = 2 * 2**30
"""Bytes of uploads of all visitors; `MAX_UPLOAD` is the bound of one."""
KEPT = 600.0
"""Seconds for which an upload is kept: what is used of it is copied at once."""
_LEAST = 2**18
"""What a small file counts for, so that their number is bounded too."""
_BROKEN = 30.0
"""Seconds without growth after which a piece of an upload is left over: see `server.SILENCE`."""


@dataclass(eq=False)
class Visitor:
    """Somebody, and what is kept for them.

    Args:
        folder: For references and results.
        name: Under which they take turns: the cookie, or `PROGRAMS`.
        chosen: The last references of each tab: a list of `Upload`.
        sessions: Open pages, the one used last at the end.
        left: What the page that was closed last has drawn, until another page takes it over.
        requests: So far.
        bytes: On disk.
    """

    folder: Path
    name: str
    chosen: dict[str, Any] = field(default_factory=dict)
    sessions: dict[str, Session] = field(default_factory=dict)
    left: Session | None = None
    requests: int = 0
    bytes: int = 0
    reading: threading.Lock = field(default_factory=threading.Lock)
    seen: float = field(default_factory=time.monotonic)

    @property
    def known(self) -> bool:
        """Whether it is a browser, which comes back with its cookie."""
        return self.name != PROGRAMS

    def weigh(self) -> None:
        """Look at how much is on disk."""
        found = self.folder.rglob("*")
        self.bytes = sum(file.stat().st_size for file in found if file.is_file())

    @property
    def worth(self) -> tuple[bool, bool, bool, float]:
        """Who is kept longer: browsers, who has results, who came more than once, who came last."""
        drawn = any(page.jobs for page in self.pages)
        return self.known, drawn, self.requests > 1, self.seen

    @property
    def pages(self) -> list[Session]:
        """Open ones, and the one that was closed last."""
        return [*self.sessions.values(), *([self.left] if self.left else [])]


@dataclass(eq=False)
class Session:
    """One open page.

    Args:
        folder: For results.
        visitor: Whose it is.
        listens: Whether the page waits for messages.
        jobs: The last one of each tab.
        earlier: Sets of the first tab, the newest first; what they have drawn is kept.
        chosen: The references of each tab.
    """

    folder: Path
    visitor: Visitor
    listens: Callable[[], bool] = lambda: False
    jobs: dict[str, Job] = field(default_factory=dict)
    earlier: list[Job] = field(default_factory=list)
    chosen: dict[str, Any] = field(default_factory=dict)


class Sessions:
    """All visitors, and the turns that they take.

    Args:
        folder: Private; each visitor's is inside it.
        waiting: How many drawings may wait for their turn.
    """

    def __init__(self, folder: Path, waiting: int = 5) -> None:
        self.turns = Turns(waiting)
        self.streams: Counter[str] = Counter()
        """Open streams of messages, by session: who has none would not see what is drawn."""
        self._folder = folder
        self._lock = threading.RLock()
        self._visitors: dict[str, Visitor] = {}

    def of(self, key: str | None, visitor: str | None = None) -> Session:
        """A page's session; a new one for a new page."""
        name = _folder_name(key)
        with self._lock:
            owner = self._visitor(visitor or f"session {name}", visitor or PROGRAMS)
            session = owner.sessions.pop(name, None)
            if session is None:  # a new page, or a reload
                session = owner.left or Session(owner.folder / name, owner)
                session.listens, owner.left = lambda: self.streams[str(key)] > 0, None
            owner.sessions[name] = session
            session.folder.mkdir(parents=True, exist_ok=True)
            while len(owner.sessions) > MAX_SESSIONS:
                self._close(owner, next(iter(owner.sessions)))
            self._make_room(owner)
            return session

    def asking(self, request: Any) -> Session:
        """The session of whoever sent a request, a `gr.Request`."""
        return self.of(request.session_hash, visitor_of(request))

    def all(self) -> list[Session]:
        """Every open page's."""
        with self._lock:
            return [one for owner in self._visitors.values() for one in owner.sessions.values()]

    def leave(self, key: str | None, visitor: str | None = None) -> None:
        """A page was closed: its jobs stop. What it drew is kept for a browser: it may reload."""
        name = _folder_name(key)
        with self._lock:
            owner = self._visitors.get(_folder_name(visitor or f"session {name}"))
            if owner is not None:
                self._close(owner, name, kept=owner.known)
                if not owner.known:
                    self._forget(_folder_name(f"session {name}"))

    def close(self) -> None:
        """Stop and delete everything."""
        with self._lock:
            for name in list(self._visitors):
                self._forget(name)

    def _visitor(self, key: str, called: str) -> Visitor:
        name = _folder_name(key)
        if name not in self._visitors:
            self._visitors[name] = Visitor(self._folder / name, called)
        found = self._visitors[name]
        found.requests, found.seen = found.requests + 1, time.monotonic()
        return found

    def _make_room(self, kept: Visitor) -> None:
        gone = time.monotonic() - FORGOTTEN_AFTER
        for name, one in list(self._visitors.items()):
            if one is not kept and not one.sessions and one.seen < gone:
                self._forget(name)
        while self._too_much():
            others = [name for name, one in self._visitors.items() if one is not kept]
            if not others:
                return
            self._forget(min(others, key=lambda name: self._visitors[name].worth))

    def _too_much(self) -> bool:
        held = sum(one.bytes for one in self._visitors.values())
        return len(self._visitors) > MAX_VISITORS or held > MAX_BYTES

    def _close(self, owner: Visitor, name: str, *, kept: bool = False) -> None:
        """Stop a page's jobs and delete their files, unless a page that has drawn may come back."""
        session = owner.sessions.pop(name, None)
        if session is None:
            return
        for job in session.jobs.values():
            job.stop()
        gone: Session | None = session
        if kept and session.jobs:
            gone, owner.left = owner.left, session
        if gone is not None:
            shutil.rmtree(gone.folder, ignore_errors=True)

    def _forget(self, name: str) -> None:
        owner = self._visitors.pop(name)
        for session in list(owner.sessions):
            self._close(owner, session)
        shutil.rmtree(owner.folder, ignore_errors=True)


class Uploads:
    """What was uploaded, by whom; the oldest of whoever has most goes when there is too much.

    Args:
        folder: Where gradio puts it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[Any, tuple[str | None, int, float]] = {}

    def begin(self, owner: str | None, size: int) -> object:
        """Make room for an upload.

        Returns:
            What to give to `end`.

        Raises:
            Refused: Too much is on its way.
        """
        self.sweep()
        size = max(size, _LEAST)
        while self._sum(owner) + size > MAX_UPLOAD and self._drop(owner):
            pass
        while self._sum() + size > MAX_UPLOADS and self._drop(self._largest()):
            pass
        if self._sum(owner) + size > MAX_UPLOAD or self._sum() + size > MAX_UPLOADS:
            raise Refused(429, "too many uploads are on their way; try again in a minute")
        ticket = object()
        self._held[ticket] = (owner, size, time.monotonic())
        return ticket

    def end(self, ticket: object, files: Sequence[Path]) -> None:
        """An upload is complete; without files it was broken off, and gradio leaves its pieces."""
        owner, size, _ = self._held[ticket]
        now = time.monotonic()
        if not files:
            self._held[ticket] = (owner, size, now)
            return
        del self._held[ticket]
        for file in files:
            self._held.pop(file, None)
            self._held[file] = (owner, max(file.stat().st_size, _LEAST), now)

    def sweep(self) -> None:
        """Delete what is old, and the pieces of uploads that were broken off."""
        old = time.monotonic() - KEPT
        for key, (_, _, at) in list(self._held.items()):
            if at >= old:
                break
            self._forget(key)
        broken = time.time() - _BROKEN
        for piece in self._folder.glob("tmp*"):
            if piece.is_file() and piece.stat().st_mtime < broken:
                piece.unlink(missing_ok=True)

    def _sum(self, *owners: str | None) -> int:
        return sum(size for who, size, _ in self._held.values() if not owners or who in owners)

    def _largest(self) -> str | None:
        sums: Counter[str | None] = Counter()
        for key, (owner, size, _) in self._held.items():
            sums[owner] += size if isinstance(key, Path) else 0
        return max(sums, key=lambda owner: sums[owner], default=None)

    def _drop(self, owner: str | None) -> bool:
        own = (key for key, (who, *_) in self._held.items() if who == owner)
        oldest = next((key for key in own if isinstance(key, Path)), None)
        if oldest is not None:
            self._forget(oldest)
        return oldest is not None

    def _forget(self, key: Any) -> None:
        del self._held[key]
        if isinstance(key, Path):
            key.unlink(missing_ok=True)


def visitor_of(request: Any) -> str | None:
    """By the cookie of a `gr.Request`, which the layer in front of gradio has checked."""
    return request.request.scope.get("visitor")


def _folder_name(key: str | None) -> str:
    """A safe name for whatever a browser calls itself."""
    return hashlib.sha256(str(key).encode("utf-8", "replace")).hexdigest()[:24]
