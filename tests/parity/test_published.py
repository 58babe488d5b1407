"""What we publish draws in stock diffusers what it draws here, to rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from ipdiverse import ImagePromptAdapter
from ipdiverse.adapter.attach.attach import attach
from ipdiverse.adapter.files.checkpoint import load_adapter
from ipdiverse.adapter.fusion import GatedFusion
from ipdiverse.adapter.model import new_adapter
from ipdiverse.base.adapters import ADAPTERS, CRITTERS_ADAPTERS
from ipdiverse.base.bases import load_base
from tests import models
from tests.checkpoint_files import public
from tests.folder_hub import FolderHub

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

TOLERANCE = 1e-5


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FolderHub:
    return FolderHub(tmp_path / "hub").install(monkeypatch)


def latents(pipe: Any, **image: Any) -> np.ndarray:
    return pipe(
        prompt="a red critter",
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        **image,
    ).images.numpy()


def stock(pipe: Any, folder: Path, image: Image.Image) -> np.ndarray:
    parts = {"image_encoder": pipe.image_encoder, "feature_extractor": pipe.feature_extractor}
    pipe.load_ip_adapter(
        str(folder), subfolder="", weight_name="ip-adapter.safetensors", image_encoder_folder=None
    )
    pipe.set_ip_adapter_scale(0.8)
    drawn = latents(pipe, ip_adapter_image=image)
    pipe.unload_ip_adapter()  # takes the encoder off too
    pipe.register_modules(**parts)
    return drawn


def ours(pipe: Any, adapter: ImagePromptAdapter, image: Image.Image, fusion: float) -> np.ndarray:
    with attach(pipe, adapter) as prompt:
        prompt.set_reference(image)
        prompt.set_scale(0.8)
        prompt.set_fusion_strength(fusion)
        return latents(pipe)


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= TOLERANCE * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("name", ADAPTERS)
def test_shipped_adapters_on_critters(
    name: str, hub: FolderHub, references: list[Image.Image]
) -> None:
    load_adapter(CRITTERS_ADAPTERS / f"{ADAPTERS[name]}.safetensors").push_to_hub("me/mine")
    adapter = ImagePromptAdapter.from_pretrained("me/mine")
    pipe = load_base().pipe
    # its own scheduler draws noise at each step, from the same generator in both
    expected = stock(pipe, hub.root / "me/mine", references[0])
    assert_close(ours(pipe, adapter, references[0], 0.0 if adapter.fusion else 1.0), expected)
    assert np.abs(expected - latents(pipe)).max() > 0.1, "the image prompt matters"


@pytest.mark.parametrize("architecture", ["sd1", "sdxl"])
@pytest.mark.parametrize("kind", ["base", "plus"])
@pytest.mark.parametrize("fused", [False, True])
def test_adapters_of_real_shape(
    architecture: str, kind: str, fused: bool, hub: FolderHub, tmp_path: Path
) -> None:
    """A fusion is left out by stock diffusers: there it draws what we draw without it."""
    pipe, image = models.pipeline(architecture, fresh=True), models.picture(3, 32)
    made = models.adapter(kind, pipe.unet)
    if fused:
        tokens = made.image_proj.num_tokens
        assert tokens is not None
        torch.manual_seed(8)
        made.fusion = GatedFusion(made.token_width, tokens, heads=2)
        torch.nn.init.ones_(made.fusion.gate)
    public(made).push_to_hub("me/mine")
    adapter = ImagePromptAdapter.from_pretrained("me/mine")
    expected = stock(pipe, hub.root / "me/mine", image)
    plain = ours(pipe, adapter, image, 0.0)
    assert_close(plain, expected)
    if fused:
        assert np.abs(ours(pipe, adapter, image, 1.0) - plain).max() > 1e-3, "the fusion matters"


def test_an_adapter_made_here_is_what_stock_would_load(hub: FolderHub, tmp_path: Path) -> None:
    """Half precision, as files are written by default, is read alike by both."""
    pipe, image = models.pipeline("sd1", fresh=True), models.picture(4, 32)
    made = new_adapter("base", pipe.unet, pipe.image_encoder, num_tokens=4)
    public(made).save_pretrained(tmp_path / "half", torch.float16)
    expected = stock(pipe, tmp_path / "half", image)
    adapter = ImagePromptAdapter.from_pretrained(tmp_path / "half")
    assert_close(ours(pipe, adapter, image, 1.0), expected)
