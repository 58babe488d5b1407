from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from ipdiverse.critters.render import render
from ipdiverse.critters.scene import sample_scene
from ipdiverse.levers import _registered

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffusers import StableDiffusionPipeline


PRODUCT = dict(_registered)


@pytest.fixture(autouse=True)
def product_levers() -> Iterator[None]:
    """Every test sees the product's levers alone, whatever was imported before."""
    for name in _registered.keys() - PRODUCT.keys():
        del _registered[name]
    yield
    for name in _registered.keys() - PRODUCT.keys():
        del _registered[name]


@pytest.fixture
def rivals(product_levers: None) -> None:
    """The workshop's levers too, as a study that imports them sees them."""
    from ipdiverse.levers import register_lever
    from workshop.rivals import RIVALS

    for rival in RIVALS:
        register_lever(rival)


@pytest.fixture(scope="session")
def references() -> list[Image.Image]:
    """Four rendered critters."""
    rng = np.random.default_rng(9)
    return [Image.fromarray(render(sample_scene(rng), seed)) for seed in range(4)]


def random_pipeline(seed: int = 0) -> StableDiffusionPipeline:
    """Stable Diffusion in small, with random weights."""
    import torch
    from diffusers import StableDiffusionPipeline

    from workshop.base import architecture
    from workshop.base.tokenizer import build_tokenizer

    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    pipe = StableDiffusionPipeline(
        vae=architecture.vae(),
        text_encoder=architecture.text_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        unet=architecture.unet(),
        scheduler=architecture.noise_schedule(),  # nothing random from step to step
        safety_checker=None,
        feature_extractor=architecture.image_processor(),
        image_encoder=architecture.image_encoder(),
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    for module in (pipe.vae, pipe.text_encoder, pipe.unet, pipe.image_encoder):
        module.eval()
    return pipe


@pytest.fixture
def pipe() -> StableDiffusionPipeline:
    return random_pipeline()
