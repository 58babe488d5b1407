"""Scores of sets of images whose attributes are known: all of `metrics` at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ipdiverse.evaluation.metrics import (
    Bools,
    Floats,
    Ints,
    accuracy,
    check_at_least,
    check_dimensions,
    check_shape,
    checked_prior,
    checked_values,
    copy_rate,
    entropy_miller_madow,
    expected_entropy,
    jensen_shannon,
    leak,
    mean_or_nan,
    normalised_entropy,
    plug_in_entropy,
    retention,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True)
class SetScores:
    """Scores of sets of images; S, R and U are the masks that `score_sets` describes.

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
        invalid_rate: Share of images that are no valid scene. They count in every other score.
        n: Number of images, over all groups.
        pooled_entropy: As `entropy`, pooled as `js` is: high for a copier of varied references.
    """

    prompt_accuracy: float
    agree_accuracy: float
    contradict_accuracy: float
    retention: float
    entropy: float
    js: float
    leak: float
    copy_rate: float
    invalid_rate: float
    n: int
    pooled_entropy: float = math.nan


class _Sets(NamedTuple):
    """The arguments of `score_sets`, as arrays."""

    outputs: Ints
    invalid: Bools
    references: Ints
    stated: Bools
    wanted: Ints
    identity: Bools
    n_values: tuple[int, ...]
    priors: Sequence[Sequence[ArrayLike]]

    @property
    def free(self) -> Bools:
        """The mask U, (groups, attributes)."""
        return ~self.stated & ~self.identity


class _Cell(NamedTuple):
    """Outputs of one open attribute: in one group, or pooled over `groups` with equal priors."""

    attribute: int
    counts: Ints
    prior: Floats
    groups: int = 1


def score_sets(
    outputs: ArrayLike,
    invalid: ArrayLike,
    references: ArrayLike,
    stated: ArrayLike,
    wanted: ArrayLike,
    identity: ArrayLike,
    n_values: tuple[int, ...],
    priors: Sequence[Sequence[ArrayLike]],
) -> SetScores:
    """Score sets of images whose attributes are known, an equal number in every group.

    S is what the prompt states, R the identity attributes it leaves to the reference, U the scene
    attributes that nobody fixed. Accuracies weigh every (group, attribute) of their mask equally,
    as `entropy` and `js` do; `leak` weighs attributes equally. Invalid images are counted in
    `invalid_rate` and stay in every other score: dropping them would reward a model for failing
    where it would have erred. NaN stands where no group has what a score needs.

    `entropy` divides each group's Miller-Madow entropy by what draws from its true conditional
    are expected to score at that many images, so that a perfect sampler scores 1 at any n.
    The chance of copying multiplies the conditionals as if open attributes were independent.
    `leak` supposes that references are dealt to prompts independently of what is open.

    Args:
        outputs: Values that the oracle reads, (groups, images, attributes).
        invalid: Images that are no valid scene, (groups, images).
        references: The reference's values, (groups, attributes).
        stated: Attributes that the prompt states, (groups, attributes).
        wanted: The prompt's values, read only where stated, (groups, attributes).
        identity: Attributes that a reference is for, (attributes,); the others are the scene.
        n_values: Number of values of each attribute.
        priors: For each group and attribute the world's probabilities given what the prompt
            states; read only where the attribute is open.

    Raises:
        ShapeError: The shapes do not fit.
        ArgumentError: A value is out of range, there are no images, or a prior is none.
    """
    sets = _Sets(
        np.asarray(outputs),
        np.asarray(invalid, dtype=bool),
        np.asarray(references),
        np.asarray(stated, dtype=bool),
        np.asarray(wanted),
        np.asarray(identity, dtype=bool),
        n_values,
        priors,
    )
    _check_shapes(sets)
    _check_values(sets)
    return SetScores(
        **_accuracies(sets),
        **_spreads(_open_cells(sets)),
        leak=mean_or_nan(_leaks(sets)),
        copy_rate=_copying(sets),
        invalid_rate=mean_or_nan(sets.invalid.ravel()),
        n=sets.invalid.size,
    )


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


def _check_shapes(sets: _Sets) -> None:
    check_dimensions("outputs", sets.outputs, 3)
    check_at_least("outputs", sets.outputs.size, 1)
    groups, images, attributes = sets.outputs.shape
    for name, found, expected in (
        ("stated", sets.stated.shape, (groups, attributes)),
        ("invalid", sets.invalid.shape, (groups, images)),
        ("references", sets.references.shape, (groups, attributes)),
        ("wanted", sets.wanted.shape, (groups, attributes)),
        ("identity", sets.identity.shape, (attributes,)),
        ("n_values", np.shape(sets.n_values), (attributes,)),
        ("priors", (len(sets.priors),), (groups,)),
    ):
        check_shape(name, found, expected)


def _check_values(sets: _Sets) -> None:
    for attribute, size in enumerate(sets.n_values):
        checked_values(sets.outputs[:, :, attribute].ravel(), size, "outputs")
        checked_values(sets.references[:, attribute], size, "references")
        checked_values(sets.wanted[sets.stated[:, attribute], attribute], size, "wanted")


def _accuracies(sets: _Sets) -> dict[str, float]:
    agree, contradict = agreement_masks(sets.wanted, sets.references, sets.stated)
    kept = ~sets.stated & sets.identity
    return {
        "prompt_accuracy": accuracy(sets.outputs, sets.wanted, sets.stated).mean,
        "agree_accuracy": accuracy(sets.outputs, sets.wanted, agree).mean,
        "contradict_accuracy": accuracy(sets.outputs, sets.wanted, contradict).mean,
        "retention": retention(sets.outputs, sets.references, kept).mean,
    }


def _open_cells(sets: _Sets) -> list[_Cell]:
    cells: list[_Cell] = []
    for group, attribute in np.argwhere(sets.free).tolist():
        size = sets.n_values[attribute]
        counts = np.bincount(sets.outputs[group, :, attribute], minlength=size)
        prior = checked_prior(sets.priors[group][attribute], (size,))
        cells.append(_Cell(attribute, counts, prior))
    return cells


def _spreads(cells: list[_Cell]) -> dict[str, float]:
    pools = _pooled(cells)
    wide = [pool for pool in pools if plug_in_entropy(pool.prior) > 0]
    js = [jensen_shannon(pool.counts, pool.prior) for pool in pools]
    spread = [normalised_entropy(pool.counts, pool.prior) for pool in wide]
    return {
        "entropy": mean_or_nan(_relative_entropies(cells)),
        "js": mean_or_nan(js, [pool.groups for pool in pools]),
        "pooled_entropy": mean_or_nan(spread, [pool.groups for pool in wide]),
    }


def _relative_entropies(cells: Iterable[_Cell]) -> list[float]:
    """Of each cell with a choice: Miller-Madow entropy over a perfect sampler's expectation."""
    pairs = (
        (entropy_miller_madow(c.counts), expected_entropy(tuple(c.prior), int(c.counts.sum())))
        for c in cells
    )
    return [entropy / expected for entropy, expected in pairs if expected > 0]


def _pooled(cells: Iterable[_Cell]) -> list[_Cell]:
    """Add up cells of one attribute and one conditional: under the null one large sample."""
    pools: dict[tuple[int, bytes], _Cell] = {}
    for cell in cells:
        key = (cell.attribute, np.round(cell.prior, 9).tobytes())
        old = pools.get(key)
        pools[key] = (
            cell._replace(counts=old.counts + cell.counts, groups=old.groups + 1) if old else cell
        )
    return list(pools.values())


def _leaks(sets: _Sets) -> list[float]:
    """Of each attribute that two groups or more leave open; fewer cannot be permuted."""
    images, found = sets.outputs.shape[1], list[float]()
    for attribute in np.flatnonzero(sets.free.sum(0) > 1).tolist():
        rows = np.flatnonzero(sets.free[:, attribute])
        given = sets.references[rows, attribute].repeat(images)
        made = sets.outputs[rows, :, attribute].ravel()
        found.append(leak(made, given, sets.n_values[attribute], groups=rows.repeat(images)))
    return found


def _copying(sets: _Sets) -> float:
    given, chance, free = (a[:, None] for a in (sets.references, _chance(sets), sets.free))
    return copy_rate(sets.outputs, given, chance, free)


def _chance(sets: _Sets) -> Floats:
    """Probability that a fair draw repeats the reference's open attributes, (groups,)."""
    chance = np.ones(len(sets.references))
    for group, attribute in np.argwhere(sets.free).tolist():
        prior = np.asarray(sets.priors[group][attribute])
        chance[group] *= prior[sets.references[group, attribute]]
    return chance
