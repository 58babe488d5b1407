"""How strongly an image prompt acts: by layer, by step and by item.

A scale is a number; a list with one number for each layer; numbers by block; a preset; a tensor
with one number for each item; or a function of layer and progress. `start_at` and `end_at` switch
it off outside a part of the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ipdiverse.errors import ArgumentError, check_range

_LIMITS = (-10, 10)
"""Of a weight."""


@dataclass(frozen=True)
class Layer:
    """Where a cross-attention layer stands in its UNet.

    Args:
        number: In `unet.attn_processors`.
        block: Which block: `down.1`, `mid`, `up.0`.
        transformer: Which transformer of the UNet it is in, counted as the UNet runs: down, mid,
            up. Layers of one transformer share it.
        transformers: How many there are.
    """

    number: int
    block: str
    transformer: int
    transformers: int

    @property
    def part(self) -> str:
        """`down`, `mid` or `up`."""
        return self.block.split(".")[0]


ScaleFunction = Callable[[Layer, float], float | Tensor]
"""A layer and the progress, 0 at the first step and towards 1 at the last, to its scale."""

ScaleLike = float | str | Sequence[float] | Mapping[str, float] | Tensor | ScaleFunction


@dataclass(frozen=True)
class Scale:
    """A scale, resolved against a UNet's layers.

    Args:
        of: Scale of a layer at a progress.
        by_step: Whether it depends on the progress at all.
        start_at: Share of the steps before which it is 0.
        end_at: Share of the steps from which it is 0 again.
        opposed: Numbers of the layers in which the image acts on the unconditional branch alone,
            so that guidance leads away from it.
    """

    of: ScaleFunction
    by_step: bool = False
    start_at: float = 0.0
    end_at: float = 1.0
    opposed: frozenset[int] = frozenset()

    def at(self, layer: Layer, progress: float) -> float | Tensor:
        """The scale of a layer at a progress."""
        if not self.start_at <= progress < self.end_at and (self.start_at, self.end_at) != (
            0.0,
            1.0,
        ):
            return 0.0
        return self.of(layer, progress)


def resolve_scale(
    value: ScaleLike,
    layers: Sequence[Layer],
    *,
    weight: float = 1.0,
    start_at: float = 0.0,
    end_at: float = 1.0,
) -> Scale:
    """Make sense of a scale.

    Args:
        value: A number; a preset of `PRESETS`; a sequence with one number for each of `layers`, in
            the order in which the UNet runs them; numbers by block (`down`, `down.1`, `mid`, `up`,
            `up.0`; the most specific holds, others are 0); a tensor (items,); a function.
        start_at: Share of the steps before which the scale is 0.
        end_at: Share of the steps from which it is 0.
    """
    check_range("start_at", start_at, 0, 1)
    check_range("end_at", end_at, start_at, 1)
    check_range("weight", weight, *_LIMITS)
    stepped = (start_at, end_at) != (0.0, 1.0)
    if isinstance(value, str):
        opposed = _opposed(value, layers)
        return Scale(_preset(value, layers, weight), stepped, start_at, end_at, opposed)
    if isinstance(value, (Tensor, np.ndarray)):
        value = checked_items(value)
        if not value.ndim:
            value = float(value)
    if isinstance(value, Tensor):
        return Scale(lambda _layer, _progress: value, stepped, start_at, end_at)
    if isinstance(value, Mapping):
        return Scale(_by_block(value, layers), stepped, start_at, end_at)
    if isinstance(value, Sequence):
        return Scale(_by_layer(value, layers), stepped, start_at, end_at)
    if callable(value):
        return Scale(value, True, start_at, end_at)
    number = checked_number(value)
    return Scale(lambda _layer, _progress: number, stepped, start_at, end_at)


def unet_layers(unet: Any) -> list[Layer]:
    """Cross-attention layers in the order in which the UNet runs them: down, mid, up."""
    names = {
        number: name.split(".")
        for number, name in enumerate(unet.attn_processors)
        if name.endswith("attn2.processor")
    }
    order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    ordered = sorted(names, key=lambda n: (order[names[n][0]], n))
    homes = [tuple(names[n][: names[n].index("transformer_blocks")]) for n in ordered]
    transformers = list(dict.fromkeys(homes))
    return [
        Layer(number, _block(names[number]), transformers.index(home), len(transformers))
        for number, home in zip(ordered, homes, strict=True)
    ]


def _block(name: list[str]) -> str:
    part = name[0].split("_")[0]
    return part if part == "mid" else f"{part}.{name[1]}"


def _by_layer(values: Sequence[float], layers: Sequence[Layer]) -> ScaleFunction:
    if len(values) != len(layers):
        raise ArgumentError(
            "has the wrong length",
            where="scale",
            expected=f"{len(layers)} numbers, one for each cross-attention layer",
            found=len(values),
        )
    numbers = {layer.number: checked_number(v) for layer, v in zip(layers, values, strict=True)}
    return lambda layer, _: numbers[layer.number]


def _by_block(values: Mapping[str, float], layers: Sequence[Layer]) -> ScaleFunction:
    known = {name for layer in layers for name in (layer.block, layer.part)}
    if unknown := sorted(map(str, set(values) - known)):
        raise ArgumentError(
            "names a block that this UNet does not have",
            where="scale",
            expected=", ".join(sorted(known)),
            found=", ".join(unknown),
        )
    numbers = {name: checked_number(value) for name, value in values.items()}
    return lambda layer, _: numbers.get(layer.block, numbers.get(layer.part, 0.0))


def checked_number(value: Any) -> float:
    """One weight, of whatever number type."""
    try:
        number = float(value) if not isinstance(value, (bool, str)) else value
    except (TypeError, ValueError, RuntimeError):
        number = value
    if not isinstance(number, float):
        raise ArgumentError(
            "is nothing that a scale may be",
            where="scale",
            expected="a number, one for each layer, numbers by block, a preset, a tensor with one "
            "for each item, or a function",
            found=repr(value),
        )
    check_range("scale", number, *_LIMITS)
    return number


def checked_items(value: Any) -> Tensor:
    """A number for each item, as a tensor."""
    numbers = torch.as_tensor(value)
    if numbers.ndim > 1 or not numbers.numel() or numbers.is_complex():
        raise ArgumentError(
            "has the wrong shape",
            where="scale",
            expected="a number for each item, (items,)",
            found=f"{tuple(numbers.shape)} of {numbers.dtype}",
        )
    for number in numbers.flatten().tolist():
        checked_number(number)
    return numbers.float()


def _bell(layer: Layer) -> float:
    half = layer.transformers / 2
    return abs(layer.transformer - half) / half


_SMOOTH: dict[str, Callable[[Layer], float]] = {
    "linear": lambda _: 1.0,
    "ease in": lambda layer: 0.05 + 0.95 * (1 - layer.transformer / layer.transformers),
    "ease out": lambda layer: 0.05 + 0.95 * (layer.transformer / layer.transformers),
    "ease in-out": lambda layer: 0.05 + 0.95 * (1 - _bell(layer)),
    "reverse in-out": lambda layer: 0.05 + 0.95 * _bell(layer),
    "weak input": lambda layer: 0.2 if layer.part == "down" else 1.0,
    "weak middle": lambda layer: 0.2 if layer.part == "mid" else 1.0,
    "weak output": lambda layer: 0.2 if layer.part == "up" else 1.0,
    "strong middle": lambda layer: 1.0 if layer.part == "mid" else 0.2,
}
"""ComfyUI's weight types that any UNet has; names and numbers are its IPAdapter nodes' own."""

_SD15_STYLE = {**dict.fromkeys(range(4), 1.0), **dict.fromkeys(range(9, 16), 1.0)}
_SD15_STRONG = {**dict.fromkeys(range(4), 1.0), **dict.fromkeys(range(6, 16), 1.0)}
_SD15_BOTH = {**_SD15_STYLE, 4: 0.25, 5: 1.0}
_SDXL_STRONG = dict.fromkeys([0, 1, 2, *range(4, 11)], 1.0)
_BY_TRANSFORMER: dict[str, dict[int, dict[int, float]]] = {
    "style transfer": {16: _SD15_STYLE, 11: {6: 1.0}},
    "composition": {16: {4: 0.25, 5: 1.0}, 11: {3: 1.0}},
    "strong style transfer": {16: _SD15_STRONG, 11: _SDXL_STRONG},
    "style and composition": {16: _SD15_BOTH, 11: {3: 1.0, 6: 1.0}},
    "strong style and composition": {
        16: dict.fromkeys(range(16), 1.0),
        11: dict.fromkeys(range(11), 1.0),
    },
    "style transfer precise": {16: _SD15_BOTH, 11: {3: 1.0, 6: 1.0}},
    "composition precise": {
        16: {**_SD15_BOTH, **dict.fromkeys((6, 7, 8), 0.1)},
        11: {**dict.fromkeys(range(11), 0.1), 3: 1.0, 6: 1.0},
    },
}
"""Presets by transformer, for the 16 of SD 1.x and 2.x and the 11 of SDXL.

ComfyUI's; on SDXL, 3 and 6 are `down_blocks.2.attentions.1` and `up_blocks.0.attentions.1`, the
layout and the style block of InstantStyle (arXiv:2404.02733, section 3.3). The precise ones oppose
the image in the other role's transformers (`_opposed`).
"""
_LAYOUT = {16: {4, 5}, 11: {3}}
"""The transformers that carry the layout."""
_ALIASES = {"style": "style transfer", "layout": "composition", "instantstyle": "style transfer"}

PRESETS = (*_SMOOTH, *_BY_TRANSFORMER, *_ALIASES)
"""Every preset's name; `style`, `layout` and `instantstyle` are InstantStyle's."""


def check_preset(name: str, where: str = "scale") -> None:
    """Refuse what names no preset."""
    if name not in PRESETS:
        raise ArgumentError(
            "is not a preset", where=where, expected=" | ".join(PRESETS), found=repr(name)
        )


def _preset(name: str, layers: Sequence[Layer], weight: float) -> ScaleFunction:
    check_preset(name)
    full = _ALIASES.get(name, name)
    if full in _SMOOTH:
        return lambda layer, _: weight * _SMOOTH[full](layer)
    table = _BY_TRANSFORMER[full]
    count = layers[0].transformers
    weights = table.get(count) or _by_role(full, layers)
    return lambda layer, _: weight * weights.get(layer.transformer, 0.0)


def _opposed(name: str, layers: Sequence[Layer]) -> frozenset[int]:
    """Layers in which a precise preset leads away from the image: those of the other role."""
    if not name.endswith(" precise"):
        return frozenset()
    count = layers[0].transformers
    layout = _LAYOUT[count] if count in _LAYOUT else {_roles(name, layers)[0]}
    away = layout if name.startswith("style") else set(range(count)) - layout
    return frozenset(layer.number for layer in layers if layer.transformer in away)


def _roles(name: str, layers: Sequence[Layer]) -> tuple[int, int]:
    """InstantStyle's two roles on any UNet: the transformers of layout and of style.

    Layout is the last transformer before the middle; style is the second of the first `up` block
    that has any, as on SDXL.
    """
    downs = [layer.transformer for layer in layers if layer.part == "down"]
    ups = [layer.transformer for layer in layers if layer.part == "up"]
    if not downs or not ups:
        raise ArgumentError(
            "needs a UNet that attends to text on its way down and up",
            where=f"scale preset {name!r}",
        )
    first_up = [layer.transformer for layer in layers if layer.block == _first_up(layers)]
    return max(downs), sorted(set(first_up))[:2][-1]


def _by_role(name: str, layers: Sequence[Layer]) -> dict[int, float]:
    """The presets on other UNets, by role; `strong` keeps everything but the other role."""
    layout, style = _roles(name, layers)
    everything = dict.fromkeys(range(layers[0].transformers), 1.0)
    if name == "composition":
        return {layout: 1.0}
    if name == "style transfer":
        return {style: 1.0}
    if name in ("style and composition", "style transfer precise"):
        return {layout: 1.0, style: 1.0}
    if name == "composition precise":
        return {**dict.fromkeys(everything, 0.1), layout: 1.0, style: 1.0}
    if name == "strong style transfer":
        return {t: w for t, w in everything.items() if t != layout}
    return everything


def _first_up(layers: Sequence[Layer]) -> str:
    return next(layer.block for layer in layers if layer.part == "up")
