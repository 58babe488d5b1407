"""Draws of pairs and training seeds: intervals of scores, and of their differences."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ipdiverse.critters.oracle import Reading
from ipdiverse.critters.scene import IDENTITY, sample_scene
from ipdiverse.errors import ArgumentError
from ipdiverse.evaluation.bootstrap import (
    difference,
    holm,
    hypervolume,
    interval,
    js_interval,
    leak_interval,
    resampled,
)
from ipdiverse.evaluation.pairs import critters_sets, study_pairs
from ipdiverse.evaluation.sets import PairSums, Sets, pair_sums, score_sets

PAIRS = study_pairs(40, seed=1)


def drawn(images: int = 6, copies: bool = False) -> np.ndarray:
    """Attributes of fair draws, or of the references again and again."""
    rng = np.random.default_rng(0)
    rows = []
    for pair in PAIRS:
        known = {name: getattr(pair.reference, name) for name in IDENTITY} | pair.stated
        fair = [sample_scene(rng, known).indices() for _ in range(images)]
        rows.append([pair.reference.indices()] * images if copies else fair)
    return np.array(rows)


def asked(images: int, copies: bool = False) -> Sets:
    seen = Reading(drawn(images, copies), np.zeros((len(PAIRS), images), bool))
    return critters_sets(seen, PAIRS)


def test_intervals_of_leak_and_distance_are_about_the_scores_of_sets() -> None:
    sets = asked(6)
    whole = score_sets(sets)
    for found, score in (
        (js_interval(sets, resamples=50), whole.js),
        (leak_interval(sets, resamples=20), whole.leak),
    ):
        assert found.estimate == score
        assert found.low < score < found.high


def test_a_perfect_sampler_and_a_copier() -> None:
    fair, copier = (pair_sums(asked(16, copies=copies)) for copies in (False, True))
    assert fair["retention"].estimate == fair["prompt_accuracy"].estimate == 1
    assert fair["entropy"].estimate == pytest.approx(1, abs=0.05)
    assert copier["entropy"].estimate == 0
    assert copier["contradict_accuracy"].estimate == 0
    assert copier["copy_rate"].estimate > 0.9
    assert abs(fair["copy_rate"].estimate) < 0.05
    free, bound = (leak_interval(asked(16, copies=c), 40) for c in (False, True))
    assert free.low < 0.1 < bound.low


def test_an_interval_holds_its_estimate_and_narrows_with_pairs() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=400)
    few, many = (PairSums(values[:n], np.ones(n)) for n in (40, 400))
    for part in (few, many):
        found = interval([part])
        assert found.low < found.estimate < found.high
    assert np.ptp(interval([many])) < np.ptp(interval([few])) / 2


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Of 300 samples of 80 pairs, each with an interval of 95 %; the truth is 0."""
    rng = np.random.default_rng(0)
    found = [interval([PairSums(rng.normal(size=80), np.ones(80))], 500) for _ in range(300)]
    assert np.mean([one.low <= 0 <= one.high for one in found]) == pytest.approx(0.95, abs=0.03)


def test_a_difference_keeps_what_pairs_have_in_common() -> None:
    """Pairs differ far more than arms do: only together is the difference seen."""
    level = np.random.default_rng(0).normal(size=100)
    one, other = PairSums(level, np.ones(100)), PairSums(level - 0.1, np.ones(100))
    apart = difference([one], [other])
    assert apart.low > 0
    assert apart.estimate == pytest.approx(0.1)
    assert interval([one]).low < interval([other]).high


def test_p_is_small_where_the_interval_excludes_0_and_one_where_nothing_differs() -> None:
    rng = np.random.default_rng(0)
    level, noise = rng.normal(size=(2, 400))
    for shift, low, high in ((0.0, 0.3, 1.0), (0.1, 0.01, 0.1), (0.5, 0.0, 1e-6)):
        one = PairSums(level + shift + noise - noise.mean(), np.ones(400))
        found = difference([one], [PairSums(level, np.ones(400))])
        assert low <= found.p <= high, shift
        assert (found.low > 0) == (found.p < 0.05)
    same = PairSums(level, np.ones(400))
    assert difference([same], [same]).p == 1
    assert math.isnan(difference([same], [PairSums(level, np.zeros(400))]).p)


def test_holm_says_what_holds_together() -> None:
    """Holm's own rule: the smallest within 5 % / 4, the next within 5 % / 3, up to a failure."""
    assert holm([0.04, 0.012, 0.016, 0.5]) == [False, True, True, False]
    assert holm([0.03, 0.012, 0.02, 0.024]) == [False, True, False, False], "none after a failure"
    assert holm([0.04]) == [True]
    assert holm([math.nan, 0.04, math.nan]) == [False, True, False]
    assert holm([]) == []


def test_training_seeds_widen_the_interval() -> None:
    level = np.random.default_rng(0).normal(size=200)
    alike = [PairSums(level, np.ones(200))] * 3
    unlike = [PairSums(level + shift, np.ones(200)) for shift in (-1.0, 0.0, 1.0)]
    assert interval(unlike).estimate == pytest.approx(interval(alike).estimate)
    assert np.ptp(interval(unlike)) > 2 * np.ptp(interval(alike))


def test_few_training_seeds_do_not_make_intervals_too_narrow() -> None:
    rng, held, pairs = np.random.default_rng(0), 0, 40
    for _ in range(200):
        shared = rng.normal(0, 0.1, pairs)  # what a pair adds is the same for every seed
        runs = [PairSums(shared + rng.normal(0, 0.05), np.ones(pairs)) for _ in range(3)]
        found = interval(runs, resamples=400)
        held += found.low <= 0 <= found.high
    assert 0.92 <= held / 200 <= 0.995


def test_what_no_pair_has_is_not_a_number_and_runs_must_fit() -> None:
    nothing = PairSums(np.zeros(3), np.zeros(3))
    assert all(math.isnan(v) for v in interval([nothing]))
    with pytest.raises(ArgumentError, match="runs: differ in their pairs"):
        resampled([nothing, PairSums(np.zeros(4), np.ones(4))])


def test_hypervolume_of_known_points_and_in_every_draw() -> None:
    ones = np.ones(5)
    points = [
        ([PairSums(ones * x, ones)], [PairSums(ones * y, ones)]) for x, y in ((1, 0.5), (0.5, 1))
    ]
    area, draws = hypervolume(points, (0.0, 0.0), resamples=7)
    assert area == pytest.approx(0.75)
    assert draws == pytest.approx([0.75] * 7)
    seeds = [[PairSums(ones * x, ones) for x in (0.0, 2.0)], [PairSums(ones, ones)] * 2]
    area, draws = hypervolume([(seeds[0], seeds[1])], (0.0, 0.0), resamples=200)
    assert area == pytest.approx(1.0)
    assert draws.std() > 1, "another two training seeds might lie anywhere"
