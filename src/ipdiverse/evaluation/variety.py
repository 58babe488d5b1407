"""Variety of sets of items, for features of any kind."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from ipdiverse.errors import ArgumentError
from ipdiverse.evaluation.metrics import (
    Floats,
    check_at_least,
    check_dimensions,
    check_shape,
    plug_in_entropy,
)

_EIGENVALUE_FLOOR = 1e-8  # below lies round-off, which small q would count as items
_TOLERANCE = 1e-6


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
        return math.exp(plug_in_entropy(values))
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
    check_at_least("features", len(kernel), 2)
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
    check_shape("reference_point", corner.shape, (2,))
    check_shape("points", cloud.shape, (len(cloud), 2))
    if not (np.isfinite(cloud).all() and np.isfinite(corner).all()):
        raise ArgumentError("a coordinate is not finite", where="points")
    area = height = 0.0
    for x, y in sorted((cloud - corner).tolist(), reverse=True):
        area += max(x, 0.0) * max(y - height, 0.0)
        height = max(height, y)
    return area


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
        raise ArgumentError("no kernel", where="kernel", expected="symmetric, diagonal of 1")
    return kernel
