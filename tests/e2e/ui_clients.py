"""Visitors of the page: a browser, and programs that speak to it without one."""

from __future__ import annotations

import json
import shutil
import socket
import time
import uuid
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ipdiverse.ui.queue import Job
    from ipdiverse.ui.server import Page as Served
    from ipdiverse.ui.visitors import Session

PATIENCE = 300.0
"""Seconds that anything may take on a busy machine."""
CHROMIUM = next(filter(None, map(shutil.which, ("/usr/bin/chromium", "chromium"))), None)
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def until(holds: Callable[[], Any], what: str, patience: float = PATIENCE) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + patience
    while not holds():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.05)


class Client:
    """A program that sends what the page's own script would."""

    def __init__(self, url: str) -> None:
        # a connection that is kept may be closed by the server just as it is used again
        fresh = httpx.Limits(max_keepalive_connections=0)
        options: dict[str, Any] = {"timeout": PATIENCE, "trust_env": False, "limits": fresh}
        # over plain http: reading the system's certificates would take longer than a request
        self.http = httpx.Client(base_url=url, verify=False, **options)  # noqa: S501
        self.session = uuid.uuid4().hex[:10]
        self._config: dict[str, Any] | None = None

    @property
    def config(self) -> dict[str, Any]:
        found = self._config or self.http.get("/config").raise_for_status().json()
        self._config = found
        return found

    def event(self, element: str, kind: str) -> dict[str, Any]:
        """The event of an element, by the id it has on the page."""
        ids = {c["props"].get("elem_id"): c["id"] for c in self.config["components"]}
        wanted = [ids[element], kind]
        return next(d for d in self.config["dependencies"] if wanted in d["targets"])

    def body(self, element: str, kind: str, data: list[Any], **more: Any) -> dict[str, Any]:
        number = self.event(element, kind)["id"]
        return {"fn_index": number, "data": data, "session_hash": self.session, **more}

    def now(self, element: str, kind: str, data: list[Any], **more: Any) -> httpx.Response:
        """An event that waits for nobody."""
        return self.http.post(
            "/gradio_api/run/predict", json=self.body(element, kind, data, **more)
        )

    def take_example(self, number: int = 0) -> None:
        event = {"index": number, "value": None, "selected": True}
        self.now("vary-examples", "select", [], event_data=event).raise_for_status()

    def join(
        self, prompt: str = "a critter", seed: int = 0, steps: int = 1, count: int = 1
    ) -> httpx.Response:
        """Ask for images, and get a place in the queue or none."""
        asked = [prompt, "", 0.5, count, 1, seed, True, steps, 3, "critters", "plus", "concat", 0]
        return self.http.post("/gradio_api/queue/join", json=self.body("vary-go", "click", asked))

    def messages(self) -> Iterator[dict[str, Any]]:
        """What the page tells this session, until there is no more."""
        where = f"/gradio_api/queue/data?session_hash={self.session}"
        with self.http.stream("GET", where) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))

    def outcome(self) -> dict[str, Any]:
        """The last message of a drawing."""
        last: dict[str, Any] = {}
        for message in self.messages():
            if message["msg"] in ("process_completed", "process_generating"):
                last = message
            if message["msg"] == "close_stream":
                break
        return last

    def upload(self, name: str, data: bytes) -> httpx.Response:
        return self.http.post("/gradio_api/upload", files={"files": (name, data)})


def session_of(served: Served, client: Client) -> Session:
    """A client's, with the cookie that it was given."""
    cookie = client.http.cookies.get("ipdiverse-visitor")
    return served.sessions.of(client.session, cookie and cookie.partition(".")[0])


def waiting_job(served: Served, client: Client, **wanted: Any) -> Job:
    """A client's, that is the next to draw; somebody else has the turn."""
    client.join(**wanted).raise_for_status()
    jobs = session_of(served, client).jobs
    until(lambda: "vary" in jobs, "the queue lets the first one through")
    return jobs["vary"]


def empty_line(served: Served) -> None:
    """Stop the jobs of whoever joined and never listened."""
    turns = served.sessions.turns
    for job in turns._jobs():
        job.stop()
    until(lambda: not (turns._line or turns.busy), "the line is empty")
    turns._promised.clear()
