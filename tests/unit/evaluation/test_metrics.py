"""Metrics against answers known beforehand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ipdiverse.errors import ArgumentError, ShapeError
from ipdiverse.evaluation import metrics as m

UNIFORM = np.full(4, 0.25)
SKEWED = np.array([0.5, 0.3, 0.2])


def entropy(prior: np.ndarray) -> float:
    return float(-(prior * np.log(prior)).sum())


class TestEntropy:
    def test_plug_in_and_correction(self):
        assert m.entropy_miller_madow([8, 0, 0, 0]) == 0
        assert m.entropy_miller_madow([1, 1, 1, 1]) == math.log(4)  # the cap
        expected = entropy(np.array([0.75, 0.25])) + 1 / 8
        assert m.entropy_miller_madow([3, 1, 0]) == pytest.approx(expected)

    @given(arrays(np.int64, st.integers(1, 9), elements=st.integers(0, 20)), st.randoms())
    def test_bounds_and_order_of_values(self, counts: np.ndarray, random: Any):
        counts[0] += 1
        shuffled = counts.tolist()
        random.shuffle(shuffled)
        found = m.entropy_miller_madow(counts)
        assert 0 <= found <= math.log(len(counts))
        assert m.entropy_miller_madow(shuffled) == pytest.approx(found, abs=1e-12)

    def test_normalised_by_the_prior_so_that_spreading_out_exceeds_one(self):
        assert m.normalised_entropy([100] * 4, UNIFORM) == pytest.approx(1)
        assert m.normalised_entropy([5000, 3000, 2000], SKEWED) == pytest.approx(1, abs=1e-3)
        assert m.normalised_entropy([100] * 3, SKEWED) > 1.05

    @pytest.mark.parametrize("n", [2, 8, 16])
    def test_expectation_is_that_of_independent_draws(self, n: int):
        draws = np.random.default_rng(7).multinomial(n, SKEWED, size=4000)
        mean = np.mean([m.entropy_miller_madow(d) for d in draws])
        assert m.expected_entropy(tuple(SKEWED), n) == pytest.approx(mean, rel=0.02)
        assert m.expected_entropy((1.0, 0.0), 8) == m.expected_entropy((0.5, 0.5), 1) == 0


class TestJensenShannon:
    def test_known_distances(self):
        assert m.jensen_shannon([5, 3, 2], SKEWED) == pytest.approx(0, abs=1e-7)
        assert m.jensen_shannon([7, 0], [0.0, 1.0]) == 1
        bits = 0.75 * math.log2(4 / 3) + 0.25 * 2 - 0.5  # H(3/4, 1/4) - (H(1, 0) + H(1/2, 1/2)) / 2
        assert m.jensen_shannon([1, 0], [0.5, 0.5]) ** 2 == pytest.approx(bits)

    @given(arrays(np.float64, (2, 5), elements=st.floats(0.0, 1.0)), st.permutations(range(5)))
    def test_symmetric_bounded_and_blind_to_order(self, pair: np.ndarray, order: list[int]):
        p, q = (row / row.sum() for row in pair + 1e-3)
        found = m.jensen_shannon(p, q)
        assert 0 <= found <= 1
        assert m.jensen_shannon(q, p) == pytest.approx(found, abs=1e-6)
        assert m.jensen_shannon(p[order], q[order]) == pytest.approx(found, abs=1e-6)


class TestLeak:
    def test_mutual_information_of_equal_and_of_crossed_values(self):
        x = np.repeat(np.arange(4), 4)
        assert m.mutual_information(x, x, 4, 4) == pytest.approx(math.log(4))
        assert m.mutual_information(x, np.tile(np.arange(4), 4), 4, 4) == pytest.approx(0, abs=1e-9)

    def test_copier_leaks_the_entropy_and_a_free_sampler_nothing(self):
        rng = np.random.default_rng(0)
        groups = np.arange(1000).repeat(8)
        references = rng.choice(3, size=1000, p=SKEWED)[groups]
        copied = m.leak(references, references, 3, groups=groups)
        assert copied == pytest.approx(entropy(SKEWED), abs=0.03)
        free = rng.choice(3, size=8000, p=SKEWED)
        assert m.leak(free, references, 3, groups=groups) == pytest.approx(0, abs=0.005)

    def test_collapse_that_ignores_the_reference_leaks_only_if_groups_are_forgotten(self):
        rng, groups = np.random.default_rng(1), np.arange(30).repeat(16)
        drawn = [rng.integers(4, size=(2, 30))[:, groups] for _ in range(20)]
        kept = [m.leak(*pair, 4, permutations=20, groups=groups) for pair in drawn]
        assert np.mean(kept) == pytest.approx(0, abs=0.04)
        assert np.mean([m.leak(*pair, 4, permutations=20) for pair in drawn]) > 0.1
        assert m.leak(*drawn[0], 4, seed=5) == m.leak(*drawn[0], 4, seed=5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: m.entropy_miller_madow([0, 0]), ArgumentError, "counts: no counts"),
        (lambda: m.entropy_miller_madow([2, -1]), ArgumentError, "counts: no counts"),
        (lambda: m.entropy_miller_madow([[1]]), ShapeError, "counts: dimensions; expected 1"),
        (lambda: m.normalised_entropy([1, 1], [1, 0]), ArgumentError, "prior leaves no choice"),
        (lambda: m.normalised_entropy([1, 1], SKEWED), ShapeError, "prior: shapes do not fit"),
        (lambda: m.jensen_shannon([1, 1], [1, 1]), ArgumentError, "prior: no distribution"),
        (lambda: m.mutual_information([0], [0, 1], 2, 2), ShapeError, "y: shapes do not fit"),
        (lambda: m.leak([0, 1], [0, 1], 2, groups=[3, 3]), ArgumentError, "groups: too few"),
        (lambda: m.leak([0, 1], [0, 1], 2, permutations=0), ArgumentError, "permutations: too few"),
        (lambda: m.leak([0] * 3, [0, 1, 1], 2, groups=[0, 0, 1]), ArgumentError, "several"),
    ],
)
def test_errors_say_what_and_where(call: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call()
