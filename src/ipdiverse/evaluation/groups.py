"""Scores as sums over (prompt, reference) pairs, so that a bootstrap can draw pairs anew.

Every score is Σ total / Σ weight over pairs. Arms that were measured on the same pairs are
resampled together, and their differences keep what the pairs have in common.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ipdiverse.critters.scene import ATTRIBUTES, IDENTITY, conditional
from ipdiverse.errors import ArgumentError
from ipdiverse.evaluation.metrics import (
    Floats,
    entropy_miller_madow,
    expected_entropy,
    jensen_shannon,
    leak,
    mean_or_nan,
)
from ipdiverse.evaluation.sets import agreement_masks
from ipdiverse.evaluation.variety import Interval, hypervolume_2d

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ipdiverse.evaluation.metrics import Bools, Ints
    from ipdiverse.evaluation.sampling import Pair

RESAMPLES = 2000
_SLOW_RESAMPLES = 200
_LEAK_PERMUTATIONS = 20


class Parts(NamedTuple):
    """One score of one arm: what each pair adds, and how much it weighs, (pairs,) both."""

    total: Floats
    weight: Floats

    @property
    def estimate(self) -> float:
        """The score over all pairs; NaN where no pair has what it needs."""
        return float(self.total.sum() / self.weight.sum()) if self.weight.sum() else float("nan")


def critters_parts(outputs: Ints, invalid: Bools, pairs: Sequence[Pair]) -> dict[str, Parts]:
    """Every score of `sets.score_sets` that is a sum over pairs.

    Args:
        outputs: What the oracle read, (pairs, images, attributes).
        invalid: Images that are no valid scene, (pairs, images).
        pairs: What was asked.
    """
    names = list(ATTRIBUTES)
    references = np.array([pair.reference.indices() for pair in pairs])
    stated = np.array([[name in pair.stated for name in names] for pair in pairs])
    wanted = np.array([wanted_indices(pair) for pair in pairs])
    identity = np.array([name in IDENTITY for name in names])
    agree, contradict = agreement_masks(wanted, references, stated)
    images = np.full(len(pairs), invalid.shape[1], float)
    shows, keeps = outputs == wanted[:, None], outputs == references[:, None]
    free = ~stated & ~identity
    spread, cells = _spreads(outputs, free, pairs)
    copied = (keeps | ~free[:, None]).all(-1).mean(1) - _chance(references, free, pairs)
    some = free.any(1).astype(float)
    edited = stated & identity
    return {
        **({"edit_accuracy": _hits(shows, edited)} if edited.any() else {}),
        "prompt_accuracy": _hits(shows, stated),
        "agree_accuracy": _hits(shows, agree),
        "contradict_accuracy": _hits(shows, contradict),
        "retention": _hits(keeps, identity & ~stated),
        "entropy": Parts(spread, cells),
        "copy_rate": Parts(copied * some, some),
        "invalid_rate": Parts(invalid.sum(1).astype(float), images),
    }


def wanted_indices(pair: Pair) -> list[int]:
    """Index of each stated value; 0 where nothing is stated, which no score reads."""
    return [
        values.index(pair.stated[name]) if name in pair.stated else 0
        for name, values in ATTRIBUTES.items()
    ]


def leak_interval(
    outputs: Ints, pairs: Sequence[Pair], resamples: int = _SLOW_RESAMPLES
) -> Interval:
    """Leak over all open attributes, nats, with an interval over pairs.

    Args:
        outputs: What the oracle read, (pairs, images, attributes).
        pairs: What was asked.
        resamples: Draws of pairs. Pairs that are drawn twice count as one group each time, which
            biases a resampled leak upwards; the interval is shifted back by that bias.
    """
    rng = np.random.default_rng(0)
    everyone = np.arange(len(pairs))
    whole = _leak(outputs, pairs, everyone, 200)
    drawn = [
        _leak(outputs, pairs, rng.integers(len(pairs), size=len(pairs)), _LEAK_PERMUTATIONS)
        for _ in range(resamples)
    ]
    shift = whole - float(np.mean(drawn))
    low, high = np.quantile(drawn, [0.025, 0.975]) + shift
    return Interval(whole, float(low), float(high))


def js_interval(outputs: Ints, pairs: Sequence[Pair], resamples: int = _SLOW_RESAMPLES) -> Interval:
    """Jensen-Shannon distance of open attributes from the world's own conditional, 0..1.

    As `sets.score_sets` has it: pooled over pairs with the same conditional, each pool weighed by
    its pairs. Few images in a pool are some way off by chance alone, which biases a resampled
    distance upwards; the interval is shifted back by that bias.

    Args:
        outputs: What the oracle read, (pairs, images, attributes).
        pairs: What was asked.
        resamples: Draws of pairs.
    """
    pools = _pools(outputs, pairs)
    whole = _distance(pools, np.ones(len(pairs)))
    drawn = [_distance(pools, weights) for weights in _pair_weights(len(pairs), resamples)]
    shift = whole - mean_or_nan(drawn)
    low, high = np.quantile(drawn, [0.025, 0.975]) + shift
    return Interval(whole, float(low), float(high))


def interval(runs: Sequence[Parts], resamples: int = RESAMPLES) -> Interval:
    """A score with its percentile interval of 95 %: training seeds are drawn, then pairs.

    Args:
        runs: The score of each training seed, on the same pairs.
        resamples: Draws.
    """
    return _interval(estimate(runs), resampled(runs, resamples))


def estimate(runs: Sequence[Parts]) -> float:
    """A score over all training seeds and pairs; NaN where none has what it needs."""
    total, weight = (np.sum([run[i] for run in runs], axis=0) for i in range(2))
    return Parts(total, weight).estimate


def difference(
    runs: Sequence[Parts], others: Sequence[Parts], resamples: int = RESAMPLES
) -> Interval:
    """One arm's score less another's, drawn together (arguments as `interval`)."""
    apart = resampled(runs, resamples) - resampled(others, resamples)
    return _interval(estimate(runs) - estimate(others), apart)


def resampled(runs: Sequence[Parts], resamples: int = RESAMPLES) -> Floats:
    """A score in every draw, (resamples,); the draws of pairs are the same for every arm.

    Raises:
        ArgumentError: Runs were measured on different numbers of pairs.
    """
    pairs = len(runs[0].total)
    if any(len(run.total) != pairs for run in runs):
        raise ArgumentError("differ in their pairs", where="runs")
    weights = _pair_weights(pairs, resamples)
    totals = np.stack([run.total for run in runs]) @ weights.T
    counts = np.stack([run.weight for run in runs]) @ weights.T
    if len(runs) > 1:
        seeds = np.random.default_rng(1).multinomial(
            len(runs), [1 / len(runs)] * len(runs), size=resamples
        )
        totals, counts = (totals * seeds.T).sum(0), (counts * seeds.T).sum(0)
    else:
        totals, counts = totals[0], counts[0]
    return np.divide(totals, counts, out=np.full(resamples, np.nan), where=counts > 0)


def hypervolume(
    points: Sequence[tuple[Sequence[Parts], Sequence[Parts]]],
    corner: tuple[float, float],
    resamples: int = RESAMPLES,
) -> tuple[float, Floats]:
    """Area that arms dominate in (variety, fidelity), and the same in every draw of pairs.

    Args:
        points: Of each arm, the two scores of every training seed.
        corner: What must be exceeded, the same for all that is compared.
        resamples: Draws.
    """
    estimates = [[estimate(runs) for runs in point] for point in points]
    whole = hypervolume_2d(estimates, corner)
    drawn = np.stack([[resampled(runs, resamples) for runs in point] for point in points])
    areas = [hypervolume_2d(drawn[:, :, i], corner) for i in range(resamples)]
    return whole, np.array(areas)


def _interval(whole: float, drawn: Floats) -> Interval:
    known = drawn[~np.isnan(drawn)]
    if not len(known):
        return Interval(float("nan"), float("nan"), float("nan"))
    low, high = np.quantile(known, [0.025, 0.975])
    return Interval(whole, float(low), float(high))


@lru_cache(maxsize=4)
def _pair_weights(pairs: int, resamples: int) -> Floats:
    """How often each pair is drawn, (resamples, pairs)."""
    rng = np.random.default_rng(0)
    return rng.multinomial(pairs, [1 / pairs] * pairs, size=resamples).astype(float)


def _hits(right: Bools, mask: Bools) -> Parts:
    counted = right & mask[:, None]
    return Parts(counted.sum((1, 2)).astype(float), mask.sum(1) * float(right.shape[1]))


def _spreads(outputs: Ints, free: Bools, pairs: Sequence[Pair]) -> tuple[Floats, Floats]:
    """Of each pair: entropies of its open attributes, each over a perfect sampler's; how many."""
    names = list(ATTRIBUTES)
    totals, counts = np.zeros(len(pairs)), np.zeros(len(pairs))
    for row, column in np.argwhere(free).tolist():
        prior = conditional(names[column], pairs[row].stated)
        ideal = expected_entropy(tuple(float(p) for p in prior), outputs.shape[1])
        if ideal > 0:
            seen = np.bincount(outputs[row, :, column], minlength=len(prior))
            totals[row] += entropy_miller_madow(seen) / ideal
            counts[row] += 1
    return totals, counts


def _chance(references: Ints, free: Bools, pairs: Sequence[Pair]) -> Floats:
    """Probability that a fair draw repeats all that is open, (pairs,)."""
    names, chance = list(ATTRIBUTES), np.ones(len(pairs))
    for row, column in np.argwhere(free).tolist():
        prior = conditional(names[column], pairs[row].stated)
        chance[row] *= prior[references[row, column]]
    return chance


class _Pool(NamedTuple):
    """One attribute under one conditional: counts of its values, (pairs, values)."""

    prior: Floats
    rows: list[int]
    counts: list[Ints]


def _pools(outputs: Ints, pairs: Sequence[Pair]) -> list[_Pool]:
    pools: dict[tuple[str, bytes], _Pool] = {}
    for row, pair in enumerate(pairs):
        for column, name in enumerate(ATTRIBUTES):
            if name in IDENTITY or name in pair.stated:
                continue
            prior = np.asarray(conditional(name, pair.stated), float)
            pool = pools.setdefault((name, prior.round(9).tobytes()), _Pool(prior, [], []))
            pool.rows.append(row)
            pool.counts.append(np.bincount(outputs[row, :, column], minlength=len(prior)))
    return list(pools.values())


def _distance(pools: Sequence[_Pool], weights: Floats) -> float:
    """Mean over pools of pairs that count `weights` times, (pairs,)."""
    found, sizes = [], []
    for pool in pools:
        times = weights[pool.rows]
        if times.sum():
            found.append(jensen_shannon(times @ np.stack(pool.counts), pool.prior))
            sizes.append(times.sum())
    return mean_or_nan(found, sizes)


def _leak(outputs: Ints, pairs: Sequence[Pair], drawn: Ints, permutations: int) -> float:
    images, found = outputs.shape[1], []
    for column, (name, values) in enumerate(ATTRIBUTES.items()):
        rows = [i for i in drawn.tolist() if name not in pairs[i].stated]
        if name in IDENTITY or len(rows) < 2:
            continue
        given = np.array([pairs[i].reference.indices()[column] for i in rows]).repeat(images)
        groups = np.arange(len(rows)).repeat(images)
        made = outputs[rows, :, column].ravel()
        found.append(leak(made, given, len(values), permutations, groups=groups))
    return mean_or_nan(found)
