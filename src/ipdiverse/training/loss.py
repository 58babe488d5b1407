"""A batch of samples to their losses: of a frozen UNet with an adapter, or of a flow of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from ipdiverse.errors import ModelError

if TYPE_CHECKING:
    from jaxtyping import Float

    from ipdiverse.adapter.model import ImagePromptAdapter


class PromptedUnet(nn.Module):
    """A frozen UNet with an adapter that learns."""

    def __init__(self, pipe: Any, adapter: ImagePromptAdapter, min_snr: float) -> None:
        super().__init__()
        self.adapter = adapter
        # The pipeline's own scheduler may be Euler, as SDXL's is, whose add_noise scales by σ
        # rather than by √ᾱ, or PNDM, which knows no velocity. All share the noise schedule.
        schedule: Any = DDPMScheduler.from_config(pipe.scheduler.config)
        kind = schedule.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            raise ModelError(
                "cannot be trained on",
                where="base",
                expected="prediction type epsilon or v_prediction",
                found=kind,
            )
        # in a tuple, so that the UNet is not a submodule: it would be wrapped and saved
        self._frozen = (pipe.unet, schedule, pipe.vae_scale_factor)
        self._min_snr = min_snr

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Each sample's weighted squared error, (batch,), in float32."""
        unet, schedule, factor = self._frozen
        latents, noise, timestep = batch["latents"], batch["noise"], batch["timestep"]
        text = batch["text_states"]
        tokens = self.adapter.tokens(batch["image"])
        tokens = self.adapter.fuse(tokens, text, batch.get("text_mask"))
        noisy = schedule.add_noise(latents, noise, timestep)
        added = _added(batch, unet.config, noisy.shape, factor)
        predicted = unet(noisy, timestep, (text, [tokens]), added_cond_kwargs=added).sample
        v = schedule.config.prediction_type == "v_prediction"
        target = schedule.get_velocity(latents, noise, timestep) if v else noise
        error = (predicted.float() - target.float()).square().mean(dim=(1, 2, 3))
        if not self._min_snr:
            return error
        return error * min_snr_weight(compute_snr(schedule, timestep), self._min_snr, v)


class TokenFlow(nn.Module):
    """A generative fusion that learns; the adapter around it is frozen, and no UNet is needed."""

    def __init__(self, adapter: ImagePromptAdapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Each sample's squared error, (batch,), in float32."""
        with torch.no_grad():
            image, target = (self.adapter.tokens(batch[name]) for name in ("image", "target"))
        text, mask = batch["text_states"], batch.get("text_mask")
        flow: Any = self.adapter.fusion
        return flow.losses(image, target, text, mask, batch["noise"], batch["timestep"])


def min_snr_weight(snr: Float[Tensor, " batch"], gamma: float, v: bool) -> Float[Tensor, " batch"]:
    """min(SNR, γ) / SNR for ε, min(SNR, γ) / (SNR + 1) for v (arXiv:2303.09556, section 3.4).

    Args:
        snr: Signal-to-noise ratio of each sample's timestep, ᾱ / (1 − ᾱ).
        gamma: γ, 5 in the paper.
    """
    # a schedule rescaled to zero SNR ends at 0, and 0 / 0 would lose the batch
    return snr.clamp(max=gamma) / (snr + 1 if v else snr.clamp_min(1e-8))


def _added(
    batch: dict[str, Tensor], config: Any, shape: torch.Size, factor: int
) -> dict[str, Tensor] | None:
    """SDXL's pooled text and sizes: uncropped, at the size of the target."""
    if "text_pooled" not in batch or config.get("addition_embed_type") != "text_time":
        return None
    height, width = (factor * side for side in shape[-2:])
    sizes = torch.tensor([height, width, 0, 0, height, width]).to(batch["text_pooled"])
    return {"text_embeds": batch["text_pooled"], "time_ids": sizes.expand(shape[0], -1)}
