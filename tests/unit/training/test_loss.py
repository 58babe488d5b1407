"""The loss of a batch, by UNets whose predictions are known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, PNDMScheduler
from torch import Tensor

from ipdiverse.errors import ModelError
from ipdiverse.training.loss import PromptedUnet, min_snr_weight

if TYPE_CHECKING:
    from collections.abc import Callable

CLEAN, NOISE = torch.randn(2, 3, 4, 6, 6, generator=torch.Generator().manual_seed(0))
TIMESTEPS = torch.tensor([0, 400, 999])
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class Adapter(torch.nn.Module):
    """Image tokens that a test can tell."""

    def tokens(self, image: Tensor) -> Tensor:
        return image + 1

    def fuse(self, tokens: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        return tokens * 2


def losses(
    predict: Callable[[Tensor, Tensor], Tensor], scheduler: Any, min_snr: float = 0.0
) -> Tensor:
    """Of a UNet that predicts from the noisy latents and ᾱ, shaped to multiply them."""
    seen: list[Any] = []
    alphas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square()
    alphas = (1 - alphas).cumprod(0)[TIMESTEPS].view(-1, 1, 1, 1)

    def unet(noisy: Tensor, timestep: Tensor, prompt: Any, added_cond_kwargs: Any) -> Any:
        seen.append(prompt)
        assert added_cond_kwargs is None
        return SimpleNamespace(sample=predict(noisy, alphas))

    unet.config = {}  # type: ignore[attr-defined]
    pipe = SimpleNamespace(unet=unet, scheduler=scheduler, vae_scale_factor=8)
    batch = {
        "latents": CLEAN,
        "noise": NOISE,
        "timestep": TIMESTEPS,
        "image": torch.zeros(3, 1, 2),
        "text_states": torch.ones(3, 5, 2),
    }
    adapter: Any = Adapter()
    loss = PromptedUnet(pipe, adapter, min_snr)(batch)
    ((text, (tokens,)),) = seen
    assert torch.equal(text, batch["text_states"])
    assert torch.equal(tokens, torch.full((3, 1, 2), 2.0)), "the adapter's, fused"
    return loss


@pytest.mark.parametrize("kind", [DDPMScheduler, PNDMScheduler, EulerDiscreteScheduler])
def test_whoever_knows_the_clean_image_predicts_the_noise(kind: Any) -> None:
    """ε from x and x_t by hand; the pipeline's scheduler only says which betas it has."""
    found = losses(lambda x_t, a: (x_t - a.sqrt() * CLEAN) / (1 - a).sqrt(), kind(**BETAS))
    assert float(found.max()) < 1e-3
    wrong = losses(lambda x_t, a: torch.zeros_like(x_t), kind(**BETAS))
    torch.testing.assert_close(wrong, NOISE.square().mean(dim=(1, 2, 3)))


@pytest.mark.parametrize("kind", [DDPMScheduler, PNDMScheduler, EulerDiscreteScheduler])
def test_v_is_what_turns_noise_into_the_image(kind: Any) -> None:
    """x = √ᾱ x_t − √(1−ᾱ) v, so v follows from x and x_t (arXiv:2202.00512, appendix D)."""
    scheduler = kind(**BETAS, prediction_type="v_prediction")
    found = losses(lambda x_t, a: (a.sqrt() * x_t - CLEAN) / (1 - a).sqrt(), scheduler)
    assert float(found.max()) < 1e-3
    assert float(losses(lambda x_t, a: NOISE, scheduler).max()) > 0.1, "ε is not v"


def test_each_sample_has_its_own_error_in_single_precision() -> None:
    def half(x_t: Tensor, a: Tensor) -> Tensor:
        predicted = NOISE.clone()
        predicted[1] += 2.0
        return predicted.half()

    found = losses(half, DDPMScheduler(**BETAS))
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([0, 4, 0], abs=1e-2)


def test_min_snr_weights_each_sample_by_its_timestep() -> None:
    plain, weighted = (
        losses(lambda x_t, a: torch.zeros_like(x_t), DDPMScheduler(**BETAS), gamma)
        for gamma in (0.0, 5.0)
    )
    first, middle, last = (weighted / plain).tolist()
    # SNR 1 / 0.00085 at timestep 0, and below 5 at 400 and 999
    assert first == pytest.approx(5 * 0.00085 / 0.99915, rel=1e-3)
    assert (middle, last) == pytest.approx((1, 1))


def test_min_snr_cuts_at_gamma() -> None:
    snr = torch.tensor([1, 9, float("inf"), 1 / 9, 0])
    epsilon = min_snr_weight(snr, 5.0, v=False)
    torch.testing.assert_close(epsilon[:4], torch.tensor([1, 5 / 9, 0, 1]))
    assert torch.isfinite(epsilon).all(), "an SNR of zero too"
    v = min_snr_weight(snr, 5.0, v=True)
    torch.testing.assert_close(v, torch.tensor([0.5, 0.5, 0, 0.1, 0]))


def test_other_predictions_are_refused() -> None:
    with pytest.raises(ModelError, match=r"base: cannot be trained on; .* found sample"):
        losses(lambda x_t, a: x_t, DDPMScheduler(**BETAS, prediction_type="sample"))
