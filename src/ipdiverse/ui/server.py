"""Opening and closing the page: bound to this machine, in a private folder that is deleted.

Also how much of the machine clients may hold: connections, and uploads on disk.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from ipdiverse.errors import ArgumentError, IpdiverseError, check_range
from ipdiverse.image_io import MAX_FILE_BYTES
from ipdiverse.sampling.request import Request
from ipdiverse.ui import find_installed
from ipdiverse.ui.queue import PROGRAMS, Turns
from ipdiverse.ui.safety import (
    OwnPageOnly,
    Refused,
    check_binding,
    is_loopback,
    private_folder,
)
from ipdiverse.ui.visitors import MAX_VISITORS, Sessions, Uploads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ipdiverse.ui import Options

_FORGOTTEN = ("GRADIO_ALLOWED_PATHS", "GRADIO_SHARE", "GRADIO_MCP_SERVER", "GRADIO_DEBUG")
"""Settings of gradio that could open to others what is closed here."""

MAX_CONNECTIONS = 400
"""In sum: many systems let a process have 1,024 files open, and gradio needs some."""
SILENCE = 15.0
"""Seconds without a byte after which a request that is not complete is given up."""
_number = count()


@dataclass(frozen=True)
class Page:
    """An open page.

    Args:
        url: Where it is.
        sessions: Its visitors'.
        folder: Holds all its files.
    """

    url: str
    sessions: Sessions
    folder: Path


@contextmanager
def opened_page(options: Options) -> Iterator[Page]:
    """Serve the page for the length of a `with` block; afterwards nothing of it is left."""
    check_binding(options.host, options.password)
    check_range("port", options.port, 1, 65535)
    check_range("waiting", options.waiting, 1, 1000)
    installed = find_installed(options.bases, options.adapters)
    with ExitStack() as stack:
        folder = stack.enter_context(private_folder())
        stack.enter_context(_environment(folder / "gradio"))
        from ipdiverse.ui.inputs import Fields
        from ipdiverse.ui.page import build, look

        sessions = Sessions(folder / "work", options.waiting)
        page = build(sessions, installed, [Path(name) for name in options.reports])
        stack.callback(_close, page, sessions)
        fields = Fields(page, (folder / "gradio").resolve())

        def check(path: str, asked: dict[str, Any], visitor: str | None) -> dict[str, Any]:
            passed = fields.checked(path, asked)
            # before gradio spends time on it
            joins = path.endswith("/join")
            if joins and (refusal := sessions.turns.admit(visitor or PROGRAMS)):
                raise Refused(*refusal)
            return passed

        uploads = Uploads(folder / "gradio")
        limits = {"check": check, "uploads": uploads, "streams": sessions.streams}
        url = _launch(page, options, look(), limits)
        page.server.config.http_protocol_class = Connection  # read for each connection
        warming = threading.Thread(target=_warm, args=(sessions.turns,), daemon=True)
        warming.start()
        stack.callback(warming.join)  # nothing is being opened when the page has gone
        yield Page(url, sessions, folder)


def serve(options: Options, tell: Callable[[str], None]) -> None:
    """Serve the page until a signal ends it."""
    ended = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: ended.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        with opened_page(options) as page:
            tell(page.url)
            ended.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _environment(cache: Path) -> Iterator[None]:
    """Give gradio our cache and no analytics. It reads these once, when it is imported."""
    cache.mkdir()
    before = dict(os.environ)
    for name in _FORGOTTEN:
        os.environ.pop(name, None)
    own = {"GRADIO_TEMP_DIR": str(cache), "GRADIO_ANALYTICS_ENABLED": "False"}
    # uvicorn trusts a proxy on this machine unless it is told otherwise
    own["FORWARDED_ALLOW_IPS"] = before.get("FORWARDED_ALLOW_IPS", "")
    os.environ |= own
    try:
        yield
    finally:
        for name in (*_FORGOTTEN, *own):
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]


def _launch(page: Any, options: Options, look: dict[str, Any], limits: dict[str, Any]) -> str:
    from starlette.middleware import Middleware

    layer = Middleware(OwnPageOnly, loopback=is_loopback(options.host), **limits)
    try:
        _, url, _ = page.launch(
            server_name=options.host,
            server_port=options.port,
            share=False,
            auth=(options.user, options.password) if options.password else None,
            max_file_size=MAX_FILE_BYTES,
            allowed_paths=[],
            app_kwargs={"middleware": [layer]},
            prevent_thread_lock=True,
            show_error=False,
            quiet=True,
            inbrowser=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            state_session_capacity=MAX_VISITORS,
            enable_monitoring=False,
            run_history=False,
            strict_cors=True,
            footer_links=[],
            **look,
        )
    except OSError as error:
        raise ArgumentError(
            "cannot be listened on",
            where=f"{options.host}:{options.port}",
            found=error,
            fix="Choose another --port.",
        ) from error
    return url


def _warm(turns: Turns) -> None:
    """Open the embedded base before the first visitor needs it; if it fails, a job will say so."""
    with suppress(IpdiverseError), turns.turn(lambda: None):
        turns.base(Request())


def _close(page: Any, sessions: Sessions) -> None:
    sessions.close()
    page.close(verbose=False)
    # jobs end at their next step; until then they write into the folder that is about to go.
    # After 100 looks the list is empty, and nobody is waited for any more
    with suppress(IndexError), sessions.turns.turn(([None] * 100).pop):
        pass


class Connection(H11Protocol):
    """One that is closed when it is silent, or when it is the least useful of too many."""

    _silence: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Close another one if there are too many."""
        super().connection_made(transport)
        self.number = next(_number)
        self._listen()
        # one that was aborted stays in the set until the loop's next round, and many come in one
        others = [one for one in self.connections - {self} if not one.transport.is_closing()]
        if len(others) >= MAX_CONNECTIONS:
            least_useful(others).drop()

    def data_received(self, data: bytes) -> None:
        """Wait for more, unless the request is complete."""
        super().data_received(data)
        self._listen()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        if self._silence is not None:
            self._silence.cancel()
        super().connection_lost(exc)

    @property
    def stage(self) -> int:
        """0 before a request, 1 while its body comes, 2 until it is answered."""
        if self.cycle is None or self.cycle.response_complete:
            return 0
        return 1 if self.cycle.more_body else 2

    def drop(self) -> None:
        """Close it without waiting for anything."""
        if not self.transport.is_closing():
            self.transport.abort()

    def _listen(self) -> None:
        if self._silence is not None:
            self._silence.cancel()
        self._silence = self.loop.call_later(SILENCE, self._silent)

    def _silent(self) -> None:
        if self.stage < 2 and not self.flow.read_paused:
            self.drop()
        else:  # it waits for us
            self._listen()


def least_useful(connections: Sequence[Any]) -> Any:
    """Who asks for least goes first, then the oldest of the address with the most connections."""
    crowd = Counter(one.client and one.client[0] for one in connections)
    return min(
        connections, key=lambda one: (one.stage, -crowd[one.client and one.client[0]], one.number)
    )
