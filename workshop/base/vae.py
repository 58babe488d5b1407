"""Stage `vae`: pixels to latents and back.

In addition to the usual losses, an auxiliary reader (`reader`) classifies every attribute from
noisy latents, at all noise levels. Attributes are then encoded in the directions that noise hides
last, which a denoiser learns first (the aim of arXiv:2501.01423, whose features these labels
replace). The decoder is trained on slightly wrong latents, since sampled ones are slightly wrong
(arXiv:2507.15856).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ipdiverse.base.memory import autocast
from workshop.base.reader import LatentReader, reading_loss

if TYPE_CHECKING:
    from workshop.base.corpus import Corpus

KL_WEIGHT = 3e-4
"""Weight of the mean KL per latent element against L1 + MSE per pixel in -1..1."""
READING = 0.02
"""Weight of the reader's cross-entropy."""
OFF = 0.2
"""Largest deviation of the noise on decoded latents, in standard deviations of the latents."""


class VaeModules(nn.Module):
    """The autoencoder and the auxiliary reader, which is not saved."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae
        reader: Any = LatentReader()
        self.reader = reader.to(memory_format=torch.channels_last)


class VaeObjective:
    """L1 + MSE + a light KL + the reader's cross-entropy, on renders."""

    def __init__(self, modules: VaeModules, corpus: Corpus, batch: int = 16) -> None:
        self.module, self.corpus, self.batch = modules, corpus, batch
        self.attributes = torch.from_numpy(corpus.attributes)

    def loss(self, rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """One batch's loss and its PSNR in dB."""
        indices = torch.randint(len(self.corpus), (self.batch,), generator=rng).numpy()
        pixels = self.corpus.pixels(indices).contiguous(memory_format=torch.channels_last)
        with autocast():
            posterior = self.module.vae.encode(pixels).latent_dist
            latents = posterior.sample().float()
            spread = latents.detach().std()
            off = OFF * torch.rand((self.batch, 1, 1, 1), generator=rng) * spread
            # one strength for each image, so that sharp latents are decoded as well
            blurred = latents + off * torch.randn(latents.shape, generator=rng)
            decoded = self.module.vae.decode(blurred).sample.float()
            logits = self.module.reader(_drowned(latents / latents.std(), rng))
        misread = reading_loss(logits, self.attributes[indices])
        mse = F.mse_loss(decoded, pixels)
        kl = 0.5 * (
            posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()
        )
        loss = F.l1_loss(decoded, pixels) + mse + KL_WEIGHT * kl.mean() + READING * misread
        figures = {"kl": kl.mean(), "misread": misread, "spread": spread}
        details = {name: float(figure.detach()) for name, figure in figures.items()}
        return loss, {"psnr": psnr(float(mse.detach())), **details}


def _drowned(latents: Tensor, rng: torch.Generator) -> Tensor:
    """Latents of unit deviation mixed with noise, from no noise to pure noise (cosine schedule)."""
    angle = math.pi / 2 * torch.rand((len(latents), 1, 1, 1), generator=rng)
    return angle.cos() * latents + angle.sin() * torch.randn(latents.shape, generator=rng)


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error over a range of -1..1."""
    return float(10 * np.log10(4 / max(mse, 1e-12)))


@torch.no_grad()
def latent_scale(vae: Any, corpus: Corpus, count: int = 512) -> float:
    """1 / standard deviation of the latents: the pipeline's `scaling_factor`."""
    posterior = vae.encode(corpus.pixels(np.arange(min(count, len(corpus))))).latent_dist
    variance = posterior.mean.var(correction=0) + posterior.var.mean()
    return float(1 / variance.sqrt())
