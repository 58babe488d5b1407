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
N_VALUES = (3, 4, 3, 4)  # one identity attribute, three of the scene
PRIORS = [np.full(3, 1 / 3), UNIFORM, SKEWED, np.array([0.4, 0.3, 0.2, 0.1])]


def entropy(prior: np.ndarray) -> float:
    return float(-(prior * np.log(prior)).sum())


def world(
    groups: int = 300, images: int = 8, copier: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Prompts that state identity or the first scene attribute, and a sampler without faults."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return np.stack([rng.choice(len(p), size=shape, p=p) for p in PRIORS], axis=-1)

    references, wanted, outputs = draw(groups), draw(groups), draw(groups, images)
    stated = rng.random((groups, 4)) < [0.5, 0.5, 0, 0]
    if copier:
        outputs[:] = references[:, None]
    else:
        outputs[:, :, 0] = references[:, None, 0]
        outputs = np.where(stated[:, None], wanted[:, None], outputs)
    return {
        "outputs": outputs,
        "invalid": np.zeros((groups, images), dtype=bool),
        "references": references,
        "stated": stated,
        "wanted": wanted,
        "identity": np.array([True, False, False, False]),
        "n_values": N_VALUES,
        "priors": [PRIORS] * groups,
    }


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

    def test_copy_rate_counts_whole_matches_above_chance(self):
        outputs = np.array([[[0, 1], [0, 0]], [[2, 2], [1, 1]], [[0, 0], [0, 0]]])
        references = np.array([[0, 1], [2, 0], [0, 0]])[:, None]
        open_mask = np.array([[True, True], [True, False], [False, False]])[:, None]
        chance = np.array([0.1, 0.3, 1.0])[:, None]
        assert m.copy_rate(outputs, references, chance, open_mask) == pytest.approx(0.5 - 0.2)
        assert math.isnan(m.copy_rate(outputs, references, chance, False))


class TestAccuracy:
    OUTPUTS = np.array([[[0, 1], [0, 2]], [[1, 1], [1, 0]]])
    WANTED = np.array([[0, 1], [1, 1]])

    def test_mean_and_per_attribute(self):
        found = m.accuracy(self.OUTPUTS, self.WANTED, [[True, True], [True, False]])
        assert found.mean == pytest.approx(5 / 6)
        assert found.per_attribute.tolist() == [1, 0.5]

    def test_nothing_masked_is_nan(self):
        found = m.retention(self.OUTPUTS, self.WANTED, [[True, False], [False, False]])
        assert found.mean == 1
        assert np.isnan(found.per_attribute).tolist() == [False, True]

    def test_agreement_splits_what_is_stated(self):
        agree, differ = m.agreement_masks([[0, 1, 2]], [[0, 0, 2]], [[True, True, False]])
        assert agree.tolist() == [[True, False, False]]
        assert differ.tolist() == [[False, True, False]]


class TestVariety:
    @pytest.mark.parametrize("q", [0, 0.1, 1, 2, math.inf])
    def test_vendi_of_equal_clustered_and_different_items(self, q: float):
        assert m.vendi(np.full((100, 100), 1.0), q, is_kernel=True) == 1
        assert m.vendi(np.tile([[0.3, -2.0, 1.0]], (100, 1)), q) == 1
        assert m.vendi(np.eye(5)[[0, 0, 0, 3, 3, 3]], q) == pytest.approx(2)
        assert m.vendi(3 * np.eye(7), q) == pytest.approx(7)

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


class TestBootstrap:
    def test_covers_at_about_its_level(self):
        rng = np.random.default_rng(0)
        samples = rng.normal(size=(200, 40))
        found = [m.bootstrap_interval(s, resamples=200, level=0.9) for s in samples]
        assert np.mean([i.low <= 0 <= i.high for i in found]) == pytest.approx(0.9, abs=0.06)

    def test_resamples_groups_not_images(self):
        values = np.random.default_rng(0).normal(size=20)
        repeated = m.bootstrap_interval(values[:, None].repeat(50, axis=1))
        assert repeated == pytest.approx(m.bootstrap_interval(values))

    def test_groups_of_any_size_and_any_statistic(self):
        found = m.bootstrap_interval([[1, 2], [3], 4], np.max, resamples=50)
        assert found.estimate == found.high == 4


class TestScoreSets:
    @pytest.mark.parametrize("images", [2, 8, 32])
    def test_perfect_sampler(self, images: int):
        scores = m.score_sets(**world(images=images))
        assert scores.prompt_accuracy == scores.agree_accuracy == scores.contradict_accuracy == 1
        assert scores.retention == 1
        assert scores.entropy == pytest.approx(1, abs=0.05)
        assert scores.pooled_entropy == pytest.approx(1, abs=0.02)
        assert scores.js < 0.06
        assert scores.leak == pytest.approx(0, abs=0.01)
        assert scores.copy_rate == pytest.approx(0, abs=0.03)
        assert (scores.invalid_rate, scores.n) == (0, 300 * images)

    def test_copier(self):
        scores = m.score_sets(**world(groups=1000, copier=True))
        assert (scores.retention, scores.agree_accuracy, scores.contradict_accuracy) == (1, 1, 0)
        assert scores.entropy == 0
        assert scores.leak == pytest.approx(np.mean([entropy(p) for p in PRIORS[1:]]), abs=0.03)
        assert scores.copy_rate > 0.85
        assert scores.pooled_entropy == pytest.approx(1, abs=0.02)

    def test_spreading_out_more_than_the_world_shows_in_js(self):
        sets, rng = world(), np.random.default_rng(3)
        for attribute in (2, 3):
            sets["outputs"][:, :, attribute] = rng.integers(N_VALUES[attribute], size=(300, 8))
        assert m.score_sets(**sets).entropy > 1
        assert m.score_sets(**sets).js > 0.1

    def test_order_of_groups_is_irrelevant(self):
        sets = world(groups=40)
        turned = {k: v if k in ("identity", "n_values") else v[::-1] for k, v in sets.items()}
        one, other = m.score_sets(**sets), m.score_sets(**turned)
        for name in ("prompt_accuracy", "retention", "entropy", "js", "copy_rate"):
            assert getattr(one, name) == pytest.approx(getattr(other, name))

    def test_conditionals_that_differ_are_not_pooled(self):
        sets = world(groups=200, images=16)
        ends = [[*PRIORS[:2], np.eye(3)[g % 2], PRIORS[3]] for g in range(200)]
        sets["outputs"][:, :, 2] = (np.arange(200) % 2)[:, None]
        right = m.score_sets(**sets | {"priors": ends})
        wrong = m.score_sets(**sets | {"priors": ends[1:] + ends[:1]})
        assert right.js < 0.06
        assert wrong.js > 0.3
        assert right.entropy == pytest.approx(1, abs=0.05)

    def test_what_nothing_defines_is_nan(self):
        sets = world(groups=5)
        sets |= {"stated": np.ones((5, 4), dtype=bool), "wanted": sets["references"]}
        undefined = ("contradict_accuracy", "retention", "entropy", "js", "leak", "copy_rate")
        assert all(math.isnan(getattr(m.score_sets(**sets), name)) for name in undefined)

    def test_invalid_images_are_reported_and_still_counted(self):
        sets = world(groups=10)
        clean = m.score_sets(**sets)
        scores = m.score_sets(**sets | {"invalid": np.arange(80).reshape(10, 8) % 4 == 0})
        assert scores.invalid_rate == 0.25
        assert (scores.entropy, scores.retention) == (clean.entropy, clean.retention)


def scored(**change: Any) -> Any:
    return lambda: m.score_sets(**world(groups=5) | change)


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
        (lambda: m.accuracy(np.zeros((1, 2, 3)), [[0]], [[0]]), ShapeError, "wanted: shapes"),
        (lambda: m.vendi([[1.0]], q=-1), ArgumentError, "q: order of the Vendi score"),
        (lambda: m.vendi([[0.0, 0.0]]), ArgumentError, "features: no cosine"),
        (lambda: m.vendi([[1, 0.2], [0, 1]], is_kernel=True), ArgumentError, "kernel: no kernel"),
        (lambda: m.vendi([[1, 0]], is_kernel=True), ShapeError, "kernel: shapes do not fit"),
        (lambda: m.mean_pairwise_distance([[1.0]]), ArgumentError, "features: too few"),
        (lambda: m.hypervolume_2d([(1, 2, 3)], (0, 0)), ShapeError, "points: shapes do not fit"),
        (lambda: m.hypervolume_2d([(1, math.nan)], (0, 0)), ArgumentError, "not finite"),
        (scored(invalid=np.zeros((5, 3))), ShapeError, r"invalid: shapes .*\(5, 8\)"),
        (scored(identity=[True]), ShapeError, r"identity: shapes .* \(4,\); found \(1,\)"),
        (scored(priors=[]), ShapeError, r"priors: shapes do not fit; expected \(5,\)"),
        (scored(outputs=np.zeros((5, 4))), ShapeError, "outputs: dimensions; expected 3; found 2"),
        (scored(outputs=np.full((5, 8, 4), 3)), ArgumentError, "outputs: value out of range"),
        (scored(references=np.zeros((5, 4))), ArgumentError, r"references: value .* indices 0..2"),
        (scored(wanted=np.full((5, 4), 9)), ArgumentError, "wanted: value out of range"),
        (lambda: m.bootstrap_interval([1]), ArgumentError, "values_by_group: too few"),
        (lambda: m.bootstrap_interval([1, 2], level=95), ArgumentError, "level: coverage"),
    ],
)
def test_errors_say_what_and_where(call: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call()
