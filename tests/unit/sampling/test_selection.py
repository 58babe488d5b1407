from __future__ import annotations

from itertools import combinations

import pytest
import torch

from ipdiverse.sampling.selection import select


def value(worth: torch.Tensor, apart: torch.Tensor, group: tuple[int, ...], weight: float) -> float:
    pairs = sum(float(apart[i, j]) for i, j in combinations(group, 2))
    return float(worth[list(group)].sum()) + weight * pairs / max(1, len(group) - 1)


@pytest.mark.parametrize("seed", range(6))
def test_the_group_is_nearly_the_best_there_is(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    worth = torch.randn(9, generator=rng)
    points = torch.randn(9, 3, generator=rng)
    apart = torch.cdist(points, points)
    found = tuple(select(worth, apart, 4))
    values = sorted(value(worth, apart, g, 1.0) for g in combinations(range(9), 4))
    assert value(worth, apart, found, 1.0) >= values[-3]


def test_worth_decides_alone_without_weight_and_distance_alone_without_worth() -> None:
    worth = torch.tensor([0.0, 3.0, 1.0, 2.0])
    line = torch.tensor([[0.0], [0.1], [0.2], [5.0]])
    apart = torch.cdist(line, line)
    assert select(worth, apart, 2, weight=0.0) == [1, 3]
    assert select(torch.zeros(4), apart, 2) == [0, 3]


def test_as_many_as_there_are_is_all_of_them() -> None:
    assert select(torch.zeros(3), torch.zeros(3, 3), 3) == [0, 1, 2]
    assert select(torch.zeros(3), torch.zeros(3, 3), 5) == [0, 1, 2]
