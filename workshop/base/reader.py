"""A reader of latents: classifies the attributes of a denoised guess, as a loss for the UNet.

Squared error hardly changes when an item has the wrong colour: it covers a few of 64 latents. The
reader classifies every attribute of the guess at the clean latents, and its cross-entropy is added
to the UNet's squared error, as perceptual losses are for decoders (arXiv:2411.04873). It is a
proper score: the best possible guess carries the true posterior of every attribute.

It is trained together with the UNet, is not saved, and shares nothing with the oracle.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ipdiverse.critters.scene import ATTRIBUTES
from workshop.base.architecture import LATENT_CHANNELS, LATENT_SIZE

NOISE = 0.15
"""Deviation of noise on the reader's input, so that the UNet cannot please it by tiny patterns."""


class LatentReader(nn.Module):
    """Scaled latents (batch, 16, 8, 8) to logits per attribute, in the order of `ATTRIBUTES`."""

    def __init__(self) -> None:
        super().__init__()
        narrow, wide = 64, 128
        self.conv_in = nn.Conv2d(LATENT_CHANNELS, narrow, 3, padding=1)
        self.blocks = nn.Sequential(
            nn.GroupNorm(8, narrow),
            nn.SiLU(),
            nn.Conv2d(narrow, wide, 3, stride=2, padding=1),
            nn.GroupNorm(8, wide),
            nn.SiLU(),
            nn.Conv2d(wide, wide, 3, padding=1),
            nn.GroupNorm(8, wide),
            nn.SiLU(),
            nn.Flatten(),
        )
        self.hidden = nn.Linear(wide * (LATENT_SIZE // 2) ** 2, 256)
        self.heads = nn.ModuleList([nn.Linear(256, len(v)) for v in ATTRIBUTES.values()])

    def forward(self, latents: Tensor) -> list[Tensor]:
        """Logits, (batch, values) each."""
        hidden = F.silu(self.hidden(self.blocks(self.conv_in(latents))))
        return [head(hidden) for head in self.heads]


def reading_loss(logits: list[Tensor], attributes: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean cross-entropy over images and attributes.

    Args:
        logits: The reader's output.
        attributes: Indices of the true values, (batch, attributes).
        weights: Of each image, (batch,); 1 by default.
    """
    per_head = [
        F.cross_entropy(head.float(), attributes[:, i], reduction="none")
        for i, head in enumerate(logits)
    ]
    each = torch.stack(per_head).mean(0)
    return each.mean() if weights is None else (weights * each).mean()


def read_frozen(reader: nn.Module, latents: Tensor) -> list[Tensor]:
    """Logits whose gradient reaches the latents but not the reader."""
    # detached, not `requires_grad_(False)`: the same step trains the reader by its own loss
    fixed = {name: tensor.detach() for name, tensor in reader.state_dict().items()}
    return functional_call(reader, fixed, (latents,))
