"""How strongly an image prompt acts: by layer, by step and by item (`resolve_scale`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ipdiverse.errors import ArgumentError, check_range

_LIMITS = (-10, 10)  # of a weight


@dataclass(frozen=True)
class Layer:
    """Where a cross-attention layer stands in its UNet."""

    number: int  # in `unet.attn_processors`
    block: str  # `down.1`, `mid`, `up.0`; of transformers `double.0`, `single.0`
    transformer: int  # which one it is in, counted as the UNet runs: down, mid, up
    transformers: int  # how many there are

    @property
    def part(self) -> str:
        """`down`, `mid` or `up`; of transformers `double` or `single`."""
        return self.block.split(".")[0]


ScaleFunction = Callable[[Layer, float], float | Tensor]
"""A layer and the progress, 0 at the first step and towards 1 at the last, to its scale."""

ScaleLike = float | str | Sequence[float] | Mapping[str, float] | Tensor | ScaleFunction


@dataclass(frozen=True)
class Scale:
    """A scale, resolved against a UNet's layers."""

    of: ScaleFunction
    by_step: bool = False  # else the progress need not be known
    start_at: float = 0.0  # share of the steps before which it is 0
    end_at: float = 1.0  # share of the steps from which it is 0 again
    # numbers of the layers in which the image acts on the unconditional branch alone, so that
    # guidance leads away from it
    opposed: frozenset[int] = frozenset()

    def at(self, layer: Layer, progress: float) -> float | Tensor:
        """The scale of a layer at a progress."""
        always = (self.start_at, self.end_at) == (0.0, 1.0)  # also where progress reaches 1
        if always or self.start_at <= progress < self.end_at:
            return self.of(layer, progress)
        return 0.0


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
    by_step, opposed = (start_at, end_at) != (0.0, 1.0), frozenset[int]()
    if isinstance(value, str):
        of, opposed = _preset(value, layers, weight)
    elif isinstance(value, Mapping):
        of = _by_block(value, layers)
    elif isinstance(value, Sequence):
        of = _by_layer(value, layers)
    elif callable(value) and not isinstance(value, Tensor):
        of, by_step = value, True
    else:
        of = _constant(value)
    return Scale(of, by_step, start_at, end_at, opposed)


def unet_layers(unet: Any) -> list[Layer]:
    """Cross-attention layers in the order in which the UNet runs them: down, mid, up."""
    # `attn_processors` names the middle last, as that is how diffusers' UNet defines its blocks
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


def _constant(value: Any) -> ScaleFunction:
    """The same in every layer: one number, or one for each item."""
    given = checked_items(value) if isinstance(value, (Tensor, np.ndarray)) else value
    if not isinstance(given, Tensor) or not given.ndim:
        given = checked_number(given)
    return lambda _layer, _progress: given


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
            "names a block that this model does not have",
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

Weights = Mapping[int, float]
"""By transformer; the others get 0."""

_BY_ROLE: dict[str, Callable[[Weights, Weights, int], Weights]] = {
    "style transfer": lambda _, style, __: style,
    "composition": lambda layout, _, __: layout,
    "strong style transfer": lambda layout, _, n: {t: 1.0 for t in range(n) if t not in layout},
    "style and composition": lambda layout, style, _: {**style, **layout},
    "strong style and composition": lambda _, __, n: dict.fromkeys(range(n), 1.0),
    "style transfer precise": lambda layout, style, _: {**style, **layout},
    "composition precise": lambda layout, style, n: {
        **dict.fromkeys(range(n), 0.1),
        **style,
        **layout,
    },
}
"""ComfyUI's presets by what the transformers of layout and of style weigh, of how many in all.

The two roles are InstantStyle's (arXiv:2404.02733, section 3.3). The precise ones oppose the image
in the other role's transformers.
"""
_ROLES: dict[int, tuple[Weights, Weights]] = {
    16: ({4: 0.25, 5: 1.0}, dict.fromkeys([*range(4), *range(9, 16)], 1.0)),
    11: ({3: 1.0}, {6: 1.0}),  # `down_blocks.2.attentions.1` and `up_blocks.0.attentions.1`
}
"""Layout and style for the 16 transformers of SD 1.x and 2.x and the 11 of SDXL, as in ComfyUI."""
_ALIASES = {"style": "style transfer", "layout": "composition", "instantstyle": "style transfer"}

PRESETS = (*_SMOOTH, *_BY_ROLE, *_ALIASES)
"""Every preset's name; `style`, `layout` and `instantstyle` are InstantStyle's."""


def check_preset(name: str, where: str = "scale") -> None:
    """Refuse what names no preset."""
    if name not in PRESETS:
        raise ArgumentError(
            "is not a preset", where=where, expected=" | ".join(PRESETS), found=repr(name)
        )


def _preset(
    name: str, layers: Sequence[Layer], weight: float
) -> tuple[ScaleFunction, frozenset[int]]:
    """A preset's scale, and the layers in which it leads away from the image."""
    check_preset(name)
    full = _ALIASES.get(name, name)
    unet = {"down", "mid", "up"} >= {layer.part for layer in layers}
    if not unet and not full.startswith(("linear", "ease", "reverse")):
        raise ArgumentError(
            "is for UNets: a transformer has no way down and up",
            where=f"scale preset {name!r}",
            fix="Give a number, one for each layer, or linear, ease in, ease out.",
        )
    if full in _SMOOTH:
        return (lambda layer, _: weight * _SMOOTH[full](layer)), frozenset()
    count = layers[0].transformers
    layout, style = _ROLES.get(count) or _roles(name, layers)
    weights = _BY_ROLE[full](layout, style, count)
    away: set[int] = set()
    if full.endswith(" precise"):
        away = set(layout) if full.startswith("style") else set(range(count)) - set(layout)
    opposed = frozenset(layer.number for layer in layers if layer.transformer in away)
    return (lambda layer, _: weight * weights.get(layer.transformer, 0.0)), opposed


def _roles(name: str, layers: Sequence[Layer]) -> tuple[Weights, Weights]:
    """The two roles on any other UNet, placed as on SDXL.

    Layout is the last transformer before the middle; style is the second of the first `up` block
    that has any.
    """
    downs = [layer.transformer for layer in layers if layer.part == "down"]
    ups = [layer for layer in layers if layer.part == "up"]
    if not downs or not ups:
        raise ArgumentError(
            "needs a UNet that attends to text on its way down and up",
            where=f"scale preset {name!r}",
        )
    first_up = {layer.transformer for layer in ups if layer.block == ups[0].block}
    return {max(downs): 1.0}, {sorted(first_up)[:2][-1]: 1.0}


def for_batch(scale: float | Tensor, items: int, branches: int) -> float | Tensor:
    """A scale for each row of a call, (branches × items), of one for each item or prompt."""
    if isinstance(scale, float) and -math.inf < scale < math.inf:
        return scale
    scale = checked_items(scale) if isinstance(scale, Tensor) else checked_number(scale)
    if not isinstance(scale, Tensor) or scale.ndim == 0:
        return scale
    if items % len(scale):
        raise ArgumentError(
            "has the wrong length",
            where="scale",
            expected=f"a number for each of {items} items, or for each prompt of theirs",
            found=len(scale),
        )
    return scale.repeat_interleave(items // len(scale)).repeat(branches)
