"""Stage `oracle`: attributes from renders and VAE round trips."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ipdiverse.base.memory import autocast
from workshop.base.corpus import to_pixels

if TYPE_CHECKING:
    from collections.abc import Callable

    from ipdiverse.critters.oracle import AttributeReader
    from workshop.base.corpus import Corpus

_DECODED_AT_ONCE = 100


class OracleObjective:
    """Cross-entropy per attribute.

    Half of the images are VAE round trips, so the oracle reads decoded latents as well as renders.
    """

    def __init__(
        self,
        oracle: AttributeReader,
        corpus: Corpus,
        vae: Any,
        batch: int = 64,
        round_trips: int = 6000,
    ) -> None:
        self.module, self.corpus, self.batch = oracle, corpus, batch
        self.decoded = round_trip(vae, corpus.images[:round_trips])

    def loss(self, rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """One batch's loss and its mean attribute accuracy."""
        half = self.batch // 2
        renders = torch.randint(len(self.corpus), (half,), generator=rng).numpy()
        decoded = torch.randint(len(self.decoded), (half,), generator=rng).numpy()
        pixels = torch.cat([self.corpus.pixels(renders), to_pixels(self.decoded[decoded])])
        labels = torch.from_numpy(self.corpus.attributes[np.concatenate([renders, decoded])])
        pixels = jitter(pixels, rng).contiguous(memory_format=torch.channels_last)
        with autocast():
            heads = [head.float() for head in self.module(pixels)]
        each = [F.cross_entropy(head, labels[:, i]) for i, head in enumerate(heads)]
        right = torch.stack([(h.argmax(-1) == labels[:, i]).float() for i, h in enumerate(heads)])
        details = {"accuracy": float(right.mean()), "worst": float(right.mean(1).min())}
        return torch.stack(each).mean(), details


@torch.no_grad()
def round_trip(
    vae: Any, images: np.ndarray, change: Callable[[Tensor], Tensor] = lambda latents: latents
) -> np.ndarray:
    """Encode uint8 images (count, 64, 64, 3), change their latents if asked, and decode them."""
    parts = []
    for start in range(0, len(images), _DECODED_AT_ONCE):
        pixels = to_pixels(images[start : start + _DECODED_AT_ONCE]).contiguous(
            memory_format=torch.channels_last
        )
        with autocast():
            decoded = vae.decode(change(vae.encode(pixels).latent_dist.mode())).sample
        parts.append(to_images(decoded))
    return np.concatenate(parts)


def to_images(pixels: Tensor) -> np.ndarray:
    """Pixels in -1..1, (batch, 3, h, w), to uint8 (batch, h, w, 3)."""
    scaled = (pixels.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def jitter(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """A little noise and contrast, as generated images have; never enough to change a colour."""
    count = len(pixels)
    noise = torch.randn(pixels.shape, generator=rng) * (
        0.06 * torch.rand((count, 1, 1, 1), generator=rng)
    )
    gain = 1 + 0.1 * (torch.rand((count, 1, 1, 1), generator=rng) - 0.5)
    return (pixels * gain + noise).clamp(-1, 1)
