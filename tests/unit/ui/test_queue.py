"""Visitors and their jobs, without a page: who is forgotten, and that nothing waits for ever."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ipdiverse.errors import ModelError
from ipdiverse.sampling.request import Request
from ipdiverse.ui.queue import Job, Session, Sessions, Turns

if TYPE_CHECKING:
    from pathlib import Path

PATIENCE = 300
"""Seconds that anything may take on a busy machine."""


@pytest.fixture
def sessions(tmp_path: Path) -> Sessions:
    return Sessions(tmp_path / "work")


def job_of(sessions: Sessions, session: Session) -> Job:
    requests = {"out": Request(image=("cat.png",), n=2, steps=4)}
    session.jobs["vary"] = Job(sessions.turns, requests, ("cat.png",), session.folder / "vary")
    return session.jobs["vary"]


def test_one_visitor_too_many_forgets_who_was_away_longest(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ipdiverse.ui.queue.MAX_SESSIONS", 2)
    here, away = sessions.of("here"), sessions.of("away")
    kept, forgotten = job_of(sessions, here), job_of(sessions, away)
    (away.folder / "0000.png").touch()
    assert sessions.of("here") is here, "seen after the other"
    newest = sessions.of("newest")
    assert forgotten.stopped
    assert not away.folder.exists()
    assert not kept.stopped
    assert here.folder.is_dir()
    assert newest.folder.is_dir()
    assert sessions.of("here") is here
    again = sessions.of("away")
    assert again is not away
    assert again.jobs == {}
    assert not newest.folder.exists()


@pytest.mark.parametrize(
    ("raised", "line", "traced"),
    [
        (ModelError("unknown base", where="x"), "x: unknown base", False),
        (KeyError("a secret"), "drawing failed; found KeyError", True),
    ],
)
def test_whatever_is_raised_ends_the_job_with_a_line(
    raised: Exception,
    line: str,
    traced: bool,
    sessions: Sessions,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def base(*_: object) -> None:
        raise raised

    monkeypatch.setattr(Turns, "base", base)
    job = job_of(sessions, sessions.of("visitor"))
    job.start()
    assert job.wait(PATIENCE), "the visitor waits no more"
    assert str(job.error) == line
    assert ("a secret" in capsys.readouterr().err) is traced, "for who runs the page"
    assert not sessions.turns.busy, "the next may draw"
