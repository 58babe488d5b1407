"""How jobs are put into batches, and whose levers a request gets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ipdiverse.dial import OFF, Dial, Levers, default_dial
from ipdiverse.errors import CheckpointError
from ipdiverse.sampling.request import Request
from ipdiverse.sampling.sample import Job, _chunks, dial_for, levers_of

JOBS = [
    *(Job("a critter", 0, index) for index in range(35)),
    *(Job("snow", 0, index) for index in range(2)),
    Job("snow", 1, 0),
]


def test_batches_are_filled_up_to_one_size() -> None:
    batches = list(_chunks(JOBS, 4))
    assert [job for batch, _ in batches for job in batch] == JOBS
    assert {len(padded) for _, padded in batches} == {4}
    assert [len(batch) for batch, _ in batches] == [4] * (len(JOBS) // 4) + [len(JOBS) % 4]
    assert all(padded[: len(batch)] == batch for batch, padded in batches)


def adapter(**spec: Any) -> Any:
    return SimpleNamespace(spec=spec, fusion=None, base_weights={}, draws=False)


def test_levers_that_are_set_override_the_dial() -> None:
    own = Dial(((0.0, OFF), (1.0, Levers(cads=0.8, interval=(0.0, 4.0)))), "by hand")
    calibrated = adapter(dial=own.as_spec())
    request = Request.of({"diversity": 1.0, "cads": 0.1})
    assert levers_of(request, calibrated) == Levers(cads=0.1, interval=(0.0, 4.0))
    assert levers_of(request, None) == Levers(cads=0.1), "without an adapter there is no dial"
    assert levers_of(Request.of({"cads": 0.1}), calibrated) == Levers(cads=0.1)


def test_a_dial_is_the_adapters_own_or_the_default() -> None:
    assert dial_for(adapter()) == default_dial(fused=False)
    with pytest.raises(CheckpointError, match="its dial is broken"):
        dial_for(adapter(dial=[]))


def test_the_dial_of_a_fusion_that_draws_is_how_far_it_goes() -> None:
    drawing = SimpleNamespace(spec={}, fusion=object(), base_weights={}, draws=True)
    for has_space in (False, True):
        dial = dial_for(drawing, has_space)  # type: ignore[arg-type]
        assert [dial.at(d).fusion_strength for d in (0.0, 0.5, 1.0)] == [0.0, 0.5, 1.0]
        assert dial.at(1.0) == OFF
