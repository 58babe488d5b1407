from __future__ import annotations

import math

import pytest
import torch

from ipdiverse.adapter.attention import BOTH, NOTHING, TEXT
from ipdiverse.sampling.denoiser import (
    DiffusionNoise,
    FlowNoise,
    branch_weights,
    clean_guess,
    combine,
)


@pytest.mark.parametrize(
    ("guidance", "image", "branches"),
    [
        (3.0, 3.0, {NOTHING, BOTH}),
        (3.0, 1.0, {NOTHING, TEXT, BOTH}),
        (1.0, 2.0, {TEXT, BOTH}),
        (3.0, 0.0, {NOTHING, TEXT}),
        (1.0, 1.0, {BOTH}),
    ],
)
def test_only_branches_with_a_weight_are_named(guidance, image, branches) -> None:
    weights = branch_weights(guidance, image)
    assert set(weights) == branches
    assert sum(weights.values()) == pytest.approx(1)


def test_the_sum_is_the_factorised_formula() -> None:
    nothing, text, both = torch.randn(3, 2, 4, 5, 5)
    w_text, w_image = 5.0, 1.5
    expected = nothing + w_text * (text - nothing) + w_image * (both - text)
    found = combine(branch_weights(w_text, w_image), {NOTHING: nothing, TEXT: text, BOTH: both})
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_two_equal_weights_are_what_pipelines_compute_to_the_bit() -> None:
    nothing, both = torch.randn(2, 2, 4, 5, 5)
    found = combine(branch_weights(7.5, 7.5), {NOTHING: nothing, BOTH: both})
    assert torch.equal(found, nothing + 7.5 * (both - nothing))


def test_noise_over_signal() -> None:
    assert DiffusionNoise(0.0).sigma == FlowNoise(1.0).sigma == math.inf
    assert DiffusionNoise(0.5).sigma == FlowNoise(0.5).sigma == pytest.approx(1)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_prediction_means_its_clean_guess(kind: str) -> None:
    clean, noise = torch.randn(2, 2, 4, 5, 5, dtype=torch.float64)
    alpha = 0.3
    sample = math.sqrt(alpha) * clean + math.sqrt(1 - alpha) * noise
    predicted = {
        "epsilon": noise,
        "v_prediction": math.sqrt(alpha) * noise - math.sqrt(1 - alpha) * clean,
        "sample": clean,
    }[kind]
    torch.testing.assert_close(clean_guess(kind, sample, predicted, alpha), clean)


def test_an_unknown_prediction_is_refused() -> None:
    with pytest.raises(ValueError, match="flow"):
        clean_guess("flow", torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 0.5)


def test_a_velocity_means_its_clean_guess() -> None:
    clean, drawn = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    noise = FlowNoise(0.3)
    sample = 0.7 * clean + 0.3 * drawn
    torch.testing.assert_close(noise.clean(sample, drawn - clean), clean)
