"""Variety, fidelity and copying as numbers: pure functions of plain arrays, for any base.

Attribute values are indices, entropies are in nats, and a group is one (prompt, reference) pair
with all its images. A score that is not defined (say, nothing contradicts) is NaN.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import jensenshannon
from scipy.special import entr

from ipdiverse.errors import ArgumentError, ShapeError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

_DRAWS = 20_000
_TOLERANCE = 1e-6
_EIGENVALUE_FLOOR = 1e-8  # below lies round-off, which small q would count as items


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
        ArgumentError: Bad counts, or `prior` is not a distribution or leaves no choice.
    """
    spread = entropy_miller_madow(counts)
    true = float(plug_in_entropy(checked_prior(prior, np.shape(counts))))
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
        Nats; 0 for a single image or a prior that leaves no choice.
    """
    weights = checked_prior(prior, (len(prior),))
    draws = np.random.default_rng(0).multinomial(n, weights / weights.sum(), size=_DRAWS)
    return float(_miller_madow(draws).mean())


def jensen_shannon(counts: ArrayLike, prior: ArrayLike) -> float:
    """Jensen-Shannon distance, 0..1: the root of the divergence in bits.

    Args:
        counts: How often each value occurred, (values,), or probabilities.
        prior: The true conditional, (values,), with sum 1.

    Raises:
        ShapeError: The lengths differ.
        ArgumentError: Bad counts, or `prior` is not a distribution.

    Source:
        Endres & Schindelin, "A new metric for probability distributions" (2003).
    """
    observed = _checked_counts(counts)
    true = checked_prior(prior, observed.shape)
    # Rounding puts the divergence of nearly equal distributions below 0, whose root scipy gives as
    # NaN, with a warning.
    with np.errstate(invalid="ignore"):
        distance = float(np.nan_to_num(jensenshannon(observed, true, base=2)))
    return min(distance, 1.0)


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
    first, second = checked_values(x, nx, "x"), checked_values(y, ny, "y")
    check_shape("y", second.shape, first.shape)
    joint = _checked_counts(np.bincount(first * ny + second, minlength=nx * ny))
    joint = (joint / joint.sum()).reshape(nx, ny)
    parts = (
        plug_in_entropy(joint.sum(1))
        + plug_in_entropy(joint.sum(0))
        - plug_in_entropy(joint.ravel())
    )
    return max(float(parts), 0.0)


def leak(
    outputs: ArrayLike,
    references: ArrayLike,
    n_values: int,
    permutations: int = 200,
    seed: int = 0,
    groups: ArrayLike | None = None,
) -> float:
    """How much an open attribute of the outputs tells about the reference's, beyond chance, nats.

    The null permutes references between groups, never between images, as the images of a group
    share one. It is about (values - 1)² / 2·groups, so with few groups a copier scores below H: on
    critters it reads .51, .70, .84, .94 and .97 of H at 20, 40, 80, 200 and 400 pairs. Compare
    leaks of equally many pairs, and take them for nats from about 200.

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
    check_shape("groups", labels.shape, made.shape)
    check_shape("references", given.shape, made.shape)
    _, first, member = np.unique(labels, return_index=True, return_inverse=True)
    per_group = given[first]
    check_at_least("groups", len(first), 2)
    check_at_least("permutations", permutations, 1)
    if (per_group[member] != given).any():
        raise ArgumentError("a group has several references", where="references", expected="one")
    observed = mutual_information(made, given, n_values, n_values)
    shuffle = np.random.default_rng(seed).permutation
    null = (
        mutual_information(made, shuffle(per_group)[member], n_values, n_values)
        for _ in range(permutations)
    )
    return observed - sum(null) / permutations


def vendi(kernel_or_features: ArrayLike, q: float = 1.0, *, is_kernel: bool = False) -> float:
    """Effective number of different items, 1..n: (Σ λ_i^q)^{1/(1-q)}, λ = eigenvalues of K/n.

    Args:
        kernel_or_features: Features, (items, dim), compared by cosine; or a kernel.
        q: Order; 1 is exp of the entropy, below 1 weighs rare items more, infinity the least.
        is_kernel: The array is a similarity matrix, (items, items). Never guessed from the shape.

    Raises:
        ShapeError: The array is not a matrix, or the kernel not square.
        ArgumentError: `q` < 0, features of length zero, or a kernel that is not symmetric with
            a diagonal of 1.

    Source:
        arXiv:2210.02410 (q = 1) and arXiv:2310.12952 (any q). Eigenvalues under 1e-8 are dropped
        and the rest rescaled to sum 1, so that equal items give exactly 1.
    """
    if not q >= 0:
        raise ArgumentError("order of the Vendi score", where="q", expected=">= 0", found=q)
    build = _checked_kernel if is_kernel else _cosine_kernel
    kernel = build(np.asarray(kernel_or_features, dtype=np.float64))
    values = np.linalg.eigvalsh(kernel / len(kernel))
    values = values[values > _EIGENVALUE_FLOOR]
    values = values / values.sum()
    if q == 1:  # the limit of the formula
        return math.exp(plug_in_entropy(values))
    return float(1 / values.max() if math.isinf(q) else (values**q).sum() ** (1 / (1 - q)))


def mean_pairwise_distance(features: ArrayLike) -> float:
    """Mean cosine distance over all pairs, 0..2. Blind to duplicate clusters: see `vendi`.

    Args:
        features: (items, dim), at least two items.

    Raises:
        ShapeError: `features` is not a matrix.
        ArgumentError: Under two items, or features of length zero.
    """
    kernel = _cosine_kernel(np.asarray(features, dtype=np.float64))
    check_at_least("features", len(kernel), 2)
    return float(1 - kernel[np.triu_indices(len(kernel), 1)].mean())


def hypervolume_2d(points: ArrayLike, reference_point: ArrayLike) -> float:
    """Area that the points dominate above the reference point; both axes are maximised.

    Args:
        points: (points, 2); those that do not exceed the reference point add nothing.
        reference_point: (2,), the same for everything that is compared.

    Raises:
        ShapeError: A point does not have two coordinates.
        ArgumentError: A coordinate is not finite.
    """
    corner = np.asarray(reference_point, dtype=np.float64)
    cloud = np.asarray(points, dtype=np.float64)
    cloud = cloud if cloud.size else cloud.reshape(0, 2)
    check_shape("reference_point", corner.shape, (2,))
    check_shape("points", cloud.shape, (len(cloud), 2))
    if not (np.isfinite(cloud).all() and np.isfinite(corner).all()):
        raise ArgumentError("a coordinate is not finite", where="points")
    area = height = 0.0
    # from the right: a point adds the part of its rectangle that is above all before it
    for x, y in sorted((cloud - corner).tolist(), reverse=True):
        area += max(x, 0.0) * max(y - height, 0.0)
        height = max(height, y)
    return area


def plug_in_entropy(probabilities: Floats) -> Floats:
    """Entropy over the last axis, nats; zero probabilities contribute nothing."""
    return entr(probabilities).sum(-1)


def _miller_madow(counts: NDArray[Any]) -> Floats:
    total = counts.sum(-1)
    entropy = plug_in_entropy(counts / total[..., None]) + ((counts > 0).sum(-1) - 1) / (2 * total)
    return np.minimum(entropy, math.log(counts.shape[-1]))


def mean_or_nan(values: ArrayLike, weights: list[int] | None = None) -> float:
    """Mean, weighted if asked; NaN of nothing."""
    array = np.asarray(values, dtype=np.float64)
    return float(np.average(array, weights=weights)) if array.size else math.nan


def _checked_counts(counts: ArrayLike) -> Floats:
    array = np.asarray(counts, dtype=np.float64)
    check_dimensions("counts", array, 1)
    if not ((array >= 0).all() and 0 < array.sum() < math.inf):
        raise ArgumentError("not counts", where="counts", expected="none negative, not all zero")
    return array


def checked_prior(prior: ArrayLike, shape: tuple[int, ...]) -> Floats:
    """Probabilities of this shape with sum 1, or an error."""
    array = np.asarray(prior, dtype=np.float64)
    check_shape("prior", array.shape, shape)
    if not ((array >= 0).all() and abs(array.sum() - 1) <= _TOLERANCE):
        raise ArgumentError("not a distribution", where="prior", expected="sum 1, none negative")
    return array


def checked_values(values: ArrayLike, size: int, where: str) -> Ints:
    """A vector of indices 0..size - 1, or an error."""
    array = np.asarray(values)
    check_dimensions(where, array, 1)
    if array.size and not (array.dtype.kind in "iub" and 0 <= array.min() <= array.max() < size):
        raise ArgumentError("value out of range", where=where, expected=f"indices 0..{size - 1}")
    return array.astype(np.int64)


def check_dimensions(where: str, array: NDArray[Any], expected: int) -> None:
    """Raise ShapeError unless `array` has `expected` axes."""
    if array.ndim != expected:
        raise ShapeError("dimensions", where=where, expected=expected, found=array.ndim)


def check_shape(where: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise ShapeError unless the shapes are equal."""
    if found != expected:
        raise ShapeError("shapes do not fit", where=where, expected=expected, found=found)


def check_at_least(where: str, found: int, expected: int) -> None:
    """Raise ArgumentError if there are fewer than expected."""
    if found < expected:
        raise ArgumentError("too few", where=where, expected=f"{expected} or more", found=found)


def _cosine_kernel(features: Floats) -> Floats:
    check_dimensions("features", features, 2)
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    if not (features.size and np.isfinite(lengths).all() and (lengths > 0).all()):
        raise ArgumentError("no cosine", where="features", expected="finite rows, none all zero")
    unit = features / lengths
    return unit @ unit.T


def _checked_kernel(kernel: Floats) -> Floats:
    check_shape("kernel", kernel.shape, (len(kernel), len(kernel)))
    symmetric = np.allclose(kernel, kernel.T, atol=_TOLERANCE)
    if not (kernel.size and symmetric and np.allclose(kernel.diagonal(), 1, atol=_TOLERANCE)):
        raise ArgumentError("not a kernel", where="kernel", expected="symmetric, diagonal of 1")
    return kernel
