"""Scales by layer, by step and by item."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from ipdiverse.adapter.attach.attach import attach
from ipdiverse.adapter.scale import PRESETS, Layer, resolve_scale, unet_layers
from ipdiverse.errors import ArgumentError
from tests import models

SD15 = [Layer(1 + 2 * i, f"down.{i // 2}", i, 16) for i in range(6)] + [
    Layer(31, "mid", 6, 16),
    *[Layer(13 + 2 * i, f"up.{1 + i // 3}", 7 + i, 16) for i in range(9)],
]
SDXL = [
    *[Layer(2 * i + 1, f"down.{1 + i // 2}", i, 11) for i in range(4)],
    Layer(139, "mid", 4, 11),
    *[Layer(2 * i + 49, f"up.{i // 3}", 5 + i, 11) for i in range(6)],
]


def at(value: Any, layers: list[Layer], progress: float = 0.0, **options: float) -> list[Any]:
    scale = resolve_scale(value, layers, **options)
    return [scale.at(layer, progress) for layer in layers]


def on(value: str, layers: list[Layer]) -> dict[int, float]:
    pairs = zip(layers, at(value, layers), strict=True)
    return {layer.transformer: scale for layer, scale in pairs if scale}


def test_layers_run_down_mid_up_though_mid_is_numbered_last(pipe: Any) -> None:
    layers = unet_layers(pipe.unet)
    assert [layer.number for layer in layers] == [1, 3, 13, 5, 7, 9, 11]
    assert [layer.block for layer in layers] == [
        "down.0",
        "down.1",
        "mid",
        "up.0",
        "up.0",
        "up.1",
        "up.1",
    ]
    assert [layer.transformer for layer in layers] == list(range(7))


def test_a_number_holds_everywhere_and_a_list_layer_by_layer() -> None:
    assert at(0.7, SD15) == [0.7] * 16
    assert at([i / 10 for i in range(16)], SD15) == [i / 10 for i in range(16)]
    with pytest.raises(ArgumentError, match=r"wrong length; expected 16 numbers.*found 3"):
        resolve_scale([1.0, 2.0, 3.0], SD15)


def test_blocks_the_most_specific_holds_and_others_are_off() -> None:
    assert at({"up": 0.5, "up.1": 1.0}, SD15) == [0.0] * 7 + [1.0] * 3 + [0.5] * 6
    with pytest.raises(ArgumentError, match=r"block that this model does not have; .*found up\.9"):
        resolve_scale({"up.9": 1.0}, SD15)


def test_instantstyles_blocks_on_sdxl() -> None:
    assert on("style", SDXL) == {6: 1.0}
    assert on("layout", SDXL) == {3: 1.0}
    assert on("style and composition", SDXL) == {3: 1.0, 6: 1.0}
    assert SDXL[3].block == "down.2", "down_blocks.2.attentions.1"
    assert SDXL[6].block == "up.0", "up_blocks.0.attentions.1"


def test_comfyuis_weight_types_on_sd15() -> None:
    assert on("composition", SD15) == {4: 0.25, 5: 1.0}
    assert set(on("style transfer", SD15)) == {0, 1, 2, 3, *range(9, 16)}
    assert set(on("strong style transfer", SD15)) == set(range(16)) - {4, 5}
    assert set(on("strong style and composition", SD15)) == set(range(16))
    assert at("ease in", SD15)[0] == pytest.approx(1.0)
    assert at("ease out", SD15)[0] == pytest.approx(0.05)
    assert at("ease in-out", SD15)[8] == pytest.approx(1.0)
    assert at("reverse in-out", SD15)[8] == pytest.approx(0.05)
    assert at("weak middle", SD15)[6] == 0.2
    assert at("strong middle", SD15)[6] == 1.0
    assert at("weak input", SD15)[:7] == [0.2] * 6 + [1.0]
    assert at("weak output", SD15)[6:8] == [1.0, 0.2]


def test_the_precise_types_oppose_the_image_in_the_other_roles_layers(pipe: Any) -> None:
    def opposed(preset: str, layers: list[Layer]) -> set[int]:
        numbers = resolve_scale(preset, layers).opposed
        return {layer.transformer for layer in layers if layer.number in numbers}

    own = unet_layers(pipe.unet)
    for layers, layout in ((SD15, {4, 5}), (SDXL, {3}), (own, {1})):
        assert opposed("style transfer precise", layers) == layout
        everything = set(range(layers[0].transformers))
        assert opposed("composition precise", layers) == everything - layout
    assert on("style transfer precise", SD15) == on("style and composition", SD15)
    assert on("composition precise", SDXL) == {i: 1.0 if i in (3, 6) else 0.1 for i in range(11)}
    weak = {6: 0.1, 7: 0.1, 8: 0.1}
    assert on("composition precise", SD15) == on("style and composition", SD15) | weak
    assert on("composition precise", own) == {i: 1.0 if i in (1, 4) else 0.1 for i in range(7)}
    for preset in set(PRESETS) - {"style transfer precise", "composition precise"}:
        assert not opposed(preset, SD15), preset
    assert not resolve_scale(1.0, SD15).opposed


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_acts_somewhere_on_every_unet(preset: str, pipe: Any) -> None:
    for layers in (SD15, SDXL, unet_layers(pipe.unet)):
        scales = at(preset, layers, weight=2.0)
        assert max(scales) > 0
        assert scales == [2 * s for s in at(preset, layers)]


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ArgumentError, match=r"is not a preset; expected linear \| ease in"):
        resolve_scale("vibes", SD15)


def test_start_and_end_switch_off_by_step() -> None:
    for progress, expected in ((0.0, 0.0), (0.2, 1.0), (0.59, 1.0), (0.6, 0.0), (0.99, 0.0)):
        assert at(1.0, SD15, progress, start_at=0.2, end_at=0.6) == [expected] * 16, progress
    assert resolve_scale(1.0, SD15, end_at=0.6).by_step
    assert not resolve_scale(1.0, SD15).by_step
    with pytest.raises(ArgumentError, match="end_at: is out of range"):
        resolve_scale(1.0, SD15, start_at=0.5, end_at=0.2)


def test_a_function_sees_layer_and_progress() -> None:
    scales = at(lambda layer, progress: layer.transformer * progress, SD15, 0.5)
    assert scales == [i * 0.5 for i in range(16)]


def test_a_tensor_is_a_scale_for_each_item() -> None:
    scale = torch.tensor([0.0, 1.0])
    assert all(part is scale for part in at(scale, SD15))
    assert at(torch.tensor(0.5), SD15) == [0.5] * 16


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 11.0])
def test_a_scale_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(ArgumentError, match="scale: is out of range"):
        resolve_scale(value, SD15)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "scale: is nothing that a scale may be; expected a number.*found None"),
        ("0.5", "scale: is not a preset.*found '0.5'"),
        (math.nan, "scale: is out of range; expected -10 to 10; found nan"),
        (True, "scale: is nothing that a scale may be.*found True"),
        ([None] * 16, "scale: is nothing that a scale may be.*found None"),
        (["1"] * 16, "scale: is nothing that a scale may be.*found '1'"),
        ([math.inf] * 16, "scale: is out of range.*found inf"),
        ([1.0] * 17, "expected 16 numbers, one for each cross-attention layer; found 17"),
        ({"up": None}, "scale: is nothing.*found None"),
        ({3: 1.0}, "scale: names a block that this model does not have.*found 3"),
        ({}, r"scale: names no block; expected down, .*mid.*; found \{\}"),
        (
            torch.ones(2, 2),
            r"scale: has the wrong shape; expected a number for each item.*\(2, 2\)",
        ),
        (torch.ones(0), r"scale: has the wrong shape.*found \(0,\)"),
        (np.ones((1, 3)), r"scale: has the wrong shape.*found \(1, 3\)"),
        (torch.tensor([1.0, math.nan]), "scale: is out of range.*found nan"),
        (1j, "scale: is nothing that a scale may be"),
    ],
)
def test_what_is_no_scale_is_one_sentence(value: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        at(value, SD15)


def test_a_function_that_gives_no_number_is_one_sentence() -> None:
    pipe = models.pipeline("sd1")
    with attach(pipe, models.adapter("base", pipe.unet)) as prompt:
        prompt.set_reference(models.picture(1))
        for given in (None, math.nan, "a"):
            prompt.set_scale(lambda _layer, _progress, given=given: given)  # type: ignore[arg-type]
            with pytest.raises(ArgumentError, match=r"scale: is "):
                pipe("x", num_inference_steps=1, output_type="latent")
