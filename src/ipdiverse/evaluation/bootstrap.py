"""Intervals of scores: a hierarchical, paired bootstrap over training seeds and pairs.

Arms that were measured on the same pairs are resampled together, so that what the pairs have in
common cancels in the arms' differences.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ipdiverse.errors import ArgumentError
from ipdiverse.evaluation.metrics import Floats, hypervolume_2d, mean_or_nan
from ipdiverse.evaluation.sets import PairSums, distance, leaked, pools

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ipdiverse.evaluation.sets import Sets

RESAMPLES = 2000
_SLOW_RESAMPLES = 200  # of scores that are not sums and are computed again for every draw
_LEAK_PERMUTATIONS = 20  # few: the noise of the null averages out over the draws


class Difference(NamedTuple):
    """The difference between two arms, with the ends of its confidence interval.

    Args:
        estimate: One less the other.
        low: Of the interval of this one comparison.
        high: The same.
        p: Two-sided, of a difference as large by chance: the estimate over the spread of its draws,
            by the normal distribution, as draws are too few to count its tails.
    """

    estimate: float
    low: float
    high: float
    p: float


class Interval(NamedTuple):
    """A statistic of all groups, with the ends of its confidence interval."""

    estimate: float
    low: float
    high: float


def leak_interval(sets: Sets, resamples: int = _SLOW_RESAMPLES) -> Interval:
    """Leak over all open attributes, nats, with an interval over pairs.

    Args:
        sets: What was asked and read.
        resamples: Draws of pairs. Pairs that are drawn twice count as one group each time, which
            biases a resampled leak upwards; the interval is shifted back by that bias.
    """
    rng, pairs = np.random.default_rng(0), len(sets.outputs)
    draws = [rng.integers(pairs, size=pairs) for _ in range(resamples)]
    drawn = [leaked(sets, rows, _LEAK_PERMUTATIONS) for rows in draws]
    return _shifted(leaked(sets, np.arange(pairs)), drawn)


def js_interval(sets: Sets, resamples: int = _SLOW_RESAMPLES) -> Interval:
    """Jensen-Shannon distance of open attributes from the world's own conditional, 0..1.

    Few images in a pool are some way off by chance alone, which biases a resampled distance
    upwards; the interval is shifted back by that bias.

    Args:
        sets: What was asked and read.
        resamples: Draws of pairs.
    """
    found, pairs = pools(sets), len(sets.outputs)
    drawn = [distance(found, weights) for weights in _pair_weights(pairs, resamples)]
    return _shifted(distance(found, np.ones(pairs)), drawn)


def interval(runs: Sequence[PairSums], resamples: int = RESAMPLES) -> Interval:
    """A score with its percentile interval of 95 %: training seeds are drawn, then pairs.

    Args:
        runs: The score of each training seed, on the same pairs.
        resamples: Draws.
    """
    return _interval(estimate(runs), resampled(runs, resamples))


def estimate(runs: Sequence[PairSums]) -> float:
    """A score over all training seeds and pairs; NaN where it is defined for none of them."""
    total, weight = (np.sum([run[i] for run in runs], axis=0) for i in range(2))
    return PairSums(total, weight).estimate


def difference(
    runs: Sequence[PairSums], others: Sequence[PairSums], resamples: int = RESAMPLES
) -> Difference:
    """One arm's score less another's, drawn together (arguments as `interval`)."""
    drawn = resampled(runs, resamples) - resampled(others, resamples)
    apart = _interval(estimate(runs) - estimate(others), drawn)
    spread = float(np.nanstd(drawn)) if not np.isnan(drawn).all() else float("nan")
    if spread == 0:  # as of an arm with itself
        return Difference(*apart, float(apart.estimate == 0))
    return Difference(*apart, math.erfc(abs(apart.estimate) / spread / math.sqrt(2)))


def holm(p_values: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which of several comparisons hold together, with a false one among them at most at `level`.

    The smallest p must stay within level / m, the next within level / (m − 1), and so on to the
    first that does not (Holm, 1979). Comparisons that could not be made (NaN) do not count.

    Args:
        p_values: Of the comparisons.
        level: Chance that at least one of those said to hold does not.
    """
    order = sorted((p, at) for at, p in enumerate(p_values) if not math.isnan(p))
    held = [False] * len(p_values)
    for rank, (p, at) in enumerate(order):
        if p > level / (len(order) - rank):
            break
        held[at] = True
    return held


def resampled(runs: Sequence[PairSums], resamples: int = RESAMPLES) -> Floats:
    """A score in every draw, (resamples,); every arm gets the same draws of pairs.

    Raises:
        ArgumentError: Runs were measured on different numbers of pairs.
    """
    pairs = len(runs[0].total)
    if any(len(run.total) != pairs for run in runs):
        raise ArgumentError("differ in their pairs", where="runs")
    weights = _pair_weights(pairs, resamples)  # of every arm: what pairs share cancels
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
    points: Sequence[tuple[Sequence[PairSums], Sequence[PairSums]]],
    corner: tuple[float, float],
    resamples: int = RESAMPLES,
) -> tuple[float, Floats]:
    """Area that arms dominate in (variety, fidelity), estimated and in every draw of pairs.

    Args:
        points: Of each arm, the two scores of every training seed.
        corner: The point to exceed, the same for everything that is compared.
        resamples: Draws.
    """
    estimates = [[estimate(runs) for runs in point] for point in points]
    whole = hypervolume_2d(estimates, corner)
    drawn = np.stack([[resampled(runs, resamples) for runs in point] for point in points])
    areas = [hypervolume_2d(drawn[:, :, i], corner) for i in range(resamples)]
    return whole, np.array(areas)


def _shifted(whole: float, drawn: list[float]) -> Interval:
    """The interval of biased draws, shifted back by their bias."""
    low, high = np.quantile(drawn, [0.025, 0.975]) + (whole - mean_or_nan(drawn))
    return Interval(whole, float(low), float(high))


def _interval(whole: float, drawn: Floats) -> Interval:
    known = drawn[~np.isnan(drawn)]
    if not len(known):
        return Interval(float("nan"), float("nan"), float("nan"))
    low, high = np.quantile(known, [0.025, 0.975])
    return Interval(whole, float(low), float(high))


@lru_cache(maxsize=4)
def _pair_weights(pairs: int, resamples: int) -> Floats:
    """How often each pair is drawn, (resamples, pairs)."""
    # counts in place of indices: all draws of a score are then one matrix product
    rng = np.random.default_rng(0)
    return rng.multinomial(pairs, [1 / pairs] * pairs, size=resamples).astype(float)
