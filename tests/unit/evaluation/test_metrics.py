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


def entropy_of(p: np.ndarray) -> float:
    """As `entropy`, of what may hold zeros."""
    return entropy(p[p > 0])


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

    @given(arrays(np.int64, st.integers(1, 9), elements=st.integers(0, 200)), st.integers(0, 99))
    def test_it_is_the_definition(self, counts: np.ndarray, seed: int):
        """The root of the divergence in bits, from entropies: H of the mean - mean of the Hs."""
        counts[0] += 1
        prior = np.random.default_rng(seed).dirichlet(np.ones(len(counts)))
        p = counts / counts.sum()
        bits = (entropy_of((p + prior) / 2) - (entropy_of(p) + entropy_of(prior)) / 2) / math.log(2)
        assert m.jensen_shannon(counts, prior) ** 2 == pytest.approx(bits, abs=1e-12)
        assert m.plug_in_entropy(p) == pytest.approx(entropy_of(p), abs=1e-12)

    def test_distributions_that_differ_by_round_off_are_no_distance_apart(self):
        """There scipy's own divergence is below 0, and its root NaN."""
        rng = np.random.default_rng(0)
        for _ in range(200):
            prior = rng.dirichlet(np.ones(4))
            assert m.jensen_shannon(prior * (1 + rng.normal(size=4) * 1e-15), prior) < 1e-7


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


class TestVariety:
    @pytest.mark.parametrize("q", [0, 0.1, 1, 2, math.inf])
    def test_vendi_of_equal_clustered_and_different_items(self, q: float):
        assert m.vendi(np.full((100, 100), 1.0), q, is_kernel=True) == 1
        assert m.vendi(np.tile([[0.3, -2.0, 1.0]], (100, 1)), q) == 1
        assert m.vendi(np.eye(5)[[0, 0, 0, 3, 3, 3]], q) == pytest.approx(2)
        assert m.vendi(3 * np.eye(7), q) == pytest.approx(7)

    @pytest.mark.parametrize("q", [0, 0.1, 0.999999, 1, 1.000001, 2, math.inf])
    def test_vendi_of_items_that_differ_by_less_than_the_floor_is_exactly_one(self, q: float):
        """Without rescaling, what the floor drops makes it 0.61 to 1.64 near order 1."""
        kernel = np.full((100, 100), 1 - 5e-7)
        np.fill_diagonal(kernel, 1)
        assert m.vendi(kernel, q, is_kernel=True) == 1

    def test_vendi_falls_with_order_and_features_are_told_from_kernels(self):
        features = np.random.default_rng(0).normal(size=(12, 4))
        scores = [m.vendi(features, q) for q in (0, 0.5, 1, 2, math.inf)]
        assert scores == sorted(scores, reverse=True)
        square = np.array([[1.0, 0.5], [0.5, 1.0]])
        assert m.vendi(square, is_kernel=True) > m.vendi(square)

    @given(arrays(np.float64, (6, 3), elements=st.floats(-1, 1)), st.permutations(range(6)))
    def test_order_of_items_is_irrelevant(self, features: np.ndarray, order: list[int]):
        features = features + np.array([3.0, 0, 0])
        assert 1 <= m.vendi(features) + 1e-9 <= 6
        assert m.vendi(features[order]) == pytest.approx(m.vendi(features), rel=1e-5)
        found = m.mean_pairwise_distance(features)
        assert m.mean_pairwise_distance(features[order]) == pytest.approx(found, abs=1e-9)
        assert m.mean_pairwise_distance([[1, 0], [0, 2], [3, 0]]) == pytest.approx(2 / 3)

    def test_hypervolume_of_a_staircase(self):
        steps = [(1, 3), (2, 2), (3, 1), (1, 1), (-5, 9), (9, -5)]
        assert m.hypervolume_2d(steps, (0, 0)) == pytest.approx(6)
        assert m.hypervolume_2d(steps[::-1], (0, 0)) == pytest.approx(6)
        assert m.hypervolume_2d(steps, (1, 1)) == pytest.approx(1)
        assert m.hypervolume_2d([], (0, 0)) == 0


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: m.entropy_miller_madow([0, 0]), ArgumentError, "counts: not counts"),
        (lambda: m.entropy_miller_madow([2, -1]), ArgumentError, "counts: not counts"),
        (lambda: m.entropy_miller_madow([[1]]), ShapeError, "counts: dimensions; expected 1"),
        (lambda: m.normalised_entropy([1, 1], [1, 0]), ArgumentError, "prior leaves no choice"),
        (lambda: m.normalised_entropy([1, 1], SKEWED), ShapeError, "prior: shapes do not fit"),
        (lambda: m.jensen_shannon([1, 1], [1, 1]), ArgumentError, "prior: not a distribution"),
        (lambda: m.mutual_information([0], [0, 1], 2, 2), ShapeError, "y: shapes do not fit"),
        (lambda: m.leak([0, 1], [0, 1], 2, groups=[3, 3]), ArgumentError, "groups: too few"),
        (lambda: m.leak([0, 1], [0, 1], 2, permutations=0), ArgumentError, "permutations: too few"),
        (lambda: m.leak([0] * 3, [0, 1, 1], 2, groups=[0, 0, 1]), ArgumentError, "several"),
        (lambda: m.vendi([[1.0]], q=-1), ArgumentError, "q: order of the Vendi score"),
        (lambda: m.vendi([[0.0, 0.0]]), ArgumentError, "features: no cosine"),
        (
            lambda: m.vendi([[1, 0.2], [0, 1]], is_kernel=True),
            ArgumentError,
            "kernel: not a kern",
        ),
        (lambda: m.vendi([[1, 0]], is_kernel=True), ShapeError, "kernel: shapes do not fit"),
        (lambda: m.mean_pairwise_distance([[1.0]]), ArgumentError, "features: too few"),
        (lambda: m.hypervolume_2d([(1, 2, 3)], (0, 0)), ShapeError, "points: shapes do not fit"),
        (lambda: m.hypervolume_2d([(1, math.nan)], (0, 0)), ArgumentError, "not finite"),
    ],
)
def test_errors_say_what_and_where(call: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call()
