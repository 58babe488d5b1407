"""Variety, fidelity and copying as numbers: pure functions of plain arrays, for any base.

Attribute values are indices, entropies are in nats, and a group is one (prompt, reference) pair
with all its images. A score that nothing defines (nothing contradicted, say) is NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ipdiverse.errors import ArgumentError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_DRAWS = 20_000
_EIGENVALUE_FLOOR = 1e-8  # below lies round-off, which small q would count as items
_TOLERANCE = 1e-6
_AXES: Mapping[str, slice] = {
    "invalid": slice(2),
    "references": slice(None, None, 2),
    "stated": slice(None, None, 2),
    "wanted": slice(None, None, 2),
    "identity": slice(2, None),
    "n_values": slice(2, None),
    "priors": slice(1),
}  # which of (groups, images, attributes) each argument of `score_sets` has


class Accuracy(NamedTuple):
    """Share of right values: over every masked cell, and per attribute (NaN where none is)."""

    mean: float
    per_attribute: Floats


class Interval(NamedTuple):
    """A statistic of all groups, with the ends of its confidence interval."""

    estimate: float
    low: float
    high: float


def entropy_miller_madow(counts: ArrayLike) -> float:
    """Entropy, nats: plug-in + (values observed - 1) / 2N, at most log(number of values).

    Args:
        counts: How often each value occurred, (values,).

    Raises:
        ShapeError: `counts` is not a vector.
        ArgumentError: A count is negative, or all are zero.

    Source:
        Miller, "Note on the bias of information estimates" (1955); Paninski,
        "Estimation of entropy and mutual information" (2003).
    """
    return float(_miller_madow(_checked_counts(counts)))


def normalised_entropy(counts: ArrayLike, prior: ArrayLike) -> float:
    """Miller-Madow entropy of outputs over the entropy of the world's true conditional.

    It exceeds 1 where outputs spread more evenly than the world does (over-dispersion): more is
    not better, so read it next to `jensen_shannon`. At few draws it is biased; see
    `expected_entropy`.

    Args:
        counts: How often each value occurred, (values,).
        prior: The true conditional, (values,), with sum 1.

    Raises:
        ShapeError: The lengths differ.
        ArgumentError: Bad counts, or `prior` is no distribution or leaves no choice.
    """
    spread = entropy_miller_madow(counts)
    true = float(_plug_in(_checked_prior(prior, np.shape(counts))))
    if true <= 0:
        raise ArgumentError("the prior leaves no choice", where="prior", expected="entropy > 0")
    return spread / true


@lru_cache(maxsize=4096)
def expected_entropy(prior: tuple[float, ...], n: int) -> float:
    """Mean Miller-Madow entropy of `n` draws from `prior`: 20,000 simulations, one fixed seed.

    Args:
        prior: Probabilities of the values, with sum 1.
        n: Images in a group. The capped estimator has no closed form, and at few images its
            expectation is well below the entropy of `prior`.

    Returns:
        Nats; 0 for a single image or a prior without choice.
    """
    weights = _checked_prior(prior, (len(prior),))
    draws = np.random.default_rng(0).multinomial(n, weights / weights.sum(), size=_DRAWS)
    return float(_miller_madow(draws).mean())


def jensen_shannon(counts: ArrayLike, prior: ArrayLike) -> float:
    """Jensen-Shannon distance, 0..1: the root of the divergence in bits.

    Args:
        counts: How often each value occurred, (values,), or probabilities.
        prior: The true conditional, (values,), with sum 1.

    Raises:
        ShapeError: The lengths differ.
        ArgumentError: Bad counts, or `prior` is no distribution.

    Source:
        Endres & Schindelin, "A new metric for probability distributions" (2003).
    """
    observed = _checked_counts(counts)
    observed = observed / observed.sum()
    true = _checked_prior(prior, observed.shape)
    mixed = _plug_in((observed + true) / 2)
    divergence = float(mixed - (_plug_in(observed) + _plug_in(true)) / 2) / math.log(2)
    return math.sqrt(min(max(divergence, 0.0), 1.0))


def mutual_information(x: ArrayLike, y: ArrayLike, nx: int, ny: int) -> float:
    """Plug-in mutual information, nats: H(x) + H(y) - H(x, y). Biased upwards; see `leak`.

    Args:
        x: Values in 0..nx - 1, (samples,).
        y: Values in 0..ny - 1, (samples,).
        nx: Number of values of `x`.
        ny: Number of values of `y`.

    Raises:
        ShapeError: The lengths differ.
        ArgumentError: A value is out of range, or there are no samples.
    """
    first, second = _checked_values(x, nx, "x"), _checked_values(y, ny, "y")
    _same_shape("y", second, first.shape)
    joint = _checked_counts(np.bincount(first * ny + second, minlength=nx * ny))
    joint = (joint / joint.sum()).reshape(nx, ny)
    parts = _plug_in(joint.sum(1)) + _plug_in(joint.sum(0)) - _plug_in(joint.ravel())
    return max(float(parts), 0.0)


def leak(
    outputs: ArrayLike,
    references: ArrayLike,
    n_values: int,
    permutations: int = 200,
    seed: int = 0,
    groups: ArrayLike | None = None,
) -> float:
    """What one open attribute of the outputs tells about the reference's, beyond chance, nats.

    The null permutes references between groups, never between images: those of a group share
    one. It is about (values - 1)² / 2·groups, so with few groups a copier scores below H.

    Args:
        outputs: The outputs' values, (images,).
        references: The value of each image's reference, (images,).
        n_values: Number of values of the attribute.
        permutations: How many permutations the null averages.
        seed: Seed of the permutations.
        groups: Group label of each image, (images,); None makes each image its own.

    Returns:
        About 0 for outputs independent of the reference, about its entropy for a copier.

    Raises:
        ShapeError: The lengths differ.
        ArgumentError: Under two groups, no permutations, or a group with several references.
    """
    made, given = np.asarray(outputs), np.asarray(references)
    labels = np.arange(made.size) if groups is None else np.asarray(groups)
    _same_shape("groups", labels, made.shape)
    _same_shape("references", given, made.shape)
    _, first, member = np.unique(labels, return_index=True, return_inverse=True)
    per_group = given[first]
    _at_least("groups", len(first), 2)
    _at_least("permutations", permutations, 1)
    if (per_group[member] != given).any():
        raise ArgumentError("a group has several references", where="references", expected="one")
    observed = mutual_information(made, given, n_values, n_values)
    shuffle = np.random.default_rng(seed).permutation
    null = (
        mutual_information(made, shuffle(per_group)[member], n_values, n_values)
        for _ in range(permutations)
    )
    return observed - sum(null) / permutations


def copy_rate(
    outputs: ArrayLike, references: ArrayLike, chance: ArrayLike, open_mask: ArrayLike = True
) -> float:
    """Share of images whose open attributes all equal the reference's, minus chance.

    Args:
        outputs: Values, (..., attributes).
        references: The same of each image's reference; broadcasts against `outputs`.
        chance: Probability that a fair draw matches, (...): the product of the priors of the
            reference's values; broadcasts against the images.
        open_mask: Which attributes are open; broadcasts. Images with none do not count.
    """
    made = np.asarray(outputs)
    closed = ~np.broadcast_to(np.asarray(open_mask, dtype=bool), made.shape)
    copied = ((made == np.asarray(references)) | closed).all(-1)
    return _mean((copied - np.asarray(chance))[~closed.all(-1)])


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


def accuracy(outputs: ArrayLike, wanted: ArrayLike, mask: ArrayLike) -> Accuracy:
    """Share of masked attributes that have the wanted value.

    Args:
        outputs: Values, (groups, images, attributes).
        wanted: Right values, (groups, attributes).
        mask: Which attributes count, (groups, attributes).

    Raises:
        ShapeError: The shapes do not fit.
    """
    made, right, counted = np.asarray(outputs), np.asarray(wanted), np.asarray(mask, dtype=bool)
    _dimensions("outputs", made, 3)
    _same_shape("wanted", right, made.shape[::2])
    _same_shape("mask", counted, made.shape[::2])
    hits = made == right[:, None]
    columns = [_mean(hits[counted[:, a], :, a]) for a in range(made.shape[2])]
    return Accuracy(_mean(hits.transpose(0, 2, 1)[counted]), np.array(columns))


def retention(outputs: ArrayLike, reference: ArrayLike, mask: ArrayLike) -> Accuracy:
    """Share of masked identity attributes kept: `accuracy` with the reference as what is right.

    Args:
        outputs: Values, (groups, images, attributes).
        reference: The reference's values, (groups, attributes).
        mask: Identity attributes that the prompt leaves to the reference, (groups, attributes).
    """
    return accuracy(outputs, reference, mask)


def vendi(kernel_or_features: ArrayLike, q: float = 1.0, *, is_kernel: bool = False) -> float:
    """Effective number of different items, 1..n: (Σ λ_i^q)^{1/(1-q)}, λ = eigenvalues of K/n.

    Args:
        kernel_or_features: Features, (items, dim), compared by cosine; or a kernel.
        q: Order; 1 is exp of the entropy, below 1 weighs rare items more, infinity the least.
        is_kernel: The array is a similarity matrix, (items, items). Never guessed from the shape.

    Raises:
        ShapeError: The array is no matrix, or the kernel not square.
        ArgumentError: `q` < 0, features of length zero, or a kernel that is not symmetric with
            a diagonal of 1.

    Source:
        arXiv:2210.02410 (q = 1) and arXiv:2310.12952 (any q). Eigenvalues under 1e-8 are dropped
        and the rest rescaled to sum 1, so equal items give exactly 1.
    """
    if not q >= 0:
        raise ArgumentError("order of the Vendi score", where="q", expected=">= 0", found=q)
    build = _checked_kernel if is_kernel else _cosine_kernel
    kernel = build(np.asarray(kernel_or_features, dtype=np.float64))
    values = np.linalg.eigvalsh(kernel / len(kernel))
    values = values[values > _EIGENVALUE_FLOOR]
    values = values / values.sum()
    if q == 1:
        return math.exp(_plug_in(values))
    return float(1 / values.max() if math.isinf(q) else (values**q).sum() ** (1 / (1 - q)))


def mean_pairwise_distance(features: ArrayLike) -> float:
    """Mean cosine distance over all pairs, 0..2. Blind to duplicate clusters: see `vendi`.

    Args:
        features: (items, dim), at least two items.

    Raises:
        ShapeError: `features` is no matrix.
        ArgumentError: Under two items, or features of length zero.
    """
    kernel = _cosine_kernel(np.asarray(features, dtype=np.float64))
    _at_least("features", len(kernel), 2)
    return float(1 - kernel[np.triu_indices(len(kernel), 1)].mean())


def hypervolume_2d(points: ArrayLike, reference_point: ArrayLike) -> float:
    """Area that the points dominate above the reference point; both axes are maximised.

    Args:
        points: (points, 2); those that do not exceed the reference point add nothing.
        reference_point: (2,), the same for everything that is compared.

    Raises:
        ShapeError: A point has not two coordinates.
        ArgumentError: A coordinate is not finite.
    """
    corner = np.asarray(reference_point, dtype=np.float64)
    cloud = np.asarray(points, dtype=np.float64)
    cloud = cloud if cloud.size else cloud.reshape(0, 2)
    _same_shape("reference_point", corner, (2,))
    _same_shape("points", cloud, (len(cloud), 2))
    if not (np.isfinite(cloud).all() and np.isfinite(corner).all()):
        raise ArgumentError("a coordinate is not finite", where="points")
    area = height = 0.0
    for x, y in sorted((cloud - corner).tolist(), reverse=True):
        area += max(x, 0.0) * max(y - height, 0.0)
        height = max(height, y)
    return area


def bootstrap_interval(
    values_by_group: Sequence[ArrayLike] | Floats,
    statistic: Callable[[Any], Any] = np.mean,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap over groups, never over images: images of a group are not independent.

    Args:
        values_by_group: One entry a group: a number, or its images' values along the first axis.
            For a paired comparison pass differences.
        statistic: Maps the drawn groups' values, joined along the first axis, to a number.
        resamples: Number of resamples.
        seed: Seed of the resampling.
        level: Coverage, between 0 and 1.

    Raises:
        ArgumentError: Under two groups, no resamples, or `level` outside (0, 1).

    Source:
        Davison & Hinkley, "Bootstrap Methods and their Application" (1997), section 3.8.
    """
    blocks: list[Floats] = [np.atleast_1d(np.asarray(values)) for values in values_by_group]
    _at_least("values_by_group", len(blocks), 2)
    _at_least("resamples", resamples, 1)
    if not 0 < level < 1:
        raise ArgumentError("coverage", where="level", expected="between 0 and 1", found=level)
    size = (resamples, len(blocks))
    draws: list[list[int]] = np.random.default_rng(seed).integers(len(blocks), size=size).tolist()
    found = [float(statistic(np.concatenate([blocks[i] for i in draw]))) for draw in draws]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(np.concatenate(blocks))), float(low), float(high))


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
    made, given = np.asarray(outputs), np.asarray(references)
    said, lasting = np.asarray(stated, dtype=bool), np.asarray(identity, dtype=bool)
    failed = np.asarray(invalid, dtype=bool)
    _check_sets(
        made,
        said,
        invalid=failed,
        references=given,
        wanted=np.asarray(wanted),
        identity=lasting,
        n_values=np.asarray(n_values),
        priors=np.arange(len(priors)),
    )
    free = ~said & ~lasting
    cells = _open_cells(made, free, n_values, priors)
    agree, contradict = agreement_masks(wanted, given, said)
    chance = _chance(given, free, priors)
    return SetScores(
        prompt_accuracy=accuracy(made, wanted, said).mean,
        agree_accuracy=accuracy(made, wanted, agree).mean,
        contradict_accuracy=accuracy(made, wanted, contradict).mean,
        retention=retention(made, given, ~said & lasting).mean,
        entropy=_mean(_relative_entropies(cells)),
        leak=_mean(_leaks(made, given, free, n_values)),
        copy_rate=copy_rate(made, given[:, None], chance[:, None], free[:, None]),
        invalid_rate=_mean(failed.ravel()),
        n=failed.size,
        **_pooled_scores(cells),
    )


def _open_cells(
    outputs: Ints, free: Bools, n_values: tuple[int, ...], priors: Sequence[Sequence[ArrayLike]]
) -> list[_Cell]:
    cells: list[_Cell] = []
    for group, attribute in np.argwhere(free).tolist():
        size = n_values[attribute]
        counts = np.bincount(outputs[group, :, attribute], minlength=size)
        cells.append(_Cell(attribute, counts, _checked_prior(priors[group][attribute], (size,))))
    return cells


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


def _pooled_scores(cells: Iterable[_Cell]) -> dict[str, float]:
    pools = _pooled(cells)
    wide = [pool for pool in pools if _plug_in(pool.prior) > 0]
    js = [jensen_shannon(pool.counts, pool.prior) for pool in pools]
    spread = [normalised_entropy(pool.counts, pool.prior) for pool in wide]
    return {
        "js": _mean(js, [pool.groups for pool in pools]),
        "pooled_entropy": _mean(spread, [pool.groups for pool in wide]),
    }


def _leaks(outputs: Ints, references: Ints, free: Bools, n_values: tuple[int, ...]) -> list[float]:
    """Of each attribute that two groups or more leave open; fewer cannot be permuted."""
    images, found = outputs.shape[1], list[float]()
    for attribute in np.flatnonzero(free.sum(0) > 1).tolist():
        rows = np.flatnonzero(free[:, attribute])
        given = references[rows, attribute].repeat(images)
        made = outputs[rows, :, attribute].ravel()
        found.append(leak(made, given, n_values[attribute], groups=rows.repeat(images)))
    return found


def _chance(references: Ints, free: Bools, priors: Sequence[Sequence[ArrayLike]]) -> Floats:
    """Probability that a fair draw repeats the reference's open attributes, (groups,)."""
    chance = np.ones(len(references))
    for group, attribute in np.argwhere(free).tolist():
        chance[group] *= np.asarray(priors[group][attribute])[references[group, attribute]]
    return chance


def _check_sets(outputs: NDArray[Any], stated: Bools, **others: NDArray[Any]) -> None:
    _dimensions("outputs", outputs, 3)
    _at_least("outputs", outputs.size, 1)
    for name, array in {"stated": stated, **others}.items():
        _same_shape(name, array, outputs.shape[_AXES[name]])
    for attribute, size in enumerate(others["n_values"].tolist()):
        _checked_values(outputs[:, :, attribute].ravel(), size, "outputs")
        _checked_values(others["references"][:, attribute], size, "references")
        _checked_values(others["wanted"][stated[:, attribute], attribute], size, "wanted")


def _plug_in(probabilities: Floats) -> Floats:
    """Entropy over the last axis, nats; zero probabilities contribute nothing."""
    logs = np.log(np.where(probabilities > 0, probabilities, 1.0))
    return -(probabilities * logs).sum(-1)


def _miller_madow(counts: NDArray[Any]) -> Floats:
    total = counts.sum(-1)
    entropy = _plug_in(counts / total[..., None]) + ((counts > 0).sum(-1) - 1) / (2 * total)
    return np.minimum(entropy, math.log(counts.shape[-1]))


def _mean(values: ArrayLike, weights: list[int] | None = None) -> float:
    array = np.asarray(values, dtype=np.float64)
    return float(np.average(array, weights=weights)) if array.size else math.nan


def _cosine_kernel(features: Floats) -> Floats:
    _dimensions("features", features, 2)
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    if not (features.size and np.isfinite(lengths).all() and (lengths > 0).all()):
        raise ArgumentError("no cosine", where="features", expected="finite rows, none all zero")
    unit = features / lengths
    return unit @ unit.T


def _checked_kernel(kernel: Floats) -> Floats:
    _same_shape("kernel", kernel, (len(kernel), len(kernel)))
    symmetric = np.allclose(kernel, kernel.T, atol=_TOLERANCE)
    if not (kernel.size and symmetric and np.allclose(kernel.diagonal(), 1, atol=_TOLERANCE)):
        raise ArgumentError("no kernel", where="kernel", expected="symmetric, diagonal of 1")
    return kernel


def _checked_counts(counts: ArrayLike) -> Floats:
    array = np.asarray(counts, dtype=np.float64)
    _dimensions("counts", array, 1)
    if not ((array >= 0).all() and 0 < array.sum() < math.inf):
        raise ArgumentError("no counts", where="counts", expected="none negative, not all zero")
    return array


def _checked_prior(prior: ArrayLike, shape: tuple[int, ...]) -> Floats:
    array = np.asarray(prior, dtype=np.float64)
    _same_shape("prior", array, shape)
    if not ((array >= 0).all() and abs(array.sum() - 1) <= _TOLERANCE):
        raise ArgumentError("no distribution", where="prior", expected="sum 1, none negative")
    return array


def _checked_values(values: ArrayLike, size: int, where: str) -> Ints:
    array = np.asarray(values)
    _dimensions(where, array, 1)
    if array.size and not (array.dtype.kind in "iub" and 0 <= array.min() <= array.max() < size):
        raise ArgumentError("value out of range", where=where, expected=f"indices 0..{size - 1}")
    return array.astype(np.int64)


def _dimensions(where: str, array: NDArray[Any], expected: int) -> None:
    if array.ndim != expected:
        raise ShapeError("dimensions", where=where, expected=expected, found=array.ndim)


def _same_shape(where: str, array: NDArray[Any], expected: tuple[int, ...]) -> None:
    if array.shape != expected:
        raise ShapeError("shapes do not fit", where=where, expected=expected, found=array.shape)


def _at_least(where: str, found: int, expected: int) -> None:
    if found < expected:
        raise ArgumentError("too few", where=where, expected=f"{expected} or more", found=found)
