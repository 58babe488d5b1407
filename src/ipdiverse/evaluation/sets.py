"""Scores of sets of images whose attributes are known, as sums over (prompt, reference) pairs.

A score is Σ total / Σ weight over pairs, so that `bootstrap` can draw pairs anew. Two are not such
sums and are computed again for every draw: the distance from the world (`distance`) and the leaks
(`leaked`, `placement_leaked`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ipdiverse.evaluation import metrics
from ipdiverse.evaluation.metrics import Bools, Floats, Ints

RETENTION_OF = "retention "
"""Begins the name of an identity attribute's own retention."""


@dataclass(frozen=True)
class Sets:
    """What was asked of sets of images and what they show, an equal number of images in each.

    A group is one (prompt, reference) pair with its images. S is what the prompt states, R the
    identity attributes that it leaves to the reference, U the scene attributes that nobody fixed.

    Args:
        outputs: Values that the oracle reads, (groups, images, attributes).
        invalid: Images that are not valid scenes, (groups, images); None if nobody looked.
        references: The reference's values, (groups, attributes).
        stated: The mask S, (groups, attributes).
        wanted: The prompt's values, read only in S, (groups, attributes).
        identity: Attributes that a reference is for, (attributes,); the others are the scene.
        n_values: Number of values of each attribute.
        priors: For each group and attribute the world's probabilities given what the prompt
            states; read only in U.
        names: Of the attributes; their numbers if it is empty.
        placement: Where things are; None if nobody looked.

    Raises:
        ShapeError: The shapes do not fit.
        ArgumentError: A value is out of range, there are no images, or a prior is not one.
    """

    outputs: Ints
    invalid: Bools | None
    references: Ints
    stated: Bools
    wanted: Ints
    identity: Bools
    n_values: tuple[int, ...]
    priors: Sequence[Sequence[ArrayLike]]
    names: tuple[str, ...] = ()
    placement: Placement | None = None

    def __post_init__(self) -> None:
        for name in ("outputs", "references", "wanted"):
            object.__setattr__(self, name, np.asarray(getattr(self, name)))
        for name in ("invalid", "stated", "identity"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=bool))
        _check_shapes(self)
        _check_values(self)

    @property
    def free(self) -> Bools:
        """The mask U, (groups, attributes)."""
        return ~self.stated & ~self.identity

    def prior(self, group: int, attribute: int) -> Floats:
        """The world's probabilities of an attribute of U, (values,)."""
        return np.asarray(self.priors[group][attribute], dtype=np.float64)


class Placement(NamedTuple):
    """Where things are, which no prompt states, as bins of continuous values."""

    outputs: Ints
    """What the oracle reads, (groups, images, variables)."""
    references: Ints
    """(groups, variables)."""
    n_values: tuple[int, ...]


class PairSums(NamedTuple):
    """One score of one arm: what each pair adds to it, and its weight, both (pairs,)."""

    total: Floats
    weight: Floats

    @property
    def estimate(self) -> float:
        """The score over all pairs; NaN where it is defined for none of them."""
        return float(self.total.sum() / self.weight.sum()) if self.weight.sum() else float("nan")


class Pool(NamedTuple):
    """One open attribute under one conditional; a perfect sampler's outputs are one sample."""

    prior: Floats
    groups: list[int]
    counts: list[Ints]
    """Of each group: how often each value occurred, (values,)."""


@dataclass(frozen=True)
class SetScores:
    """Scores of sets of images; S, R and U are the masks that `Sets` describes.

    Args:
        prompt_accuracy: Share of S that the outputs show.
        agree_accuracy: The same where the prompt and the reference want the same value.
        contradict_accuracy: The same where they want different values.
        retention: Share of R that equals the reference's.
        entropy: Spread of U within groups; a perfect sampler's expectation is 1 at any n.
        js: Distance of U from the world's conditional, pooled over groups with the same one.
            0 is ideal; blind to collapse within groups, which `entropy` and `leak` show.
        leak: Information of U about the reference's U, nats, mean over attributes; 0 is ideal.
        copy_rate: Share of images that repeat all of U, minus chance.
        invalid_rate: Share of images that are not valid scenes. They count in every other score.
        n: Number of images, over all groups.
        asked_for: Share of images that are valid and show all of S and all of R at once.
        retention_worst: `retention` of the identity attribute that is kept least.
        retention_by: `retention` of each identity attribute.
        placement_leak: As `leak`, of `Placement`.
        pooled_entropy: As `entropy`, pooled as `js` is: high for a copier of varied references.
        edit_accuracy: As `prompt_accuracy`, of stated identity alone.
    """

    prompt_accuracy: float
    agree_accuracy: float
    contradict_accuracy: float
    retention: float
    entropy: float
    js: float
    leak: float
    copy_rate: float
    n: int
    invalid_rate: float = math.nan
    asked_for: float = math.nan
    retention_worst: float = math.nan
    retention_by: dict[str, float] = field(default_factory=dict)
    placement_leak: float = math.nan
    pooled_entropy: float = math.nan
    edit_accuracy: float = math.nan


def score_sets(sets: Sets) -> SetScores:
    """Score sets of images whose attributes are known.

    Accuracies weigh every (group, attribute) of their mask equally, as `entropy` and `js` do;
    `leak` weighs attributes equally. Invalid images are counted in `invalid_rate` and stay in
    every other score: dropping them would reward a model for failing where it would have erred.
    A score that is defined for no group is NaN.

    `entropy` divides each group's Miller-Madow entropy by what draws from its true conditional
    are expected to score at that many images, so that a perfect sampler scores 1 at any n.
    The chance of copying multiplies the conditionals as if open attributes were independent.
    `leak` supposes that references are dealt to prompts independently of what is open.
    """
    found = pools(sets)
    wide = [pool for pool in found if metrics.plug_in_entropy(pool.prior) > 0]
    scores = {name: part.estimate for name, part in pair_sums(sets).items()}
    by = {
        n.removeprefix(RETENTION_OF): scores.pop(n) for n in [*scores] if n.startswith(RETENTION_OF)
    }
    spread = [metrics.normalised_entropy(np.sum(pool.counts, 0), pool.prior) for pool in wide]
    return SetScores(
        **scores,
        js=distance(found, np.ones(len(sets.outputs))),
        leak=leaked(sets, np.arange(len(sets.outputs))),
        n=sets.outputs[..., 0].size,
        retention_worst=float(np.fmin.reduce([*by.values()], initial=math.nan)),
        retention_by=by,
        placement_leak=placement_leaked(sets, np.arange(len(sets.outputs))),
        pooled_entropy=metrics.mean_or_nan(spread, [len(pool.groups) for pool in wide]),
    )


def concatenated(parts: Sequence[dict[str, PairSums]]) -> dict[str, PairSums]:
    """Scores of consecutive pairs as those of all of them, names as in the first."""
    return {
        name: PairSums(*(np.concatenate([one[name][i] for one in parts]) for i in range(2)))
        for name in (parts[0] if parts else ())
    }


def pair_sums(sets: Sets) -> dict[str, PairSums]:
    """Every score of `SetScores` that is a sum over pairs.

    Those that need edits or validity are there only if sets have them, and `retention` of each
    identity attribute is named `RETENTION_OF` it.
    """
    agree, contradict = agreement_masks(sets.wanted, sets.references, sets.stated)
    shows, keeps = (sets.outputs == value[:, None] for value in (sets.wanted, sets.references))
    free, edited = sets.free, sets.stated & sets.identity
    # an image is a copy if it repeats every open attribute at once
    copied = (keeps | ~free[:, None]).all(-1).mean(1) - _chance(sets)
    some = free.any(1).astype(float)
    asked = sets.identity & ~sets.stated
    by = {
        f"{RETENTION_OF}{sets.names[i] if sets.names else i}": _hits(keeps[..., i : i + 1], part)
        for i in np.flatnonzero(sets.identity)
        if (part := asked[:, i : i + 1]).any()
    }
    return {
        **({"edit_accuracy": _hits(shows, edited)} if edited.any() else {}),
        "prompt_accuracy": _hits(shows, sets.stated),
        "agree_accuracy": _hits(shows, agree),
        "contradict_accuracy": _hits(shows, contradict),
        "retention": _hits(keeps, asked),
        **by,
        "entropy": _spread(sets),
        "copy_rate": PairSums(copied * some, some),
        **({} if sets.invalid is None else _of_validity(sets.invalid, shows, keeps, sets)),
    }


def _of_validity(invalid: Bools, shows: Bools, keeps: Bools, sets: Sets) -> dict[str, PairSums]:
    """Scores that only sets have whose validity was read."""
    left = sets.identity & ~sets.stated
    whole = ((shows | ~sets.stated[:, None]) & (keeps | ~left[:, None])).all(-1) & ~invalid
    images = np.full(len(invalid), invalid.shape[1], float)
    return {
        "asked_for": PairSums(whole.sum(1).astype(float), images),
        "invalid_rate": PairSums(invalid.sum(1).astype(float), images),
    }


def pools(sets: Sets) -> list[Pool]:
    """The outputs of open attributes, grouped by equal conditionals."""
    found: dict[tuple[int, bytes], Pool] = {}
    for group, attribute in np.argwhere(sets.free).tolist():
        prior = sets.prior(group, attribute)
        # rounded: equal conditionals may differ in the last digit by how they were computed
        pool = found.setdefault((attribute, prior.round(9).tobytes()), Pool(prior, [], []))
        pool.groups.append(group)
        pool.counts.append(_counts(sets, group, attribute))
    return list(found.values())


def distance(found: Sequence[Pool], weights: Floats) -> float:
    """Mean Jensen-Shannon distance of pools from their conditionals, 0..1.

    Args:
        found: As `pools` gives them; each weighs as much as its groups do.
        weights: How many times each group counts, (groups,).
    """
    apart, sizes = [], []
    for pool in found:
        times = weights[pool.groups]
        if times.sum():
            apart.append(metrics.jensen_shannon(times @ np.stack(pool.counts), pool.prior))
            sizes.append(times.sum())
    return metrics.mean_or_nan(apart, sizes)


def leaked(sets: Sets, drawn: Ints, permutations: int = 200) -> float:
    """How much open attributes tell about the reference's, nats: mean of `metrics.leak` over them.

    Args:
        sets: What was asked and read.
        drawn: Numbers of the groups that count; a group drawn twice counts as two.
        permutations: As `metrics.leak` takes them.
    """
    attributes = Placement(sets.outputs, sets.references, sets.n_values)
    return _mean_leak(attributes, sets.free, drawn, permutations)


def placement_leaked(sets: Sets, drawn: Ints, permutations: int = 200) -> float:
    """As `leaked`, of continuous variables in bins, which are always open; NaN if nobody looked."""
    if sets.placement is None:
        return math.nan
    free = np.ones(sets.placement.references.shape, bool)
    return _mean_leak(sets.placement, free, drawn, permutations)


def _mean_leak(seen: Placement, open_: Bools, drawn: Ints, permutations: int) -> float:
    free, images, found = open_[drawn], seen.outputs.shape[1], list[float]()
    for variable in np.flatnonzero(free.sum(0) > 1).tolist():  # fewer cannot be permuted
        rows = drawn[free[:, variable]]
        given = seen.references[rows, variable].repeat(images)
        groups = np.arange(len(rows)).repeat(images)
        made, values = seen.outputs[rows, :, variable].ravel(), seen.n_values[variable]
        found.append(metrics.leak(made, given, values, permutations, groups=groups))
    return metrics.mean_or_nan(found)


def agreement_masks(
    wanted: ArrayLike, reference: ArrayLike, stated: ArrayLike
) -> tuple[Bools, Bools]:
    """Split what the prompt states: (agrees with the reference, contradicts it).

    Args:
        wanted: The prompt's values, read only where stated, (groups, attributes).
        reference: The reference's values, (groups, attributes).
        stated: Which attributes the prompt states, (groups, attributes).
    """
    same, said = np.asarray(wanted) == np.asarray(reference), np.asarray(stated, dtype=bool)
    return said & same, said & ~same


def _check_shapes(sets: Sets) -> None:
    metrics.check_dimensions("outputs", sets.outputs, 3)
    metrics.check_at_least("outputs", sets.outputs.size, 1)
    groups, images, attributes = sets.outputs.shape
    for name, found, expected in (
        ("stated", sets.stated.shape, (groups, attributes)),
        *([] if sets.invalid is None else [("invalid", sets.invalid.shape, (groups, images))]),
        ("references", sets.references.shape, (groups, attributes)),
        ("wanted", sets.wanted.shape, (groups, attributes)),
        ("identity", sets.identity.shape, (attributes,)),
        ("n_values", np.shape(sets.n_values), (attributes,)),
        ("priors", (len(sets.priors),), (groups,)),
    ):
        metrics.check_shape(name, found, expected)


def _check_values(sets: Sets) -> None:
    for attribute, size in enumerate(sets.n_values):
        metrics.checked_values(sets.outputs[:, :, attribute].ravel(), size, "outputs")
        metrics.checked_values(sets.references[:, attribute], size, "references")
        metrics.checked_values(sets.wanted[sets.stated[:, attribute], attribute], size, "wanted")
    for group, attribute in np.argwhere(sets.free).tolist():
        metrics.checked_prior(sets.prior(group, attribute), (sets.n_values[attribute],))


def _hits(right: Bools, mask: Bools) -> PairSums:
    counted = right & mask[:, None]
    return PairSums(counted.sum((1, 2)).astype(float), mask.sum(1) * float(right.shape[1]))


def _spread(sets: Sets) -> PairSums:
    """Entropies of open attributes that leave a choice, relative to a perfect sampler's."""
    groups, images, _ = sets.outputs.shape
    total, weight = np.zeros(groups), np.zeros(groups)
    for group, attribute in np.argwhere(sets.free).tolist():
        ideal = metrics.expected_entropy(tuple(sets.prior(group, attribute).tolist()), images)
        if ideal > 0:
            total[group] += metrics.entropy_miller_madow(_counts(sets, group, attribute)) / ideal
            weight[group] += 1
    return PairSums(total, weight)


def _counts(sets: Sets, group: int, attribute: int) -> Ints:
    values = sets.outputs[group, :, attribute]
    return np.bincount(values, minlength=sets.n_values[attribute])


def _chance(sets: Sets) -> Floats:
    """Probability that a fair draw repeats the reference's open attributes, (groups,)."""
    chance = np.ones(len(sets.references))
    for group, attribute in np.argwhere(sets.free).tolist():
        chance[group] *= sets.prior(group, attribute)[sets.references[group, attribute]]
    return chance
