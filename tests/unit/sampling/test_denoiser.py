"""Levers on pipelines: nothing when off, what is skipped is skipped, each image by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler

from ipdiverse.adapter.attach.attach import attach, detach
from ipdiverse.adapter.attention import NOTHING, TEXT
from ipdiverse.adapter.fusion import GatedFusion
from ipdiverse.adapter.model import remember_base_weights
from ipdiverse.dial import Levers
from ipdiverse.errors import ArgumentError, ModelError
from ipdiverse.sampling.denoiser import release, steer
from tests import models
from tests.devices import WithoutFloat64

SEEDS = (11, 12)
EVERY_LEVER = {
    "interpolation": 0.5,
    "fusion_strength": 0.5,
    "image_guidance": 1.5,
    "interval": (0.5, 3.0),
    "cads": 0.5,
    "late_layout": 0.6,
    "remove_stated": 1.0,
    "drop": 0.5,
}
"""The product's, and rivals: these act on embeddings and on the scale, where none of ours does."""


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def pipe(request: pytest.FixtureRequest) -> Any:
    return models.pipeline(request.param)


@pytest.fixture
def sd1() -> Any:
    """With a text encoder that says it is in the image encoder's space, as removal needs."""
    encoder = models.image_encoder()
    encoder.visual_projection = torch.nn.Linear(models.CLIP_WIDTH, 64, bias=False)
    encoder.config.projection_dim = 64
    pipe = models.pipeline("sd1", fresh=True, image_encoder=encoder.eval())
    pipe.text_encoder.config.pooled_in_image_space = True
    return pipe


def prompted(pipe: Any) -> Any:
    """An attachment with every part that a lever may need."""
    adapter = models.adapter("plus", pipe.unet)
    adapter.fusion = GatedFusion(adapter.token_width, 8, heads=2)
    torch.nn.init.constant_(adapter.fusion.gate, 0.5)
    remember_base_weights(adapter, models.adapter("plus", pipe.unet, seed=6))
    attachment = attach(pipe, adapter)
    attachment.set_reference(models.picture(1))
    return attachment


def draw(pipe: Any, seeds: tuple[int, ...] = SEEDS, **options: Any) -> np.ndarray:
    settings: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0}
    return pipe(
        prompt=["a red critter in the snow"] * len(seeds),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
        **settings | options,
    ).images.numpy()


class Calls:
    """Rows of every call of the UNet itself."""

    def __init__(self, pipe: Any) -> None:
        self.rows: list[int] = []
        self._handle = pipe.unet.conv_in.register_forward_hook(
            lambda _, inputs, __: self.rows.append(len(inputs[0]))
        )

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def test_levers_that_are_off_change_nothing_to_the_bit(pipe: Any) -> None:
    with prompted(pipe) as attachment:
        before = draw(pipe)
        steer(attachment, Levers(), SEEDS)
        np.testing.assert_array_equal(draw(pipe), before)


@pytest.mark.usefixtures("rivals")
@pytest.mark.parametrize("name", EVERY_LEVER)
def test_each_lever_changes_the_images_and_leaves_no_trace(sd1: Any, name: str) -> None:
    with prompted(sd1) as attachment:
        before = draw(sd1)
        levers = Levers(**{name: EVERY_LEVER[name]})
        steer(attachment, levers, SEEDS, ["a red critter in the snow"])
        assert np.abs(draw(sd1) - before).max() > 1e-3
        release(attachment)
        np.testing.assert_array_equal(draw(sd1), before)


@pytest.mark.usefixtures("rivals")
@pytest.mark.parametrize("name", EVERY_LEVER)
def test_an_image_is_the_same_alone(sd1: Any, name: str) -> None:
    levers = Levers(**{name: EVERY_LEVER[name]})
    with prompted(sd1) as attachment:
        steer(attachment, levers, SEEDS, ["a red critter in the snow"])
        both = draw(sd1)
        steer(attachment, levers, SEEDS[1:], ["a red critter in the snow"])
        alone = draw(sd1, SEEDS[1:])
    np.testing.assert_allclose(alone[0], both[1], atol=2e-3 * np.abs(both).max())


def test_outside_the_interval_the_unconditional_pass_is_skipped(pipe: Any) -> None:
    with prompted(pipe) as attachment:
        steer(attachment, Levers(interval=(1.0, 5.0)), SEEDS)
        with Calls(pipe) as calls:
            draw(pipe)
        alphas = [float(pipe.scheduler.alphas_cumprod[t]) for t in pipe.scheduler.timesteps]
        sigmas = [((1 - a) / a) ** 0.5 for a in alphas]
        assert calls.rows == [4 if 1.0 < sigma <= 5.0 else 2 for sigma in sigmas]
        assert set(calls.rows) == {2, 4}


def test_an_interval_of_nothing_is_guidance_1(pipe: Any) -> None:
    with prompted(pipe) as attachment:
        expected = draw(pipe, guidance_scale=1.0)
        steer(attachment, Levers(interval=(1e6, 1e7)), SEEDS)
        found = draw(pipe)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_factorised_guidance_is_its_formula_in_one_pass(pipe: Any) -> None:
    attachment = prompted(pipe)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    width = pipe.unet.config.cross_attention_dim
    text = torch.randn(4, 40, width, generator=torch.Generator().manual_seed(1))
    more = {"added_cond_kwargs": {"text_embeds": torch.randn(4, 64), "time_ids": torch.ones(4, 6)}}
    more = more if pipe.unet.config.addition_embed_type else {}
    models.as_encoded(attachment, text[2:], negative=text[:2])
    pipe._guidance_scale = 5.0
    pipe.scheduler.set_timesteps(4)

    def predict() -> torch.Tensor:
        with torch.no_grad():
            return pipe.unet(noise.repeat(2, 1, 1, 1), 500, text, **more).sample

    nothing, both = predict().chunk(2)
    # scale 0 would not do: "no image" has tokens too
    attachment.hook.layout = (NOTHING, TEXT)
    attachment.hook.changed()
    text_alone = predict().chunk(2)[1]
    attachment.hook.layout = None
    steer(attachment, Levers(image_guidance=1.5), SEEDS)
    with Calls(pipe) as calls:
        found = predict()
    detach(pipe)
    assert calls.rows == [6]
    expected = nothing + 5.0 * (text_alone - nothing) + 1.5 * (both - text_alone)
    for half in found.chunk(2):
        torch.testing.assert_close(half, expected, rtol=1e-3, atol=1e-3)


def test_image_guidance_0_is_text_alone(pipe: Any) -> None:
    """w_I = 0 leaves ε(∅,∅) and ε(T,∅): two passes, and no trace of the reference."""
    with prompted(pipe) as attachment:
        steer(attachment, Levers(image_guidance=0.0), SEEDS)
        with Calls(pipe) as calls:
            first = draw(pipe)
        attachment.set_reference(models.picture(2))
        np.testing.assert_array_equal(draw(pipe), first)
    assert set(calls.rows) == {4}


def test_a_pipeline_that_does_not_guide_is_left_with_one_branch(pipe: Any) -> None:
    with prompted(pipe) as attachment:
        before = draw(pipe, guidance_scale=1.0)
        steer(attachment, Levers(image_guidance=2.0, interval=(1.0, 2.0)), SEEDS)
        with Calls(pipe) as calls:
            np.testing.assert_array_equal(draw(pipe, guidance_scale=1.0), before)
    assert set(calls.rows) == {2}


@pytest.mark.usefixtures("rivals")
def test_levers_that_read_prompts_ask_for_them(sd1: Any) -> None:
    with prompted(sd1) as attachment:
        before = draw(sd1)
        with pytest.raises(ArgumentError, match="remove_stated: needs the prompts"):
            steer(attachment, Levers(remove_stated=0.5), SEEDS)
        with pytest.raises(ArgumentError, match=r"prompts: differ in number .* expected 1 or 2"):
            steer(attachment, Levers(), SEEDS, ["a", "b", "c"])
        with pytest.raises(ArgumentError, match="seeds: is empty"):
            steer(attachment, Levers(), [])
        np.testing.assert_array_equal(draw(sd1), before)


@pytest.mark.usefixtures("rivals")
def test_what_an_adapter_or_base_lacks_is_said() -> None:
    pipe = models.pipeline("sd1")
    attachment = attach(pipe, models.adapter("plus", pipe.unet))
    attachment.set_reference(models.picture(1))
    try:
        with pytest.raises(ModelError, match="shares no space"):
            steer(attachment, Levers(remove_stated=1.0), SEEDS, ["a critter"])
        steer(attachment, Levers(cads=0.1), (1, 2, 3))
        with pytest.raises(ArgumentError, match="expected 2"):
            draw(pipe)
    finally:
        detach(pipe)


def test_a_scheduler_that_does_not_say_the_noise_is_refused() -> None:
    pipe = models.pipeline("sd1")
    pipe.scheduler = EDMEulerScheduler()
    with prompted(pipe) as attachment:
        draw(pipe)
        steer(attachment, Levers(cads=0.5), SEEDS)
        refused = "EDMEulerScheduler: does not say how much noise is left; expected a scheduler"
        with pytest.raises(ModelError, match=refused):
            draw(pipe)


@pytest.mark.usefixtures("rivals")
def test_a_scale_that_is_set_while_levers_are_on_stays_when_they_go(sd1: Any) -> None:
    with prompted(sd1) as attachment:
        attachment.set_scale(0.4)
        expected = draw(sd1)
        attachment.set_scale(1.0)
        steer(attachment, Levers(late_layout=0.5, fusion_strength=0.5), SEEDS)
        attachment.set_scale(0.4)
        assert np.abs(draw(sd1) - expected).max() > 1e-3
        release(attachment)
        np.testing.assert_array_equal(draw(sd1), expected)


@pytest.mark.usefixtures("rivals")
def test_references_of_prompts_serve_each_of_their_images(sd1: Any) -> None:
    """Two references, two images of each: every image has its seed and its own reference."""
    seeds, prompts = (1, 2, 3, 4), ["a red critter", "a red critter", "snow", "snow"]
    levers = Levers(remove_stated=1.0, cads=0.3, drop=0.3)
    with prompted(sd1) as attachment:
        attachment.set_reference([models.picture(1), models.picture(2)])
        steer(attachment, levers, seeds, prompts)
        settings: dict[str, Any] = {
            "num_inference_steps": 3,
            "guidance_scale": 3.0,
            "output_type": "latent",
        }
        together = sd1(
            prompt=["a red critter", "snow"],
            num_images_per_prompt=2,
            generator=[torch.Generator().manual_seed(i) for i in range(4)],
            **settings,
        ).images.numpy()
        attachment.set_reference(models.picture(2))
        steer(attachment, levers, seeds[3:], ["snow"])
        alone = sd1(
            prompt=["snow"], generator=[torch.Generator().manual_seed(3)], **settings
        ).images.numpy()
    np.testing.assert_allclose(alone[0], together[3], atol=2e-3 * np.abs(together).max())
    assert np.abs(together[2] - together[3]).max() > 1e-2


def test_levers_work_on_a_compiled_unet(sd1: Any) -> None:
    with prompted(sd1) as attachment:
        steer(attachment, Levers(cads=0.5, interval=(0.5, 3.0)), SEEDS)
        expected = draw(sd1)
        release(attachment)
        unet = sd1.unet
        sd1.unet = torch.compile(unet, backend="eager")
        steer(attachment, Levers(cads=0.5, interval=(0.5, 3.0)), SEEDS)
        np.testing.assert_allclose(draw(sd1), expected, atol=1e-4 * np.abs(expected).max())
        release(attachment)
        sd1.unet = unet


def test_guidance_rescale_still_counts(pipe: Any) -> None:
    with prompted(pipe) as attachment:
        plain = draw(pipe, guidance_rescale=0.9)
        steer(attachment, Levers(image_guidance=3.0), SEEDS)
        pipe_does = draw(pipe, guidance_rescale=0.9)
        np.testing.assert_allclose(pipe_does, plain, atol=1e-4 * np.abs(plain).max())
        steer(attachment, Levers(image_guidance=2.0), SEEDS)
        assert np.abs(draw(pipe, guidance_rescale=0.9) - draw(pipe)).max() > 1e-3


def test_a_refused_lever_leaves_nothing_behind(sd1: Any) -> None:
    with prompted(sd1) as attachment:
        before = draw(sd1)
        attachment.set_reference([models.picture(1), models.picture(2)])
        with pytest.raises(ArgumentError, match="do not fit the references"):
            steer(attachment, Levers(cads=0.3), (1, 2, 3))
        attachment.set_reference(models.picture(1))
        np.testing.assert_array_equal(draw(sd1), before)


def test_levers_before_a_reference_say_what_is_missing(sd1: Any) -> None:
    with attach(sd1, models.adapter("plus", sd1.unet)) as attachment:
        steer(attachment, Levers(cads=0.5), SEEDS)
        with pytest.raises(ArgumentError, match="no reference was set"):
            draw(sd1)


def test_levers_run_in_inference_mode(sd1: Any) -> None:
    with prompted(sd1) as attachment, torch.inference_mode():
        steer(attachment, Levers(cads=0.5), SEEDS)
        assert np.isfinite(draw(sd1)).all()


def test_levers_that_have_faded_compute_nothing_again(sd1: Any) -> None:
    """CADS ends at t = 0.6: keys of the image are new at the steps before that alone."""
    with prompted(sd1) as attachment:
        layer = next(iter(attachment.adapters[0].layers().values())).to_k_ip
        counted: list[int] = []
        handle = layer.register_forward_hook(lambda *_: counted.append(1))
        steer(attachment, Levers(cads=0.5), SEEDS)
        draw(sd1, num_inference_steps=20)
        handle.remove()
    # progress 0, .05, .1 share a γ of 0; .15 to .35 each have their own; from .4 on it is 1
    assert len(counted) == 1 + 5 + 1


def test_detach_takes_levers_off_too(sd1: Any) -> None:
    plain = draw(sd1)
    attachment = prompted(sd1)
    steer(attachment, Levers(cads=0.5, interval=(0.5, 3.0)), SEEDS)
    draw(sd1)
    detach(sd1)
    np.testing.assert_array_equal(draw(sd1), plain)


@pytest.mark.usefixtures("rivals")
def test_constant_levers_keep_what_is_computed_once(sd1: Any) -> None:
    """Token dropout does not change from step to step: keys of the image are computed once."""
    with prompted(sd1) as attachment:
        layer = next(iter(attachment.adapters[0].layers().values())).to_k_ip
        counted: list[int] = []
        handle = layer.register_forward_hook(lambda *_: counted.append(1))
        steer(attachment, Levers(drop=0.5, interval=(1.0, 5.0)), SEEDS)
        draw(sd1)
        handle.remove()
    assert len(counted) == 2, "once for each set of branches"


def test_what_is_refused_leaves_the_levers_that_are_on(sd1: Any) -> None:
    with prompted(sd1) as attachment:
        attachment.adapters[0].base_weights = {}
        steer(attachment, Levers(cads=0.5, fusion_strength=0.5), SEEDS)
        before = draw(sd1)
        with pytest.raises(ModelError, match="does not hold its base weights"):
            steer(attachment, Levers(interpolation=0.2), SEEDS)
        np.testing.assert_array_equal(draw(sd1), before)


@pytest.mark.usefixtures("rivals")
def test_what_is_refused_while_it_encodes_leaves_no_lever(sd1: Any) -> None:
    with prompted(sd1) as attachment:
        before = draw(sd1)
        steer(attachment, Levers(cads=0.5), SEEDS)
        with pytest.raises(ArgumentError, match="needs the prompts"):
            steer(attachment, Levers(remove_stated=0.5, interpolation=0.5), SEEDS)
        np.testing.assert_array_equal(draw(sd1), before)


def test_how_much_noise_is_left_needs_no_float64_of_its_device(sd1: Any) -> None:
    with prompted(sd1) as attachment:
        steering = steer(attachment, Levers(cads=0.5), SEEDS)
        expected = steering._noise(torch.tensor(123.4))
        alphas = sd1.scheduler.alphas_cumprod
        sd1.scheduler.alphas_cumprod = alphas.as_subclass(WithoutFloat64)
        assert steering._noise(torch.tensor(123.4)) == expected
