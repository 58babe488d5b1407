"""How jobs are put into batches."""

from __future__ import annotations

from ipdiverse.dial import OFF, Levers
from ipdiverse.sampling.sample import _LARGEST_SET, Job, _chunks

SET = 2 * _LARGEST_SET + 3
JOBS = [
    *(Job("a critter", 0, index) for index in range(SET)),
    *(Job("snow", 0, index) for index in range(2)),
    Job("snow", 1, 0),
]


def test_batches_are_filled_up_to_their_size() -> None:
    batches = list(_chunks(JOBS, 4, OFF))
    assert [job for batch, _ in batches for job in batch] == JOBS
    assert {size for _, size in batches} == {4}
    assert [len(batch) for batch, _ in batches] == [4] * (len(JOBS) // 4) + [len(JOBS) % 4]


def test_a_set_stays_together_but_for_one_too_large_for_memory() -> None:
    batches = list(_chunks(JOBS, 4, Levers(repulsion=0.5)))
    assert [job for batch, _ in batches for job in batch] == JOBS
    assert [len(batch) for batch, _ in batches] == [_LARGEST_SET, _LARGEST_SET, 3, 2, 1]
    assert all(size == len(batch) for batch, size in batches), "nothing else takes part in a set"
