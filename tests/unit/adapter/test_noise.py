"""Noise conditioning: what a level does, and that an adapter carries it through files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from ipdiverse.adapter.files.checkpoint import load_adapter, save_adapter
from ipdiverse.adapter.files.conversion import convert
from ipdiverse.adapter.model import ImagePromptAdapter
from ipdiverse.adapter.noise import NoiseConditioning, alphas_cumprod
from ipdiverse.adapter.projection import LinearProjection, ResamplerProjection
from ipdiverse.errors import CheckpointError
from tests.devices import WithoutFloat64

if TYPE_CHECKING:
    from pathlib import Path

WIDTHS = {1: (32, 16), 3: (32, 24)}


def told(width: int) -> NoiseConditioning:
    """Trained: the level says something."""
    torch.manual_seed(0)
    noise = NoiseConditioning(width)
    torch.nn.init.normal_(noise.level[2].weight, std=0.2)
    noise.standardise(3 + 2 * torch.randn(200, width))
    return noise


@pytest.mark.parametrize("shape", [(3, 8), (3, 5, 8)])
def test_untrained_at_level_0_it_changes_nothing_to_the_bit(shape: tuple[int, ...]) -> None:
    noise, embeds = NoiseConditioning(8), torch.randn(shape)
    noise.standardise(torch.randn(50, 8))
    assert torch.equal(noise(embeds), embeds)
    level = torch.zeros(3, dtype=torch.long)
    assert torch.equal(noise(embeds, level, torch.randn(shape)), embeds)


def test_the_last_level_is_noise_with_the_embeddings_mean_and_deviation() -> None:
    noise = NoiseConditioning(4)
    usual = torch.tensor([5.0, -3.0, 0.0, 1.0]) + torch.tensor([2.0, 1.0, 3.0, 0.5]) * torch.randn(
        5000, 4, generator=torch.Generator().manual_seed(0)
    )
    noise.standardise(usual)
    noise.requires_grad_(False)
    drawn = noise(usual, torch.full((5000,), 999), torch.randn(5000, 4))
    torch.testing.assert_close(drawn.mean(0), usual.mean(0), atol=0.15, rtol=0)
    torch.testing.assert_close(drawn.std(0), usual.std(0), atol=0.1, rtol=0.05)
    correlation = torch.corrcoef(torch.stack([drawn[:, 0], usual[:, 0]]))[0, 1]
    assert abs(float(correlation)) < 0.1
    half = noise(usual, torch.full((5000,), 500), torch.randn(5000, 4))
    assert 0.5 < float(torch.corrcoef(torch.stack([half[:, 0], usual[:, 0]]))[0, 1]) < 0.9
    torch.testing.assert_close(half.std(0), usual.std(0), atol=0.1, rtol=0.05)


def test_the_schedule_starts_at_one_and_falls_to_nothing() -> None:
    alphas = alphas_cumprod(torch.arange(1000))
    assert alphas[0] == 1
    assert (alphas.diff() < 0).all()
    assert alphas[-1] < 1e-4


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_files_carry_it_and_other_layouts_get_it_folded(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    projection = (
        LinearProjection(12, 32, 4) if kind == "base" else ResamplerProjection(12, 32, 4, 64, 4)
    )
    adapter = ImagePromptAdapter(projection, WIDTHS, noise=told(12)).eval()
    save_adapter(adapter, tmp_path / "a.safetensors", {}, torch.float32)
    loaded = load_adapter(tmp_path / "a.safetensors").eval()
    embeds = torch.randn(2, 12) if kind == "base" else torch.randn(2, 7, 12)
    level, drawn = torch.tensor([100, 700]), torch.randn(embeds.shape)
    with torch.no_grad():
        expected = adapter.tokens(embeds, level=level, noise=drawn)
        assert torch.equal(loaded.tokens(embeds, level=level, noise=drawn), expected)
        notes = convert(tmp_path / "a.safetensors", tmp_path / "d.safetensors", "diffusers")
        assert any("noise conditioning is left out" in note for note in notes)
        folded = load_adapter(tmp_path / "d.safetensors").eval()
        assert folded.noise is None
        torch.testing.assert_close(folded.tokens(embeds), adapter.tokens(embeds))


def test_noise_of_another_width_is_refused(tmp_path: Path) -> None:
    adapter = ImagePromptAdapter(LinearProjection(12, 32, 4), WIDTHS, noise=NoiseConditioning(10))
    save_adapter(adapter, tmp_path / "a.safetensors", {})
    with pytest.raises(CheckpointError, match="noise is of width 10, expected the projection's 12"):
        load_adapter(tmp_path / "a.safetensors")


def test_one_row_has_no_deviation_and_several_have_that_of_a_sample() -> None:
    noise, rows = NoiseConditioning(4), torch.randn(5, 4)
    noise.standardise(rows)
    assert torch.equal(noise.std, rows.std(0))
    noise.standardise(rows[:1])
    assert torch.equal(noise.mean, rows[0])
    assert torch.equal(noise.std, torch.full((4,), 1e-4))


def test_the_schedule_needs_no_float64_of_its_device() -> None:
    levels = torch.arange(0, 1000, 37)
    found = alphas_cumprod(levels.as_subclass(WithoutFloat64))  # type: ignore[arg-type]
    assert torch.equal(found, alphas_cumprod(levels))
