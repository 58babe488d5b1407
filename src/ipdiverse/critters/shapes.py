"""Signed distance fields of flat shapes, and painting them with one pixel of anti-aliasing.

A distance is negative inside. Fields are evaluated only within the shape's bounding box, which
makes a render cheap. Formulas: Inigo Quilez, "2D distance functions".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np

Bounds = tuple[float, float, float, float]


class Shape(NamedTuple):
    """A flat shape, in fractions of the image."""

    bounds: Bounds
    """Left, top, right and bottom."""
    distance: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """Signed distance at points x and y, which broadcast; negative inside."""


def ellipse(x: float, y: float, rx: float, ry: float) -> Shape:
    """Axis-aligned ellipse; the distance is first-order exact at the boundary."""

    def distance(at_x: np.ndarray, at_y: np.ndarray) -> np.ndarray:
        dx, dy = (at_x - x) / rx, (at_y - y) / ry
        return (np.sqrt(dx * dx + dy * dy) - 1) * min(rx, ry)

    return Shape((x - rx, y - ry, x + rx, y + ry), distance)


def box(x: float, y: float, hx: float, hy: float) -> Shape:
    """Axis-aligned box of half sizes hx and hy."""

    def distance(at_x: np.ndarray, at_y: np.ndarray) -> np.ndarray:
        return np.maximum(np.abs(at_x - x) - hx, np.abs(at_y - y) - hy)

    return Shape((x - hx, y - hy, x + hx, y + hy), distance)


def capsule(x0: float, y0: float, x1: float, y1: float, r: float) -> Shape:
    """A line from (x0, y0) to (x1, y1) with round ends of radius r."""
    dx, dy = x1 - x0, y1 - y0

    def distance(at_x: np.ndarray, at_y: np.ndarray) -> np.ndarray:
        px, py = at_x - x0, at_y - y0
        along = np.clip((px * dx + py * dy) / (dx * dx + dy * dy), 0, 1)
        return np.hypot(px - along * dx, py - along * dy) - r

    return Shape((min(x0, x1) - r, min(y0, y1) - r, max(x0, x1) + r, max(y0, y1) + r), distance)


def polygon(points: tuple[tuple[float, float], ...]) -> Shape:
    """A simple polygon, convex or not, clockwise or not."""

    def distance(at_x: np.ndarray, at_y: np.ndarray) -> np.ndarray:
        start, edge, square = _edges(points)
        px, py = at_x - start[0], at_y - start[1]
        along = np.clip((px * edge[0] + py * edge[1]) / square, 0, 1)
        nearest = ((px - along * edge[0]) ** 2 + (py - along * edge[1]) ** 2).min(0)
        # inside, a ray to one side crosses an odd number of edges
        crosses = (py < 0) != (py < edge[1])
        crosses = crosses & ((px * edge[1] < py * edge[0]) == (edge[1] > 0))
        inside = np.logical_xor.reduce(crosses, axis=0)
        return np.where(inside, -1, 1).astype(nearest.dtype) * np.sqrt(nearest)

    xs, ys = zip(*points, strict=True)
    return Shape((min(xs), min(ys), max(xs), max(ys)), distance)


@lru_cache(maxsize=64)
def _edges(points: tuple[tuple[float, float], ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start and direction of each edge, (2, edges, 1, 1), and its squared length."""
    start = np.array(points).T[:, :, None, None]
    edge = np.roll(start, -1, axis=1) - start
    return start.astype(np.float32), edge.astype(np.float32), (edge**2).sum(0).astype(np.float32)


def grown(shape: Shape, by: float) -> Shape:
    """The shape with its boundary moved outwards."""
    left, top, right, bottom = shape.bounds
    bounds = left - by, top - by, right + by, bottom + by
    return Shape(bounds, lambda x, y: shape.distance(x, y) - by)


def clipped(shape: Shape, by: Shape) -> Shape:
    """The intersection of two shapes."""
    a, b = shape.bounds, by.bounds
    bounds = max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])
    return Shape(bounds, lambda x, y: np.maximum(shape.distance(x, y), by.distance(x, y)))


def star(x: float, y: float, outer: float, inner: float) -> tuple[tuple[float, float], ...]:
    """Corners of a five-pointed star with one point up."""
    angles = np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, outer, inner)
    return tuple(
        (float(x + r * np.sin(a)), float(y - r * np.cos(a)))
        for a, r in zip(angles, radii, strict=True)
    )


@cache
def centres(size: int) -> np.ndarray:
    """Where pixels are, as fractions of the image, (size,)."""
    return (np.arange(size, dtype=np.float32) + 0.5) / size


def paint(canvas: np.ndarray, shape: Shape, colour: tuple[float, float, float]) -> None:
    """Blend a flat colour over the canvas, float32 (size, size, 3), RGB in 0..1, in place.

    Coverage falls linearly over one pixel at the shape's boundary.
    """
    size = canvas.shape[0]
    left, top, right, bottom = shape.bounds
    x0, x1 = max(0, int(left * size - 1)), min(size, int(right * size + 2))
    y0, y1 = max(0, int(top * size - 1)), min(size, int(bottom * size + 2))
    if x0 >= x1 or y0 >= y1:
        return
    at = centres(size)
    distance = shape.distance(at[None, x0:x1], at[y0:y1, None])
    coverage = 0.5 - distance * size
    np.minimum(np.maximum(coverage, 0, out=coverage), 1, out=coverage)
    region = canvas[y0:y1, x0:x1]  # a view, so the canvas changes too
    region += coverage[..., None] * (np.array(colour, np.float32) - region)
