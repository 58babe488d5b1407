"""Who may ask the page for what: hosts, origins, paths, sizes, passwords; and a private cache.

Gradio's own CORS layer keeps other sites from reading answers of a page on localhost. It does not
look at the Host header, so it would let in a site whose name points at 127.0.0.1 (DNS rebinding);
and it does not stop requests whose answer nobody needs, such as uploads. `OwnPageOnly` stops both,
and lets through only the paths that the page itself uses.
"""

from __future__ import annotations

import ipaddress
import re
import time
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ipdiverse.errors import ArgumentError
from ipdiverse.image_io import MAX_FILE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MAX_REFERENCES = 8
MAX_UPLOAD = MAX_REFERENCES * MAX_FILE_BYTES
"""Bytes of one upload: the largest number of references, each as large as may be."""
MAX_BODY = 2**20
"""Bytes of any other request."""
LOGINS_A_MINUTE = 10
MIN_PASSWORD = 8

_PATHS = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json|login|logout)/?"
    r"|/(assets|static|svelte)/.*"
    r"|/gradio_api/(startup-events|app_id|login_check|token|user|reset|cancel)/?"
    r"|/gradio_api/(upload|upload_progress|queue/join|queue/data|run/predict)/?"
    r"|/gradio_api/heartbeat/\w+"
    r"|/gradio_api/file=(?![\w+.-]*:/).*"  # else gradio fetches an address
)
# gradio's page has inline scripts, and runs `js=` strings by `eval`; nothing is from elsewhere
_HEADERS = {
    b"content-security-policy": b"default-src 'self'; script-src 'self' 'unsafe-inline' "
    b"'unsafe-eval'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    b"font-src 'self' data:; frame-ancestors 'none'; form-action 'self'; object-src 'none'",
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
}
_SAFE_METHODS = ("GET", "HEAD")


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_binding(host: str, password: str) -> None:
    """Refuse to listen beyond this machine without a password.

    Args:
        host: What the page is bound to.
        password: Empty means none.

    Raises:
        ArgumentError: It is missing, or too easy to guess.
    """
    if not is_loopback(host) and not password:
        raise ArgumentError(
            "would be open to everyone who can reach this machine",
            where=f"host {host}",
            expected="a password",
            fix="Set IPDIVERSE_UI_PASSWORD, or leave --host out and use an SSH tunnel.",
        )
    if password and len(password) < MIN_PASSWORD:
        raise ArgumentError(
            "is too short",
            where="password",
            expected=f"{MIN_PASSWORD} characters or more",
            found=len(password),
        )


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder that only this user can open, deleted at the end of the block."""
    with TemporaryDirectory(prefix="ipdiverse-ui-", ignore_cleanup_errors=True) as folder:
        yield Path(folder).resolve()


class OwnPageOnly:
    """ASGI layer that refuses requests which the page itself would not make.

    Args:
        app: The layer below.
        loopback: The page is for this machine: only its names are accepted as Host.
    """

    def __init__(self, app: Any, loopback: bool) -> None:
        self._app, self._loopback = app, loopback
        self._logins: list[float] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer or pass on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        refusal = (404, "not found") if scope["type"] != "http" else self.refusal(scope)
        if refusal is None:
            await self._app(scope, receive, _with_headers(send))
            return
        status, words = refusal
        text = [(b"content-type", b"text/plain; charset=utf-8")]
        await send({"type": "http.response.start", "status": status, "headers": text})
        await send({"type": "http.response.body", "body": words.encode()})

    def refusal(self, scope: Mapping[str, Any]) -> tuple[int, str] | None:
        """Status and words of a refusal; None lets the request through.

        Args:
            scope: ASGI's, of an HTTP request.
        """
        headers = {name.decode("latin-1"): v.decode("latin-1") for name, v in scope["headers"]}
        host = headers.get("host", "")
        if self._loopback and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            return 421, "this page answers only to the names of its own machine"
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return 403, "other sites may not use this page"
        path = scope["path"]
        if not _PATHS.fullmatch(path):
            return 404, "not found"
        if scope["method"] in _SAFE_METHODS:
            return None
        return self._too_much(path.rstrip("/"), headers)

    def _too_much(self, path: str, headers: Mapping[str, str]) -> tuple[int, str] | None:
        # a chunked body states no length, and could grow until the disk is full
        size = headers.get("content-length", "")
        if not size.isdecimal():
            return 411, "the size is not stated"
        if int(size) > (MAX_UPLOAD if path == "/gradio_api/upload" else MAX_BODY):
            return 413, "too large"
        if path != "/login":
            return None
        now = time.monotonic()
        self._logins = [at for at in self._logins if now - at < 60]
        if len(self._logins) >= LOGINS_A_MINUTE:
            return 429, "too many attempts; wait a minute"
        self._logins.append(now)
        return None


def _with_headers(send: Any) -> Any:
    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            kept = [pair for pair in message["headers"] if pair[0].lower() not in _HEADERS]
            message = {**message, "headers": [*kept, *_HEADERS.items()]}
        await send(message)

    return sending
