"""Stage `oracle`: attributes from renders and VAE round trips, validity from broken scenes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ipdiverse.base.memory import autocast
from workshop.base.corpus import to_pixels

if TYPE_CHECKING:
    from ipdiverse.critters.oracle import Oracle
    from workshop.base.corpus import Corpus

_DECODED_AT_ONCE = 100


class OracleObjective:
    """Cross-entropy per attribute on valid images, binary cross-entropy on validity.

    Half of the valid images are VAE round trips, so the oracle reads decoded latents as well as
    renders. As many images again are broken on purpose (`broken`).
    """

    def __init__(
        self,
        oracle: Oracle,
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
        pixels = _jitter(pixels, rng)
        wrong = broken(pixels[torch.randperm(self.batch, generator=rng)], rng)
        inputs = torch.cat([pixels, wrong]).contiguous(memory_format=torch.channels_last)
        with autocast():
            logits, valid = self.module(inputs)
        heads = [head[: self.batch].float() for head in logits]
        attribute = sum(F.cross_entropy(head, labels[:, i]) for i, head in enumerate(heads)) / len(
            heads
        )
        truth = (torch.arange(len(inputs)) < self.batch).float()
        validity = F.binary_cross_entropy_with_logits(valid.float(), truth)
        right = torch.stack([(h.argmax(-1) == labels[:, i]).float() for i, h in enumerate(heads)])
        known = ((valid > 0) == (truth > 0.5)).float().mean()
        details = {
            "accuracy": float(right.mean()),
            "worst": float(right.mean(1).min()),
            "validity": float(known),
        }
        return attribute + 0.5 * validity, details


@torch.no_grad()
def round_trip(vae: Any, images: np.ndarray) -> np.ndarray:
    """Encode and decode uint8 images (count, 64, 64, 3)."""
    parts = []
    for start in range(0, len(images), _DECODED_AT_ONCE):
        pixels = to_pixels(images[start : start + _DECODED_AT_ONCE]).contiguous(
            memory_format=torch.channels_last
        )
        with autocast():
            decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        parts.append(to_images(decoded))
    return np.concatenate(parts)


def to_images(pixels: Tensor) -> np.ndarray:
    """Pixels in -1..1, (batch, 3, h, w), to uint8 (batch, h, w, 3)."""
    scaled = (pixels.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def _jitter(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """A little noise and contrast, as generated images have; never enough to change a colour."""
    count = len(pixels)
    noise = torch.randn(pixels.shape, generator=rng) * (
        0.06 * torch.rand((count, 1, 1, 1), generator=rng)
    )
    gain = 1 + 0.1 * (torch.rand((count, 1, 1, 1), generator=rng) - 0.5)
    return (pixels * gain + noise).clamp(-1, 1)


def broken(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Images that are not valid scenes: cross-faded, spliced, shuffled, noisy, erased or smeared.

    Args:
        pixels: Valid scenes, (batch, 3, 64, 64).
        rng: Chooses how each image is broken.
    """
    breaks = (_cross_fade, _splice, _shuffle_blocks, _drown, _erase, _smear)
    chosen = torch.randint(len(breaks), (len(pixels),), generator=rng).tolist()
    others = pixels.roll(1, 0)
    return torch.stack(
        [breaks[b](one, other, rng) for b, one, other in zip(chosen, pixels, others, strict=True)]
    )


def _uniform(low: float, high: float, rng: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=rng))


def _cross_fade(one: Tensor, other: Tensor, rng: torch.Generator) -> Tensor:
    return torch.lerp(one, other, _uniform(0.35, 0.65, rng))


def _splice(one: Tensor, other: Tensor, rng: torch.Generator) -> Tensor:
    """Left half of one and right half of the other, mirrored so that bodies are cut."""
    cut = int(_uniform(26, 38, rng))
    return torch.cat([one[..., :cut], other.flip(-1)[..., cut:]], dim=-1)


def _shuffle_blocks(one: Tensor, other: Tensor, rng: torch.Generator) -> Tensor:
    size = 16 if _uniform(0, 1, rng) < 0.5 else 32
    blocks = one.unfold(1, size, size).unfold(2, size, size).reshape(3, -1, size, size)
    order = torch.randperm(blocks.shape[1], generator=rng)
    if torch.equal(order, torch.arange(len(order))):
        order = order.roll(1)
    side = 64 // size
    grid = blocks[:, order].reshape(3, side, side, size, size)
    return grid.permute(0, 1, 3, 2, 4).reshape(3, 64, 64)


def _drown(one: Tensor, other: Tensor, rng: torch.Generator) -> Tensor:
    return (one + _uniform(0.5, 1.5, rng) * torch.randn(one.shape, generator=rng)).clamp(-1, 1)


def _erase(one: Tensor, other: Tensor, rng: torch.Generator) -> Tensor:
    """No creature: every row is a gradient between its outermost pixels."""
    edge = torch.stack([one[..., 0], one[..., -1]], dim=-1)
    return F.interpolate(edge, size=64, mode="linear")


def _smear(one: Tensor, other: Tensor, rng: torch.Generator) -> Tensor:
    """So little detail that nothing can be recognised."""
    small = F.interpolate(one[None], size=int(_uniform(4, 9, rng)), mode="area")
    return F.interpolate(small, size=64, mode="bilinear")[0]
