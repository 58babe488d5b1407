from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from ipdiverse.adapter.attach import attach, detach
from ipdiverse.adapter.attention import decoupled_cross_attention
from ipdiverse.adapter.checkpoint import load_adapter, read_spec, save_adapter
from ipdiverse.adapter.model import ImagePromptAdapter, cross_attention_layers, new_adapter
from ipdiverse.adapter.reference import Reference
from ipdiverse.errors import ArgumentError, CheckpointError, ModelError, ShapeError

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
    torch.testing.assert_close(decoupled_cross_attention(q, tk, tv, ik, iv, 0.7), expected)


def test_scale_may_differ_by_item() -> None:
    q, tk, tv, ik, iv = (heads(2, 3, n, 8) for n in (5, 7, 7, 4, 4))
    both = decoupled_cross_attention(q, tk, tv, ik, iv, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(both[0], naive(q, tk, tv)[0])
    torch.testing.assert_close(both[1], (naive(q, tk, tv) + naive(q, ik, iv))[1])


def test_the_order_of_image_tokens_is_irrelevant() -> None:
    q, tk, tv, ik, iv = (heads(2, 3, n, 8) for n in (5, 7, 7, 4, 4))
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        decoupled_cross_attention(q, tk, tv, ik, iv, 1.0),
        decoupled_cross_attention(q, tk, tv, ik[:, :, order], iv[:, :, order], 1.0),
    )


def test_batch_sizes_that_differ_are_named() -> None:
    q, t, i = heads(2, 3, 5, 8), heads(2, 3, 7, 8), heads(1, 3, 4, 8)
    with pytest.raises(ShapeError, match=r"expected 2 image prompts; found 1\. Give one"):
        decoupled_cross_attention(q, t, t, i, i, 1.0)


def test_layers_are_numbered_as_published(pipe: StableDiffusionPipeline) -> None:
    numbers = list(cross_attention_layers(pipe.unet))
    assert numbers == [1, 3, 5, 7, 9, 11, 13]
    assert "mid_block" in cross_attention_layers(pipe.unet)[13]


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_save_then_load_is_equal(pipe: StableDiffusionPipeline, kind: Any, tmp_path: Path) -> None:
    sizes = {"width": 64, "depth": 3, "num_tokens": 5} if kind == "plus" else {"num_tokens": 7}
    adapter = new_adapter(kind, pipe.unet, pipe.image_encoder, **sizes)
    file = tmp_path / "a.safetensors"
    save_adapter(adapter, file, {"steps": 3}, dtype=torch.float32)
    loaded = load_adapter(file)
    assert loaded.kind == kind
    assert loaded.image_proj.num_tokens == sizes["num_tokens"]
    expected = adapter.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in loaded.state_dict().items())
    assert {"kind": kind, "steps": 3}.items() <= read_spec(file).items()
    assert [f.name for f in tmp_path.iterdir()] == ["a.safetensors"]


def test_broken_files_are_named(adapter: ImagePromptAdapter, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: no such file"):
        load_adapter(tmp_path / "gone.safetensors")
    (tmp_path / "text.safetensors").write_text("not tensors at all")
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        load_adapter(tmp_path / "text.safetensors")
    state = adapter.state_dict()
    for change, message in (
        ({"extra.weight": torch.zeros(1)}, "unexpected extra.weight"),
        (
            {"ip_adapter.3.to_v_ip.weight": torch.zeros(2, 2)},
            r"to_v_ip.weight is \(2, 2\), expected",
        ),
    ):
        save_file(state | change, tmp_path / "changed.safetensors")
        with pytest.raises(CheckpointError, match=message):
            load_adapter(tmp_path / "changed.safetensors")
    missing = {k: v for k, v in state.items() if k != "ip_adapter.5.to_v_ip.weight"}
    save_file(missing, tmp_path / "missing.safetensors")
    with pytest.raises(CheckpointError, match=r"missing ip_adapter\.5\.to_v_ip\.weight"):
        load_adapter(tmp_path / "missing.safetensors")
    save_file({"ip_adapter.1.to_k_ip.weight": torch.zeros(2, 2)}, tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="holds no known image projection"):
        load_adapter(tmp_path / "none.safetensors")


def test_attaching_twice_or_to_nothing_is_refused(
    pipe: StableDiffusionPipeline, adapter: ImagePromptAdapter
) -> None:
    with pytest.raises(ModelError, match="no adapter is attached"):
        detach(pipe)
    attach(pipe, adapter)
    with pytest.raises(ModelError, match=r"attached already\. Call detach first"):
        attach(pipe, adapter)
    detach(pipe)


def test_an_image_without_an_encoder_says_what_to_give(
    pipe: StableDiffusionPipeline, adapter: ImagePromptAdapter, references: list[Image.Image]
) -> None:
    pipe.image_encoder = None
    with attach(pipe, adapter) as prompt:
        with pytest.raises(
            ModelError, match=r"has no image encoder\. Give attach"
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
    with pytest.raises(ArgumentError, match=r"batch of 3 or 6 items.*found 2"):
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


@pytest.mark.parametrize(
    ("key", "tensor"),
    [
        ("ip_adapter.x.to_k_ip.weight", torch.zeros(2, 2)),
        ("ip_adapter.3.to_k_ip.weight", torch.zeros(2)),
        ("image_proj.norm.weight", torch.zeros(0)),
        ("image_proj.proj.weight", torch.zeros(3)),
    ],
)
def test_hostile_shapes_and_names_are_one_error(
    adapter: ImagePromptAdapter, tmp_path: Path, key: str, tensor: torch.Tensor
) -> None:
    save_file(adapter.state_dict() | {key: tensor}, tmp_path / "hostile.safetensors")
    with pytest.raises(CheckpointError, match=r"hostile\.safetensors: (its tensors|does not fit)"):
        load_adapter(tmp_path / "hostile.safetensors")


def test_a_claim_of_huge_sizes_takes_no_memory(tmp_path: Path) -> None:
    tensors = {
        "image_proj.latents": torch.zeros(1, 1, 200_000),
        "image_proj.proj_in.weight": torch.zeros(1, 8),
        "image_proj.proj_out.weight": torch.zeros(8, 1),
        "image_proj.layers.0.0.to_q.weight": torch.zeros(1, 1),
        "ip_adapter.1.to_k_ip.weight": torch.zeros(2, 2),
    }
    save_file(tensors, tmp_path / "huge.safetensors")
    with pytest.raises(CheckpointError, match="does not fit together"):
        load_adapter(tmp_path / "huge.safetensors")


def test_weights_that_are_not_finite_are_refused(
    adapter: ImagePromptAdapter, tmp_path: Path
) -> None:
    state = adapter.state_dict() | {"image_proj.norm.bias": torch.full((128,), float("nan"))}
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(CheckpointError, match=r"image_proj\.norm\.bias is not finite"):
        load_adapter(tmp_path / "nan.safetensors")


def test_an_adapter_for_another_image_encoder_is_refused(
    pipe: StableDiffusionPipeline, adapter: ImagePromptAdapter
) -> None:
    from ipdiverse.adapter.model import layer_widths
    from ipdiverse.adapter.projection import LinearProjection

    other = ImagePromptAdapter(LinearProjection(1024, 128), layer_widths(pipe.unet))
    with pytest.raises(ModelError, match=r"image encoder; expected .* width 128; found 1024"):
        attach(pipe, other)
