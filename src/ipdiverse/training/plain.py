"""Plain IP-Adapter on critters, trained as its authors do: the reference is the target.

It learns to copy, and that is the point: it is the baseline that everything else must beat.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ipdiverse.adapter.attach import image_embeds
from ipdiverse.critters.training.clip import captions_and_labels
from ipdiverse.critters.training.corpus import encoded_once
from ipdiverse.critters.training.loop import fingerprint
from ipdiverse.critters.training.unet import text_states, velocity_loss

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from transformers import CLIPVisionModelWithProjection

    from ipdiverse.adapter.model import ImagePromptAdapter
    from ipdiverse.critters.training.corpus import Corpus
    from ipdiverse.critters.training.unet import Latents

DROP_TEXT, DROP_IMAGE, DROP_BOTH = 0.05, 0.05, 0.05
"""Shares of samples without text, without image, without both (arXiv:2308.06721, section 4.1)."""


def cache_image_embeds(
    encoder: CLIPVisionModelWithProjection, corpus: Corpus, kind: str, folder: Path
) -> np.ndarray:
    """Image embeddings of every image, encoded once per weights and scenes."""
    file = folder / f"embeds-{kind}-{corpus.name}-{fingerprint(encoder)}.npy"
    return encoded_once(file, corpus, lambda pixels: image_embeds(encoder, pixels, kind))


class PlainObjective:
    """‖v − v_θ(x_t, text, image)‖² with the image of the target itself; only the adapter learns.

    Args:
        adapter: What is trained; it must be attached to `pipe`'s UNet.
        pipe: The frozen base, a Stable Diffusion pipeline.
        corpus: Scenes, for captions.
        latents: Their cached latents.
        embeds: Their cached image embeddings.
        batch: Samples a step.
    """

    def __init__(
        self,
        adapter: ImagePromptAdapter,
        pipe: Any,
        corpus: Corpus,
        latents: Latents,
        embeds: np.ndarray,
        batch: int = 64,
    ) -> None:
        self.module, self.pipe, self.corpus, self.latents = adapter, pipe, corpus, latents
        self.embeds, self.batch = embeds, batch
        for part in (pipe.unet, pipe.text_encoder, pipe.image_encoder):
            part.requires_grad_(False).eval()
        adapter.requires_grad_(True)
        self._no_image = self._empty_embeds()

    def loss(self, rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """One batch's loss."""
        indices = torch.randint(len(self.embeds), (self.batch,), generator=rng).numpy()
        u = torch.rand(self.batch, generator=rng)
        no_text = (u < DROP_TEXT) | (u >= 1 - DROP_BOTH)
        no_image = ((u >= DROP_TEXT) & (u < DROP_TEXT + DROP_IMAGE)) | (u >= 1 - DROP_BOTH)
        seeds = torch.randint(2**31, (self.batch,), generator=rng).tolist()
        captions, _ = captions_and_labels(self.corpus, indices, seeds)
        text = text_states(self.pipe.text_encoder, self.pipe.tokenizer, captions, no_text)
        embeds = torch.from_numpy(self.embeds[indices]).float()
        embeds[no_image] = self._no_image
        clean = self.latents.sample(indices, rng).contiguous(memory_format=torch.channels_last)
        noise = torch.randn(clean.shape, generator=rng)
        scheduler = self.pipe.scheduler
        timesteps = torch.randint(
            scheduler.config.num_train_timesteps, (self.batch,), generator=rng
        )

        def predict(noisy: Tensor) -> Tensor:
            tokens = self.module.tokens(embeds)
            return self.pipe.unet(noisy, timesteps, (text, [tokens])).sample

        return velocity_loss(predict, scheduler, clean, timesteps, noise)[0], {}

    @torch.no_grad()
    def _empty_embeds(self) -> Tensor:
        """What stands for "no image": zeros (base), or a zero image's hidden states (plus)."""
        encoder = self.pipe.image_encoder
        size = encoder.config.image_size
        embeds = image_embeds(encoder, torch.zeros(1, 3, size, size), self.module.kind)[0]
        return torch.zeros_like(embeds) if self.module.kind == "base" else embeds
