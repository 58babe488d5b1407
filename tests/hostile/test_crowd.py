"""Crowds at the page: who came in good faith is drawn in turn, and keeps what is theirs."""

from __future__ import annotations

import resource
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the page needs gradio")

from ipdiverse.ui.queue import PLACES, Job, Sheet
from tests.e2e.ui_clients import (
    PATIENCE,
    Client,
    session_of,
    until,
    waiting_job,
)
from tests.hostile.test_pictures import encoded

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import httpx

    from ipdiverse.sampling.request import Request
    from ipdiverse.ui.server import Page as Served

WAITING = 5
MIB = 2**20


def browser(served: Served, like: Client | None = None) -> Client:
    """A client with a cookie of its own."""
    client = Client(served.url)
    client.http.get("/config").raise_for_status()
    client._config = like and like.config
    return client


class Drawing:
    """Stands in for the model: a turn draws one batch of flat images, when the test lets it."""

    BATCH = 4

    def __init__(self) -> None:
        self.order: list[str] = []
        self._let = threading.Semaphore(0)

    def let(self, turns: int) -> None:
        """Let so many turns pass, and wait until they have."""
        wanted = len(self.order) + turns
        self._let.release(turns)
        until(lambda: len(self.order) >= wanted, f"{turns} turns")

    def draw(self, job: Job, inside: str, request: Request) -> None:
        """One turn of a job, in place of `Job._draw`."""
        while not self._let.acquire(timeout=0.02):
            job._check()
        folder, files = job.folder / inside, job.files.setdefault(inside, [])
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(len(files), min(request.n, len(files) + self.BATCH)):
            image = Image.new("RGB", (8, 8))
            image.save(folder / f"{number:04d}.png")
            job._drawn.append(image)
            files.append(folder / f"{number:04d}.png")
            job.done += request.steps or 0
        if len(files) == request.n:
            named = replace(request, image=job.names)
            job.sheets[inside] = Sheet(named, [], False, None, 3.0)
        self.order.append(job.visitor)


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> Drawing:
    drawing = Drawing()

    def draw(job: Job, inside: str, request: Request) -> None:
        drawing.draw(job, inside, request)

    monkeypatch.setattr(Job, "_draw", draw)
    return drawing


def flood(client: Client, over: threading.Event) -> None:
    """Ask for all that can be had, again and again, and wait for it as a page would."""
    while not over.is_set():
        if 200 in [client.join(count=16).status_code for _ in range(PLACES + 1)]:
            client.outcome()


def drawn_files(outcome: dict[str, Any]) -> set[str]:
    """Every file that an outcome names."""

    def found(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            yield from [value["path"]] if isinstance(value.get("path"), str) else []
            value = list(value.values())
        if isinstance(value, list):
            for one in value:
                yield from found(one)

    return set(found(outcome["output"]["data"]))


def keeps_all(client: Client, files: set[str]) -> None:
    """A visitor's reload finds the reference again, and the results are still there."""
    assert files
    for file in files:
        assert client.http.get(f"/gradio_api/file={file}").status_code == 200, file
    loads = [d for d in client.config["dependencies"] if any(k == "load" for _, k in d["targets"])]
    again = {"data": [[]], "session_hash": "reloaded"}
    told = [
        client.http.post("/gradio_api/run/predict", json={"fn_index": one["id"], **again}).text
        for one in loads
        if len(one["inputs"]) == 1
    ]
    assert any("Reference: critter-1.png." in text for text in told)


@pytest.mark.parametrize(
    ("many", "count"), [(15, 4), *(pytest.param(50, n, marks=pytest.mark.slow) for n in (4, 16))]
)
def test_under_a_flood_a_visitor_is_drawn_within_five_turns_a_batch(
    many: int, count: int, served: Served, client: Client, drawing: Drawing
) -> None:
    crowd = [browser(served, client) for _ in range(many)]
    for one in crowd:
        one.take_example()
    over = threading.Event()
    with ThreadPoolExecutor(many + 1) as pool:
        for one in crowd:
            pool.submit(flood, one, over)
        try:
            drawing.let(4 * many)  # the line is full, and everybody has had some turns
            honest = browser(served, client)
            honest.take_example()
            before = len(drawing.order)
            # at most a few others are being let in at the same moment
            codes = [honest.join(count=count).status_code]
            while codes[-1] != 200 and len(codes) < 30:
                codes.append(honest.join(count=count).status_code)
            assert codes[-1] == 200, codes
            outcome = pool.submit(honest.outcome)
            until(lambda: "vary" in session_of(served, honest).jobs, "the job has come")
            job = session_of(served, honest).jobs["vary"]
            until(lambda: job.ready, "the page listens")
            while job.done < job.total:
                assert not job.stopping, job.error
                drawing.let(1)
            took = drawing.order[before:]
            assert took.count(job.visitor) == count // Drawing.BATCH
            assert len(took) <= (WAITING + 1) * count // Drawing.BATCH, took
            told = outcome.result(PATIENCE)
        finally:
            over.set()
            drawing._let.release(10_000)
    assert f"Done: {count} images." in str(told)
    keeps_all(honest, drawn_files(told))


@pytest.mark.parametrize("cookies", [False, True], ids=["programs", "browsers"])
def test_130_foreign_sessions_push_nobody_out(
    cookies: bool,
    served: Served,
    client: Client,
    drawing: Drawing,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ipdiverse.ui.visitors.MAX_VISITORS", 20)
    honest = browser(served)
    honest.take_example()
    honest.join(count=4).raise_for_status()
    drawing._let.release()
    files = drawn_files(honest.outcome())
    foreign = Client(served.url)
    foreign._config = honest.config
    for number in range(130):
        foreign.session = f"foreign-{number}"
        foreign.http.cookies.clear()
        if cookies:
            foreign.http.get("/config")
        foreign.now("vary-star", "click", []).raise_for_status()
    assert len({one.visitor.folder for one in served.sessions.all()}) <= 20
    keeps_all(honest, files)


def test_uploads_of_all_have_a_bound_in_sum(
    served: Served, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ipdiverse.ui.visitors.MAX_UPLOAD", 4 * MIB)
    monkeypatch.setattr("ipdiverse.ui.visitors.MAX_UPLOADS", 10 * MIB)
    (mine,) = client.upload("mine.png", encoded("PNG")).raise_for_status().json()
    crowd = [browser(served, client) for _ in range(5)]
    for number in range(20):
        for owner, one in enumerate(crowd):
            one.upload("a.png", bytes([number, owner]) * (MIB // 2)).raise_for_status()
            held = sum(file.stat().st_size for file in uploads(served))
            assert held <= 10 * MIB
    assert len(list(uploads(served))) >= 8, "what fits is kept"
    told = client.now("vary-upload", "upload", [[{"path": mine, "orig_name": "mine.png"}]])
    assert "Reference: mine.png." in told.raise_for_status().text


def uploads(served: Served) -> Iterator[Path]:
    return (served.folder / "gradio").rglob("*a.png")


def test_silent_connections_are_dropped(
    served: Served, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ipdiverse.ui.server.SILENCE", 0.2)
    idle = connections(served, 60)
    until(lambda: all(map(closed, idle)), "nobody is silent for ever")
    assert client.http.get("/config").status_code == 200


def connections(served: Served, count: int) -> list[socket.socket]:
    """Open ones that never complete a request: some say nothing, some stop in the middle."""
    port = int(served.url.rstrip("/").rpartition(":")[2])
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
    for one in idle[::3]:
        one.sendall(b"GET / HTTP/1.1\r\nHost:")
    for one in idle[1::3]:
        one.sendall(b"POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nx")
    return idle


def test_fifty_at_once_are_drawn_or_told_to_come_back(
    served: Served, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    # each with a cookie of its own: all programs without one have two places together
    first, *crowd = [Client(served.url) for _ in range(51)]
    for one in (first, *crowd):
        one.http.get("/config").raise_for_status()
        one._config = client.config
        one.take_example()
    draw, drawing, at_once = Job._draw, [], []

    def counted(job: Job, *rest: Any) -> None:
        drawing.append(job)
        at_once.append(len(drawing))
        try:
            draw(job, *rest)
        finally:
            drawing.remove(job)

    monkeypatch.setattr(Job, "_draw", counted)
    monkeypatch.setattr("ipdiverse.ui.queue._UNHEARD", PATIENCE)  # all listen at the end only
    gate = threading.Barrier(50)

    def come(number: int) -> httpx.Response:
        gate.wait()
        return crowd[number].join("a critter", seed=1000 + number, steps=2)

    with ThreadPoolExecutor(50) as pool:
        with served.sessions.turns.turn(lambda: None):
            waiting_job(served, first, seed=999)
            answers = list(pool.map(come, range(50)))
        taken = [n for n, answer in enumerate(answers) if answer.status_code == 200]
        told = list(pool.map(Client.outcome, [first, *(crowd[n] for n in taken)]))
    refused = [answer.text for answer in answers if answer.status_code == 503]
    assert (len(taken), len(refused)) == (WAITING, 50 - WAITING), "nobody is left without an answer"
    assert all("Queue is full" in text for text in refused)
    for number, outcome in zip([-1, *taken], told, strict=True):
        assert outcome["msg"] == "process_completed"
        assert outcome["success"]
        assert f"--seed={1000 + number}" in str(outcome["output"]), "everyone's own"
        assert "Done: 1 image." in str(outcome["output"])
    assert at_once == [1] * (1 + WAITING), "one generation at a time"


def test_programs_without_a_cookie_share_two_places(served: Served, client: Client) -> None:
    crowd = [Client(served.url) for _ in range(5)]
    for one in crowd:
        one._config = client.config
        one.take_example()
    with served.sessions.turns.turn(lambda: None):
        codes = [one.join().status_code for one in crowd]
        assert codes == [200, 200, 429, 429, 429]
        client.take_example()
        job = waiting_job(served, client, steps=2)
        told: list[Any] = []
        listening = threading.Thread(target=lambda: told.append(client.outcome()))
        listening.start()
    listening.join(PATIENCE)
    assert "Done: 1 image." in str(told), "a browser is not kept out"
    assert job.images == 1


def test_who_never_listens_is_dropped_before_anything_is_drawn(
    served: Served, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ipdiverse.ui.queue._UNHEARD", 1.0)
    client.take_example()
    client.join(steps=100, count=16).raise_for_status()
    until(lambda: "vary" in session_of(served, client).jobs, "the job has come")
    job = session_of(served, client).jobs["vary"]
    until(lambda: job.wait(0), "nobody listens")
    assert (job.done, job.stopped) == (0, True)
    assert served.sessions.turns._jobs() == []


def test_a_program_that_hangs_up_frees_the_slot(served: Served, client: Client) -> None:
    client.take_example()
    client.join(steps=100, count=16).raise_for_status()
    stream = client.messages()
    while next(stream)["msg"] != "process_generating":
        pass
    job = session_of(served, client).jobs["vary"]
    stream.close()  # type: ignore[attr-defined]
    until(lambda: job.wait(0), "the slot is free", 60)
    assert job.stopped


@pytest.mark.parametrize("count", [450, pytest.param(1100, marks=pytest.mark.slow)])
def test_idle_connections_shut_nobody_out(count: int, client: Client, served: Served) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    idle = connections(served, count)
    assert client.http.get("/config").status_code == 200
    served_now = [one for one in idle if not closed(one)]
    assert len(served_now) <= 400
    for one in idle:
        one.close()


def closed(one: socket.socket) -> bool:
    one.setblocking(False)
    try:
        return one.recv(2**16) == b""  # else an answer is being read
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
