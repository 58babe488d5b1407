"""The loss of a denoiser: squared error of ε or v, each timestep weighted."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def noised(
    latents: Float[Tensor, "batch channels h w"],
    noise: Float[Tensor, "batch channels h w"],
    alphas_cumprod: Float[Tensor, " batch"],
) -> Float[Tensor, "batch channels h w"]:
    """x_t = √ᾱ x + √(1−ᾱ) ε (arXiv:2006.11239, equation 4)."""
    signal, spread = _roots(alphas_cumprod)
    return signal * latents + spread * noise


def target_of(
    kind: str,
    latents: Float[Tensor, "batch channels h w"],
    noise: Float[Tensor, "batch channels h w"],
    alphas_cumprod: Float[Tensor, " batch"],
) -> Float[Tensor, "batch channels h w"]:
    """What the UNet is to predict.

    Args:
        kind: The scheduler's `prediction_type`: `epsilon`, or `v_prediction`, which is
            v = √ᾱ ε − √(1−ᾱ) x (arXiv:2202.00512, appendix D).
        latents: Clean, scaled.
        noise: Of the same shape.
        alphas_cumprod: ᾱ of each sample's timestep.

    Raises:
        ValueError: Another kind.
    """
    if kind == "epsilon":
        return noise
    if kind != "v_prediction":
        raise ValueError(f"prediction type {kind!r}; expected epsilon or v_prediction")
    signal, spread = _roots(alphas_cumprod)
    return signal * noise - spread * latents


def min_snr_weight(
    kind: str, alphas_cumprod: Float[Tensor, " batch"], gamma: float
) -> Float[Tensor, " batch"]:
    """min(SNR, γ) / SNR for ε, min(SNR, γ) / (SNR + 1) for v (arXiv:2303.09556, section 3.4).

    Args:
        kind: As `target_of` takes it.
        alphas_cumprod: ᾱ of each sample's timestep.
        gamma: γ, 5 in the paper; 0 is a weight of 1 everywhere.
    """
    if not gamma:
        return torch.ones_like(alphas_cumprod)
    snr = alphas_cumprod / (1 - alphas_cumprod).clamp_min(1e-8)
    return snr.clamp(max=gamma) / (snr + 1 if kind == "v_prediction" else snr.clamp_min(1e-8))


def weighted_squared_error(
    predicted: Float[Tensor, "batch channels h w"],
    target: Float[Tensor, "batch channels h w"],
    weight: Float[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """Each sample's mean squared error, in float32, times its weight."""
    error = (predicted.float() - target.float()).square().mean(dim=(1, 2, 3))
    return error * weight


def at_timesteps(
    alphas_cumprod: Float[Tensor, " steps"], timesteps: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """ᾱ of each sample."""
    return alphas_cumprod.to(timesteps.device)[timesteps]


def _roots(alphas_cumprod: Tensor) -> tuple[Tensor, Tensor]:
    shaped = alphas_cumprod[:, None, None, None]
    return shaped.sqrt(), (1 - shaped).sqrt()
