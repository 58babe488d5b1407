"""Scenes with one planted fault each: a part missing, doubled, merged, recoloured, moved or lost.

Most are renders whose parts were changed, so that nothing but the fault tells them from a valid
scene. `LEFT_OUT` is never trained on: it shows what is found of faults that nobody planted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageFilter
from scipy.ndimage import gaussian_filter, map_coordinates

from ipdiverse.critters import shapes
from ipdiverse.critters.render import Jitter, painted, parts, side_of
from ipdiverse.critters.scene import ATTRIBUTES, Scene, sample_scene

if TYPE_CHECKING:
    from collections.abc import Callable

    from ipdiverse.critters.render import Layer

_SIZE = 64
_CREATURE = ("item", "arm", "feet", "body", "marks", "eyes", "headgear")
_SEEN_PIXELS, _SEEN_CHANGE = 24, 40
"""A fault counts if so many pixels change by more than so much in a channel, of 255."""


@dataclass(frozen=True)
class Drawn:
    """A scene, its parts, and what faults are made with."""

    scene: Scene
    jitter: Jitter
    rng: np.random.Generator
    size: int = _SIZE

    @property
    def parts(self) -> dict[str, list[Layer]]:
        """Its parts, as `parts` in `critters.render` gives them, anew each time."""
        return parts(self.scene, self.jitter)

    def image(self, changed: dict[str, list[Layer]] | None = None) -> np.ndarray:
        """The scene with parts replaced or, under new names, added in front."""
        return painted(self.scene.place, self.jitter, {**self.parts, **(changed or {})}, self.size)

    def other(self, name: str) -> Drawn:
        """The same scene with another value of one attribute."""
        values = [v for v in ATTRIBUTES[name] if v != getattr(self.scene, name)]
        return replace(self, scene=replace(self.scene, **{name: str(self.rng.choice(values))}))

    def stranger(self) -> Drawn:
        """Another scene."""
        scene, seed = sample_scene(self.rng), int(self.rng.integers(2**31))
        return replace(self, scene=scene, jitter=Jitter.from_seed(seed))

    @property
    def centre(self) -> tuple[float, float, float]:
        """Middle and radius of the body."""
        left, _, right, _ = self.parts["body"][0][0].bounds
        return (left + right) / 2, self.jitter.y, self.jitter.radius


def _moved(layers: list[Layer], dx: float, dy: float) -> list[Layer]:
    """The same shapes elsewhere."""

    def elsewhere(shape: shapes.Shape) -> shapes.Shape:
        left, top, right, bottom = shape.bounds
        bounds = left + dx, top + dy, right + dx, bottom + dy
        return shapes.Shape(bounds, lambda x, y: shape.distance(x - dx, y - dy))

    return [(elsewhere(shape), colour) for shape, colour in layers]


def _sign(one: Drawn) -> int:
    return int(one.rng.choice((-1, 1)))


def _half(one: Drawn, x: float, y: float) -> shapes.Shape:
    """All that lies on one side of a point: left, right, above or below."""
    side = _sign(one)
    return shapes.box(*((x + side, y) if one.rng.random() < 0.5 else (x, y + side)), 1.0, 1.0)


def _middle(layers: list[Layer]) -> tuple[float, float]:
    bounds = np.array([shape.bounds for shape, _ in layers])
    return (
        float(bounds[:, 0].min() + bounds[:, 2].max()) / 2,
        float(bounds[:, 1].min() + bounds[:, 3].max()) / 2,
    )


def _halved(one: Drawn, other: Drawn, *names: str) -> np.ndarray:
    """Half of a part as it is in another scene, in front of the whole of this one's."""
    half = _half(one, *_middle(one.parts[names[0]]))
    changed = {}
    for name in names:
        own = [(shapes.clipped(shape, _beyond(half)), c) for shape, c in one.parts[name]]
        others = [(shapes.clipped(shape, half), c) for shape, c in other.parts[name]]
        changed[name] = own + others
    return one.image(changed)


def _beyond(shape: shapes.Shape) -> shapes.Shape:
    """All outside a shape."""
    return shapes.Shape((-1.0, -1.0, 2.0, 2.0), lambda x, y: -shape.distance(x, y))


def _no_eyes(one: Drawn) -> np.ndarray:
    return one.image({"eyes": []})


def _no_item(one: Drawn) -> np.ndarray:
    return one.image({"item": []} | ({"arm": []} if one.rng.random() < 0.5 else {}))


def _no_feet(one: Drawn) -> np.ndarray:
    feet = one.parts["feet"]
    return one.image({"feet": feet[: int(one.rng.integers(2))]})


def _two_items(one: Drawn) -> np.ndarray:
    second = one if one.rng.random() < 0.4 else one.other("item")
    second = second if one.rng.random() < 0.4 else second.other("item_colour")
    side, r = side_of(one.scene, one.jitter), one.jitter.radius
    # on the other side of a creature in the middle; else farther on, or it would be cut off
    away = -2.84 * r if one.scene.position == "middle" else one.rng.uniform(0.22, 0.34)
    return one.image({"second": _moved(second.parts["item"], side * away, one.rng.normal(0, 0.03))})


def _creature(one: Drawn, dx: float, dy: float = 0.0) -> dict[str, list[Layer]]:
    return {f"other {name}": _moved(one.parts[name], dx, dy) for name in _CREATURE}


def _two_creatures(one: Drawn) -> np.ndarray:
    other = one.stranger() if one.rng.random() < 0.7 else one
    x, other_x = one.centre[0], other.centre[0]
    target = one.rng.uniform(0.1, 0.35) if x > 0.5 else one.rng.uniform(0.65, 0.9)
    second = _creature(other, target - other_x, one.rng.normal(0, 0.03))
    if one.rng.random() < 0.5:  # behind the first
        own = one.parts
        order = {"decoration": own.pop("decoration"), **second, **own}
        return painted(one.scene.place, one.jitter, order, one.size)
    return one.image(second)


def _merged_creatures(one: Drawn) -> np.ndarray:
    """Two bodies that run into each other, of one colour or two."""
    other = one.other("shape") if one.rng.random() < 0.6 else one.other("colour")
    dx, dy = _sign(one) * one.rng.uniform(0.09, 0.2), one.rng.normal(0, 0.04)
    names = ("body", "marks") if one.rng.random() < 0.5 else ("body", "marks", "eyes", "headgear")
    return one.image({f"other {name}": _moved(other.parts[name], dx, dy) for name in names})


def _two_coloured_item(one: Drawn) -> np.ndarray:
    return _halved(one, one.other("item_colour"), "item")


def _two_coloured_body(one: Drawn) -> np.ndarray:
    return _halved(one, one.other("colour"), "body", "marks")


def _two_shapes(one: Drawn) -> np.ndarray:
    return _halved(one, one.other("shape"), "body", "marks")


def _merged_items(one: Drawn) -> np.ndarray:
    other = one.other("item")
    other = other if one.rng.random() < 0.5 else other.other("item_colour")
    if one.rng.random() < 0.4:
        return _halved(one, other, "item")
    dx, dy = one.rng.normal(0, 0.04, 2)
    return one.image({"item": one.parts["item"] + _moved(other.parts["item"], dx, dy)})


def _wrong_eyes(one: Drawn) -> np.ndarray:
    """One too many in a second row, one lost of several, or one without a pupil."""
    eyes, r = one.parts["eyes"], one.jitter.radius  # rim, white and pupil of each eye
    count, which = len(eyes) // 3, int(one.rng.integers(len(eyes) // 3))
    chosen = eyes[3 * which : 3 * which + 3]
    how = one.rng.random()
    if how < 0.4 and count > 1:
        return one.image({"eyes": [eye for eye in eyes if eye not in chosen]})
    if how < 0.55:
        return one.image({"eyes": [eye for eye in eyes if eye is not chosen[2]]})
    dy = _sign(one) * one.rng.uniform(0.45, 0.7) * r
    return one.image({"more": _moved(chosen, one.rng.normal(0, 0.2) * r, dy)})


def _misplaced(one: Drawn) -> np.ndarray:
    """Eyes, headgear or item away from where they belong."""
    name = str(one.rng.choice([n for n in ("eyes", "headgear", "item") if one.parts[n]]))
    away = one.rng.uniform(0.14, 0.26)
    angle = one.rng.uniform(0, 2 * np.pi)
    return one.image({name: _moved(one.parts[name], away * np.cos(angle), away * np.sin(angle))})


def _ghost(one: Drawn) -> np.ndarray:
    """Two scenes at once: whole, or the second creature alone."""
    share = one.rng.uniform(0.3, 0.7)
    other = one.stranger()
    if one.rng.random() < 0.5:
        return _mixed(one.image(), other.image(), share)
    return _mixed(one.image(), one.image(_creature(other, 0.0)), share)


def _mixed(image: np.ndarray, other: np.ndarray, share: float | np.ndarray) -> np.ndarray:
    return (image + (other.astype(float) - image) * share + 0.5).astype(np.uint8)


def _bare(one: Drawn) -> np.ndarray:
    """The place without the creature."""
    return one.image({name: [] for name in _CREATURE})


def _cut(one: Drawn) -> np.ndarray:
    """A half or a piece of the creature is missing."""
    x, y, r = one.centre
    size, image = one.size, one.image()
    mask = np.zeros((size, size, 1), bool)
    if one.rng.random() < 0.6:
        at = int((x + one.rng.normal(0, 0.3) * r) * size)
        part = np.s_[:, :at] if one.rng.random() < 0.5 else np.s_[:, at:]
        part = part if one.rng.random() < 0.7 else np.s_[: int((y - 0.1 * r) * size)]
    else:
        left, top = (int((v - one.rng.uniform(0, 0.9) * r) * size) for v in (x, y))
        side = int(one.rng.uniform(0.7, 1.2) * r * size)
        part = np.s_[max(0, top) : top + side, max(0, left) : left + side]
    mask[part] = True
    return np.where(mask, _bare(one), image)


def _blur(one: Drawn) -> np.ndarray:
    """So little detail that parts run together, all over or in the creature."""
    image = Image.fromarray(one.image())
    blurred = np.asarray(
        image.filter(ImageFilter.GaussianBlur(one.rng.uniform(2.2, 5) * one.size / 64))
    )
    if one.rng.random() < 0.5:
        return blurred
    x, y, r = one.centre
    return _mixed(np.asarray(image), blurred, _spot(one, x, y, 1.3 * r))


def _spot(one: Drawn, x: float, y: float, radius: float) -> np.ndarray:
    """A soft disc: 1 inside, 0 outside."""
    at = (np.arange(one.size) + 0.5) / one.size
    distance = np.hypot(at[None, :] - x, at[:, None] - y)
    return np.clip((radius - distance) * 16 + 0.5, 0, 1)[..., None]


def _melted(one: Drawn) -> np.ndarray:
    """Outlines bent out of shape, all over or in the creature."""
    size, rng = one.size, one.rng
    width = rng.uniform(3, 6) * size / 64
    bends = np.stack([gaussian_filter(rng.normal(size=(size, size)), width) for _ in range(2)])
    bends *= rng.uniform(2.2, 4) * size / 64 / bends.std()
    x, y, r = one.centre
    bends = bends if rng.random() < 0.4 else bends * _spot(one, x, y, 1.6 * r)[..., 0]
    grid = np.mgrid[:size, :size] + bends
    image = one.image()
    channels = [map_coordinates(image[..., c], grid, order=1, mode="nearest") for c in range(3)]
    return np.stack(channels, axis=-1)


def _scrambled(one: Drawn) -> np.ndarray:
    """No scene at all: blocks out of order, halves of two scenes, noise, or a place alone."""
    image, half, how = one.image(), one.size // 2, one.rng.integers(4)
    if how == 0:
        side = half if one.rng.random() < 0.5 else half // 2
        count = one.size // side
        blocks = (
            image.reshape(count, side, count, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
        )
        blocks = blocks[one.rng.permutation(len(blocks))]
        return blocks.reshape(count, count, side, side, 3).swapaxes(1, 2).reshape(image.shape)
    if how == 1:
        return np.concatenate([image[:, :half], one.stranger().image()[:, ::-1][:, half:]], axis=1)
    if how == 2:
        noise = one.rng.normal(0, one.rng.uniform(50, 150), image.shape)
        return np.clip(image + noise, 0, 255).astype(np.uint8)
    return _bare(one)


def _no_body(one: Drawn) -> np.ndarray:
    return one.image({"body": [], "marks": []})


def _two_patterns(one: Drawn) -> np.ndarray:
    return _halved(one, one.other("pattern"), "body", "marks")


def _two_headgears(one: Drawn) -> np.ndarray:
    one = one.other("headgear") if one.scene.headgear == "none" else one
    other = one.other("headgear")
    other = other.other("headgear") if other.scene.headgear == "none" else other
    dx = _sign(one) * one.rng.uniform(0.4, 1.0) * one.jitter.radius
    return one.image({"second": _moved(other.parts["headgear"], dx, 0.0)})


def _two_places(one: Drawn) -> np.ndarray:
    """One place to the left, another to the right, behind a whole creature."""
    other = one.other("place")
    behind, creature = _bare(one), one.image()
    at = int(one.rng.uniform(0.3, 0.7) * one.size)
    both = np.concatenate([behind[:, :at], _bare(other)[:, at:]], axis=1)
    own = np.abs(creature.astype(int) - behind).max(-1, keepdims=True) > 8
    return np.where(own, creature, both)


def _faded_item(one: Drawn) -> np.ndarray:
    without = one.image({"item": []})
    return _mixed(one.image(), without, one.rng.uniform(0.5, 0.8))


TRAINED: dict[str, Callable[[Drawn], np.ndarray]] = {
    "no eyes": _no_eyes,
    "no item": _no_item,
    "no feet": _no_feet,
    "two items": _two_items,
    "two creatures": _two_creatures,
    "merged creatures": _merged_creatures,
    "two-coloured item": _two_coloured_item,
    "two-coloured body": _two_coloured_body,
    "two shapes": _two_shapes,
    "merged items": _merged_items,
    "wrong eyes": _wrong_eyes,
    "misplaced": _misplaced,
    "ghost": _ghost,
    "cut": _cut,
    "blur": _blur,
    "melted": _melted,
    "scrambled": _scrambled,
}
"""Kinds that are trained on, each a scene to its image with that fault."""

LEFT_OUT: dict[str, Callable[[Drawn], np.ndarray]] = {
    "no body": _no_body,
    "two patterns": _two_patterns,
    "two headgears": _two_headgears,
    "two places": _two_places,
    "faded item": _faded_item,
}
"""Kinds that are only measured."""

KINDS = {**TRAINED, **LEFT_OUT}


def faulty(kind: str, scene: Scene, seed: int, size: int = _SIZE) -> np.ndarray | None:
    """A scene with a fault, uint8 (size, size, 3).

    Args:
        kind: Of `KINDS`.
        scene: The scene without it.
        seed: Renders the scene, and decides what chance leaves open of the fault.
        size: Of the image, in pixels.

    Returns:
        None where the fault cannot be seen in this scene.
    """
    one = Drawn(scene, Jitter.from_seed(seed), np.random.default_rng([seed, 1]), size)
    image = KINDS[kind](one)
    changed = np.abs(image.astype(int) - one.image()).max(-1) > _SEEN_CHANGE
    return image if changed.sum() >= _SEEN_PIXELS * (size / _SIZE) ** 2 else None
