"""The loss against the scheduler's own formulas and hand-made cases."""

from __future__ import annotations

import pytest
import torch

from ipdiverse.training import loss as losses
from workshop.base import architecture

CLEAN, NOISE = torch.randn(2, 5, 4, 6, 6, generator=torch.Generator().manual_seed(0))
TIMESTEPS = torch.tensor([0, 10, 400, 800, 999])


def test_noise_and_targets_are_the_schedulers() -> None:
    scheduler = architecture.noise_schedule()
    alphas = losses.at_timesteps(scheduler.alphas_cumprod, TIMESTEPS)
    torch.testing.assert_close(
        losses.noised(CLEAN, NOISE, alphas), scheduler.add_noise(CLEAN, NOISE, TIMESTEPS)
    )
    torch.testing.assert_close(
        losses.target_of("v_prediction", CLEAN, NOISE, alphas),
        scheduler.get_velocity(CLEAN, NOISE, TIMESTEPS),
    )
    assert losses.target_of("epsilon", CLEAN, NOISE, alphas) is NOISE
    with pytest.raises(ValueError, match="prediction type 'sample'"):
        losses.target_of("sample", CLEAN, NOISE, alphas)


def test_min_snr_cuts_at_gamma() -> None:
    alphas = torch.tensor([0.5, 0.9, 1.0, 0.1])  # SNR 1, 9, endless, 1/9
    epsilon = losses.min_snr_weight("epsilon", alphas, 5.0)
    torch.testing.assert_close(epsilon[[0, 1, 3]], torch.tensor([1.0, 5 / 9, 1.0]))
    assert epsilon[2] < 1e-6
    v = losses.min_snr_weight("v_prediction", alphas, 5.0)
    torch.testing.assert_close(v[[0, 1, 3]], torch.tensor([0.5, 0.5, 0.1]))
    assert torch.equal(losses.min_snr_weight("epsilon", alphas, 0), torch.ones(4))
    pure_noise = losses.min_snr_weight("epsilon", torch.zeros(1), 5.0)
    assert torch.isfinite(pure_noise).all()


def test_each_sample_has_its_own_error_and_weight() -> None:
    predicted = CLEAN.clone()
    predicted[1] += 2.0
    weight = torch.tensor([1.0, 0.5, 1.0, 1.0, 1.0])
    error = losses.weighted_squared_error(predicted.half(), CLEAN.half(), weight)
    assert error.dtype == torch.float32
    assert error.tolist() == pytest.approx([0, 2, 0, 0, 0], abs=1e-2)
