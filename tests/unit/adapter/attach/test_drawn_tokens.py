"""A generative fusion on a pipeline: whose tokens it draws, from which seeds, and how often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ipdiverse.adapter.attach.attach import Attachment, attach, detach
from ipdiverse.adapter.files.checkpoint import adapter_bytes, load_adapter, save_adapter
from ipdiverse.adapter.files.inspection import inspect_checkpoint
from ipdiverse.adapter.generative import GenerativeFusion
from ipdiverse.adapter.model import ImagePromptAdapter
from ipdiverse.dial import Levers
from ipdiverse.errors import ArgumentError, CheckpointError
from ipdiverse.sampling.denoiser import steer
from tests import models


def drawing(unet: Any, guidance: float = 1.0) -> ImagePromptAdapter:
    """A plus adapter with a flow whose weights do something."""
    adapter = models.adapter("plus", unet)
    tokens, width = adapter.image_proj.num_tokens or 0, adapter.token_width
    fusion = GenerativeFusion(width, tokens, 6, words=2, depth=1, steps=3, guidance=guidance)
    torch.manual_seed(0)
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    basis = torch.linalg.qr(torch.randn(tokens * width, 6))[0]
    fusion.variation.set(torch.zeros(tokens * width), basis, torch.ones(6), torch.eye(6))
    adapter.fusion = fusion
    return adapter.requires_grad_(False)


@pytest.fixture
def attachment() -> Any:
    pipe = models.pipeline("sd1", fresh=True)
    attached = attach(pipe, drawing(pipe.unet))
    attached.set_reference(models.picture(1))
    yield attached
    detach(pipe)


def images(attachment: Attachment, count: int = 2, **options: Any) -> torch.Tensor:
    seeds = [torch.Generator().manual_seed(i) for i in range(count)]
    usual = {"num_inference_steps": 2, "output_type": "pt", "generator": seeds}
    return attachment.pipe("a critter", num_images_per_prompt=count, **usual | options).images


def tokens(attachment: Attachment) -> torch.Tensor:
    return attachment.hook.prompts[0].slot.groups[0].tokens


def test_each_image_has_tokens_of_its_own_and_no_image_has_none(attachment: Attachment) -> None:
    images(attachment)
    given = attachment.hook.prompts[0].references[0]
    nothing, other, one, two = tokens(attachment)
    assert torch.equal(nothing, given.negative[0, 0])
    assert torch.equal(other, given.negative[0, 0])
    assert not torch.allclose(one, two)
    attachment.set_seeds([7, 7])
    images(attachment)
    same = tokens(attachment)[2:]
    torch.testing.assert_close(same[0], same[1])


def test_strength_0_and_text_alone_are_stock_to_the_bit(attachment: Attachment) -> None:
    attachment.set_fusion_strength(0)
    plain, adapter = images(attachment), attachment.adapters[0]
    fusion, adapter.fusion = adapter.fusion, None
    attachment.hook.changed()
    assert torch.equal(images(attachment), plain)
    adapter.fusion = fusion
    attachment.set_fusion_strength(1)
    assert not torch.allclose(images(attachment), plain)


def test_tokens_are_drawn_once_for_an_image_whatever_levers_do_at_each_step(
    attachment: Attachment, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    original = GenerativeFusion.forward

    def counted(*args: Any, **options: Any) -> torch.Tensor:
        drawn.append(1)
        return original(*args, **options)

    monkeypatch.setattr(GenerativeFusion, "forward", counted)
    images(attachment, num_inference_steps=4)
    assert len(drawn) == 1
    attachment.set_seeds([1, 2])
    steer(attachment, Levers(cads=0.5, interval=(0.0, 4.0)), [1, 2])
    images(attachment, num_inference_steps=8)
    assert len(drawn) == 2


def test_seeds_that_do_not_fit_the_call_are_refused(attachment: Attachment) -> None:
    attachment.set_seeds([1, 2, 3])
    with pytest.raises(ArgumentError, match=r"seeds of the fusion.*expected 2.*found 3"):
        images(attachment)


def test_a_file_holds_it_and_says_so(tmp_path: Path) -> None:
    adapter, file = drawing(models.unet("sd1"), guidance=1.5), tmp_path / "a.safetensors"
    save_adapter(adapter, file, {}, torch.float32)
    loaded = load_adapter(file)
    assert isinstance(loaded.fusion, GenerativeFusion)
    assert (loaded.fusion.steps, loaded.fusion.guidance) == (3, 1.5)
    image, text = torch.randn(1, *_shape(adapter)), torch.randn(1, 4, adapter.token_width)
    assert torch.equal(loaded.fuse(image, text), adapter.fuse(image, text))
    assert adapter_bytes(loaded, {}, torch.float32) == file.read_bytes()
    assert inspect_checkpoint(file)["fusion"]["kind"] == "generative"


@pytest.mark.parametrize("steps", [0, 10**9, "8", 1.5])
def test_a_file_that_asks_for_endless_steps_is_refused(steps: object, tmp_path: Path) -> None:
    adapter, file = drawing(models.unet("sd1")), tmp_path / "a.safetensors"
    adapter.fusion.steps = steps  # type: ignore[union-attr,assignment]
    save_adapter(adapter, file, {}, torch.float32)
    with pytest.raises(CheckpointError, match=r"fusion steps: .*expected 1 to 1000"):
        load_adapter(file)


def _shape(adapter: ImagePromptAdapter) -> tuple[int, int]:
    return adapter.image_proj.num_tokens or 0, adapter.token_width
