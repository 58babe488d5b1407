"""A frozen UNet with an adapter that learns: a batch of samples to their losses."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ipdiverse.training import loss as losses

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from ipdiverse.adapter.model import ImagePromptAdapter


class PromptedUnet(nn.Module):
    """A frozen UNet with an adapter that learns: a batch of samples to their losses.

    Args:
        pipe: The base, with the adapter attached.
        adapter: What learns.
        min_snr: γ of `losses.min_snr_weight`.
    """

    def __init__(self, pipe: Any, adapter: ImagePromptAdapter, min_snr: float) -> None:
        super().__init__()
        self.adapter = adapter
        # in a tuple: not a part of this module
        self._frozen = (pipe.unet, pipe.scheduler, pipe.vae_scale_factor)
        self._min_snr = min_snr

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Each sample's weighted squared error, (batch,)."""
        unet, scheduler, factor = self._frozen
        kind = scheduler.config.prediction_type
        alphas = losses.at_timesteps(scheduler.alphas_cumprod, batch["timestep"])
        tokens = self.adapter.tokens(batch["image"])
        text = batch["text_states"]
        tokens = self.adapter.fuse(tokens, text, batch.get("text_mask"))
        noisy = losses.noised(batch["latents"], batch["noise"], alphas)
        predicted = unet(
            noisy,
            batch["timestep"],
            (text, [tokens]),
            added_cond_kwargs=_added(batch, unet.config, noisy.shape, factor),
        ).sample
        target = losses.target_of(kind, batch["latents"], batch["noise"], alphas)
        weight = losses.min_snr_weight(kind, alphas, self._min_snr)
        return losses.weighted_squared_error(predicted, target, weight)


def fast_backward(latents: Tensor, precision: str) -> AbstractContextManager[Any]:
    """Around forward and backward: the attention that is fastest both ways.

    PyTorch's fused attention is, by two times and more, and it holds no attention matrix; but for
    few tokens in half precision on a CPU, where its backward pass is the slower
    (`benchmarks/attention.py`). Backward too, as gradient checkpointing runs the forward pass again
    in there.

    Args:
        latents: (batch, channels, h, w); a UNet's largest attention is over their h·w places.
        precision: As `TrainConfig` takes it.
    """
    few = latents.shape[-2] * latents.shape[-1] <= _FEW_TOKENS
    plain = latents.device.type == "cpu" and precision != "fp32" and few
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


_FEW_TOKENS = 256


def _added(
    batch: dict[str, Tensor], config: Any, shape: torch.Size, factor: int
) -> dict[str, Tensor] | None:
    """SDXL's pooled text and sizes: uncropped, at the size of the target."""
    if "text_pooled" not in batch or config.get("addition_embed_type") != "text_time":
        return None
    height, width = (factor * side for side in shape[-2:])
    sizes = torch.tensor([height, width, 0, 0, height, width]).to(batch["text_pooled"])
    return {"text_embeds": batch["text_pooled"], "time_ids": sizes.expand(shape[0], -1)}
