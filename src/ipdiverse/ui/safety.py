"""Who may ask the page for what: hosts, origins, paths, sizes, passwords; and a private cache.

Gradio's own CORS layer keeps other sites from reading answers of a page on localhost. It does not
look at the Host header, so it would let in a site whose name points at 127.0.0.1 (DNS rebinding);
and it does not stop requests whose answer nobody needs, such as uploads. `OwnPageOnly` stops both,
and lets through only the paths that the page itself uses, with bodies that the page could send.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import re
import secrets
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from ipdiverse.errors import ArgumentError, IpdiverseError
from ipdiverse.image_io import MAX_FILE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MAX_REFERENCES = 8
MAX_UPLOAD = MAX_REFERENCES * MAX_FILE_BYTES
"""Bytes of one upload: the largest number of references, each as large as may be."""
MAX_BODY = 2**17
"""Bytes of any other request."""
MAX_OPEN, MAX_OPEN_OF_PROGRAMS = 24, 200
"""Requests of a browser, and of all programs without a cookie, that are answered at a time."""
LOGINS_A_MINUTE = 10
MIN_PASSWORD = 8

_PATHS = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json|login|logout)/?"
    r"|/(assets|static|svelte)/.*"
    r"|/gradio_api/(startup-events|app_id|login_check|token|user|reset|cancel)/?"
    r"|/gradio_api/(upload|upload_progress|queue/join|queue/data|run/predict)/?"
    r"|/gradio_api/heartbeat/[\w-]{1,64}"
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
_UPLOAD, _STREAM = "/gradio_api/upload", "/gradio_api/queue/data"
_HOST = re.compile(r"([\w.-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?", re.ASCII)
_COOKIE = b"ipdiverse-visitor"
_BUSY, _PATIENCE = (429, 503), 1.0
"""Refusals that come late, and after how many seconds."""
_log = logging.getLogger(__name__)


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_binding(host: str, password: str) -> None:
    """Refuse to listen beyond this machine without a password."""
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


class Refused(IpdiverseError):  # noqa: N818 - what happened, not what went wrong
    """Raised for a request that is not passed on.

    Args:
        status: Of HTTP.
        words: A line for whoever asked.
    """

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


Check = Callable[[str, dict[str, Any], str | None], dict[str, Any]]
"""Of a path, what was sent there and the visitor: what of it to pass on, or an IpdiverseError."""


class OwnPageOnly:
    """ASGI layer that refuses requests which the page itself would not make.

    Args:
        app: The layer below.
        loopback: The page is for this machine: only its names are accepted as Host.
        check: For bodies in JSON.
        uploads: Keeps account of them.
        streams: Counts open streams of messages, by the page's session.
    """

    def __init__(
        self,
        app: Any,
        loopback: bool,
        check: Check = lambda _, asked, __: asked,
        uploads: Any = None,
        streams: Counter[str] | None = None,
    ) -> None:
        self._app, self._loopback, self._check = app, loopback, check
        self._uploads, self._streams = uploads, Counter() if streams is None else streams
        self._open: Counter[str | None] = Counter()
        self._secret = secrets.token_bytes(32)
        self._logins: list[float] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer or pass on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close"})
            return
        answer = _Answer(send)
        try:
            if refusal := self.refusal(scope):
                raise Refused(*refusal)
            visitor, cookie = self._visitor(scope)
            answer.cookie = cookie
            # no proxy is trusted but those that uvicorn is told of, and it has read these already
            kept = [pair for pair in scope["headers"] if not pair[0].startswith(b"x-forwarded-")]
            asked = {**scope, "headers": kept, "visitor": visitor}
            most = MAX_OPEN if visitor else MAX_OPEN_OF_PROGRAMS
            with _counted(self._open, visitor, most):
                receive = await self._checked(asked, receive)
                with self._accounted(asked, answer):
                    await self._app(asked, receive, answer.send)
        except Refused as refused:
            if refused.status in _BUSY:  # who asks again at once shall not keep the machine busy
                await asyncio.sleep(_PATIENCE)
            await answer.refuse(refused.status, str(refused), scope["path"])
        except Exception as error:  # gradio's and its parts': a request that none of them expects
            # not worth a line: who left while uploading, and who asks for an unknown session
            kinds = {type(error).__name__, type(error.__cause__).__name__}
            if not kinds & {"ClientDisconnect", "HTTPException"}:
                log_failure(f"request {scope['method']} {scope['path']}", error)
            words = f"the request cannot be answered; found {type(error).__name__}"
            await answer.refuse(400, words, scope["path"])

    def refusal(self, scope: Mapping[str, Any]) -> tuple[int, str] | None:
        """Status and words of a refusal; None lets the request through."""
        headers = {name.decode("latin-1"): v.decode("latin-1") for name, v in scope["headers"]}
        host = headers.get("host", "")
        if host and not _HOST.fullmatch(host):
            return 400, "the Host header names no host"
        if self._loopback and not is_loopback(_split(f"//{host}")[0] or ""):
            return 421, "this page answers only to the names of its own machine"
        origin = headers.get("origin")
        if origin is not None and _split(origin)[1] != host:
            return 403, "other sites may not use this page"
        path = scope["path"]
        if not _PATHS.fullmatch(path) or "\0" in path:
            return 404, "not found"
        if scope["method"] in _SAFE_METHODS:
            return None
        return self._too_much(path.rstrip("/"), headers)

    def _too_much(self, path: str, headers: Mapping[str, str]) -> tuple[int, str] | None:
        # a chunked body states no length, and could grow until the disk is full
        size = headers.get("content-length", "")
        if not (size.isascii() and size.isdecimal()):
            return 411, "the size is not stated"
        if len(size) > 12 or int(size) > (MAX_UPLOAD if path == _UPLOAD else MAX_BODY):
            return 413, "too large"
        if path != "/login":
            return None
        now = time.monotonic()
        self._logins = [at for at in self._logins if now - at < 60]
        if len(self._logins) >= LOGINS_A_MINUTE:
            return 429, "too many attempts; wait a minute"
        self._logins.append(now)
        return None

    @contextmanager
    def _accounted(self, scope: Any, answer: _Answer) -> Iterator[None]:
        path = scope["path"].rstrip("/")
        if path == _STREAM:
            asked = parse_qs(scope["query_string"].decode("latin-1"))
            with _counted(self._streams, asked.get("session_hash", [""])[0], MAX_OPEN):
                yield
            return
        if path != _UPLOAD or scope["method"] in _SAFE_METHODS:
            yield
            return
        size = int(dict(scope["headers"])[b"content-length"])
        ticket = self._uploads.begin(scope["visitor"], size)
        answer.body = b""
        try:
            yield
        finally:
            files = json.loads(answer.body) if answer.status == 200 and answer.body else []
            self._uploads.end(ticket, [Path(file) for file in files])

    def _visitor(self, scope: Any) -> tuple[str | None, bytes | None]:
        """Who asks, by a cookie that only this page can make; and the one that a new visitor gets.

        Browsers send it with every request. A program that does not is known by its session.
        """
        sent = b"; ".join(value for name, value in scope["headers"] if name == b"cookie")
        for value in re.findall(_COOKIE + rb"=(\w{32})\.(\w{64})", sent):
            if hmac.compare_digest(self._signed(value[0]), value[1]):
                return value[0].decode(), None
        if scope["path"].rstrip("/") not in ("", "/config"):
            return None, None
        name = secrets.token_hex(16).encode()
        rest = b"; Path=/; HttpOnly; SameSite=Strict"
        return name.decode(), _COOKIE + b"=" + name + b"." + self._signed(name) + rest

    def _signed(self, name: bytes) -> bytes:
        return hmac.new(self._secret, name, hashlib.sha256).hexdigest().encode()

    async def _checked(self, scope: Any, receive: Any) -> Any:
        """The body of a request, once it is known to be one that the page could send."""
        path = scope["path"].rstrip("/")
        if scope["method"] in _SAFE_METHODS or path in (_UPLOAD, "/login"):
            return receive
        try:
            asked = json.loads(await _body(receive), parse_constant=_refuse_constant)
            if not isinstance(asked, dict):
                raise Refused(400, "the request is not a JSON object")
            passed = self._check(path, asked, scope["visitor"])
            text = json.dumps(passed, ensure_ascii=False, allow_nan=False).encode()
        except Refused:
            raise
        except IpdiverseError as error:
            raise Refused(400, str(error)) from error
        except (ValueError, RecursionError) as error:  # half surrogate pairs and infinity too
            raise Refused(400, "the request is not JSON as the page sends it") from error
        messages = [{"type": "http.request", "body": text, "more_body": False}]

        async def receiving() -> Any:
            return messages.pop() if messages else await receive()

        return receiving


class _Answer:
    """What is sent back: with our headers, and with an end even where something failed."""

    def __init__(self, send: Any) -> None:
        self._send = send
        self.cookie: bytes | None = None
        self.body: bytes | None = None
        """What was sent, where somebody wants to know."""
        self.status = 0

    async def send(self, message: Any) -> None:
        if self.body is not None:
            self.body += message.get("body", b"")
        if message["type"] == "http.response.start":
            self.status = message["status"]
            kept = [pair for pair in message["headers"] if pair[0].lower() not in _HEADERS]
            own = [(b"set-cookie", self.cookie)] if self.cookie else []
            message = {**message, "headers": [*kept, *_HEADERS.items(), *own]}
        await self._send(message)

    async def refuse(self, status: int, words: str, path: str) -> None:
        kind, body = b"text/plain", words
        if path.startswith("/gradio_api/") and not path.startswith(_UPLOAD):
            # the page's script looks for either name
            kind, body = b"application/json", json.dumps({"detail": words, "error": words})
        if not self.status:
            headers = [(b"content-type", kind + b"; charset=utf-8")]
            await self.send({"type": "http.response.start", "status": status, "headers": headers})
        else:
            body = ""
        await self.send({"type": "http.response.body", "body": body.encode()})


@contextmanager
def _counted(open_now: Counter[Any], whose: str | None, most: int) -> Iterator[None]:
    if open_now[whose] >= most:
        raise Refused(429, "too many requests at once")
    open_now[whose] += 1
    try:
        yield
    finally:
        open_now[whose] -= 1
        if not open_now[whose]:
            del open_now[whose]


def log_failure(where: str, error: BaseException) -> None:
    """One line, for who runs the page, of what nobody foresaw: which error, and where."""
    *_, last = traceback.extract_tb(error.__traceback__) or [None]
    at = f" at {Path(last.filename).name}:{last.lineno}" if last else ""
    found = f"{type(error).__name__}{at}: {error}"
    _log.error("%s", IpdiverseError("failed", where=where, found=found))


async def _body(receive: Any) -> bytes:
    parts, more = [], True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise Refused(400, "the request has no end")
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


def _refuse_constant(name: str) -> None:
    raise Refused(400, f"the request holds {name}, which is not JSON")


def _split(address: str) -> tuple[str | None, str]:
    """Host name, and host with port; none of what is not an address."""
    try:
        parts = urlsplit(address)
        return parts.hostname, parts.netloc
    except ValueError:
        return None, ""
