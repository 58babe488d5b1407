from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from ipdiverse.adapter.attach.attach import attach, detach
from ipdiverse.adapter.attention import ImageBranch, decoupled_cross_attention
from ipdiverse.adapter.model import (
    ImagePromptAdapter,
    cross_attention_layers,
    new_adapter,
    remember_base_weights,
)
from ipdiverse.adapter.reference import Reference
from ipdiverse.errors import ArgumentError, ModelError, ShapeError
from tests import models

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import StableDiffusionPipeline
    from PIL import Image


@pytest.fixture
def adapter(pipe: StableDiffusionPipeline) -> ImagePromptAdapter:
    return new_adapter("base", pipe.unet, pipe.image_encoder)


def heads(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def naive(query: Any, key: Any, value: Any) -> torch.Tensor:
    logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return logits.softmax(-1) @ value


def test_decoupled_attention_is_the_papers_sum() -> None:
    q, tk, tv, ik, iv = (heads(2, 3, n, 8) for n in (5, 7, 7, 4, 4))
    expected = naive(q, tk, tv) + 0.7 * naive(q, ik, iv)
    found = decoupled_cross_attention(q, tk, tv, [ImageBranch(ik, iv, 0.7)])
    torch.testing.assert_close(found, expected)
    two = [ImageBranch(ik, iv, 0.5), ImageBranch(iv, ik, 0.25)]
    torch.testing.assert_close(
        decoupled_cross_attention(q, tk, tv, two),
        naive(q, tk, tv) + 0.5 * naive(q, ik, iv) + 0.25 * naive(q, iv, ik),
    )
    assert torch.equal(
        decoupled_cross_attention(q, tk, tv, [ImageBranch(ik, iv, 0.0)]),
        decoupled_cross_attention(q, tk, tv, []),
    )


def test_scale_may_differ_by_item() -> None:
    q, tk, tv, ik, iv = (heads(2, 3, n, 8) for n in (5, 7, 7, 4, 4))
    scales = torch.tensor([0.0, 1.0])
    both = decoupled_cross_attention(q, tk, tv, [ImageBranch(ik, iv, scales)])
    torch.testing.assert_close(both[0], naive(q, tk, tv)[0])
    torch.testing.assert_close(both[1], (naive(q, tk, tv) + naive(q, ik, iv))[1])


def test_the_order_of_image_tokens_is_irrelevant() -> None:
    q, tk, tv, ik, iv = (heads(2, 3, n, 8) for n in (5, 7, 7, 4, 4))
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        decoupled_cross_attention(q, tk, tv, [ImageBranch(ik, iv, 1.0)]),
        decoupled_cross_attention(q, tk, tv, [ImageBranch(ik[:, :, order], iv[:, :, order], 1.0)]),
    )


def test_batch_sizes_that_differ_are_named() -> None:
    q, t, i = heads(2, 3, 5, 8), heads(2, 3, 7, 8), heads(1, 3, 4, 8)
    with pytest.raises(ShapeError, match=r"expected 2 image prompts; found 1\. Give one"):
        decoupled_cross_attention(q, t, t, [ImageBranch(i, i, 1.0)])


def test_layers_are_numbered_as_published(pipe: StableDiffusionPipeline) -> None:
    numbers = list(cross_attention_layers(pipe.unet))
    assert numbers == [1, 3, 5, 7, 9, 11, 13]
    assert "mid_block" in cross_attention_layers(pipe.unet)[13]


def test_attaching_twice_or_to_nothing_is_refused(
    pipe: StableDiffusionPipeline, adapter: ImagePromptAdapter
) -> None:
    with pytest.raises(ModelError, match="no adapter is attached"):
        detach(pipe)
    attach(pipe, adapter)
    with pytest.raises(ModelError, match=r"attached already\. Call detach first"):
        attach(pipe, adapter)
    detach(pipe)


def test_references_may_be_files(
    pipe: StableDiffusionPipeline,
    adapter: ImagePromptAdapter,
    references: list[Image.Image],
    tmp_path: Path,
) -> None:
    file = tmp_path / "ref.png"
    references[0].save(file)
    with attach(pipe, adapter) as prompt:
        prompt.set_reference(str(file), negative=file)
        (one,) = prompt.references()[0].images
        assert one.tobytes() == references[0].tobytes()
        prompt.set_reference([file, references[1]])
        assert len(prompt.references()) == 2
        with pytest.raises(ArgumentError, match="reference: is not an image; expected a PIL image"):
            prompt.set_reference(3)  # type: ignore[arg-type]


def test_an_image_without_an_encoder_says_what_to_give(
    pipe: StableDiffusionPipeline, adapter: ImagePromptAdapter, references: list[Image.Image]
) -> None:
    pipe.image_encoder = None
    with attach(pipe, adapter) as prompt:
        with pytest.raises(
            ModelError, match=r"no image encoder\. Name one with --image-encoder\. In"
        ):
            prompt.set_reference(references[0])
        prompt.set_reference(Reference(embeds=[torch.zeros(1, 128)]))
        assert pipe("a critter", num_inference_steps=1).images


def test_an_adapter_of_other_sizes_is_refused(
    pipe: StableDiffusionPipeline, adapter: ImagePromptAdapter
) -> None:
    widths = {1: (128, 96), 3: (64, 192)}
    wrong = ImagePromptAdapter(adapter.image_proj, widths)
    with pytest.raises(ModelError, match=r"layer 3 does not fit.*\(128, 192\); found \(64, 192\)"):
        attach(pipe, wrong)
    assert all("Decoupled" not in type(p).__name__ for p in pipe.unet.attn_processors.values())


def test_a_missing_or_misfitting_reference_is_an_error_not_a_guess(
    pipe: StableDiffusionPipeline, adapter: ImagePromptAdapter, references: list[Image.Image]
) -> None:
    attachment = attach(pipe, adapter)
    with pytest.raises(ArgumentError, match="no reference was set"):
        pipe("a critter", num_inference_steps=1)
    attachment.set_reference(references[:3])
    with pytest.raises(ArgumentError, match=r"expected 3 outputs, or a multiple; found 1"):
        pipe("a critter", num_inference_steps=1, guidance_scale=3.0)


def test_equal_references_are_encoded_once(
    pipe: StableDiffusionPipeline, adapter: ImagePromptAdapter, references: list[Image.Image]
) -> None:
    calls = []
    pipe.image_encoder.register_forward_hook(lambda *_: calls.append(1))
    attachment = attach(pipe, adapter)
    attachment.set_reference([references[0], references[1], references[0]])
    attachment.set_reference([references[0]])
    assert len(calls) == 2


def test_an_adapter_for_another_image_encoder_is_refused(
    pipe: StableDiffusionPipeline, adapter: ImagePromptAdapter
) -> None:
    from ipdiverse.adapter.model import layer_widths
    from ipdiverse.adapter.projection import LinearProjection

    other = ImagePromptAdapter(LinearProjection(1024, 128), layer_widths(pipe.unet))
    with pytest.raises(ModelError, match=r"image encoder; expected .* width 128; found 1024"):
        attach(pipe, other)


def bits(adapter: Any) -> dict[str, tuple[torch.dtype, bytes]]:
    return {
        name: (tensor.dtype, tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for name, tensor in adapter.state_dict().items()
    }


@pytest.mark.parametrize("kind", ["base", "faceid"])
def test_attaching_leaves_the_adapter_as_it_was(kind: str) -> None:
    pipe, half = models.pipeline("sd1"), models.pipeline("sd1", fresh=True).to(torch.bfloat16)
    adapter = models.adapter(kind, pipe.unet, lora_rank=2).train()
    before, reference = bits(adapter), Reference([models.picture(1)], faces=models.face(1))
    remember_base_weights(adapter, models.adapter(kind, pipe.unet, lora_rank=2, seed=9))

    def drawn(pipe: Any, *shares: float) -> torch.Tensor:
        with attach(pipe, adapter) as prompt:
            prompt.set_reference(reference)
            for share in shares:
                prompt.set_interpolation(share)
            seed = torch.Generator().manual_seed(1)
            images = pipe("x", num_inference_steps=1, output_type="latent", generator=seed).images
            acting.append(prompt.hook.prompts[0].acting)
        return images.float()

    acting: list[Any] = []
    first = drawn(pipe)
    assert drawn(half).isfinite().all()
    drawn(half, 0.5)
    drawn(half, 0.5, 1.0)
    assert torch.equal(drawn(pipe), first)
    assert bits(adapter) == before
    assert adapter.training
    assert [one is adapter for one in acting] == [True, False, False, False, True]
    assert {p.dtype for one in acting[1:4] for p in one.parameters()} == {torch.bfloat16}


def test_weights_that_change_while_attached_act() -> None:
    half = models.pipeline("sd1", fresh=True).to(torch.bfloat16)
    adapter, other = (models.adapter("base", half.unet, seed=seed) for seed in (5, 6))
    with attach(half, adapter) as prompt:
        prompt.set_reference(models.picture(1))
        adapter.load_state_dict(other.state_dict())
        prompt.set_reference(models.picture(1))
        half("x", num_inference_steps=1, output_type="latent")
        acting = prompt.hook.prompts[0].acting
    for name, tensor in acting.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name].to(torch.bfloat16))
