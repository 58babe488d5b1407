"""Noise-conditioned image embeddings: an adapter that was told how far to trust its reference.

    e_τ = √ᾱ_τ ē + √(1 − ᾱ_τ) n,    ē the standardised embedding, τ embedded and added

as Stable unCLIP's `noise_level`. Trained over all τ, the adapter keeps at each level what is still
to be read and leaves the rest to the text and to chance, so noise that is drawn once for an image
and held over its steps is variety that training has seen.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

LEVELS = 1000
_FREQUENCIES = 64


class NoiseConditioning(nn.Module):
    """Noise of a level on embeddings, and the level said beside it.

    Untrained, at level 0 it changes nothing, bit for bit.

    Args:
        width: Of the embeddings.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.level = nn.Sequential(
            nn.Linear(2 * _FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )
        for parameter in self.level[2].parameters():
            nn.init.zeros_(parameter)

    def standardise(self, embeds: Float[Tensor, "... width"]) -> None:
        """Take mean and deviation of each channel from these embeddings; one row has none."""
        rows = embeds.flatten(0, -2).float()
        self.mean.copy_(rows.mean(0))
        self.std.copy_(rows.std(0, correction=int(len(rows) > 1)).clamp_min(1e-4))

    def forward(
        self,
        embeds: Float[Tensor, "batch *patches width"],
        level: Int[Tensor, " batch"] | None = None,
        noise: Float[Tensor, "batch *patches width"] | None = None,
    ) -> Float[Tensor, "batch *patches width"]:
        """Noised embeddings with their level.

        Args:
            embeds: Pooled embeddings or hidden states.
            level: τ of each item, 0 (as it is) to 999 (all noise); None is 0.
            noise: Of the shape of `embeds`; None is none.
        """
        if level is None:
            level = torch.zeros(len(embeds), dtype=torch.long, device=embeds.device)
        shape = (len(embeds), *[1] * (embeds.ndim - 1))
        signal = alphas_cumprod(level).to(embeds).view(shape)
        std = self.std.to(embeds)
        # written so that a level of 0 adds exact zeros
        noised = embeds + (signal.sqrt() - 1) * (embeds - self.mean.to(embeds))
        if noise is not None:
            noised = noised + (1 - signal).sqrt() * std * noise
        said = self.level(_sinusoids(level).to(embeds)).view(len(embeds), *shape[1:-1], -1)
        return noised + std * said


def alphas_cumprod(level: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """ᾱ_τ of the cosine schedule (arXiv:2102.09672, equation 17); exactly 1 at 0."""
    offset = 0.008
    exact = level.cpu().double()  # not every device has float64
    angle = (exact / LEVELS + offset) / (1 + offset) * (math.pi / 2)
    start = math.cos(offset / (1 + offset) * math.pi / 2) ** 2
    alphas = torch.where(exact == 0, 1.0, angle.cos().square() / start)
    return alphas.clamp(0, 1).float().to(level.device)


def _sinusoids(level: Int[Tensor, " batch"]) -> Float[Tensor, "batch width"]:
    counted = torch.arange(_FREQUENCIES, dtype=torch.float32, device=level.device)
    steps = counted / _FREQUENCIES
    angles = level[:, None].float() * torch.exp(-math.log(10_000) * steps)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
