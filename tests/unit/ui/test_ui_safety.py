"""Who may ask the page for what."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ipdiverse.cli import main
from ipdiverse.errors import ArgumentError
from ipdiverse.ui.safety import (
    LOGINS_A_MINUTE,
    MAX_BODY,
    MAX_UPLOAD,
    OwnPageOnly,
    check_binding,
    is_loopback,
    private_folder,
)


def asked(path: str, method: str = "GET", loopback: bool = True, **headers: str) -> Any:
    """Status of a refusal; None if it is let through."""
    given = {"host": "127.0.0.1:7860"} | {k.replace("_", "-"): v for k, v in headers.items()}
    raw = [(name.encode(), value.encode("latin-1")) for name, value in given.items()]
    scope = {"type": "http", "path": path, "method": method, "headers": raw}
    refusal = OwnPageOnly(None, loopback).refusal(scope)
    return refusal and refusal[0]


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost", "[::1]:80", "127.9.9.9"])
def test_names_of_this_machine_are_answered(host: str) -> None:
    assert asked("/", host=host) is None


@pytest.mark.parametrize("host", ["evil.example:7860", "127.0.0.1.evil.example", "", "10.0.0.1"])
def test_other_names_are_not_so_that_rebinding_gains_nothing(host: str) -> None:
    assert asked("/", host=host) == 421
    assert asked("/", host=host, loopback=False) is None, "there a password is asked for"


@pytest.mark.parametrize("host", ["[", "a b", "[::1", "x:99999999", "user@localhost", "\xff"])
def test_what_names_no_host_is_refused(host: str) -> None:
    for loopback in (True, False):
        assert asked("/", loopback=loopback, host=host) == 400


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:7861", "http://[", "", "\xff"]
)
def test_other_sites_may_not_use_the_page(origin: str) -> None:
    for loopback in (True, False):
        assert asked("/gradio_api/queue/join", "POST", loopback, origin=origin) == 403
    same = {"origin": "http://127.0.0.1:7860", "content_length": "10"}
    assert asked("/gradio_api/queue/join", "POST", **same) is None


@pytest.mark.parametrize(
    "path",
    [
        *("/docs", "/openapi.json", "/gradio_api/info", "/gradio_api/openapi.json", "/monitoring"),
        *("/gradio_api/proxy=http://10.0.0.1/", "/gradio_api/file=http://10.0.0.1/x.png"),
        *("/gradio_api/file=https:/evil", "/gradio_api/component_server", "/gradio_api/call/x"),
        *("/gradio_api/vibe-edit/", "/gradio_api/process_recording", "/gradio_api/runs"),
        *("/gradio_api/dev/reload", "/gradio_api/deep_link", "/custom_component/x"),
    ],
)
def test_what_the_page_does_not_use_is_not_there(path: str) -> None:
    assert asked(path) == 404
    assert asked(path, "POST", content_length="1") == 404


@pytest.mark.parametrize(
    "path", ["/", "/config", "/assets/index.js", "/theme.css", "/gradio_api/file=/tmp/x/a.png"]
)
def test_what_it_uses_is(path: str) -> None:
    assert asked(path) is None


async def _unforeseen(scope: Any, receive: Any, send: Any) -> None:
    if scope["path"] == "/config":
        await send({"type": "http.response.start", "status": 200, "headers": []})
    raise KeyError("of a library")


def answers(app: Any, path: str, method: str = "GET", body: bytes = b"", **headers: str) -> Any:
    """All that is sent back, and what the layer below was asked."""
    given = {"host": "localhost", "content-length": str(len(body))}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    raw = [(name.encode(), value.encode()) for name, value in given.items()]
    scope = {"type": "http", "path": path, "method": method, "headers": raw}
    sent, seen = [], []

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    async def below(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope, await receive()))
        await app(scope, receive, send)

    asyncio.run(OwnPageOnly(below, loopback=True)(scope, receive, send))
    return sent, seen


def test_an_error_nobody_foresaw_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    (start, body), _ = answers(_unforeseen, "/")
    assert start["status"] == 400
    assert body["body"] == b"the request cannot be answered; found KeyError"
    (record,) = caplog.records
    assert record.exc_info is None
    assert "request GET /: failed; found KeyError at test_ui_safety.py" in record.message
    assert "\n" not in record.message
    (start, end), _ = answers(_unforeseen, "/config")
    assert (start["status"], end["body"]) == (200, b""), "an answer that was begun is ended"


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"[", b"[]", b"NaN", b'{"a": NaN}', b'{"a": -Infinity}', b'{"a": 1e999}'),
        *(
            b"\xff\xfe",
            b'{"a": "\\ud800"}',
            b'{"a": ' + b"[" * 60_000,
            b'{"a": ' + b"9" * 6000 + b"}",
        ),
    ],
)
@pytest.mark.parametrize("path", ["queue/join", "run/predict", "cancel", "reset"])
def test_a_body_that_is_no_json_object_is_refused(body: bytes, path: str) -> None:
    (start, end), seen = answers(_unforeseen, f"/gradio_api/{path}", "POST", body)
    assert start["status"] == 400
    assert b"the request" in end["body"]
    assert not seen


def test_no_proxy_is_believed_that_was_not_named() -> None:
    forwarded = {"x_forwarded_host": "evil.example", "x_forwarded_proto": "https"}
    _, ((scope, _),) = answers(_unforeseen, "/", **forwarded)
    assert [name for name, _ in scope["headers"]] == [b"host", b"content-length"]


def test_a_visitor_is_known_by_a_cookie_that_nobody_else_can_make() -> None:
    layer = OwnPageOnly(None, loopback=True)
    name, made = layer._visitor({"path": "/", "headers": []})
    assert made is not None
    assert b"HttpOnly; SameSite=Strict" in made
    pair = made.split(b";")[0]
    assert layer._visitor({"path": "/", "headers": [(b"cookie", b"a=b; " + pair)]}) == (name, None)
    forged = pair[:-1] + (b"0" if pair[-1:] != b"0" else b"1")
    other, again = layer._visitor({"path": "/config", "headers": [(b"cookie", forged)]})
    assert other != name
    assert again is not None
    nobody = layer._visitor({"path": "/gradio_api/upload", "headers": [(b"cookie", forged)]})
    assert nobody == (None, None), "made with the page alone"


def test_requests_have_a_size() -> None:
    join, upload = "/gradio_api/queue/join", "/gradio_api/upload"
    assert asked(join, "POST") == 411
    for size in ("-1", "1e3", "\xb2", "9" * 5000):
        assert asked(join, "POST", content_length=size) in (411, 413)
    assert asked(join, "POST", content_length=str(MAX_BODY + 1)) == 413
    assert asked(upload, "POST", content_length=str(MAX_BODY + 1)) is None
    assert asked(upload, "POST", content_length=str(MAX_UPLOAD + 1)) == 413


def test_passwords_cannot_be_tried_for_long() -> None:
    layer = OwnPageOnly(None, loopback=False)
    headers = [(b"host", b"x"), (b"content-length", b"30")]
    scope = {"type": "http", "path": "/login", "method": "POST", "headers": headers}
    told = [layer.refusal(scope) for _ in range(LOGINS_A_MINUTE + 1)]
    assert told[:-1] == [None] * LOGINS_A_MINUTE
    assert told[-1] == (429, "too many attempts; wait a minute")


@pytest.mark.parametrize(("host", "here"), [("::1", True), ("10.0.0.1", False), ("x.y", False)])
def test_loopback(host: str, here: bool) -> None:
    assert is_loopback(host) is here


def test_others_are_let_in_with_a_password_only() -> None:
    check_binding("127.0.0.1", "")
    check_binding("0.0.0.0", "long enough")  # noqa: S104 - nothing listens
    with pytest.raises(ArgumentError, match="open to everyone"):
        check_binding("0.0.0.0", "")  # noqa: S104
    with pytest.raises(ArgumentError, match="password: is too short"):
        check_binding("127.0.0.1", "short")


def test_the_command_says_so_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("IPDIVERSE_UI_PASSWORD", raising=False)
    assert main(["ui", "--host", "0.0.0.0"]) == 2  # noqa: S104
    error = capsys.readouterr().err
    assert "host 0.0.0.0: would be open to everyone who can reach this machine" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "0"], "port: is out of range"),
        (["--bases", "no/such"], "base no/such: does not exist"),
        (["--adapters", "no.safetensors"], "adapter no.safetensors: does not exist"),
        (
            ["--bases", "sd15"],
            "base sd15: is a preset, not a file or a folder. Leave it out",
        ),
        (["--adapters", "sd15"], "`ipdiverse generate --base sd15 --image FILE` downloads them."),
        (["--bases", "empty"], "empty: is not a base; expected a model_index.json"),
        (["--bases", "ref.png"], "ref.png: cannot be a base; expected .safetensors; found .png"),
        (["--adapters", "empty"], "empty: does not hold a checkpoint"),
        (["--adapters", "ref.png"], "ref.png: cannot be an adapter; expected .safetensors | .bin"),
        (["--waiting", "0"], "waiting: is out of range"),
    ],
)
def test_bad_options_are_one_line(
    flags: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "ref.png").touch()
    assert main(["ui", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "pip install 'ipdiverse[ui]'"),
        ('{"url": "file:///a/b", "dir_info": {"editable": true}}', "pip install -e '/a/b[ui]'"),
        ('{"url": "file:///a%20b", "dir_info": {}}', "pip install '/a b[ui]'"),
        ('{"url": "file:///a/i.whl", "archive_info": {}}', "pip install '/a/i.whl[ui]'"),
    ],
)
def test_without_gradio_the_command_says_what_to_install(
    origin: str | None,
    command: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By how it was installed: from an index, a checkout, a copy, a wheel (PEP 610)."""
    installed = SimpleNamespace(read_text={"direct_url.json": origin}.get)
    monkeypatch.setattr("ipdiverse.commands.console.find_spec", lambda name: None)
    monkeypatch.setattr("ipdiverse.commands.console.distribution", lambda name: installed)
    assert main(["ui"]) == 2
    error = capsys.readouterr().err
    assert error == f"ipdiverse: ui: needs gradio, which is not installed. Run `{command}`.\n"


def test_the_cache_is_private_and_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with private_folder() as folder:
        assert folder.stat().st_mode & 0o077 == 0
        (folder / "in").mkdir()
        (folder / "in" / "x").write_bytes(b"x")
    assert os.listdir(tmp_path) == []  # noqa: PTH208
