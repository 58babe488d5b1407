"""Generative text-image fusion: a small flow that draws image tokens anew, each image its own."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from ipdiverse.provenance import noise

if TYPE_CHECKING:
    from collections.abc import Sequence


class Variation(nn.Module):
    """The coordinates in which pictures differ, held as buffers: `VariationSpace`, for a flow.

    Coordinates are whitened in part: divided by the root of their deviation. Whitened ones give
    what is nearly noise the weight of all else, and plain ones hardly show identity.

    Args:
        size: Numbers in a picture's tokens, tokens · width.
        directions: Principal directions, k.
    """

    mean: Tensor
    directions: Tensor
    deviations: Tensor
    scene: Tensor

    def __init__(self, size: int, directions: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("directions", torch.zeros(size, directions))
        self.register_buffer("deviations", torch.ones(directions))
        # QQᵀ: what may change; the rest is identity
        self.register_buffer("scene", torch.eye(directions))

    def set(self, mean: Tensor, directions: Tensor, deviations: Tensor, scene: Tensor) -> None:
        """Take what a `VariationSpace` holds under these names."""
        for held, given in (
            (self.mean, mean),
            (self.directions, directions),
            (self.deviations, deviations),
            (self.scene, scene @ scene.T),
        ):
            held.copy_(given)

    @property
    def root(self) -> Tensor:
        """Deviations of the coordinates, whose mean variance is 1."""
        deviations = self.deviations.float()
        return (deviations / deviations.mean()).sqrt()

    @property
    def unit(self) -> Tensor:
        """What a coordinate of 1 stands for in tokens."""
        return self.deviations.float() / self.root

    def coordinates(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch k"]:
        """Of image tokens, in float32."""
        return self.along(tokens.to(self.mean) - self.mean.view(tokens.shape[1:])) / self.unit

    def along(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch k"]:
        """What lies in the directions, in float32; standard normal noise stays it."""
        return (tokens.flatten(1).to(self.directions) @ self.directions).float()

    def across(self, x: Float[Tensor, "batch k"], tokens: int) -> Tensor:
        """Turn numbers along the directions into image tokens: `along` backwards."""
        return (x.to(self.directions) @ self.directions.T).unflatten(1, (tokens, -1))

    def of_scene(self, change: Float[Tensor, "batch k"]) -> Float[Tensor, "batch k"]:
        """A change of coordinates without its part in identity, which whitened ones tell."""
        return (change / self.root) @ self.scene.float() * self.root


class _FlowBlock(nn.Module):
    """A transformer block: tokens attend to themselves and to what is given, modulated by time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_given = nn.Linear(width, 2 * width)
        self.to_out = nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        # adaLN-Zero (DiT, arXiv:2212.09748): every block begins as the identity
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(
        self, states: Tensor, time: Tensor, given: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> Tensor:
        """(batch, tokens, width); `given` are keys and values of `read`."""
        shift, scale, gate, shift_feed, scale_feed, gate_feed = self.modulation(time).chunk(6, -1)
        query, key, value = _heads(self.to_qkv(_normed(states, shift, scale)), 3)
        key, value = (torch.cat(pair, dim=2) for pair in zip((key, value), given, strict=True))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        states = states + gate * self.to_out(mixed.transpose(1, 2).flatten(2))
        return states + gate_feed * self.feed(_normed(states, shift_feed, scale_feed))

    def read(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of reference and text, which are the same at every step."""
        key, value = _heads(self.to_given(context), 2)
        return key, value


class GenerativeFusion(nn.Module):
    """T' ~ p(T' | T, C): tokens of the same subject in a scene that the text describes.

    A flow from noise to tokens of another picture of the subject (flow matching, arXiv:2210.02747):
    x_τ = (1 − τ)·noise + τ·x₁, and a transformer learns the velocity x₁ − noise from x_τ, τ, the
    reference's coordinates and the text's states. It moves only the scene's part; the subject's
    part, and what lies outside the variation space, stay the reference's.

    Args:
        token_width: Width of image tokens.
        num_tokens: Image tokens of one reference.
        directions: Of the variation space.
        words: Tokens of the text that stands for no text, for guidance.
        width: Width inside, a multiple of 64; None is fit for `token_width`.
        depth: Transformer blocks.
        steps: Euler steps of an image.
        guidance: How far the text steers the drawing (arXiv:2207.12598): 1 is as it was trained;
            another number doubles the work.
        text_width: Of text tokens; None is that of image tokens.

    Raises:
        ValueError: The width is not a multiple of 64.
    """

    kind = "generative"
    no_text: Tensor

    def __init__(
        self,
        token_width: int,
        num_tokens: int,
        directions: int,
        words: int = 1,
        width: int | None = None,
        depth: int = 4,
        steps: int = 8,
        guidance: float = 1.0,
        text_width: int | None = None,
    ) -> None:
        super().__init__()
        text_width = text_width or token_width
        width = width or min(1024, max(192, token_width // 2 // 64 * 64))
        if width % 64:
            raise ValueError(f"fusion: a width of {width} is not a multiple of 64")
        self.steps, self.guidance = steps, guidance
        self.variation = Variation(num_tokens * token_width, directions)
        self.register_buffer("no_text", torch.zeros(words, text_width))
        self.image_in = nn.Linear(token_width, width)
        self.reference_in = nn.Linear(token_width, width)
        self.text_in = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, width))
        self.place = nn.Parameter(0.02 * torch.randn(num_tokens, width))
        self.time_in = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(_FlowBlock(width) for _ in range(depth))
        self.modulation = nn.Linear(width, 2 * width)
        self.image_out = nn.Linear(width, token_width)
        nn.init.zeros_(self.image_out.weight)
        nn.init.zeros_(self.image_out.bias)

    @torch.no_grad()
    def forward(
        self,
        image_tokens: Float[Tensor, "batch tokens width"],
        text: Float[Tensor, "batch text text_width"],
        text_mask: Bool[Tensor, "batch text"] | None = None,
        strength: float = 1.0,
        seeds: Sequence[int] | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        """Draw tokens; each row depends on its own seed alone.

        Args:
            image_tokens: The reference's.
            text: The text's states.
            text_mask: What of it is not padding.
            strength: Where the flow begins: 1 at noise, 0 at the reference, whose tokens it then
                returns bit for bit; in between at a mix.
            seeds: Of the rows; None numbers them.
        """
        strength = min(1.0, strength)
        if strength <= 0:
            return image_tokens
        reference = self.variation.coordinates(image_tokens)
        given = self.read(reference, text, text_mask)
        guided = self.guidance != 1
        free = self.read(reference, self.no_text.expand(len(text), -1, -1)) if guided else given
        x = torch.lerp(reference, self._noise(image_tokens, seeds), strength)
        times = torch.linspace(1 - strength, 1, self.steps + 1).tolist()
        for now, after in pairwise(times):
            moment = torch.tensor([now], device=x.device)
            velocity = self.velocity(x, moment, given)
            if guided:
                velocity = torch.lerp(self.velocity(x, moment, free), velocity, self.guidance)
            x = x + (after - now) * velocity
        change = self.variation.of_scene(x - reference) * self.variation.unit
        return image_tokens + self.variation.across(change, len(self.place)).to(image_tokens)

    def losses(
        self,
        image_tokens: Float[Tensor, "batch tokens width"],
        target: Float[Tensor, "batch tokens width"],
        text: Float[Tensor, "batch text text_width"],
        text_mask: Bool[Tensor, "batch text"] | None,
        noise: Float[Tensor, "batch 2 tokens width"],
        time: Float[Tensor, " batch"],
    ) -> Float[Tensor, " batch"]:
        """Each sample's squared error of the velocity, for tokens of two pictures of a subject.

        `noise` is where the flow begins, and a little of what blurs the reference, from which the
        flow would else learn to copy.
        """
        variation, blur = self.variation, 0.1
        reference, other = variation.coordinates(image_tokens), variation.coordinates(target)
        other = reference + variation.of_scene(other - reference)
        start, blurred = variation.along(noise[:, 0]), variation.along(noise[:, 1])
        seen = reference + blur * variation.root * blurred
        given = self.read(seen, text, text_mask)
        velocity = self.velocity(torch.lerp(start, other, time[:, None]), time, given)
        return (velocity - (other - start)).square().mean(1)

    def read(
        self, reference: Tensor, text: Tensor, text_mask: Tensor | None = None
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
        """Each block's keys and values of the reference and the text, and what is not padding."""
        tokens = len(self.place)
        shown = self.reference_in(self.variation.across(reference, tokens)) + self.place
        context = torch.cat([shown, self.text_in(text.to(shown.dtype))], dim=1)
        if text_mask is not None:  # image tokens and reference come before the text
            text_mask = F.pad(text_mask.to(text.device), (2 * tokens, 0), value=True)[:, None, None]
        blocks: Any = self.blocks
        return [block.read(context) for block in blocks], text_mask

    def velocity(
        self,
        x: Float[Tensor, "batch k"],
        time: Float[Tensor, " times"],
        given: tuple[list[tuple[Tensor, Tensor]], Tensor | None],
    ) -> Float[Tensor, "batch k"]:
        """Where x is going at a time, one for each row or one for all; `given` is of `read`."""
        known, mask = given
        states = self.image_in(self.variation.across(x, len(self.place))) + self.place
        moment = F.silu(self.time_in(_waves(time).to(states.dtype)))[:, None]
        for block, keys in zip(self.blocks, known, strict=True):
            states = block(states, moment, keys, mask)
        shift, scale = self.modulation(moment).chunk(2, -1)
        return self.variation.along(self.image_out(_normed(states, shift, scale)))

    def _noise(self, like: Tensor, seeds: Sequence[int] | None) -> Tensor:
        rows = range(len(like)) if seeds is None else seeds
        return self.variation.along(noise("generative", rows, like.shape[1:]).to(like.device))


def _normed(states: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(states, states.shape[-1:]) * (1 + scale) + shift


def _heads(states: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Parts of (batch, tokens, parts · width) as (batch, heads, tokens, 64)."""
    return states.unflatten(-1, (parts, -1, 64)).permute(2, 0, 3, 1, 4).unbind()


def _waves(time: Float[Tensor, " times"]) -> Float[Tensor, "times 64"]:
    """A time in 0..1 as sines and cosines (arXiv:1706.03762, section 3.5)."""
    rates = torch.exp(-math.log(10_000) * torch.arange(32, device=time.device) / 32)
    angles = 1000 * time.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
