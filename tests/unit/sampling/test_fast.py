"""Fast mode: what is left out, each image by itself, and nothing left behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import hooks
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from ipdiverse.adapter.attach import joint
from ipdiverse.adapter.attach.attach import attach
from ipdiverse.adapter.attention import BOTH, NOTHING
from ipdiverse.dial import Levers
from ipdiverse.errors import ArgumentError, ModelError
from ipdiverse.sampling import fast
from ipdiverse.sampling.denoiser import release, steer
from tests import models

SEEDS = (11, 12)
ON = range(1, len(fast.LEVELS))


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def pipe(request: pytest.FixtureRequest) -> Any:
    return models.pipeline(request.param)


@pytest.fixture
def sd1() -> Any:
    return models.pipeline("sd1")


def prompted(pipe: Any) -> Any:
    attachment = attach(pipe, models.adapter("plus", pipe.unet))
    attachment.set_reference(models.picture(1))
    return attachment


def draw(pipe: Any, seeds: tuple[int, ...] = SEEDS, **options: Any) -> np.ndarray:
    settings: dict[str, Any] = {"num_inference_steps": 12, "guidance_scale": 3.0}
    return pipe(
        prompt=["a red critter in the snow"] * len(seeds),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
        **settings | options,
    ).images.numpy()


def operations(pipe: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        draw(pipe)
    return counter.get_total_flops()


class Rows:
    """Rows of each call of a module."""

    def __init__(self, module: Any) -> None:
        self.rows: list[int] = []
        self._handle = module.register_forward_hook(self._count)

    def _count(self, _: Any, inputs: Any, __: Any) -> None:
        self.rows.append(len(inputs[0]))

    def __enter__(self) -> list[int]:
        return self.rows

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def test_each_level_computes_less_and_is_exact_when_it_is_off_again(pipe: Any) -> None:
    with prompted(pipe) as attachment:
        before, counts = draw(pipe), [operations(pipe)]
        for level in ON:
            steer(attachment, Levers(), SEEDS, fast=level)
            found = draw(pipe)
            assert np.isfinite(found).all()
            assert np.abs(found - before).max() > 0
            np.testing.assert_array_equal(draw(pipe), found, "a call leaves nothing to the next")
            counts.append(operations(pipe))
        assert counts == sorted(counts, reverse=True)
        assert counts[-1] < counts[0] / 2
        release(attachment)
        np.testing.assert_array_equal(draw(pipe), before)


def test_a_level_that_leaves_out_nothing_is_exact(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "LEVELS", (None, fast.Level(1)))
    with prompted(pipe) as attachment:
        before = draw(pipe)
        steer(attachment, Levers(), SEEDS, fast=1)
        np.testing.assert_array_equal(draw(pipe), before)


def test_a_shallow_step_at_the_same_latents_is_the_deep_one(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler that stays where it is asks the same again: what is kept is the answer."""
    monkeypatch.setattr(fast, "LEVELS", (None, fast.Level(10, 10, 0.0)))
    predicted: list[torch.Tensor] = []

    def stay(output: torch.Tensor, _: Any, sample: torch.Tensor, **__: Any) -> tuple[torch.Tensor]:
        predicted.append(output)
        return (sample,)

    monkeypatch.setattr(pipe.unet.time_proj, "forward", lambda t: torch.zeros(len(t), 16))
    with prompted(pipe) as attachment:
        steer(attachment, Levers(), SEEDS, fast=1)
        monkeypatch.setattr(pipe.scheduler, "step", stay)
        draw(pipe, num_inference_steps=3)
    assert len(predicted) == 3
    torch.testing.assert_close(predicted[1], predicted[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(predicted[2], predicted[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("level", ON)
def test_an_image_is_the_same_alone(sd1: Any, level: int) -> None:
    with prompted(sd1) as attachment:
        steer(attachment, Levers(), SEEDS, fast=level)
        both = draw(sd1)
        steer(attachment, Levers(), SEEDS[1:], fast=level)
        alone = draw(sd1, SEEDS[1:])
    np.testing.assert_allclose(alone[0], both[1], atol=2e-3 * np.abs(both).max())


def test_which_steps_compute_what(sd1: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "LEVELS", (None, fast.Level(2, 4)))
    with prompted(sd1) as attachment:
        steer(attachment, Levers(), SEEDS, fast=1)
        with Rows(sd1.unet.conv_in) as shallow, Rows(sd1.unet.down_blocks[0].resnets[0]) as deep:
            draw(sd1, num_inference_steps=8)
    assert shallow == [4, 2, 2, 2] * 2, "guidance at one step in four"
    assert deep == [4, 2] * 2, "deep features at one in two"


def test_guidance_that_begins_late_is_computed_when_it_does(sd1: Any) -> None:
    with prompted(sd1) as attachment:
        steer(attachment, Levers(interval=(0.0, 4.0)), SEEDS, fast=3)
        with Rows(sd1.unet.down_blocks[0].resnets[0]) as deep:
            draw(sd1)
    assert deep[0] == 2
    assert 4 in deep


def test_cross_attention_is_kept_once_the_layout_is_decided(
    sd1: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "LEVELS", (None, fast.Level(1, 1, 0.5)))
    with prompted(sd1) as attachment:
        steer(attachment, Levers(), SEEDS, fast=1)
        attention = sd1.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
        with Rows(attention.to_q) as computed:
            draw(sd1)
        assert len(computed) == 7, "6 steps of 12, and the one that is kept"
        attachment.set_scale(1.0, end_at=0.8)
        with Rows(attention.to_q) as computed:
            draw(sd1)
        assert len(computed) == 8, "another scale, another output"


def test_image_to_image_can_be_fast() -> None:
    pipe = models.pipeline("sd1", "Img2Img")
    given: dict[str, Any] = {"image": [models.picture(2)] * 2}
    with prompted(pipe) as attachment:
        before = draw(pipe, **given)
        steer(attachment, Levers(), SEEDS, fast=2)
        with Rows(pipe.unet.down_blocks[0].resnets[0]) as deep:
            found = draw(pipe, **given)
        assert np.isfinite(found).all()
        assert len(deep) <= 4
        release(attachment)
        np.testing.assert_array_equal(draw(pipe, **given), before)


def test_an_error_leaves_the_unet_as_it_was(sd1: Any) -> None:
    unet = sd1.unet
    with prompted(sd1) as attachment:
        before = draw(sd1)
        steer(attachment, Levers(), SEEDS, fast=3)
        calls: list[int] = []

        def fail(*_: Any) -> None:
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("stopped")

        handle = unet.conv_out.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="stopped"):
            draw(sd1)
        handle.remove()
        assert "forward" not in unet.mid_block.__dict__
        assert all(processor.outputs is None for _, processor in attachment.hook.processors)
        found = draw(sd1)
        np.testing.assert_array_equal(draw(sd1), found)
        release(attachment)
        np.testing.assert_array_equal(draw(sd1), before)


def test_rows_of_branches_are_found_again() -> None:
    kept = fast.Kept()
    kept.branches = (NOTHING, BOTH)
    kept.put("a", torch.arange(4.0))
    kept.branches = (BOTH,)
    found = kept.find("a")
    assert found is not None
    assert found.tolist() == [2, 3]
    assert kept.find("a", stamp=1) is None
    kept.put("b", torch.arange(2.0))
    kept.branches = (NOTHING, BOTH)
    assert kept.find("b") is None, "no row of the unconditional branch"


def test_what_cannot_be_is_refused(sd1: Any) -> None:
    with prompted(sd1) as attachment:
        with pytest.raises(ArgumentError, match="fast"):
            steer(attachment, Levers(), SEEDS, fast=len(fast.LEVELS))
        unet, sd1.unet = sd1.unet, torch.compile(sd1.unet, backend="eager")
        try:
            with pytest.raises(ModelError, match="compile_repeated_blocks"):
                fast.Fast(sd1.unet, fast.LEVELS[1], [])  # type: ignore[arg-type]
        finally:
            sd1.unet = unet


def taylor(unet: Any) -> None:
    hooks.apply_taylorseer_cache(unet, hooks.TaylorSeerCacheConfig(cache_identifiers=[r".*attn2"]))


def faster(unet: Any) -> None:
    hooks.apply_faster_cache(unet, hooks.FasterCacheConfig(current_timestep_callback=lambda: 500))


def broadcast(unet: Any) -> None:
    asked = hooks.PyramidAttentionBroadcastConfig(
        cross_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    hooks.apply_pyramid_attention_broadcast(unet, asked)


def text_kv(unet: Any) -> None:
    hooks.apply_text_kv_cache(unet, hooks.TextKVCacheConfig())


CACHES = {
    "pyramid_attention_broadcast": broadcast,
    "faster_cache": faster,
    "text_kv_cache": text_kv,
    "taylorseer_cache": taylor,
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", CACHES)
def test_a_cache_of_diffusers_is_refused_in_one_line(name: str, when: str) -> None:
    pipe = models.pipeline("sd1", fresh=True, unet=models.two_levels())
    if when == "before":
        CACHES[name](pipe.unet)
    else:
        prompted(pipe)
        CACHES[name](pipe.unet)
    with pytest.raises(ModelError, match=rf"{name}.*--fast") as raised:
        (prompted if when == "before" else draw)(pipe)
    assert "\n" not in str(raised.value)


def test_caches_that_find_no_place_in_a_unet_change_nothing() -> None:
    """MagCache warns and hooks nothing; FirstBlockCache and SeaCache raise, all in diffusers."""
    pipe = models.pipeline("sd1", fresh=True, unet=models.two_levels())
    with prompted(pipe):
        before = draw(pipe, num_inference_steps=3)
        asked = hooks.MagCacheConfig(num_inference_steps=3, mag_ratios=[1.0] * 3)
        hooks.apply_mag_cache(pipe.unet, asked)
        for refused in (
            lambda: hooks.apply_first_block_cache(pipe.unet, hooks.FirstBlockCacheConfig()),
            lambda: hooks.apply_sea_cache(pipe.unet, hooks.SeaCacheConfig()),
        ):
            with pytest.raises((IndexError, ValueError)):
                refused()
        np.testing.assert_array_equal(draw(pipe, num_inference_steps=3), before)


def test_a_controlnet_acts_in_fast_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it adds on the way down reaches deep steps; shallow ones read what those left."""
    from diffusers import ControlNetModel

    torch.manual_seed(3)
    plain = models.pipeline("sd1")
    build: Any = ControlNetModel.from_unet
    net = build(plain.unet, conditioning_embedding_out_channels=(4, 4, 8)).eval()
    for block in (*net.controlnet_down_blocks, net.controlnet_mid_block):
        torch.nn.init.normal_(block.weight, std=0.3)  # they begin at zero, and would do nothing
    pipe = models.pipeline("sd1", "ControlNet", controlnet=net)
    given = {"image": [models.picture(2)] * 2, "num_inference_steps": 8}
    with prompted(pipe) as attachment:
        exact = draw(pipe, **given)
        monkeypatch.setattr(fast, "LEVELS", (None, fast.Level(1), fast.Level(4, 2)))
        steer(attachment, Levers(), SEEDS, fast=1)
        np.testing.assert_array_equal(draw(pipe, **given), exact, "every step is computed")
        steer(attachment, Levers(), SEEDS, fast=2)
        with (
            Rows(pipe.unet.down_blocks[0].resnets[0]) as deep,
            Rows(net.controlnet_down_blocks[0]) as controlled,
        ):
            found = draw(pipe, **given)
        assert deep == [4, 4]
        assert controlled == [4] * 8, "diffusers calls the ControlNet at every step, for all rows"
        without = draw(pipe, **given, controlnet_conditioning_scale=0.0)
        assert np.abs(found - without).max() > 1e-2 * np.abs(found).max(), "it acts"
        release(attachment)
        np.testing.assert_array_equal(draw(pipe, **given), exact)


def test_steps_are_computed_mostly_early() -> None:
    def chosen(level: fast.Level, steps: int) -> list[int]:
        return [s for s in range(steps) if level.computed(s, steps, level.every)]

    assert chosen(fast.Level(4, power=2), 25) == [0, 1, 3, 6, 11, 16, 24]
    assert chosen(fast.Level(4), 12) == [0, 4, 8]


def test_compiled_blocks_are_not_compiled_again_while_the_dial_moves() -> None:
    """`compile_repeated_blocks` compiles transformer blocks, and ours are inside of them."""
    pipe = models.pipeline("sd1", fresh=True, unet=models.two_levels())
    few: dict[str, Any] = {"num_inference_steps": 3}
    with prompted(pipe) as attachment:
        steer(attachment, Levers(cads=0.2), SEEDS)
        plain = draw(pipe, **few)
        torch.compiler.reset()
        counters.clear()
        pipe.unet.compile_repeated_blocks(backend="eager")
        steer(attachment, Levers(cads=0.2), SEEDS)
        np.testing.assert_allclose(draw(pipe, **few), plain, atol=1e-4 * np.abs(plain).max())
        compiled = counters["stats"]["unique_graphs"]
        assert compiled > 0
        for strength, scale in ((0.5, 1.0), (0.9, 0.7), (0.1, 0.4)):
            attachment.set_scale(scale)
            steer(attachment, Levers(cads=strength), SEEDS)
            draw(pipe, **few)
        assert counters["stats"]["unique_graphs"] == compiled, "of scales and levers, nothing new"
    torch.compiler.reset()


def test_an_attention_backend_reaches_the_layers(sd1: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    stock = joint.dispatch_attention_fn

    def note(*given: Any, backend: Any = None, **more: Any) -> Any:
        seen.append(backend)
        return stock(*given, backend=backend, **more)

    monkeypatch.setattr(joint, "dispatch_attention_fn", note)
    with prompted(sd1):
        before = draw(sd1, num_inference_steps=2)
        assert set(seen) == {None}, "the active one"
        seen.clear()
        try:
            sd1.unet.set_attention_backend("_native_math")
            found = draw(sd1, num_inference_steps=2)
        finally:
            sd1.unet.reset_attention_backend()
            sd1.unet.set_attention_backend("native")
    assert {one.value for one in seen} == {"_native_math"}
    np.testing.assert_allclose(found, before, atol=1e-3 * np.abs(before).max())
