"""Image prompts on Flux.1 and Stable Diffusion 3.5 against stock diffusers."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ipdiverse.adapter.attach.attach import attach, detach
from ipdiverse.adapter.reference import Reference
from ipdiverse.dial import Levers
from ipdiverse.errors import ModelError
from ipdiverse.sampling.denoiser import steer
from ipdiverse.sampling.diversify import diversify
from tests import joint_models, models
from tests.acceptance.scenes import (
    depth,
    flux_controlnet,
    half,
    joint_inpainting,
    sd3_controlnet,
)

PARITY = 1e-5
"""Of the largest latent."""


def run(pipe: Any, **given: Any) -> np.ndarray:
    settings = {
        "prompt": "a red creature",
        "height": models.SIZE,
        "width": models.SIZE,
        "num_inference_steps": 3,
        "output_type": "latent",
        "max_sequence_length": 12,
        "generator": torch.Generator().manual_seed(3),
    }
    return pipe(**{**settings, **given}).images.detach().numpy()


def equal(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.isfinite(expected).all()
    assert np.abs(found - expected).max() <= PARITY * np.abs(expected).max()


TASKS: dict[str, dict[str, Any]] = {
    "flux": {},
    "flux-Img2Img": {"image": models.picture(20), "strength": 0.7},
    "flux-Inpaint": {"image": models.picture(20), "mask_image": half(), "strength": 0.7},
    "flux-ControlNet": {"control_image": depth(0)},
    "flux-Kontext": {"image": models.picture(20), "max_area": 64**2, "_auto_resize": False},
    "sd3": {},
    "sd3-Img2Img": {"image": models.picture(20), "strength": 0.7},
    "sd3-Inpaint": {"image": models.picture(20), "mask_image": half(), "strength": 0.7},
    "sd3-ControlNet": {"control_image": depth(0)},
}
"""Pipelines of stock that take an adapter, and what their calls need."""


def task_pipeline(task: str) -> Any:
    name, _, kind = task.partition("-")
    scene = {
        "flux-ControlNet": flux_controlnet,
        "sd3-ControlNet": sd3_controlnet,
        "sd3-Inpaint": partial(joint_inpainting, "sd3"),
    }.get(task)
    others = {} if scene is None else scene().pipe.components
    return joint_models.pipeline(name, kind, fresh=True, **copy.deepcopy(others))


TRUE_CFG = {"negative_prompt": "a blue house", "true_cfg_scale": 3.0}


@pytest.mark.parametrize("num_tokens", [4])
@pytest.mark.parametrize("guided", [{}, TRUE_CFG], ids=["distilled", "true-cfg"])
def test_xlabs_equals_stock(num_tokens: int, guided: dict[str, Any]) -> None:
    tensors, picture = joint_models.xlabs_tensors(num_tokens), models.picture(10)
    pipe = joint_models.pipeline("flux", fresh=True)
    plain = run(pipe, **guided)
    with attach(pipe, joint_models.adapter(tensors)) as attachment:
        attachment.set_reference(picture)
        attachment.set_scale(0.0)
        np.testing.assert_array_equal(run(pipe, **guided), plain)
        attachment.set_scale(0.7)
        ours = run(pipe, **guided)
    np.testing.assert_array_equal(run(pipe, **guided), plain)
    pipe.load_ip_adapter(joint_models.nested(tensors), weight_name="")
    pipe.set_ip_adapter_scale(0.7)
    stock = run(pipe, ip_adapter_image=picture, **guided)
    assert np.abs(stock - plain).max() > 1e-2 * np.abs(stock).max()
    equal(ours, stock)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_sd3_equals_stock(guidance: float) -> None:
    tensors = joint_models.sd3_tensors()
    pipe = joint_models.pipeline("sd3", fresh=True)
    states = torch.randn(1, 17, models.CLIP_WIDTH, generator=torch.Generator().manual_seed(8))
    given = {"guidance_scale": guidance}
    plain = run(pipe, **given)
    with attach(pipe, joint_models.adapter(tensors)) as attachment:
        attachment.set_reference(Reference(embeds=[states]))
        attachment.set_scale(0.0)
        np.testing.assert_array_equal(run(pipe, **given), plain)
        attachment.set_scale(0.7)
        ours = run(pipe, **given)
    np.testing.assert_array_equal(run(pipe, **given), plain)
    pipe.transformer._load_ip_adapter_weights(joint_models.nested(tensors))
    pipe.set_ip_adapter_scale(0.7)
    embeds = torch.cat([torch.zeros_like(states), states]) if guidance > 1 else states
    stock = run(pipe, ip_adapter_image_embeds=embeds, **given)
    assert np.abs(stock - plain).max() > 1e-2 * np.abs(stock).max()
    equal(ours, stock)


class HandWritten:
    """InstantX's processor for Flux, as its authors wrote it down, in plain steps."""

    def __init__(self, stock: Any, key: torch.Tensor, value: torch.Tensor, scale: float) -> None:
        self.stock, self.key, self.value, self.scale = stock, key, value, scale
        self.tokens = torch.empty(0)

    def __call__(
        self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None,
        attention_mask: Any = None, image_rotary_emb: Any = None,
    ) -> Any:  # fmt: skip
        from diffusers.models.embeddings import apply_rotary_emb

        def heads(states: torch.Tensor) -> torch.Tensor:
            return states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
            return (weights @ v).transpose(1, 2).flatten(2)

        def normed(states: torch.Tensor) -> torch.Tensor:
            return states / (states.square().mean(-1, keepdim=True) + 1e-5).sqrt()

        query = attn.norm_q(heads(attn.to_q(hidden_states)))
        key, value = attn.norm_k(heads(attn.to_k(hidden_states))), heads(attn.to_v(hidden_states))
        added = attend(
            query,
            normed(heads(self.tokens @ self.key.T)),
            normed(heads(self.tokens @ self.value.T)),
        )
        words = 0 if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        if words:
            text = encoder_hidden_states
            query = torch.cat([attn.norm_added_q(heads(attn.add_q_proj(text))), query], dim=2)
            key = torch.cat([attn.norm_added_k(heads(attn.add_k_proj(text))), key], dim=2)
            value = torch.cat([heads(attn.add_v_proj(text)), value], dim=2)
        turned: Any = apply_rotary_emb
        query, key = (turned(t, image_rotary_emb) for t in (query, key))
        mixed = attend(query, key, value)
        if not words:
            return mixed + self.scale * added
        out = attn.to_out[0](mixed[:, words:] + self.scale * added)
        return out, attn.to_add_out(mixed[:, :words])


def test_instantx_equals_its_equations() -> None:
    tensors, picture = joint_models.instantx_tensors(), models.picture(10)
    pipe, adapter = joint_models.pipeline("flux"), joint_models.adapter(tensors)
    plain = run(pipe)
    with attach(pipe, adapter) as attachment:
        attachment.set_reference(picture)
        attachment.set_scale(0.0)
        np.testing.assert_array_equal(run(pipe), plain)
        attachment.set_scale(0.7)
        ours = run(pipe)
    np.testing.assert_array_equal(run(pipe), plain)
    before = dict(pipe.transformer.attn_processors)
    pixels = pipe.feature_extractor(picture, return_tensors="pt").pixel_values
    processors = {}
    for number, name in enumerate(before):
        parts = [tensors[f"ip_adapter.{number}.to_{part}_ip.weight"] for part in "kv"]
        processors[name] = HandWritten(before[name], parts[0], parts[1], 0.7)
        with torch.no_grad():
            embeds = pipe.image_encoder(pixels).image_embeds
            processors[name].tokens = adapter.image_proj(embeds)
    pipe.transformer.set_attn_processor(processors)
    expected = run(pipe)
    pipe.transformer.set_attn_processor(before)
    assert np.abs(expected - plain).max() > 1e-2 * np.abs(expected).max()
    equal(ours, expected)


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("flux", joint_models.sd3_tensors, "expected xlabs or instantx or redux; found sd3"),
        ("sd3", joint_models.xlabs_tensors, "expected sd3; found xlabs"),
    ],
)
def test_an_adapter_of_another_transformer_is_refused(
    name: str, tensors: Any, message: str
) -> None:
    pipe = joint_models.pipeline(name)
    with pytest.raises(ModelError, match=message):
        attach(pipe, joint_models.adapter(tensors()))
    with pytest.raises(ModelError, match="no adapter is attached"):
        detach(pipe)


def test_redux_equals_stock() -> None:
    """Stock's prior puts the tokens behind the text; its own strength is of all of that."""
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder

    tensors, picture = joint_models.redux_tensors(), models.picture(10)
    pipe, encoder = joint_models.pipeline("flux"), joint_models.siglip()
    build: Any = ReduxImageEncoder
    embedder = build(models.CLIP_WIDTH, joint_models.TEXT_WIDTH)
    embedder.load_state_dict(tensors)
    plain = run(pipe)
    with torch.no_grad():
        text, pooled, _ = pipe.encode_prompt("a red creature", None, max_sequence_length=12)
        pixels = models.image_processor()(picture, return_tensors="pt").pixel_values
        tokens = embedder(encoder(pixels).last_hidden_state).image_embeds
    both = torch.cat([text, tokens], dim=1)
    stock = run(pipe, prompt=None, prompt_embeds=both, pooled_prompt_embeds=pooled)
    with attach(pipe, joint_models.adapter(tensors), image_encoder=encoder) as attachment:
        attachment.set_reference(picture)
        np.testing.assert_array_equal(run(pipe), stock)
        attachment.set_scale(0.0)
        np.testing.assert_array_equal(run(pipe), plain)
        far = []
        for scale in (0.1, 0.5, 0.999999, 3.0):
            attachment.set_scale(scale)
            far.append(float(np.abs(run(pipe) - plain).max()))
    assert far == sorted(far)
    assert far[0] > 1e-4
    np.testing.assert_allclose(far[2], np.abs(stock - plain).max(), rtol=1e-3)
    np.testing.assert_array_equal(run(pipe), plain)


def test_guidance_in_two_calls_obeys_levers() -> None:
    """Outside the interval the second call costs nothing; a weight of 1 is what stock computes."""
    pipe, passes = joint_models.pipeline("flux"), []
    handle = pipe.transformer.norm_out.register_forward_hook(lambda *_: passes.append(1))
    with attach(pipe, joint_models.adapter(joint_models.xlabs_tensors())) as attachment:
        attachment.set_reference(models.picture(10))
        alone, guided = run(pipe), run(pipe, **TRUE_CFG)
        passes.clear()
        steer(attachment, Levers(interval=(0.0, 1e-9)), [3])
        np.testing.assert_array_equal(run(pipe, **TRUE_CFG), alone)
        assert len(passes) == 3
        steer(attachment, Levers(image_guidance=1.0), [3])
        equal(run(pipe, **TRUE_CFG), guided)
        steer(attachment, Levers(image_guidance=2.0), [3])
        assert np.abs(run(pipe, **TRUE_CFG) - guided).max() > 1e-2 * np.abs(guided).max()
        with pytest.raises(ModelError, match="fast: is for UNets"):
            steer(attachment, Levers(), [3], fast=1)
    handle.remove()


@pytest.mark.parametrize("task", TASKS)
def test_a_pipeline_with_stocks_adapter_is_diversified(task: str) -> None:
    """The same call of the same script: at 0 stock's latents, above it others, undone stock."""
    pipe, given = task_pipeline(task), TASKS[task]
    flux = task.startswith("flux")
    given = {**given, **(TRUE_CFG if flux else {"guidance_scale": 4.0})}
    without = run(pipe, **given)
    if flux:
        pipe.load_ip_adapter(joint_models.nested(joint_models.xlabs_tensors()), weight_name="")
        pipe.set_ip_adapter_scale([0.9, 0.4])
        given["negative_ip_adapter_image"] = models.picture(11)
    else:
        nested = joint_models.nested(joint_models.sd3_tensors())
        pipe.register_modules(image_encoder=joint_models.siglip())
        pipe.load_ip_adapter(nested)
        pipe.set_ip_adapter_scale(0.7)
    given["ip_adapter_image"] = models.picture(10)
    stock, kind = run(pipe, **given), type(pipe)
    with diversify(pipe, 0.0) as diversified:
        equal(run(pipe, **given), stock)
        pipe.set_ip_adapter_scale(0.0)
        np.testing.assert_array_equal(run(pipe, **given), without)
        assert np.abs(stock - without).max() > 1e-2 * np.abs(stock).max()
        pipe.set_ip_adapter_scale([0.9, 0.4] if flux else 0.7)
        diversified.set_diversity(1.0)
        assert np.abs(run(pipe, **given) - stock).max() > 1e-3 * np.abs(stock).max()
    assert type(pipe) is kind
    np.testing.assert_array_equal(run(pipe, **given), stock)


def test_xlabs_second_adapter_of_16_tokens_equals_stock() -> None:
    """Stock tells it by 65536 rows of its projection, so this one is of the published widths."""
    width, tokens = 4096, 16
    torch.manual_seed(12)
    part = {"proj.weight": (width * tokens, models.CLIP_DIM), "proj.bias": (width * tokens,)}
    names = {f"ip_adapter_proj_model.{name}": shape for name, shape in part.items()}
    names |= {f"ip_adapter_proj_model.norm.{name}": (width,) for name in ("weight", "bias")}
    for number in range(joint_models.DOUBLE):
        for end in "kv":
            key = f"double_blocks.{number}.processor.ip_adapter_double_stream_{end}_proj"
            names |= {f"{key}.weight": (joint_models.WIDTH, width)}
            names |= {f"{key}.bias": (joint_models.WIDTH,)}
    tensors = {name: 0.02 * torch.randn(shape) for name, shape in names.items()}
    tensors["ip_adapter_proj_model.norm.weight"] += 1
    model = joint_models.flux(joint_attention_dim=width)
    pipe = joint_models.pipeline("flux", fresh=True, transformer=model)
    given = {
        "prompt": None,
        "prompt_embeds": torch.randn(1, 12, width),
        "pooled_prompt_embeds": torch.randn(1, 64),
    }
    adapter = joint_models.adapter(tensors)
    assert adapter.image_proj.num_tokens == tokens
    plain = run(pipe, **given)
    with attach(pipe, adapter) as attachment:
        attachment.set_reference(models.picture(10))
        ours = run(pipe, **given)
        attachment.set_scale(0.0)
        np.testing.assert_array_equal(run(pipe, **given), plain)
    np.testing.assert_array_equal(run(pipe, **given), plain)
    pipe.load_ip_adapter(joint_models.nested(tensors), weight_name="")
    stock = run(pipe, ip_adapter_image=models.picture(10), **given)
    assert np.abs(stock - plain).max() > 1e-2 * np.abs(stock).max()
    equal(ours, stock)


def test_scales_by_block_and_step_several_references_and_adapters_equal_stock() -> None:
    tensors = [joint_models.xlabs_tensors(), joint_models.xlabs_tensors(seed=15)]
    pictures = [[models.picture(10), models.picture(12)], [models.picture(11)]]
    first, then = [[0.9, 0.2], [0.3, 0.6]], [[0.1, 0.5], [0.0, 1.1]]
    pipe = joint_models.pipeline("flux", fresh=True)
    given = {**TRUE_CFG, "num_inference_steps": 4}
    plain = run(pipe, **given)
    with attach(pipe, *map(joint_models.adapter, tensors)) as attachment:
        for number, images in enumerate(pictures):
            attachment.set_reference(Reference(images), adapter=number)
            numbers = [layer.number for layer in attachment.hook.layers]
            places = {layer: place for place, layer in enumerate(numbers)}
            attachment.set_scale(
                lambda layer, progress, n=number, at=places: (first, then)[progress >= 0.5][n][
                    at[layer.number]
                ],
                adapter=number,
            )
        ours = run(pipe, **given)
        attachment.set_scale(0.0)
        np.testing.assert_array_equal(run(pipe, **given), plain)
    np.testing.assert_array_equal(run(pipe, **given), plain)
    pipe.load_ip_adapter([joint_models.nested(t) for t in tensors], weight_name=["", ""])
    pipe.set_ip_adapter_scale(first)

    def change(own: Any, step: int, _: Any, kept: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            own.set_ip_adapter_scale(then)
        return kept

    stock = run(pipe, ip_adapter_image=pictures, callback_on_step_end=change, **given)
    assert np.abs(stock - plain).max() > 1e-2 * np.abs(stock).max()
    equal(ours, stock)


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_masks_of_a_call_act_where_stock_ignores_them(name: str) -> None:
    """Each in its half, as given by `set_reference`; white is none, and black no reference."""
    from diffusers.image_processor import IPAdapterMaskProcessor

    tensors = joint_models.xlabs_tensors() if name == "flux" else joint_models.sd3_tensors()
    pipe, pictures = joint_models.pipeline(name), [models.picture(10), models.picture(11)]
    encoder = None if name == "flux" else joint_models.siglip()
    left, right = half(0), half(1)
    white = Image.new("L", left.size, 255)
    black = Image.new("L", left.size)

    def masked(*masks: Any) -> np.ndarray:
        prepared: Any = IPAdapterMaskProcessor().preprocess(list(masks))
        asked = [prepared.reshape(1, *prepared.shape[:1], *prepared.shape[2:])]
        return run(pipe, joint_attention_kwargs={"ip_adapter_masks": asked})

    plain = run(pipe)
    with attach(pipe, joint_models.adapter(tensors), image_encoder=encoder) as attachment:
        attachment.set_reference(pictures[0])
        alone = run(pipe)
        attachment.set_reference(Reference(pictures))
        equal(masked(white, black), alone)
        halves, turned = masked(left, right), masked(right, left)
        assert np.abs(halves - turned).max() > 1e-3 * np.abs(halves).max()
    np.testing.assert_array_equal(run(pipe), plain)


def test_a_second_attention_of_sd35_medium_shifts_the_numbers() -> None:
    """Stock numbers every attention, and so do adapters for it: four here in three blocks."""
    tensors = joint_models.sd3_tensors(layers=joint_models.SD3_BLOCKS + 1)
    model = joint_models.sd3(dual_attention_layers=(1,))
    pipe = joint_models.pipeline("sd3", fresh=True, transformer=model)
    states = torch.randn(1, 17, models.CLIP_WIDTH, generator=torch.Generator().manual_seed(8))
    given: dict[str, Any] = {"guidance_scale": 4.0}
    plain = run(pipe, **given)
    with attach(pipe, joint_models.adapter(tensors)) as attachment:
        blocks = [layer.block for layer in attachment.hook.layers]
        assert blocks == ["double.0", "double.1", "double.1", "double.2"]
        attachment.set_reference(Reference(embeds=[states]))
        attachment.set_scale(0.7)
        ours = run(pipe, **given)
        attachment.set_scale(0.0)
        np.testing.assert_array_equal(run(pipe, **given), plain)
    pipe.transformer._load_ip_adapter_weights(joint_models.nested(tensors))
    pipe.set_ip_adapter_scale(0.7)
    embeds = torch.cat([torch.zeros_like(states), states])
    stock = run(pipe, ip_adapter_image_embeds=embeds, **given)
    assert np.abs(stock - plain).max() > 1e-2 * np.abs(stock).max()
    equal(ours, stock)


def test_sd3_takes_several_adapters_and_scales_by_layer() -> None:
    """More than stock's one: at 0 an adapter is absent, and scales by layer are those of one."""
    pipe, picture = joint_models.pipeline("sd3"), models.picture(10)
    one, two = (joint_models.adapter(joint_models.sd3_tensors(seed=s)) for s in (7, 9))
    encoder = joint_models.siglip()
    with attach(pipe, one, image_encoder=encoder) as attachment:
        attachment.set_reference(picture)
        alone = run(pipe)
        attachment.set_scale([1.0, 0.0, 0.0])
        first = run(pipe)
    with attach(pipe, one, two, image_encoder=encoder) as attachment:
        attachment.set_reference(picture, adapter=None)
        both = run(pipe)
        attachment.set_scale(0.0, adapter=1)
        np.testing.assert_array_equal(run(pipe), alone)
        attachment.set_scale([1.0, 0.0, 0.0], adapter=0)
        np.testing.assert_array_equal(run(pipe), first)
    assert np.abs(both - alone).max() > 1e-3 * np.abs(alone).max()
    assert np.abs(first - alone).max() > 1e-3 * np.abs(alone).max()


def test_two_calls_of_one_step_are_told_apart_by_their_text() -> None:
    """Also where the texts come as embeddings, and the next call swaps them."""
    pipe = joint_models.pipeline("flux", fresh=True)
    tensors, image = joint_models.xlabs_tensors(), models.picture(10)
    with torch.no_grad():
        (red, pooled, _), (blue, other, _) = (
            pipe.encode_prompt(text, None, max_sequence_length=12)
            for text in ("a red creature", "a blue house")
        )
    sides = ((red, pooled), (blue, other))
    calls = [
        {
            "prompt": None,
            "prompt_embeds": sides[at][0],
            "pooled_prompt_embeds": sides[at][1],
            "negative_prompt_embeds": sides[1 - at][0],
            "negative_pooled_prompt_embeds": sides[1 - at][1],
            "true_cfg_scale": 3.0,
        }
        for at in (0, 1)
    ]
    with attach(pipe, joint_models.adapter(tensors)) as attachment:
        attachment.set_reference(image)
        ours = [run(pipe, **call) for call in calls]
    pipe.load_ip_adapter(joint_models.nested(tensors), weight_name="")
    for found, call in zip(ours, calls, strict=True):
        equal(found, run(pipe, ip_adapter_image=image, **call))
