"""Variety against answers known beforehand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ipdiverse.errors import ArgumentError, ShapeError
from ipdiverse.evaluation import variety as m


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
        (lambda: m.vendi([[1.0]], q=-1), ArgumentError, "q: order of the Vendi score"),
        (lambda: m.vendi([[0.0, 0.0]]), ArgumentError, "features: no cosine"),
        (lambda: m.vendi([[1, 0.2], [0, 1]], is_kernel=True), ArgumentError, "kernel: no kernel"),
        (lambda: m.vendi([[1, 0]], is_kernel=True), ShapeError, "kernel: shapes do not fit"),
        (lambda: m.mean_pairwise_distance([[1.0]]), ArgumentError, "features: too few"),
        (lambda: m.hypervolume_2d([(1, 2, 3)], (0, 0)), ShapeError, "points: shapes do not fit"),
        (lambda: m.hypervolume_2d([(1, math.nan)], (0, 0)), ArgumentError, "not finite"),
    ],
)
def test_errors_say_what_and_where(call: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call()
