"""Signed distance fields of flat shapes, and painting them with one pixel of anti-aliasing.

A distance is negative inside. Fields are evaluated only within the shape's bounding box, which
makes a render cheap. Formulas: Inigo Quilez, "2D distance functions".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    Bounds = tuple[float, float, float, float]


class Shape(Protocol):
    """Anything with bounds and a signed distance."""

    def bounds(self) -> Bounds:
        """Left, top, right and bottom, as fractions of the image."""
        ...

    def distance(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Signed distance at these points, negative inside; x and y broadcast."""
        ...


@dataclass(frozen=True, slots=True)
class Ellipse:
    """Axis-aligned ellipse; the distance is first-order exact at the boundary."""

    x: float
    y: float
    rx: float
    ry: float

    def bounds(self) -> Bounds:
        return self.x - self.rx, self.y - self.ry, self.x + self.rx, self.y + self.ry

    def distance(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        dx, dy = (x - self.x) / self.rx, (y - self.y) / self.ry
        return (np.sqrt(dx * dx + dy * dy) - 1) * min(self.rx, self.ry)


@dataclass(frozen=True, slots=True)
class Box:
    """Axis-aligned box of half sizes hx and hy."""

    x: float
    y: float
    hx: float
    hy: float

    def bounds(self) -> Bounds:
        return self.x - self.hx, self.y - self.hy, self.x + self.hx, self.y + self.hy

    def distance(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.maximum(np.abs(x - self.x) - self.hx, np.abs(y - self.y) - self.hy)


@dataclass(frozen=True, slots=True)
class Capsule:
    """A line from (x0, y0) to (x1, y1) with round ends of radius r."""

    x0: float
    y0: float
    x1: float
    y1: float
    r: float

    def bounds(self) -> Bounds:
        (left, right), (top, bottom) = sorted((self.x0, self.x1)), sorted((self.y0, self.y1))
        return left - self.r, top - self.r, right + self.r, bottom + self.r

    def distance(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        dx, dy = self.x1 - self.x0, self.y1 - self.y0
        px, py = x - self.x0, y - self.y0
        along = np.clip((px * dx + py * dy) / (dx * dx + dy * dy), 0, 1)
        return np.hypot(px - along * dx, py - along * dy) - self.r


@dataclass(frozen=True, slots=True)
class Polygon:
    """A simple polygon, convex or not, clockwise or not."""

    points: tuple[tuple[float, float], ...]

    def bounds(self) -> Bounds:
        xs, ys = zip(*self.points, strict=True)
        return min(xs), min(ys), max(xs), max(ys)

    def distance(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        start, edge, square = _edges(self.points)
        px, py = x - start[0], y - start[1]
        along = np.clip((px * edge[0] + py * edge[1]) / square, 0, 1)
        nearest = ((px - along * edge[0]) ** 2 + (py - along * edge[1]) ** 2).min(0)
        # inside, a ray to one side crosses an odd number of edges
        crosses = (py < 0) != (py < edge[1])
        crosses = crosses & ((px * edge[1] < py * edge[0]) == (edge[1] > 0))
        inside = np.logical_xor.reduce(crosses, axis=0)
        return np.where(inside, -1, 1).astype(nearest.dtype) * np.sqrt(nearest)


@lru_cache(maxsize=64)
def _edges(points: tuple[tuple[float, float], ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start and direction of each edge, (2, edges, 1, 1), and its squared length."""
    start = np.array(points).T[:, :, None, None]
    edge = np.roll(start, -1, axis=1) - start
    return start.astype(np.float32), edge.astype(np.float32), (edge**2).sum(0).astype(np.float32)


@dataclass(frozen=True, slots=True)
class _Grown:
    shape: Shape
    by: float

    def bounds(self) -> Bounds:
        left, top, right, bottom = self.shape.bounds()
        return left - self.by, top - self.by, right + self.by, bottom + self.by

    def distance(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return self.shape.distance(x, y) - self.by


@dataclass(frozen=True, slots=True)
class _Clipped:
    shape: Shape
    by: Shape

    def bounds(self) -> Bounds:
        a, b = self.shape.bounds(), self.by.bounds()
        return max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])

    def distance(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.maximum(self.shape.distance(x, y), self.by.distance(x, y))


def grown(shape: Shape, by: float) -> Shape:
    """The shape with its boundary moved outwards."""
    return _Grown(shape, by)


def clipped(shape: Shape, by: Shape) -> Shape:
    """The intersection of two shapes."""
    return _Clipped(shape, by)


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
    left, top, right, bottom = shape.bounds()
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
