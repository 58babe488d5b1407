"""Draw a scene. A pure function of (scene, seed, size): numpy distance fields, anti-aliased.

Coordinates are fractions of the image: x and y in 0..1, y downwards.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ipdiverse.critters import shapes
from ipdiverse.critters.scene import WORLD, Scene
from ipdiverse.critters.shapes import Shape, box, capsule, ellipse, polygon

Colour = tuple[float, float, float]
Layer = tuple[Shape, Colour]

_X_OF_POSITION = {"left": 0.27, "middle": 0.5, "right": 0.73}
_INK: Colour = (0.09, 0.08, 0.12)
_WHITE: Colour = (0.98, 0.98, 0.97)


@dataclass(frozen=True, slots=True)
class Jitter:
    """Continuous variation, which no caption mentions."""

    x: float
    y: float
    radius: float
    horizon: float
    gaze: tuple[float, float]
    hue: float
    value: float
    item_hue: float
    item_side: int
    decoration: tuple[float, ...]

    @classmethod
    def from_seed(cls, seed: int) -> Jitter:
        """Draw all of them from one seed, whatever the scene is."""
        # all in one draw and always in this order: a seed gives the same picture in every version
        u = np.random.default_rng(seed).random(20)
        return cls(
            x=float(u[0] - 0.5) * 0.06,
            y=0.6 + float(u[1] - 0.5) * 0.05,
            radius=0.185 + 0.03 * float(u[2]),
            horizon=0.56 + 0.14 * float(u[3]),
            gaze=(float(u[4] - 0.5) * 0.8, float(u[5] - 0.5) * 0.5),
            hue=float(u[6] - 0.5) * 0.024,
            value=float(u[7] - 0.5) * 0.12,
            item_hue=float(u[8] - 0.5) * 0.024,
            item_side=1 if u[9] < 0.5 else -1,
            decoration=tuple(float(v) for v in u[10:]),
        )


def render(scene: Scene, seed: int, size: int = 64) -> np.ndarray:
    """Draw the scene, uint8 (size, size, 3), RGB; the seed decides its `Jitter`."""
    jitter = Jitter.from_seed(seed)
    return painted(scene.place, jitter, parts(scene, jitter), size)


def painted(
    place: str, jitter: Jitter, layers: Mapping[str, Iterable[Layer]], size: int = 64
) -> np.ndarray:
    """Draw parts over a place's sky and ground, uint8 (size, size, 3)."""
    canvas = _background(place, jitter, size)
    for part in layers.values():
        for shape, colour in part:
            shapes.paint(canvas, shape, colour)
    return (canvas * 255 + 0.5).astype(np.uint8)


def parts(scene: Scene, jitter: Jitter) -> dict[str, list[Layer]]:
    """Every part's shapes by its name, from back to front."""
    x = _X_OF_POSITION[scene.position] + jitter.x
    y, r = jitter.y, jitter.radius
    side = side_of(scene, jitter)
    body = _tint(scene.colour, jitter.hue, jitter.value)
    dark = _shade(body, 0.45)
    outline = _outline(scene.shape, x, y, r)
    arm = capsule(x + side * 0.6 * r, y + 0.2 * r, x + side * 1.3 * r, y + 0.15 * r, 0.15 * r)
    item_colour = _tint(scene.item_colour, jitter.item_hue, 0)
    return {
        "decoration": list(_DECORATIONS[scene.place](jitter.horizon, jitter.decoration)),
        "item": list(_item(scene.item, item_colour, x, y, r, side)),
        "arm": [(arm, _shade(body, 0.75))],
        "feet": [(ellipse(x + d * r, y + 0.95 * r, 0.28 * r, 0.16 * r), dark) for d in (-0.4, 0.4)],
        # a dark rim, so that a green critter is seen in a meadow
        "body": [(shapes.grown(outline, 0.012), dark), (outline, body)],
        "marks": [(mark, _shade(body, 0.55)) for mark in _marks(scene.pattern, outline, x, y, r)],
        "eyes": list(_eyes(scene.eyes, jitter.gaze, x, y, r)),
        "headgear": list(_headgear(scene.headgear, x, y - _TOP[scene.shape] * r, r)),
    }


def side_of(scene: Scene, jitter: Jitter) -> int:
    """On which side the item is held: 1 right, -1 left; at an edge towards the middle."""
    return {"left": 1, "right": -1}.get(scene.position, jitter.item_side)


def _tint(name: str, hue: float, value: float) -> Colour:
    h, s, v = WORLD["colours"][name]
    return colorsys.hsv_to_rgb((h + hue) % 1.0, s, min(1.0, v + value * v))


def _shade(colour: Colour, factor: float) -> Colour:
    return (colour[0] * factor, colour[1] * factor, colour[2] * factor)


def _background(place: str, jitter: Jitter, size: int) -> np.ndarray:
    """Sky and ground as two vertical gradients, float32 (size, size, 3) in 0..1."""
    sky_top, sky_low, ground_top, ground_low = np.array(WORLD["places"][place], np.float32)
    y, horizon = shapes.centres(size)[:, None, None], jitter.horizon
    sky = sky_top + (sky_low - sky_top) * (y / horizon)
    ground = ground_top + (ground_low - ground_top) * ((y - horizon) / (1 - horizon))
    below = np.clip((y - horizon) * size + 0.5, 0, 1)
    return np.repeat(sky + (ground - sky) * below, size, axis=1)


def _meadow(h: float, d: tuple[float, ...]) -> Iterable[Layer]:
    yield ellipse(d[0], h + 0.06, 0.3, 0.12), (0.40, 0.70, 0.30)
    yield ellipse(0.15 + 0.7 * d[1], 0.14, 0.13, 0.05), (0.95, 0.97, 1.0)
    yield ellipse(0.19 + 0.7 * d[1], 0.11, 0.07, 0.05), (0.95, 0.97, 1.0)


def _desert(h: float, d: tuple[float, ...]) -> Iterable[Layer]:
    yield ellipse(0.15 + 0.7 * d[0], 0.15, 0.085, 0.085), (1.0, 0.95, 0.75)
    x = 0.06 if d[1] < 0.5 else 0.94
    yield capsule(x, h - 0.16, x, h + 0.05, 0.03), (0.30, 0.50, 0.28)
    yield ellipse(d[2], h + 0.02, 0.35, 0.07), (0.84, 0.63, 0.36)


def _snow(h: float, d: tuple[float, ...]) -> Iterable[Layer]:
    for u in d[:2]:
        x = 0.06 + 0.88 * u
        yield polygon(((x, h - 0.24), (x + 0.09, h + 0.03), (x - 0.09, h + 0.03))), (0.2, 0.38, 0.3)
    yield ellipse(d[2], h + 0.06, 0.4, 0.07), (0.97, 0.98, 1.0)


def _beach(h: float, d: tuple[float, ...]) -> Iterable[Layer]:
    yield box(0.5, h - 0.05, 0.6, 0.07), (0.16, 0.45, 0.74)
    yield box(0.5, h + 0.02, 0.6, 0.012), (0.93, 0.97, 0.99)
    yield ellipse(0.15 + 0.7 * d[0], 0.14, 0.075, 0.075), (1.0, 0.95, 0.6)


def _city(h: float, d: tuple[float, ...]) -> Iterable[Layer]:
    for i, u in enumerate(d[:5]):
        top, colour = h - 0.18 - 0.26 * u, (0.36, 0.38, 0.47) if i % 2 else (0.46, 0.46, 0.55)
        yield box(0.1 + 0.2 * i, (top + h) / 2, 0.09, (h - top) / 2), colour


def _moon(h: float, d: tuple[float, ...]) -> Iterable[Layer]:
    for i in range(4):
        yield ellipse(d[i], 0.06 + 0.3 * d[i + 4], 0.016, 0.016), _WHITE
    for i in range(2):
        x, y = d[i + 5], h + 0.1 + 0.2 * d[i + 1]
        yield ellipse(x, y, 0.1, 0.035), (0.42, 0.42, 0.47)


_DECORATIONS = {
    "meadow": _meadow,
    "desert": _desert,
    "snow": _snow,
    "beach": _beach,
    "city": _city,
    "moon": _moon,
}

_TOP = {"round": 0.96, "square": 0.84, "triangular": 0.86, "tall": 1.2, "star": 0.95}
"""Where headgear sits: height of each shape above its centre, in radii."""


def _outline(shape: str, x: float, y: float, r: float) -> Shape:
    """The body as one shape of radius about r."""
    if shape == "round":
        return ellipse(x, y, r, r)
    if shape == "square":
        return box(x, y, 0.88 * r, 0.88 * r)
    if shape == "triangular":
        left, right, base = x - 1.15 * r, x + 1.15 * r, y + 0.9 * r
        return polygon(((x, y - 1.25 * r), (right, base), (left, base)))
    if shape == "tall":
        return capsule(x, y - 0.6 * r, x, y + 0.4 * r, 0.62 * r)
    return polygon(shapes.star(x, y + 0.05 * r, 1.28 * r, 0.74 * r))


_SPOTS = ((-0.55, -0.45), (0.55, -0.5), (-0.5, 0.5), (0.5, 0.45), (0.0, 0.78), (0.0, -0.8))


def _marks(pattern: str, outline: Shape, x: float, y: float, r: float) -> Iterable[Shape]:
    if pattern == "striped":
        for dy in (-0.85, -0.25, 0.35, 0.95):
            yield shapes.clipped(box(x, y + dy * r, 2 * r, 0.13 * r), outline)
    elif pattern == "spotted":
        for dx, dy in _SPOTS:
            yield shapes.clipped(ellipse(x + dx * r, y + dy * r, 0.19 * r, 0.19 * r), outline)


# radius, and where each stands
_EYES = {"one": (0.4, (0.0,)), "two": (0.3, (-0.34, 0.34)), "three": (0.25, (-0.52, 0.0, 0.52))}


def _eyes(kind: str, gaze: tuple[float, float], x: float, y: float, r: float) -> Iterable[Layer]:
    share, places = _EYES[kind]
    radius = share * r
    for dx in places:
        ex, ey = x + dx * r, y - 0.05 * r
        yield ellipse(ex, ey, radius * 1.15, radius * 1.15), _INK
        yield ellipse(ex, ey, radius, radius), _WHITE
        pupil = radius * 0.48
        yield ellipse(ex + gaze[0] * pupil, ey + gaze[1] * pupil, pupil, pupil), _INK


def _headgear(kind: str, x: float, top: float, r: float) -> Iterable[Layer]:
    if kind == "hat":
        yield box(x, top - 0.36 * r, 0.46 * r, 0.42 * r), (0.16, 0.15, 0.2)
        yield box(x, top - 0.12 * r, 0.46 * r, 0.1 * r), (0.75, 0.73, 0.75)
        yield box(x, top + 0.04 * r, 0.8 * r, 0.09 * r), (0.16, 0.15, 0.2)
    elif kind == "crown":
        half = ((0.6, 0.12), (0.68, -0.66), (0.3, -0.25))
        points = (*((-px, py) for px, py in half), (0, -0.8), *half[::-1])
        crown = polygon(tuple((x + px * r, top + py * r) for px, py in points))
        yield shapes.grown(crown, 0.008), (0.45, 0.32, 0.05)
        yield crown, (0.98, 0.8, 0.2)
    elif kind == "flower":
        for angle in np.linspace(0, 2 * np.pi, 5, endpoint=False):
            px, py = x + 0.3 * r * np.sin(angle), top - 0.25 * r - 0.3 * r * np.cos(angle)
            yield ellipse(float(px), float(py), 0.24 * r, 0.24 * r), (0.99, 0.93, 0.97)
        yield ellipse(x, top - 0.25 * r, 0.2 * r, 0.2 * r), (0.93, 0.55, 0.15)


def _item(kind: str, colour: Colour, x: float, y: float, r: float, side: int) -> Iterable[Layer]:
    hx, hy = x + side * 1.42 * r, y + 0.15 * r
    dark = _shade(colour, 0.45)
    if kind == "gift":
        hx += side * 0.2 * r
        yield box(hx, hy, 0.56 * r, 0.5 * r), dark
        yield box(hx, hy, 0.5 * r, 0.44 * r), colour
        yield box(hx, hy, 0.11 * r, 0.44 * r), _WHITE
        yield box(hx, hy, 0.5 * r, 0.1 * r), _WHITE
        return
    yield capsule(hx, hy + 0.1 * r, hx, hy - 0.9 * r, 0.06 * r), (0.3, 0.22, 0.18)
    if kind == "balloon":
        yield ellipse(hx, hy - 1.55 * r, 0.6 * r, 0.72 * r), dark
        yield ellipse(hx, hy - 1.55 * r, 0.54 * r, 0.66 * r), colour
    elif kind == "umbrella":
        dome = ellipse(hx, hy - 0.85 * r, 0.9 * r, 0.85 * r)
        upper = box(hx, hy - 1.35 * r, r, 0.5 * r)
        yield shapes.clipped(dome, upper), dark
        inner = ellipse(hx, hy - 0.89 * r, 0.83 * r, 0.75 * r)
        yield shapes.clipped(inner, upper), colour
    else:
        yield capsule(hx, hy, hx, hy - 1.9 * r, 0.06 * r), (0.3, 0.22, 0.18)
        corners = ((0, -1.95), (0.95, -1.55), (0, -1.1))
        flag = polygon(tuple((hx + side * px * r, hy + py * r) for px, py in corners))
        yield shapes.grown(flag, 0.01), dark
        yield flag, colour
