"""Stage `unet`: the text-to-image denoiser on cached latents, with the text encoder frozen.

In training, features of its middle are aligned with the image encoder's features of the clean
image (REPA, arXiv:2410.06940), and its guess at the clean latents is classified (`reader`). Neither
head is saved.
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ipdiverse.base.memory import autocast
from ipdiverse.base.pipelines import fingerprint
from workshop.base.clip import captions_and_labels, tokenize
from workshop.base.corpus import encoded_once
from workshop.base.reader import NOISE, LatentReader, read_frozen, reading_loss

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    from workshop.base.corpus import Corpus

CAPTION_DROP = 0.1
ALIGNMENT = 0.5
"""Weight of the alignment loss; REPA's own."""
READING = 0.15
"""Weight of the reader's cross-entropy, times the signal's share of the noisy latents' variance: at
high noise the best guess is a mean of many images, which has no single readable attribute."""
UNIFORM = 0.25
"""Fraction of timesteps drawn uniformly; the others are mostly in the middle (`crowded`)."""
ALL_STATED = 0.3
"""Fraction of captions that state every attribute: they teach most about the meaning of words."""


class Latents:
    """Posterior mean and standard deviation of every image, float16 (count, 32, 8, 8)."""

    def __init__(self, moments: np.ndarray, scale: float) -> None:
        self.moments, self.scale = moments, scale

    def sample(self, indices: np.ndarray, rng: torch.Generator) -> Tensor:
        """Scaled latents drawn afresh from the posterior, (batch, 16, 8, 8)."""
        mean, std = torch.from_numpy(self.moments[indices]).float().chunk(2, dim=1)
        return (mean + std * torch.randn(mean.shape, generator=rng)) * self.scale


def cache_latents(vae: Any, corpus: Corpus, folder: Path) -> np.ndarray:
    """Moments of every image (`Latents`), encoded once per weights and scenes."""

    def encode(pixels: Tensor) -> Tensor:
        posterior = vae.encode(pixels).latent_dist
        return torch.cat([posterior.mean, posterior.std], dim=1)

    file = folder / f"latents-{corpus.name}-{fingerprint(vae)}.npy"
    return encoded_once(file, corpus, encode)


def cache_patches(image_encoder: Any, corpus: Corpus, folder: Path) -> np.ndarray:
    """Penultimate hidden states of every image's patches, float16 (count, 64, width)."""

    def encode(pixels: Tensor) -> Tensor:
        return image_encoder(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]

    file = folder / f"patches-{corpus.name}-{fingerprint(image_encoder)}.npy"
    return encoded_once(file, corpus, encode)


class Alignment(nn.Module):
    """Predicts the image encoder's patch features from the UNet's features on the same grid.

    Args:
        patches: Features of every image (`cache_patches`); standardised here, or the part common to
            all images would dominate the cosine.
        width: Channels of the UNet's features.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, patches: np.ndarray, width: int) -> None:
        super().__init__()
        self.patches = patches
        sample = torch.from_numpy(np.array(patches[:4000])).float().flatten(0, 1)
        self.register_buffer("mean", sample.mean(0))
        self.register_buffer("std", sample.std(0) + 1e-4)
        features = patches.shape[-1]
        self.head = nn.Sequential(
            nn.Linear(width, 2 * features), nn.SiLU(), nn.Linear(2 * features, features)
        )

    def forward(self, hidden: Tensor, indices: np.ndarray) -> Tensor:
        """One minus the mean cosine.

        Args:
            hidden: UNet features, (batch, width, 8, 8).
            indices: Which images they belong to.
        """
        seen = (torch.from_numpy(self.patches[indices]).float() - self.mean) / self.std
        with autocast():
            predicted = self.head(hidden.flatten(2).transpose(1, 2))
        return 1 - F.cosine_similarity(predicted.float(), seen, dim=-1).mean()


class UnetModules(nn.Module):
    """The UNet and its auxiliary heads, which are not saved."""

    def __init__(self, unet: UNet2DConditionModel, alignment: Alignment) -> None:
        super().__init__()
        self.unet, self.alignment = unet, alignment
        reader: Any = LatentReader()
        self.reader = reader.to(memory_format=torch.channels_last)


@torch.no_grad()
def text_states(
    text: CLIPTextModel, tokenizer: CLIPTokenizer, captions: list[str], dropped: Tensor
) -> Tensor:
    """Hidden states of captions, (batch, tokens, width); those of "" where they are dropped."""
    # "" and not zeros: it is what guidance compares with when images are drawn
    kept = ["" if drop else words for drop, words in zip(dropped, captions, strict=True)]
    with autocast():
        return text(tokenize(tokenizer, kept)).last_hidden_state.float()


def velocity_loss(
    predict: Callable[[Tensor], Tensor],
    scheduler: Any,
    clean: Tensor,
    timesteps: Tensor,
    noise: Tensor,
) -> tuple[Tensor, Tensor]:
    """Squared error of v (Salimans & Ho, arXiv:2202.00512), and the guess at the clean latents.

    Args:
        predict: Noisy latents to predicted v.
        scheduler: The noise schedule.
        clean: Latents, (batch, channels, height, width).
        timesteps: int64, (batch,).
        noise: Of the shape of `clean`.
    """
    noisy = scheduler.add_noise(clean, noise, timesteps)
    target = scheduler.get_velocity(clean, noise, timesteps)
    # PyTorch's fused CPU attention is slow backward; the plain one is not
    with autocast(), sdpa_kernel(SDPBackend.MATH):
        predicted = predict(noisy)
    predicted = predicted.float()
    # clean = √ᾱ noisy - √(1-ᾱ) v: the formula of v itself, with other arguments
    guess = scheduler.get_velocity(predicted, noisy, timesteps)
    return F.mse_loss(predicted, target), guess


def _has_compiler() -> bool:
    """Whether the C++ compiler that torch.compile needs is installed."""
    names = (os.environ.get("CXX", ""), "g++", "clang++")
    return any(name and shutil.which(name) for name in names)


def crowded(batch: int, steps: int, rng: torch.Generator) -> Tensor:
    """Timesteps, mostly in the middle, where content is decided, int64 (batch,) in random order.

    Logit-normal (arXiv:2403.03206), with a fraction of uniform ones. Both are drawn once from each
    of equally likely strata: the same mean loss with less variance.
    """
    uniform = round(UNIFORM * batch)
    middle = torch.sigmoid(torch.special.ndtri(_strata(batch - uniform, rng)))
    share = torch.cat([_strata(uniform, rng), middle])[torch.randperm(batch, generator=rng)]
    return (share * steps).long().clamp(max=steps - 1)


def _strata(count: int, rng: torch.Generator) -> Tensor:
    """One number from each of `count` equal parts of 0..1, the ends excluded."""
    drawn = (torch.arange(count) + torch.rand(count, generator=rng)) / max(1, count)
    return drawn.clamp(1e-6, 1 - 1e-6)


class UnetObjective:
    """Squared error of v at `crowded` timesteps, alignment, reading; a tenth of captions dropped.

    The features that are aligned leave the first up block, on the image encoder's 8×8 grid.
    """

    def __init__(
        self,
        modules: UnetModules,
        text: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: Any,
        corpus: Corpus,
        latents: Latents,
        batch: int = 128,
        compiled: bool = True,
    ) -> None:
        self.module, self.tokenizer = modules, tokenizer
        self.attributes = torch.from_numpy(corpus.attributes)
        self.text = text.eval().requires_grad_(False)
        self.scheduler, self.corpus, self.latents, self.batch = scheduler, corpus, latents, batch
        self._hidden: dict[str, Tensor] = {}
        # the loss needs features that the UNet does not return
        block: Any = modules.unet.up_blocks[0]
        block.register_forward_hook(lambda _, __, output: self._hidden.update(middle=output))
        unet = modules.unet
        self.forward = torch.compile(unet) if compiled and _has_compiler() else unet

    def loss(self, rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """One batch's loss."""
        indices = torch.randint(len(self.corpus), (self.batch,), generator=rng).numpy()
        seeds = torch.randint(2**31, (self.batch,), generator=rng).tolist()
        whole = torch.rand(self.batch, generator=rng) < ALL_STATED
        chances = [1.0 if states_all else None for states_all in whole]
        captions, _ = captions_and_labels(self.corpus, indices, seeds, chances)
        dropped = torch.rand(self.batch, generator=rng) < CAPTION_DROP
        states = text_states(self.text, self.tokenizer, captions, dropped)
        clean = self.latents.sample(indices, rng).contiguous(memory_format=torch.channels_last)
        noise = torch.randn(clean.shape, generator=rng)
        timesteps = crowded(self.batch, self.scheduler.config.num_train_timesteps, rng)
        velocity, guess = velocity_loss(
            lambda noisy: self.forward(noisy, timesteps, states).sample,
            self.scheduler,
            clean,
            timesteps,
            noise,
        )
        misaligned = self.module.alignment(self._hidden["middle"], indices)
        signal = self.scheduler.alphas_cumprod[timesteps]
        misread, learning = self._read(guess, clean, signal, self.attributes[indices], rng)
        figures = {"velocity": velocity, "misaligned": misaligned, "misread": misread}
        loss = velocity + ALIGNMENT * misaligned + READING * misread + learning
        return loss, {name: float(figure.detach()) for name, figure in figures.items()}

    def _read(
        self,
        guess: Tensor,
        clean: Tensor,
        signal: Tensor,
        attributes: Tensor,
        rng: torch.Generator,
    ) -> tuple[Tensor, Tensor]:
        """Two cross-entropies: of the guess, which trains the UNet, and the reader's own."""
        both = torch.cat([guess, clean])
        both = both + NOISE * torch.randn(both.shape, generator=rng)
        reader = self.module.reader
        with autocast():
            seen = read_frozen(reader, both[: len(guess)])
            learnt = reader(both.detach())
        misread = reading_loss(seen, attributes, signal)
        return misread, reading_loss(learnt, attributes.repeat(2, 1))
