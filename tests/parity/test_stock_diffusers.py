"""Our attention, projection and hook against stock diffusers, on the same weights, in fp32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from ipdiverse.adapter.attach.attach import attach, detach
from ipdiverse.adapter.files.checkpoint import load_adapter, save_adapter
from ipdiverse.adapter.model import new_adapter
from tests.conftest import random_pipeline

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image

# stock reads exactly 4 tokens in base and 4 layers in plus
SIZES: dict[str, dict[str, int]] = {
    "base": {"num_tokens": 4},
    "plus": {"num_tokens": 16, "width": 128, "depth": 4},
}
TOLERANCE = 1e-5


def run(pipe: Any, guidance: float, **image: Any) -> np.ndarray:
    return pipe(
        prompt="a red critter",
        num_inference_steps=3,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        **image,
    ).images.numpy()


@pytest.fixture(params=["base", "plus"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    pipe = random_pipeline()
    torch.manual_seed(1)
    adapter = new_adapter(request.param, pipe.unet, pipe.image_encoder, **SIZES[request.param])
    for layer in adapter.ip_adapter.values():  # as far from the text as a trained adapter is
        torch.nn.init.normal_(layer.to_k_ip.weight, std=0.3)
        torch.nn.init.normal_(layer.to_v_ip.weight, std=0.3)
    file = tmp_path / f"{request.param}.safetensors"
    save_adapter(adapter, file, {}, dtype=torch.float32)
    return file


@pytest.mark.parametrize("scale", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_latents_equal_stock(
    saved: Path, references: list[Image.Image], guidance: float, scale: float
) -> None:
    stock, ours = random_pipeline(), random_pipeline()
    stock.load_ip_adapter(saved.parent, subfolder="", weight_name=saved.name)
    stock.set_ip_adapter_scale(scale)
    expected = run(stock, guidance, ip_adapter_image=references[0])

    attachment = attach(ours, load_adapter(saved))
    attachment.set_scale(scale)
    attachment.set_reference([references[0]])
    found = run(ours, guidance)

    assert np.abs(found - expected).max() <= TOLERANCE * max(1.0, np.abs(expected).max())


def test_the_image_prompt_matters(saved: Path, references: list[Image.Image]) -> None:
    pipe = random_pipeline()
    attachment = attach(pipe, load_adapter(saved))
    results = []
    for reference in references[:2]:
        attachment.set_reference([reference])
        results.append(run(pipe, 4.0))
    assert np.abs(results[0] - results[1]).max() > 1e-2


def test_references_of_one_batch_do_not_mix(saved: Path, references: list[Image.Image]) -> None:
    """Stock diffusers mixes them; the truth is the item alone."""
    pipe = random_pipeline()
    attachment = attach(pipe, load_adapter(saved))
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(2))

    def batch(images: list[Image.Image], noise: torch.Tensor) -> np.ndarray:
        attachment.set_reference(images)
        return pipe(
            prompt=["a critter"] * len(images),
            latents=noise,
            num_inference_steps=2,
            guidance_scale=3.0,
            output_type="latent",
        ).images.numpy()

    together = batch(references[:2], latents)
    for index in range(2):
        alone = batch([references[index]], latents[index : index + 1])
        np.testing.assert_allclose(together[index], alone[0], atol=2e-5)


def test_detach_restores_output_and_state_exactly(
    saved: Path, references: list[Image.Image]
) -> None:
    pipe = random_pipeline()
    before, processors = run(pipe, 4.0), dict(pipe.unet.attn_processors)
    state = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    attach(pipe, load_adapter(saved)).set_reference([references[0]])
    assert not np.array_equal(run(pipe, 4.0), before)
    detach(pipe)
    np.testing.assert_array_equal(run(pipe, 4.0), before)
    assert pipe.unet.attn_processors == processors
    after = pipe.unet.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], state[name]) for name in state)


def test_scale_zero_is_text_alone_exactly(saved: Path, references: list[Image.Image]) -> None:
    pipe = random_pipeline()
    before = run(pipe, 4.0)
    attachment = attach(pipe, load_adapter(saved))
    attachment.set_reference([references[0]])
    attachment.set_scale(0.0)
    np.testing.assert_array_equal(run(pipe, 4.0), before)
