"""The hook: whose tokens go where, what is computed once, what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from ipdiverse.adapter.attach.attach import attach, detach
from ipdiverse.adapter.fusion import BlendFusion, GatedFusion
from ipdiverse.adapter.model import ImagePromptAdapter, new_adapter
from ipdiverse.adapter.reference import Reference
from ipdiverse.adapter.scale import Scale
from ipdiverse.errors import ArgumentError, ModelError
from tests import models
from tests.conftest import random_pipeline

if TYPE_CHECKING:
    from collections.abc import Callable

PLUS = {"width": 64, "depth": 1, "num_tokens": 5}


def trained(pipe: Any, fusion: Any = None, seed: int = 1) -> ImagePromptAdapter:
    """As far from the text as a trained adapter is."""
    torch.manual_seed(seed)
    adapter = new_adapter("plus", pipe.unet, pipe.image_encoder, fusion, **PLUS)
    for layer in adapter.layers().values():
        torch.nn.init.normal_(layer.to_k_ip.weight, std=0.3)
        torch.nn.init.normal_(layer.to_v_ip.weight, std=0.3)
    return adapter


def latents(pipe: Any, prompts: list[str] | None = None, **options: Any) -> np.ndarray:
    prompts = prompts or ["a red critter"]
    count = len(prompts) * options.get("num_images_per_prompt", 1)
    settings: dict[str, Any] = {
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "generator": [torch.Generator().manual_seed(i) for i in range(count)],
        "output_type": "latent",
    }
    return pipe(prompt=prompts, **(settings | options)).images.numpy()


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.abs(a - b).max() <= 1e-4 * max(1.0, np.abs(b).max()))


def test_detach_restores_state_and_output(pipe: Any, references: list[Image.Image]) -> None:
    before, plain = dict(pipe.unet.attn_processors), latents(pipe)
    keys, own = set(pipe.unet.state_dict()), set(pipe.__dict__)
    with attach(pipe, trained(pipe, GatedFusion(128, 5))) as prompt:
        prompt.set_reference(references[0])
        assert not close(latents(pipe), plain)
        assert set(pipe.unet.state_dict()) == keys, "saving the base saves the base alone"
    after = pipe.unet.attn_processors
    assert all(after[name] is before[name] for name in before)
    assert set(pipe.__dict__) == own
    np.testing.assert_array_equal(latents(pipe), plain)


def test_an_opposed_layer_shows_the_image_to_the_unconditional_branch_alone(
    pipe: Any, references: list[Image.Image]
) -> None:
    """Every layer opposed: that branch is the image prompt's, the other is text alone."""

    def predict(rows: slice) -> torch.Tensor:
        with torch.no_grad():
            return pipe.unet(noise[rows], torch.tensor(500), text[rows]).sample

    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 16, 8, 8, generator=rng)
    text = torch.randn(4, 12, 128, generator=rng)
    text_alone = predict(slice(2, 4))
    with attach(pipe, trained(pipe)) as prompt:
        prompt.set_reference([references[0], references[1]])
        models.as_encoded(prompt, text[:2])
        with_image = predict(slice(0, 2))
        everywhere = frozenset(layer.number for layer in prompt.hook.layers)
        prompt.hook.prompts[0].scale = Scale(lambda _layer, _progress: 1.0, opposed=everywhere)
        unguided = predict(slice(0, 2))
        models.as_encoded(prompt, text[2:], negative=text[:2])
        both = predict(slice(0, 4))
    torch.testing.assert_close(both[:2], with_image, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both[2:], text_alone, atol=1e-4, rtol=1e-4)
    unprompted = predict(slice(0, 2))
    torch.testing.assert_close(unguided, unprompted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(with_image, unprompted, atol=1e-2)


def test_each_prompt_and_each_output_may_have_its_own_reference(
    pipe: Any, references: list[Image.Image]
) -> None:
    alone = []
    with attach(pipe, trained(pipe)) as prompt:
        for index in range(4):
            prompt.set_reference(references[index])
            seeds = [torch.Generator().manual_seed(index)]
            alone.append(latents(pipe, generator=seeds)[0])
        prompt.set_reference(references)
        together = latents(pipe, ["a red critter"] * 4)
        assert all(close(a, b) for a, b in zip(together, alone, strict=True))
        several = latents(pipe, num_images_per_prompt=4)
        np.testing.assert_allclose(several, together, atol=1e-4)
        prompt.set_reference(references[:2])
        halves = latents(pipe, ["a red critter"] * 2, num_images_per_prompt=2)
        assert close(halves[0], alone[0]), "the first prompt's first image"
        assert not close(halves[1], alone[1]), "the first prompt's second image"


def test_a_number_of_references_that_does_not_fit_is_refused(
    pipe: Any, references: list[Image.Image]
) -> None:
    with attach(pipe, trained(pipe)) as prompt:
        with pytest.raises(ArgumentError, match="references: is empty"):
            prompt.set_reference([])
        prompt.set_reference(references[:3])
        with pytest.raises(ArgumentError, match=r"expected 3 outputs, or a multiple; found 2"):
            latents(pipe, ["a", "b"])
        pair = Reference([references[0], references[1]])
        with pytest.raises(ArgumentError, match="references: differ in number"):
            prompt.set_reference([pair, references[2]])
        with pytest.raises(ArgumentError, match="adapter: is out of range"):
            prompt.set_reference(references[0], adapter=1)


def test_scales_by_item_layer_and_step_act(pipe: Any, references: list[Image.Image]) -> None:
    prompts = ["a red critter"] * 2
    plain = latents(pipe, prompts)
    with attach(pipe, trained(pipe)) as prompt:
        prompt.set_reference(references[0])
        full = latents(pipe, prompts)
        prompt.set_scale(0.0)
        np.testing.assert_array_equal(latents(pipe, prompts), plain)
        prompt.set_scale(torch.tensor([0.0, 1.0]))
        mixed = latents(pipe, prompts)
        assert close(mixed[0], plain[0])
        assert close(mixed[1], full[1])
        prompt.set_scale([0.0] * 7)
        np.testing.assert_array_equal(latents(pipe, prompts), plain)
        prompt.set_scale([0.0] * 6 + [1.0])
        assert not close(latents(pipe, prompts), plain)
        prompt.set_scale(1.0, start_at=0.5)
        late = latents(pipe, prompts)
        assert not close(late, plain)
        assert not close(late, full)
        with pytest.raises(ArgumentError, match="one for each cross-attention layer; found 2"):
            prompt.set_scale([1.0, 1.0])
        prompt.set_scale(torch.ones(3))
        with pytest.raises(ArgumentError, match=r"a number for each of 2 items.*; found 3"):
            latents(pipe, prompts)


def test_scales_and_references_of_prompts_go_to_all_of_their_images(
    pipe: Any, references: list[Image.Image]
) -> None:
    prompts = ["a red critter", "a blue critter"]

    plain = latents(pipe, prompts, num_images_per_prompt=2)
    with attach(pipe, trained(pipe)) as prompt:
        prompt.set_reference(references[:2])
        full = latents(pipe, prompts, num_images_per_prompt=2)
        prompt.set_scale(torch.tensor([0.0, 1.0]))
        mixed = latents(pipe, prompts, num_images_per_prompt=2)
    for image, expected in enumerate((plain, plain, full, full)):
        assert close(mixed[image], expected[image]), image
        assert not close(plain[image], full[image])


def test_two_references_for_one_guided_output_are_no_reference_and_its_negative(
    pipe: Any, references: list[Image.Image]
) -> None:
    with attach(pipe, trained(pipe)) as prompt:
        prompt.set_reference(references[:2])
        with pytest.raises(ArgumentError, match=r"expected 2 outputs.*found 1.*one Reference"):
            latents(pipe, ["a red critter"])


def test_two_adapters_add_up(pipe: Any, references: list[Image.Image]) -> None:
    one, two = trained(pipe, seed=1), trained(pipe, seed=2)
    with attach(pipe, one, two) as prompt:
        prompt.set_reference(references[0], adapter=0)
        with pytest.raises(ArgumentError, match="no reference was set"):
            latents(pipe)
        prompt.set_reference(references[1], adapter=1)
        both = latents(pipe)
        prompt.set_scale(0.0, adapter=1)
        only_one = latents(pipe)
        assert prompt.adapters == [one, two]
    with attach(pipe, one) as prompt:
        prompt.set_reference(references[0])
        np.testing.assert_array_equal(latents(pipe), only_one)
    assert not close(both, only_one)


def test_a_negative_reference_acts_through_guidance_alone(
    pipe: Any, references: list[Image.Image]
) -> None:
    with attach(pipe, trained(pipe)) as prompt:
        prompt.set_reference(references[0])
        plain, unguided = latents(pipe), latents(pipe, guidance_scale=1.0)
        prompt.set_reference(references[0], negative=references[1])
        assert not close(latents(pipe), plain)
        np.testing.assert_array_equal(latents(pipe, guidance_scale=1.0), unguided)


def half(side: str) -> Image.Image:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64) if side == "left" else (32, 0, 64, 64))
    return mask


def test_masks_give_each_reference_its_region(pipe: Any, references: list[Image.Image]) -> None:
    whole = Image.new("L", (64, 64), 255)
    nothing = Image.new("L", (64, 64), 0)
    with attach(pipe, trained(pipe)) as prompt:
        prompt.set_reference(references[0])
        alone = latents(pipe)
        prompt.set_reference(Reference(references[:2], masks=[whole, nothing]))
        assert close(latents(pipe), alone), "a reference without a region is not there"
        prompt.set_reference(Reference(references[:2], masks=[half("left"), half("right")]))
        split = latents(pipe)
        prompt.set_reference(Reference(references[:2], masks=[half("right"), half("left")]))
        assert not close(latents(pipe), split)
        with pytest.raises(ArgumentError, match="for every item or for none"):
            prompt.set_reference(
                [Reference(references[:2], masks=[whole, nothing]), Reference(references[:2])]
            )


def test_combined_references_differ_and_equal_ones_average_to_themselves(
    pipe: Any, references: list[Image.Image]
) -> None:
    first, second = references[:2]
    with attach(pipe, trained(pipe)) as prompt:
        results = {}
        for how in ("concat", "average", "subtract"):
            prompt.set_reference(Reference([first, second], combine=how))  # type: ignore[arg-type]
            results[how] = latents(pipe)
        prompt.set_reference(first)
        alone = latents(pipe)
        prompt.set_reference(Reference([first, first], combine="average"))
        assert close(latents(pipe), alone)
        prompt.set_reference(Reference([first, second], combine="weighted", weights=[1.0, 0.0]))
        assert close(latents(pipe), alone)
    for a, b in (("concat", "average"), ("average", "subtract"), ("concat", "subtract")):
        assert not close(results[a], results[b]), (a, b)


@pytest.mark.parametrize("fusion", [lambda: GatedFusion(128, 5), lambda: BlendFusion(128)])
def test_fusion_strength_zero_is_plain_ip_adapter_to_the_bit(
    pipe: Any, references: list[Image.Image], fusion: Callable[[], Any]
) -> None:
    adapter = trained(pipe, fusion())
    if isinstance(adapter.fusion, GatedFusion):
        torch.nn.init.constant_(adapter.fusion.gate, 0.7)
    with attach(pipe, adapter) as prompt:
        prompt.set_reference(references[0])
        fused = latents(pipe)
        prompt.set_fusion_strength(0.0)
        unfused = latents(pipe)
    adapter.fusion = None
    with attach(pipe, adapter) as prompt:
        prompt.set_reference(references[0])
        np.testing.assert_array_equal(latents(pipe), unfused)
    assert not close(fused, unfused)


def test_both_branches_are_fused_each_with_its_own_text_and_without_padding(
    pipe: Any, references: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = trained(pipe, BlendFusion(128))
    seen: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    original = adapter.fuse
    monkeypatch.setattr(
        adapter, "fuse", lambda t, c, m, *rest: seen.append((c, m)) or original(t, c, m, *rest)
    )
    with attach(pipe, adapter) as prompt:
        prompt.set_reference(references[0])
        latents(pipe, ["a red critter on the moon"], negative_prompt=["snow"])
    ((text, mask),) = seen
    assert text.shape[0] == 2
    assert not torch.equal(text[0], text[1])
    lengths = [
        len(pipe.tokenizer(words).input_ids) for words in ("snow", "a red critter on the moon")
    ]
    assert mask is not None
    assert mask.sum(1).tolist() == lengths


def test_nothing_constant_is_computed_twice(pipe: Any, references: list[Image.Image]) -> None:
    adapter = trained(pipe, GatedFusion(128, 5))
    counts = dict.fromkeys(("encoder", "projection", "fusion", "image keys", "text keys"), 0)

    def count(name: str) -> Any:
        return lambda *_: counts.update({name: counts[name] + 1})

    pipe.image_encoder.register_forward_hook(count("encoder"))
    adapter.image_proj.register_forward_hook(count("projection"))
    adapter.fusion.register_forward_hook(count("fusion"))
    for layer in adapter.layers().values():
        layer.to_k_ip.register_forward_hook(count("image keys"))
    for name, module in pipe.unet.named_modules():
        if name.endswith("attn2.to_k"):
            module.register_forward_hook(count("text keys"))
    with attach(pipe, adapter) as prompt:
        prompt.set_reference([references[0], references[0]])
        latents(pipe, ["a", "b"], num_inference_steps=5)
        once = dict(counts)
        prompt.set_reference(references[0])
        latents(pipe, ["a", "b"], num_inference_steps=5)
    # one image and the zero image; one projection of each; one fusion; seven layers
    assert once == {
        "encoder": 2,
        "projection": 2,
        "fusion": 1,
        "image keys": 7,
        "text keys": 7,
    }
    assert counts["encoder"] == 2, "a repeated reference is not encoded again"
    assert counts["text keys"] == 14, "a new call has new text"


def test_no_flops_in_constant_parts_after_the_first_step(
    pipe: Any, references: list[Image.Image]
) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    adapter = trained(pipe, GatedFusion(128, 5))
    text = torch.randn(2, 40, 128, generator=torch.Generator().manual_seed(0))
    sample = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))

    def flops() -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            pipe.unet(sample, torch.tensor(500), encoder_hidden_states=text)
        return counter.get_total_flops()

    with attach(pipe, adapter) as prompt:
        prompt.set_reference(references[0])
        models.as_encoded(prompt, text)
        first, second, third = flops(), flops(), flops()
    assert second == third
    layers = [
        pipe.unet.get_submodule(n) for n, m in pipe.unet.named_modules() if n.endswith("attn2")
    ]
    per_token = sum(2 * 2 * a.to_k.in_features * a.to_k.out_features for a in layers)
    fusion = first - second - 2 * (40 + 5) * per_token
    assert fusion > 0, "the first step also fused"
    assert first - second > 2 * (40 + 5) * per_token


def test_slicing_or_fusing_after_attaching_is_an_error_not_a_silent_loss(
    references: list[Image.Image],
) -> None:
    pipe = random_pipeline()
    prompt = attach(pipe, trained(pipe))
    prompt.set_reference(references[0])
    pipe.enable_attention_slicing(1)
    with pytest.raises(ModelError, match=r"processor was replaced.*Sliced"):
        latents(pipe)


def test_unsupported_models_are_refused(references: list[Image.Image]) -> None:
    pipe = random_pipeline()
    adapter = trained(pipe)
    with pytest.raises(ModelError, match=r"object: has no UNet with attention processors"):
        attach(object(), adapter)
    with pytest.raises(ArgumentError, match="adapter: is missing"):
        attach(pipe)
    pipe.enable_attention_slicing(1)
    with pytest.raises(ModelError, match=r"attention is sliced\. Call pipe.disable_attention_slic"):
        attach(pipe, adapter)
    pipe = random_pipeline()
    pipe.unet.fuse_qkv_projections()
    with pytest.raises(ModelError, match=r"are fused\. Call unet.unfuse_qkv_projections"):
        attach(pipe, adapter)
    with pytest.raises(ModelError, match="no adapter is attached"):
        detach(object())
