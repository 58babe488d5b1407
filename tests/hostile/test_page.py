"""Requests that the page's own script would never send: a line each, and nothing read or fetched.

What a crowd does to it: test_crowd.py.
"""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("gradio", reason="the page needs gradio")

from tests.e2e.ui_clients import Client
from tests.hostile.test_pictures import BOMBS, encoded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ipdiverse.ui.server import Page as Served


def uploaded(client: Client, name: str, data: bytes) -> dict[str, Any]:
    (path,) = client.upload(name, data).raise_for_status().json()
    return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    "name", ["../../../evil.png", "..\\..\\evil.png", "/etc/evil.png", "%2e.png"]
)
def test_names_cannot_lead_out_of_the_cache(client: Client, served: Served, name: str) -> None:
    given = uploaded(client, name, encoded("PNG"))
    assert Path(given["path"]).resolve().is_relative_to(served.folder / "gradio")
    answer = client.now("vary-upload", "upload", [[given]]).json()
    assert "Reference: " in str(answer["data"])
    assert ".." not in str(answer["data"][1])


def test_a_file_of_the_machine_cannot_be_named(client: Client, served: Served) -> None:
    secret = served.folder / "work" / "secret.png"
    secret.parent.mkdir(exist_ok=True)
    secret.write_bytes(b"secret")
    for path in ("/etc/passwd", str(Path(__file__)), str(secret), "../../etc/passwd"):
        given = {"path": path, "meta": {"_type": "gradio.FileData"}}
        answer = client.now("vary-upload", "upload", [[given]])
        assert answer.status_code >= 400
        assert "root:" not in answer.text
        assert client.http.get(f"/gradio_api/file={path}").status_code in (403, 404)


def test_no_address_is_ever_fetched(client: Client) -> None:
    with socket.socket() as trap:
        trap.bind(("127.0.0.1", 0))
        trap.listen()
        trap.settimeout(1)
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/x.png"
        for given in ({"path": url}, {"path": url, "url": url}, {"path": "x.png", "url": url}):
            sent = given | {"meta": {"_type": "gradio.FileData"}}
            assert client.now("vary-upload", "upload", [[sent]]).status_code >= 400
        assert client.http.get(f"/gradio_api/file={url}").status_code == 404
        with pytest.raises(TimeoutError):
            trap.accept()


WRONG: dict[str, Any] = {
    "null": None,
    "true": True,
    "negative": -1,
    "fraction": 1.5,
    "huge": 10**300,
    "infinite": 1e999,
    "NaN": float("nan"),
    "text": "x",
    "long": "x" * 100_000,
    "place": "/etc/passwd",
    "elsewhere": "../../x.safetensors",
    "address": "http://127.0.0.1:9/x",
    "control": "\x1b[2J\r\0\u202e",
    "surrogate": "\ud800",
    "list": [],
    "nested": [[0]],
    "object": {},
    "file": {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
    "twice": ["0", "0"],
}


def bodies(client: Client) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every field of every event of the page, each with every wrong value; where each is sent."""
    components = {c["id"]: c["props"] for c in client.config["components"]}
    about = {"session_hash": client.session, "event_data": {"index": 0}}
    for event in client.config["dependencies"]:
        usual = [components[number].get("value") for number in event["inputs"]]
        body = {"fn_index": event["id"], "data": usual, **about}
        path = "/gradio_api/queue/join" if event["queue"] else "/gradio_api/run/predict"
        for wrong in WRONG.values():
            for at in range(len(usual)):
                yield path, body | {"data": [*usual[:at], wrong, *usual[at + 1 :]]}
            for name in ("fn_index", "data", "event_data", "session_hash", "trigger_id", "batched"):
                yield path, body | {name: wrong}
    for wrong in WRONG.values():
        for name in ("fn_index", "session_hash", "event_id"):
            usual = {"fn_index": 0, "session_hash": client.session, "event_id": "x"}
            yield "/gradio_api/cancel", usual | {name: wrong}


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_wrong_value_of_any_field_is_one_line(
    every: int,
    client: Client,
    capfd: pytest.CaptureFixture[str],
    served: Served,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ipdiverse.ui.safety._PATIENCE", 0.0)
    codes = set()
    with served.sessions.turns.turn(lambda: None):  # nothing is drawn
        for path, body in list(bodies(client))[::every]:
            kind = {"content-type": "application/json"}
            answer = client.http.post(path, content=json.dumps(body), headers=kind)
            codes.add(answer.status_code)
            if answer.status_code != 200:
                assert answer.json()["detail"].count("\n") == 0
                assert len(answer.text) < 2500
    assert codes == {200, 400, 429}
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err + captured.out


def test_requests_that_no_browser_sends_are_one_line(
    client: Client, capfd: pytest.CaptureFixture[str]
) -> None:
    get = client.http.get
    assert get("/", headers={"Host": "["}).status_code == 400
    assert get("/", headers={"Origin": "http://["}).status_code == 403
    forwarded = {"X-Forwarded-Host": "evil.example", "X-Forwarded-For": "10.0.0.1"}
    assert "evil.example" not in get("/config", headers=forwarded).text
    for path in ("queue/data?session_hash=x", "file=%00", "file=" + "x" * 5000, "heartbeat/%00"):
        assert get(f"/gradio_api/{path}").status_code in (200, 403, 404)
    for name in (".png", "\0.png", "x" * 3000 + ".png", "..", ""):
        answer = client.upload(name, b"no picture")
        if answer.status_code == 400:
            continue
        (path,) = answer.raise_for_status().json()
        told = client.now("vary-upload", "upload", [[{"path": path, "orig_name": name}]])
        assert "not an image of an accepted format" in told.raise_for_status().text
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err + captured.out


def test_one_file_named_many_times_is_read_once(client: Client) -> None:
    given = uploaded(client, "cat.png", encoded("PNG"))
    answer = client.now("vary-upload", "upload", [[given] * 9])
    assert answer.status_code == 400
    assert "is named twice" in answer.json()["detail"]


def test_uploads_have_a_size(client: Client) -> None:
    from ipdiverse.image_io import MAX_FILE_BYTES

    answer = client.upload("large.png", bytes(MAX_FILE_BYTES + 1))
    assert answer.status_code == 413
    assert "size" in answer.text


def test_other_hosts_and_sites_are_refused(client: Client) -> None:
    get = client.http.get
    assert get("/", headers={"Host": "evil.example"}).status_code == 421
    assert get("/config", headers={"Origin": "http://evil.example"}).status_code == 403
    assert get("/gradio_api/info").status_code == 404
    answer = get("/")
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_nothing_is_offered_to_programs_or_told_of_the_machine(client: Client) -> None:
    import ipdiverse

    assert {d["api_visibility"] for d in client.config["dependencies"]} == {"private"}
    assert str(Path(ipdiverse.__file__).parent) not in str(client.config)
    assert client.config["analytics_enabled"] is False


def take(client: Client, name: str, data: bytes) -> str:
    """Give a picture as a reference; what the page says of it."""
    given = uploaded(client, name, data)
    return client.now("vary-upload", "upload", [[given]]).raise_for_status().json()["data"][1]


@pytest.mark.parametrize(
    ("amount", "kind"),
    [(2, "repeated EXIF"), (2, "long texts"), (2, "scans")]
    + [pytest.param(40, kind, marks=pytest.mark.slow) for kind in BOMBS],
)
def test_pictures_made_to_stall_are_a_line_each_and_examples_go_on(
    amount: int, kind: str, client: Client, capfd: pytest.CaptureFixture[str]
) -> None:
    """How much work each is: test_pictures.py."""
    others = [Client(str(client.http.base_url)) for _ in range(2)]
    data, told = BOMBS[kind](amount), list[str]()
    for other in others:
        other._config = client.config
    crowd = [
        threading.Thread(target=lambda one=one: told.append(take(one, "a.png", data)))
        for one in others
    ]
    for one in crowd:
        one.start()
    client.take_example()
    for one in crowd:
        one.join()
    assert len(told) == 2
    for line in told:
        assert "Reference: a.png." in line or line.count('role="alert"') == 1
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err + captured.out
