"""Intervals of scores: a paired bootstrap over pairs, and Student's t over training seeds.

Arms that were measured on the same pairs are resampled together, so that what the pairs have in
common cancels in the arms' differences. Two or three seeds are too few to be drawn anew: a
bootstrap of three says too little of their spread, which t with as few degrees of freedom does not.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.stats import t as student

from ipdiverse.errors import ArgumentError
from ipdiverse.evaluation.metrics import Floats, Ints, hypervolume_2d, mean_or_nan
from ipdiverse.evaluation.sets import PairSums, Sets, distance, leaked, pools

RESAMPLES = 2000
_SLOW_RESAMPLES = 200  # of scores that are not sums and are computed again for every draw
_LEAK_PERMUTATIONS = 20  # few: the noise of the null averages out over the draws


class Difference(NamedTuple):
    """The difference between two arms, with the ends of its confidence interval.

    Args:
        estimate: One less the other.
        low: Of the interval of this one comparison.
        high: The same.
        p: Two-sided, of a difference as large by chance: the estimate over its spread, by Student's
            t with as many degrees of freedom as the seeds leave; draws are too few to count tails.
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


def leak_interval(
    sets: Sets,
    resamples: int = _SLOW_RESAMPLES,
    of: Callable[[Sets, Ints, int], float] = leaked,
) -> Interval:
    """Leak over all open attributes, nats, with an interval over pairs.

    Args:
        sets: What was asked and read.
        resamples: Draws of pairs. Pairs that are drawn twice count as one group each time, which
            biases a resampled leak upwards; the interval is shifted back by that bias.
        of: `leaked` or `placement_leaked`.
    """
    rng, pairs = np.random.default_rng(0), len(sets.outputs)
    draws = [rng.integers(pairs, size=pairs) for _ in range(resamples)]
    drawn = [of(sets, rows, _LEAK_PERMUTATIONS) for rows in draws]
    return _shifted(of(sets, np.arange(pairs), 200), drawn)


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
    """A score with its interval of 95 %, over pairs and, where there are several, training seeds.

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
    apart = estimate(runs) - estimate(others)
    found = _interval(apart, resampled(runs, resamples) - resampled(others, resamples))
    if np.isnan(found.low):
        return Difference(*found, float("nan"))
    if runs is others or found.low == found.high:  # as of an arm with itself
        return Difference(*found, float(apart == 0))
    spread = float(np.nanstd(_over_pairs(runs, resamples) - _over_pairs(others, resamples)))
    seeds = [_seed_variance(one) for one in (runs, others)]
    variance = spread**2 + sum(part for part, _ in seeds)
    # Welch-Satterthwaite; pairs are many, so that their variance counts as known
    uncertain = sum(part**2 / freedom for part, freedom in seeds if part)
    freedom = variance**2 / uncertain if uncertain else math.inf
    return Difference(*found, float(2 * student.sf(abs(apart) / math.sqrt(variance), freedom)))


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

    To the score of drawn pairs comes what another few seeds might have added: their standard error
    times a draw from Student's t.

    Raises:
        ArgumentError: Runs were measured on different numbers of pairs.
    """
    drawn, (variance, freedom) = _over_pairs(runs, resamples), _seed_variance(runs)
    if not variance:
        return drawn
    # by content: an arm differs from itself by nothing, and independently from every other
    rng = np.random.default_rng(zlib.crc32(np.stack([run.total for run in runs]).tobytes()))
    return drawn + math.sqrt(variance) * rng.standard_t(freedom, resamples)


def _over_pairs(runs: Sequence[PairSums], resamples: int) -> Floats:
    """A score of all seeds together in every draw of pairs; NaN where it is not defined."""
    pairs = len(runs[0].total)
    if any(len(run.total) != pairs for run in runs):
        raise ArgumentError("differ in their pairs", where="runs")
    weights = _pair_weights(pairs, resamples)  # of every arm: what pairs share cancels
    total, weight = (np.sum([run[i] for run in runs], axis=0) @ weights.T for i in range(2))
    return np.divide(total, weight, out=np.full(resamples, np.nan), where=weight > 0)


def _seed_variance(runs: Sequence[PairSums]) -> tuple[float, int]:
    """Variance of the mean over training seeds, and its degrees of freedom; 0 of a single seed."""
    found = [run.estimate for run in runs]
    if len(found) < 2 or np.isnan(found).any():
        return 0.0, 0
    return float(np.var(found, ddof=1)) / len(found), len(found) - 1


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
