"""Stage `unet`: the text-to-image denoiser on cached latents, with the text encoder frozen."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ipdiverse.critters.training.clip import captions_and_labels, tokenize
from ipdiverse.critters.training.corpus import save_array
from ipdiverse.critters.training.loop import autocast, fingerprint

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from ipdiverse.critters.training.corpus import Corpus

CAPTION_DROP = 0.1


class Latents:
    """Posterior mean and standard deviation of every image, float16 (count, 8, 16, 16)."""

    def __init__(self, moments: np.ndarray, scale: float) -> None:
        self.moments, self.scale = moments, scale

    def sample(self, indices: np.ndarray, rng: torch.Generator) -> Tensor:
        """Scaled latents drawn afresh from the posterior, (batch, 4, 16, 16)."""
        mean, std = torch.from_numpy(self.moments[indices]).float().chunk(2, dim=1)
        return (mean + std * torch.randn(mean.shape, generator=rng)) * self.scale


@torch.no_grad()
def cache_latents(vae: Any, corpus: Corpus, folder: Path, batch: int = 200) -> np.ndarray:
    """Encode the corpus once; later calls with the same weights and scenes open the file."""
    file = folder / f"latents-{corpus.name}-{fingerprint(vae)}.npy"
    if not file.exists():
        parts = []
        for start in range(0, len(corpus), batch):
            indices = np.arange(start, min(start + batch, len(corpus)))
            pixels = corpus.pixels(indices).contiguous(memory_format=torch.channels_last)
            with autocast():
                posterior = vae.encode(pixels).latent_dist
            parts.append(torch.cat([posterior.mean, posterior.std], dim=1).half().numpy())
        save_array(file, np.concatenate(parts))
    return np.load(file)


def _has_compiler() -> bool:
    """Whether torch.compile can work here at all."""
    names = (os.environ.get("CXX", ""), "g++", "clang++")
    return any(name and shutil.which(name) for name in names)


class UnetObjective:
    """Mean squared error of v (Salimans & Ho, arXiv:2202.00512), uniform timesteps."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: Any,
        corpus: Corpus,
        latents: Latents,
        batch: int = 64,
        compiled: bool = True,
    ) -> None:
        self.module, self.text, self.tokenizer = unet, text.eval().requires_grad_(False), tokenizer
        self.scheduler, self.corpus, self.latents, self.batch = scheduler, corpus, latents, batch
        self.forward = torch.compile(unet) if compiled and _has_compiler() else unet

    def loss(self, rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """One batch's loss."""
        indices = torch.randint(len(self.corpus), (self.batch,), generator=rng).numpy()
        states = self._text_states(indices, rng)
        clean = self.latents.sample(indices, rng).contiguous(memory_format=torch.channels_last)
        noise = torch.randn(clean.shape, generator=rng)
        # one timestep from each of `batch` equal strata: the same mean, less variance
        strata = (torch.arange(self.batch) + torch.rand(self.batch, generator=rng)) / self.batch
        steps = self.scheduler.config.num_train_timesteps
        timesteps = (strata * steps).long().clamp(max=steps - 1)  # the sum may round up to 1
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        target = self.scheduler.get_velocity(clean, noise, timesteps)
        # PyTorch's fused CPU attention is slow backward; the plain one is not
        with autocast(), sdpa_kernel(SDPBackend.MATH):
            predicted = self.forward(noisy, timesteps, states).sample
        return F.mse_loss(predicted.float(), target), {}

    @torch.no_grad()
    def _text_states(self, indices: np.ndarray, rng: torch.Generator) -> Tensor:
        seeds = torch.randint(2**31, (self.batch,), generator=rng).tolist()
        captions, _ = captions_and_labels(self.corpus, indices, seeds)
        dropped = torch.rand(self.batch, generator=rng) < CAPTION_DROP
        captions = ["" if drop else text for drop, text in zip(dropped, captions, strict=True)]
        with autocast():
            return self.text(tokenize(self.tokenizer, captions)).last_hidden_state.float()
