"""Levers: what changes sampling to gain variety. Each is one definition with one pure function.

`LEVERS` holds all that are registered. Flags, requests, the dial, calibration and studies follow
from it. Light: torch is imported where noise is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from ipdiverse.errors import ArgumentError, check_range
from ipdiverse.provenance import noise

if TYPE_CHECKING:
    from torch import Tensor

ActsOn = Literal["weights", "fusion", "embeddings", "projected", "tokens", "scale", "guidance"]


@dataclass(frozen=True)
class StepContext:
    """When a lever acts, and on what.

    Args:
        seeds: One for each item; everything random about an item comes from its seed.
        progress: Share of the steps done, 0 at the first.
        sigma: Noise level σ = √((1 − ᾱ) / ᾱ) of this step.
        prompts: Each item's text; empty where it is not known.
        layers: The UNet's cross-attention layers (`adapter.scale.Layer`).
        embedding: `pooled`, `hidden` or `face`: which embedding is being changed.
        attachment: The adapter on its pipeline, for levers that read text or images; None in hosts
            other than diffusers.
    """

    seeds: tuple[int, ...]
    progress: float = 0.0
    sigma: float = 0.0
    prompts: tuple[str, ...] = ()
    layers: Sequence[Any] = ()
    embedding: str = ""
    attachment: Any = None

    def noise(self, name: str, like: Tensor) -> Tensor:
        """Standard normal noise of the shape of `like`, (items, …), for the lever `name`.

        An item's noise is the same at every step, whatever else is in the batch.
        """
        if len(self.seeds) != len(like):
            raise ValueError(f"{len(self.seeds)} seeds for {len(like)} items")
        return noise(name, self.seeds, like.shape[1:]).to(like)


@dataclass(frozen=True)
class Lever:
    """One way to change sampling.

    Args:
        name: Its keyword in Python, its key in files and, with dashes, its flag.
        help: What it does, in one sentence.
        acts_on: What `act` changes:
            `weights`: share of the way from an adapter's base weights (0) to its own (1);
            `fusion`: weight of what text-image fusion adds;
            `embeddings`: one item's image embeddings, (references, *patches, width);
            `projected`: image tokens before fusion, (items, references, tokens, width);
            `tokens`: fused image tokens, (items, tokens, width);
            `scale`: the image prompt's scale, an `adapter.scale.Scale`;
            `guidance`: (w_T, w_I) in ε(∅,∅) + w_T [ε(T,∅) − ε(∅,∅)] + w_I [ε(T,I) − ε(T,∅)].
        act: `act(subject, strength, context)` gives the changed subject. It must be pure and must
            treat each item by itself, so that image i never depends on how many are drawn.
        off: The strength at which nothing changes, bit for bit.
        low: Least strength.
        high: Greatest strength.
        is_range: A strength is a pair of noise levels, 0 ≤ low < high, rather than a number.
        ladder: Strengths that calibration climbs, from the first upwards; empty leaves it alone.
        phase: For `tokens`: what the result depends on besides an item and its seed. Tokens are
            computed again only when it changes; None is never.
        fits: Whether an adapter has what the lever needs; calibration asks.
    """

    name: str
    help: str
    acts_on: ActsOn
    act: Callable[[Any, Any, StepContext], Any]
    off: Any = 0.0
    low: float = 0.0
    high: float = 1.0
    is_range: bool = False
    ladder: tuple[Any, ...] = ()
    phase: Callable[[StepContext], Hashable] | None = None
    fits: Callable[[Any], bool] = lambda _: True

    def check(self, strength: Any) -> None:
        """Refuse a strength that is out of range (`ArgumentError`)."""
        if self.off is None and strength is None:
            return
        if not self.is_range:
            check_range(self.name, strength, self.low, self.high)
            return
        ends: Any = strength if isinstance(strength, (tuple, list)) else ()
        numbers = len(ends) == 2 and all(isinstance(end, (int, float)) for end in ends)
        if not numbers or not 0 <= ends[0] < ends[1]:
            what, expected = "is not a range of noise levels", "0 ≤ low < high"
            raise ArgumentError(what, where=self.name, expected=expected, found=strength)

    def between(self, one: Any, other: Any, share: float) -> Any:
        """A strength some share of the way from one to another, for the dial."""
        if one == other:
            return one
        if self.is_range:
            (low, high), (next_low, next_high) = (ends or (0.0, _LOUDEST) for ends in (one, other))
            # upper ends by their logarithms, because schedules spread noise levels that way
            return (low + (next_low - low) * share, high * (next_high / high) ** share)
        if one is None or other is None:
            return other  # "off" is not a number, so the lever comes on at once
        return one + (other - one) * share


_LOUDEST = 1e3
"""A noise level above which hardly any step lies: where an interval that is off begins to close."""

_registered: dict[str, Lever] = {}
LEVERS: Mapping[str, Lever] = MappingProxyType(_registered)
"""Every registered lever by name, in the order in which they act."""


def register_lever(lever: Lever) -> Lever:
    """Make a lever available to `Levers`, requests, flags, dials, calibration and studies.

    Example:
        Shrink image tokens towards their mean::

            def calm(tokens, strength, context):
                return tokens.lerp(tokens.mean(1, keepdim=True), strength)

            register_lever(Lever("calm", "Flattens image tokens.", "tokens", calm))
            ipdiverse.generate("reference.png", "in the snow", calm=0.3)

    Args:
        lever: Its name must not be a field of `Request`.

    Returns:
        The lever.

    Raises:
        ArgumentError: The name is not an identifier, or another lever has it.
    """
    # it becomes a keyword, a flag and an attribute of `Levers`, whose own start with "_"
    if not lever.name.isidentifier() or lever.name.startswith("_"):
        raise ArgumentError("is not a name", where="lever", found=repr(lever.name))
    if _registered.get(lever.name, lever) != lever:
        raise ArgumentError("is another lever's name", where="lever", found=lever.name)
    lever.check(lever.off)
    _registered[lever.name] = lever
    return lever


def _times(subject: float, strength: float, _: StepContext) -> float:
    return subject * strength


def image_guided(
    weights: tuple[float, float], strength: float, _: StepContext
) -> tuple[float, float]:
    """Guidance factorised: w_I is the strength, w_T stays (arXiv:2211.09800, equation 3)."""
    return weights[0], strength


def inside_interval(
    weights: tuple[float, float], strength: tuple[float, float], context: StepContext
) -> tuple[float, float]:
    """Guidance in an interval of noise levels alone (arXiv:2404.07724, equation 4)."""
    low, high = strength
    return weights if low < context.sigma <= high else (1.0, 1.0)


def recombine(tokens: Tensor, strength: float, context: StepContext) -> Tensor:
    """Each item's subject in a scene of its own (`adapter.imagine.VariationSpace.recombined`).

    Args:
        tokens: Image tokens before fusion, (items, references, tokens, width).
    """
    return context.attachment.recombined(tokens, strength, context.prompts, context.seeds)


def cads(tokens: Tensor, strength: float, context: StepContext) -> Tensor:
    """Condition-annealed noise on image tokens (CADS, arXiv:2310.17347, algorithm 1, ψ = 1).

    ŷ = √γ y + s √(1 − γ) n, rescaled to y's mean and deviation; γ falls from 1 to 0 as the noise
    level rises. In the paper any s above 0 means pure noise where γ = 0. Here s also scales 1 − γ,
    so that small strengths are small changes.

    Args:
        tokens: Fused image tokens, (items, tokens, width).
    """
    gamma = 1 - min(1.0, strength) * (1 - annealing(context))
    if strength == 0 or gamma == 1:
        return tokens
    mean, std = tokens.mean((1, 2), keepdim=True), tokens.std((1, 2), keepdim=True)
    drawn = strength * std * context.noise("cads", tokens)
    noised = math.sqrt(gamma) * tokens + math.sqrt(1 - gamma) * drawn
    centred = noised - noised.mean((1, 2), keepdim=True)
    return centred / noised.std((1, 2), keepdim=True).clamp_min(1e-8) * std + mean


def annealing(context: StepContext, start: float = 0.6, end: float = 0.9) -> float:
    """γ of CADS: 0 while t = 1 − progress is at least τ2 (`end`), then rising to 1 at τ1."""
    return min(1.0, max(0.0, (end - (1 - context.progress)) / (end - start)))


for _lever in (
    Lever(
        "interpolation",
        "Mix of a fine-tuned adapter's base weights (0) and its own (1); needs an adapter that "
        "holds both.",
        "weights",
        _times,  # W = (1 − s) · W_base + s · W: WiSE-FT, arXiv:2109.01903
        off=1.0,
        ladder=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0),
        fits=lambda adapter: bool(adapter.base_weights),
    ),
    Lever(
        "fusion_strength",
        "Weight of what text-image fusion adds: 1 as trained, 0 is plain IP-Adapter.",
        "fusion",
        _times,
        off=1.0,
        high=10,
        ladder=(0.0, 0.5, 1.0, 1.5),
        fits=lambda adapter: adapter.fusion is not None,
    ),
    Lever(
        "image_guidance",
        "Guidance weight of what the image adds to the text; the guidance scale then weighs the "
        "text alone. None guides both together.",
        "guidance",
        image_guided,
        off=None,
        high=100,  # no ladder: its third pass of the UNet costs more than stock
    ),
    Lever(
        "recombine",
        "How far each image gets a scene of its own that fits the prompt, the subject kept: 0 the "
        "reference's, 1 another. Needs a variation space.",
        "projected",
        recombine,
        ladder=(0.0, 0.25, 0.5, 0.75, 1.0),
        fits=lambda _: False,  # calibrate it by name: whether there is a space, no adapter says
    ),
    Lever(
        "interval",
        "Guide only while the noise level σ is between these two numbers; None is always.",
        "guidance",
        inside_interval,
        off=None,
        is_range=True,
        ladder=(None, (0.0, 8.0), (0.0, 4.0), (0.0, 3.0)),
    ),
    Lever(
        "cads",
        "Noise on image tokens in the early steps, in deviations of the tokens.",
        "tokens",
        cads,
        high=100,
        ladder=(0.0, 0.1, 0.2, 0.35, 0.6, 1.0),
        phase=annealing,
    ),
):
    register_lever(_lever)
