"""Stage `vae`: pixels to latents and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ipdiverse.critters.training.loop import autocast

if TYPE_CHECKING:
    from ipdiverse.critters.training.corpus import Corpus

KL_WEIGHT = 3e-4
"""Weight of the mean KL per latent element against L1 + MSE per pixel in -1..1."""


class VaeObjective:
    """L1 + MSE + a light KL, on renders."""

    def __init__(self, vae: Any, corpus: Corpus, batch: int = 16) -> None:
        self.module, self.corpus, self.batch = vae, corpus, batch

    def loss(self, rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """One batch's loss and its PSNR in dB."""
        indices = torch.randint(len(self.corpus), (self.batch,), generator=rng).numpy()
        pixels = self.corpus.pixels(indices).contiguous(memory_format=torch.channels_last)
        with autocast():
            posterior = self.module.encode(pixels).latent_dist
            decoded = self.module.decode(posterior.sample()).sample.float()
        mse = F.mse_loss(decoded, pixels)
        kl = 0.5 * (
            posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()
        )
        loss = F.l1_loss(decoded, pixels) + mse + KL_WEIGHT * kl.mean()
        return loss, {"psnr": psnr(float(mse.detach())), "kl": float(kl.mean().detach())}


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error over a range of -1..1."""
    return float(10 * np.log10(4 / max(mse, 1e-12)))


@torch.no_grad()
def latent_scale(vae: Any, corpus: Corpus, count: int = 512) -> float:
    """1 / standard deviation of the latents: the pipeline's `scaling_factor`."""
    posterior = vae.encode(corpus.pixels(np.arange(min(count, len(corpus))))).latent_dist
    variance = posterior.mean.var(correction=0) + posterior.var.mean()
    return float(1 / variance.sqrt())
