"""Visitors and their jobs, without a page: who is forgotten, and that nothing waits for ever."""

from __future__ import annotations

import random
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from ipdiverse.errors import ArgumentError, ModelError
from ipdiverse.sampling.request import Request
from ipdiverse.ui.queue import PLACES, PROGRAMS, GaveWay, Job, Stopped, Turns
from ipdiverse.ui.visitors import Session, Sessions

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


def waiting(turns: Turns, visitor: str, n: int = 4, heard: bool = True) -> Job:
    """A job of a visitor that is in the line, without a thread."""
    requests = {"out": Request(image=("cat.png",), n=n, steps=25)}
    job = Job(turns, requests, ("cat.png",), Path("nowhere"), visitor, lambda: heard)
    turns.join(job)
    return job


def next_of(turns: Turns) -> Job:
    found = turns._next()
    assert found is not None
    return found


def drawn_in_turns(turns: Turns, batches: int, batch: int = 4) -> list[str]:
    """Who draws each of the next batches."""
    order = []
    for _ in range(batches):
        job = next_of(turns)
        with turns.turn(job._check, job):
            order.append(job.visitor)
            job.done += batch * 25
        if job.done >= job.total:
            turns.leave(job)
    return order


def test_turns_go_round_over_visitors_and_not_over_jobs() -> None:
    turns = Turns(8)
    for one in ("a", "a", "b", "c"):
        waiting(turns, one, n=16)
    assert drawn_in_turns(turns, 9) == ["a", "b", "c"] * 3
    late = waiting(turns, "late")
    assert [turns.before(job) for job in (*turns._line["a"], late)] == [0, 4, 3]
    assert drawn_in_turns(turns, 4) == ["a", "b", "c", "late"]


def test_who_comes_during_a_turn_is_before_who_has_it() -> None:
    turns = Turns()
    drawing = waiting(turns, "a", n=16)
    waiting(turns, "b", n=16)
    with turns.turn(drawing._check, drawing):
        waiting(turns, "c", n=16)
    assert drawn_in_turns(turns, 4) == ["b", "c", "a", "b"]


def test_who_draws_goes_on_unless_another_visitor_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns()
    job = waiting(turns, "a", n=16)
    waiting(turns, "a", n=16)
    waiting(turns, "nobody looks", heard=False)
    job._finished = job._turn_from = 0
    job._step(4)
    job._finished = job.done  # the batch is complete
    job._step(4)
    job._finished = job.done
    waiting(turns, "b")
    with pytest.raises(GaveWay):
        job._step(4)
    job._turn_from = job._finished = job.done
    job._step(4)  # the first batch of the next turn


def test_nothing_is_drawn_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns()
    deaf, mine = waiting(turns, "gone", heard=False), waiting(turns, "here")
    assert next_of(turns) is mine
    assert turns.before(mine) == 0
    deaf._check()
    monkeypatch.setattr("ipdiverse.ui.queue._UNHEARD", -1.0)
    with pytest.raises(Stopped):
        deaf._check()
    assert deaf.stopping


def test_places_are_few_and_go_to_who_has_none_or_has_had_less() -> None:
    turns = Turns(3)
    first, second = waiting(turns, "greedy", n=16), waiting(turns, "greedy", n=16)
    with pytest.raises(ArgumentError, match="2 of your drawings are waiting"):
        waiting(turns, "greedy")
    waiting(turns, "b")
    waiting(turns, "c", n=16)
    assert turns.admit("d") is None, "the second place of the greedy"
    assert turns.admit("e") == (503, "Queue is full: others are drawing. Try again in a minute.")
    turns.arrived("d")
    waiting(turns, "d", n=16)
    assert (first.stopping, second.stopping) == (False, True)
    assert "has lost its place" in str(second.error)
    assert turns.admit("e") is not None, "all have one, and had as much"
    turns.leave(second)
    assert drawn_in_turns(turns, 4) == ["greedy", "b", "c", "d"]
    assert drawn_in_turns(turns, 2) == ["greedy", "c"]
    waiting(turns, "f", n=16)
    assert turns.admit("e") is None, "others have had two turns"
    turns.arrived("e")
    waiting(turns, "e")
    assert [job.visitor for job in turns._jobs()] == ["d", "greedy", "f", "e"]


def test_a_place_is_kept_for_who_was_admitted(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(1)
    assert [turns.admit(one) for one in ("a", "b")] == [None, None]
    assert turns.admit("c") is not None
    turns.arrived("nobody")
    turns.arrived("b")
    assert turns.admit("c") is None
    assert turns.admit("d") is not None
    monkeypatch.setattr("ipdiverse.ui.queue._PASSED_ON", -1.0)
    assert turns.admit("d") is None, "who was admitted has not come"


def test_programs_are_one_visitor(sessions: Sessions) -> None:
    programs = [sessions.of(f"program {number}") for number in range(3)]
    assert {one.visitor.name for one in programs} == {PROGRAMS}
    assert [sessions.turns.admit(PROGRAMS) for _ in range(2)] == [None, None]
    refused = sessions.turns.admit(PROGRAMS)
    assert refused is not None
    assert refused[0] == 429
    assert sessions.turns.admit("browser") is None


def press(turns: Turns, flood: list[str]) -> None:
    """Fifty clients ask for all that they can get."""
    for one in flood:
        for _ in range(PLACES + 1):
            if turns.admit(one) is None:
                turns.arrived(one)
                waiting(turns, one, n=16)
    for job in [job for own in turns._line.values() for job in own if job.stopping]:
        turns.leave(job)  # as its own thread would


@pytest.mark.parametrize("cookies", [True, False], ids=["browsers", "programs"])
def test_an_honest_visitor_waits_for_five_turns_of_a_flood(cookies: bool) -> None:
    turns, chance = Turns(), random.Random(0)
    flood = [f"flood {number}" if cookies else PROGRAMS for number in range(50)]
    for visit in range(4):
        for _ in range(50 if visit else 150):
            chance.shuffle(flood)
            press(turns, flood)
            drawn_in_turns(turns, 1)
        assert turns.admit("honest") is None, "others have had many turns"
        turns.arrived("honest")
        job, others = waiting(turns, "honest"), 0
        while job.done < job.total:
            press(turns, flood)
            others += drawn_in_turns(turns, 1) != ["honest"]
            assert not job.stopping, "keeps the place"
        assert others <= 5


class Stub(Job):
    """A job that draws nothing; it notes who has the turn, and that it has it alone."""

    def __init__(self, turns: Turns, visitor: str, drawn: list[str], fate: str) -> None:
        requests = {"out": Request(image=("cat.png",), n=2, steps=1)}
        heard = fate != "unheard"
        super().__init__(turns, requests, (), Path("nowhere"), visitor, lambda: heard)
        self.drawn, self.fate, self.inside = drawn, fate, threading.Lock()

    def _draw(self, inside: str, request: Request) -> None:
        assert TURN.acquire(blocking=False), "two draw at once"
        try:
            self.drawn.append(self.visitor)
            self._drawn.append(Image.new("RGB", (1, 1)))
            self.done += 1
            if self.fate == "stopped":
                self.stop()
            if self.fate == "fails":
                raise ValueError("as it may happen")
        finally:
            TURN.release()


TURN = threading.Lock()


@pytest.mark.parametrize("seed", range(300))
def test_everybody_is_drawn_or_told_in_any_order(
    seed: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ipdiverse.ui.queue._WAIT", 0.001)
    monkeypatch.setattr("ipdiverse.ui.queue._UNHEARD", 0.002)
    chance, turns, drawn = random.Random(seed), Turns(seed % 7), []
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # threads change places as often as they can
    jobs: list[Stub] = []
    try:
        fates = ("drawn", "drawn", "unheard", "stopped", "fails", "left")

        def come() -> None:
            job = Stub(turns, chance.choice("abcdef"), drawn, chance.choice(fates))
            if turns.admit(job.visitor) is None:
                turns.arrived(job.visitor)
                with suppress(ArgumentError):
                    job.start()
                    jobs.append(job)
            if job.fate == "left":
                job.stop()

        pages = [threading.Thread(target=come) for _ in range(10)]
        for one in pages:
            one.start()
        for one in pages:
            one.join()
        assert all(job.wait(PATIENCE) for job in jobs), [(job.fate, job.visitor) for job in jobs]
    finally:
        sys.setswitchinterval(before)
    assert jobs
    for job in jobs:
        assert job.done == 2 or job.stopping or job.error is not None, job.fate
        assert not (job.fate == "unheard" and job.done), "drawn for nobody"
    assert not turns.busy
    assert turns._line == {}
    assert turns._promised == []
    capsys.readouterr()


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
    many = sessions.of("page 129", "browser with many pages").visitor
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
