"""Visitors and their jobs, without a page: who is forgotten, and that nothing waits for ever."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ipdiverse.errors import ArgumentError, ModelError
from ipdiverse.sampling.request import Request
from ipdiverse.ui.queue import GaveWay, Job, Turns
from ipdiverse.ui.visitors import Session, Sessions, Visitor

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
    monkeypatch.setattr("ipdiverse.ui.visitors.MAX_VISITORS", 2)
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


def waiting(turns: Turns, visitor: Visitor, n: int, steps: int = 25) -> Job:
    """A job of a visitor that is in the line, without a thread."""
    requests = {"out": Request(image=("cat.png",), n=n, steps=steps)}
    job = Job(turns, requests, ("cat.png",), visitor.folder / "vary", visitor)
    turns.join(job)
    return job


def visitors(sessions: Sessions, *names: str) -> list[Visitor]:
    return [sessions.of(name, name).visitor for name in names]


def next_of(turns: Turns) -> Job:
    (found,) = [job for job in turns._line if turns._is_next(job)]
    return found


def drawn_in_turns(turns: Turns, batches: int, batch: int = 4) -> list[Visitor | None]:
    """Who draws each of the next batches."""
    order = []
    for _ in range(batches):
        job = next_of(turns)
        with turns.turn(lambda: None, job):
            order.append(job.visitor)
            job._charge(batch * next(iter(job.requests.values())).steps or 0)
            if job.done >= job.total:
                turns.leave(job)
    return order


def test_visitors_take_turns_batch_by_batch(sessions: Sessions) -> None:
    a, b, c = visitors(sessions, "a", "b", "c")
    for one in (a, b, c):
        waiting(sessions.turns, one, n=16)
    order = drawn_in_turns(sessions.turns, 12)
    assert [set(order[i : i + 3]) for i in (0, 3, 6, 9)] == [{a, b, c}] * 4


def test_one_small_drawing_waits_for_no_flood(sessions: Sessions) -> None:
    flood = visitors(sessions, *(f"flood {n}" for n in range(8)))
    for one in flood:
        waiting(sessions.turns, one, n=16, steps=100)
    drawn_in_turns(sessions.turns, 3)
    (honest,) = visitors(sessions, "honest")
    job = waiting(sessions.turns, honest, n=4)
    assert drawn_in_turns(sessions.turns, 1) == [honest]
    assert job.done == job.total


def test_a_large_batch_is_interrupted_for_a_small_drawing_but_not_for_ever(
    sessions: Sessions,
) -> None:
    large, small, other = visitors(sessions, "large", "small", "other")
    first = waiting(sessions.turns, large, n=16, steps=100)
    first._turn_from, first._finished = 0, 0
    first._step(4)
    waiting(sessions.turns, other, n=16, steps=100)
    first._step(4)
    assert first.done == 8, "one that asks for as much waits for the end of the batch"
    waiting(sessions.turns, small, n=1)
    for _ in range(3):
        with pytest.raises(GaveWay):
            first._step(4)
        first._charge(first._finished - first.done)
        first._step(4)
    first._step(4)
    assert first.done == 8


def test_who_waits_for_many_turns_is_next(sessions: Sessions) -> None:
    large, *crowd = visitors(sessions, "large", *(f"small {n}" for n in range(60)))
    mine = waiting(sessions.turns, large, n=16, steps=100)
    turns = 0
    for one in crowd:
        waiting(sessions.turns, one, n=4)
        turns += 1
        if drawn_in_turns(sessions.turns, 1) == [large]:
            break
    assert mine.done == 400
    assert turns < 40


def test_places_are_few_and_go_to_those_who_ask_for_little(sessions: Sessions) -> None:
    sessions.turns._waiting = 3
    greedy, modest, late = visitors(sessions, "greedy", "modest", "late")
    first = waiting(sessions.turns, greedy, n=16, steps=100)
    second = waiting(sessions.turns, greedy, n=16, steps=100)
    before = greedy.used
    with pytest.raises(ArgumentError, match="2 of your drawings are waiting"):
        waiting(sessions.turns, greedy, n=1)
    assert greedy.used > before + 100, "asking again and again brings the next turn no nearer"
    waiting(sessions.turns, modest, n=4)
    waiting(sessions.turns, modest, n=4)
    assert sessions.turns.admit(late) is None
    waiting(sessions.turns, late, n=4)
    assert (first.stopping, second.stopping) in ((True, False), (False, True))
    lost = first if first.stopping else second
    assert "has lost its place" in str(lost.error)
    waiting(sessions.turns, late, n=4)
    (last,) = visitors(sessions, "last")
    assert sessions.turns.admit(last) == (
        503,
        "Queue is full: others are drawing. Try again in a minute.",
    )


def test_places_are_kept_for_who_was_admitted(sessions: Sessions) -> None:
    sessions.turns._waiting = 1
    a, b, c = visitors(sessions, "a", "b", "c")
    assert [sessions.turns.admit(one) for one in (a, b)] == [None, None]
    refused = sessions.turns.admit(c)
    assert refused is not None
    assert refused[0] == 503
    sessions.turns.arrived()
    assert sessions.turns.admit(c) is None


def test_foreign_sessions_do_not_push_out_who_is_at_work(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ipdiverse.ui.visitors.MAX_VISITORS", 10)
    mine = sessions.of("page", "browser")
    program = sessions.of("program")
    job_of(sessions, program)
    for number in range(130):
        sessions.of(f"foreign {number}")
    assert sessions.of("page", "browser") is mine
    assert sessions.of("program") is program
    for number in range(130):
        sessions.of(f"page {number}", "browser with many pages")
    assert sessions.of("page", "browser") is mine
    many = sessions.visitor(None, "browser with many pages")
    assert many is not None
    assert list(many.sessions)[-1] in str(sessions.of("page 129", "browser with many pages").folder)
    assert len(many.sessions) == 8


def test_bytes_are_bounded_in_sum(sessions: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ipdiverse.ui.visitors.MAX_BYTES", 1000)
    here = sessions.of("here", "a")
    job_of(sessions, here)
    for name in "bcd":
        other = sessions.of(name, name)
        (other.folder / "x").write_bytes(bytes(400))
        other.visitor.weigh()
    sessions.of("here", "a")
    assert sessions.of("here", "a") is here
    held = [session.visitor.bytes for session in sessions.all()]
    assert sum(held) <= 1000


def test_a_reload_finds_its_references_and_nobody_elses(sessions: Sessions) -> None:
    before = sessions.of("first page", "browser")
    before.visitor.chosen["vary"] = ["cat"]
    sessions.leave("first page", "browser")
    assert not before.folder.exists()
    assert sessions.of("second page", "browser").visitor.chosen == {"vary": ["cat"]}
    assert sessions.of("second page", "other browser").visitor.chosen == {}
    program = sessions.of("program")
    program.visitor.chosen["vary"] = ["dog"]
    sessions.leave("program")
    assert sessions.of("program").visitor.chosen == {}, "who sends no cookie leaves nothing"
