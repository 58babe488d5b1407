"""What levers make of references: their embeddings changed, their latents as places to avoid."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ipdiverse.base.memory import full_range
from ipdiverse.errors import ArgumentError
from ipdiverse.sampling.levers import Moment
from ipdiverse.sampling.removal import Removal, stated_basis

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ipdiverse.adapter.attach.attach import Attachment
    from ipdiverse.dial import Levers


class ChangedEmbeds:
    """What levers make of each item's embeddings (`encoding.EmbedChange`)."""

    def __init__(
        self, seeds: tuple[int, ...], level: int, removals: Sequence[Removal] | None
    ) -> None:
        self.items, self._level, self._removals = len(seeds), level, removals
        self._moments = [Moment(0.0, (seed,)) for seed in seeds]

    def __call__(self, item: int, name: str, embeds: Tensor) -> Tensor:
        """Without what the item's text states."""
        return embeds if self._removals is None else self._removals[item](name, embeds)

    def noise(self, item: int, embeds: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The level, and noise that belongs to the item's seed."""
        if not self._level:
            return None, None
        drawn = [self._moments[item].noise("embedding", embeds[:1])] * len(embeds)
        return torch.tensor([self._level]), torch.cat(drawn)


def embed_change(
    attachment: Attachment, levers: Levers, seeds: tuple[int, ...], prompts: Sequence[str] | None
) -> ChangedEmbeds:
    """The change that levers ask for.

    Args:
        attachment: Whose encoders read prompts.
        levers: With noise or removal on.
        seeds: One for each item.
        prompts: One for each item, or one for all.

    Raises:
        ArgumentError: Removal is on and there are no prompts.
        ModelError: Removal is on and text and image encoder share no space.
    """
    if not levers.remove_stated:
        return ChangedEmbeds(seeds, levers.noise_level, None)
    if not prompts or len(prompts) not in (1, len(seeds)):
        raise ArgumentError(
            "needs the prompts",
            where="remove_stated",
            expected=f"1 or {len(seeds)}",
            found=0 if not prompts else len(prompts),
        )
    bases = {text: stated_basis(attachment, text, levers.removal_rank) for text in set(prompts)}
    texts = list(prompts) * (len(seeds) if len(prompts) == 1 else 1)
    removals = [Removal(bases[text], levers.remove_stated) for text in texts]
    return ChangedEmbeds(seeds, levers.noise_level, removals)


def reference_latents(attachment: Attachment, sample: Tensor) -> Tensor:
    """References' latents, (items or 1, references, channels, height, width).

    Of adapters with different numbers of items, each item has the references of all.

    Args:
        attachment: Whose references, and whose pipeline's VAE.
        sample: The UNet's, for its size.

    Raises:
        ArgumentError: A reference was given as embeddings.
    """
    rows = [_latents(attachment, number, sample) for number in range(len(attachment.adapters))]
    items = math.lcm(*map(len, rows))
    return torch.cat([row.repeat_interleave(items // len(row), 0) for row in rows], dim=1)


def _latents(attachment: Attachment, number: int, sample: Tensor) -> Tensor:
    """Of one adapter's references; fewer images are filled up with the last."""
    pipe = attachment.pipe
    factor = pipe.vae_scale_factor
    size = (sample.shape[-1] * factor, sample.shape[-2] * factor)
    references = attachment.references(number)
    if not all(reference.images for reference in references):
        raise ArgumentError("needs the reference's images", where="shield")
    most = max(len(reference.images or ()) for reference in references)
    rows = []
    for reference in references:
        images = list(reference.images or ())
        images += [images[-1]] * (most - len(images))
        pixels = [np.asarray(image.convert("RGB").resize(size)) for image in images]
        rows.append(_encoded(pipe, torch.from_numpy(np.stack(pixels))))
    return torch.stack(rows)


def _encoded(pipe: Any, pixels: Tensor) -> Tensor:
    """Scaled latents of pixels 0..255, (images, height, width, 3); in float32 where that is due."""
    vae, device = pipe.vae, pipe._execution_device
    with full_range(vae):
        scaled = (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).to(device, vae.dtype)
        latents = vae.encode(scaled).latent_dist.mode()
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (latents - shift) * vae.config.scaling_factor
