"""Region masks, shrunk to each layer's grid."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from ipdiverse.adapter.attach.attach import attach
from ipdiverse.adapter.reference import Reference, RegionMask, layer_grid, mask_weights
from ipdiverse.errors import ArgumentError
from tests import models


def test_white_acts_and_black_does_not() -> None:
    image = Image.new("L", (8, 4))
    image.paste(255, (4, 0, 8, 4))
    weights = mask_weights(image)
    assert weights.shape == (4, 8)
    assert weights.sum() == 16
    assert weights[:, :4].sum() == 0


@pytest.mark.parametrize("grid", [(16, 16), (8, 8), (4, 4), (2, 2)])
def test_a_half_stays_a_half_at_every_resolution(grid: tuple[int, int]) -> None:
    weights = torch.zeros(1, 64, 64)
    weights[:, :, 32:] = 1
    shrunk = RegionMask(weights).at(grid[0] * grid[1], (64, 64)).unflatten(1, grid)
    assert shrunk[:, :, : grid[1] // 2].abs().max() == 0
    assert (shrunk[:, :, grid[1] // 2 :] == 1).all()


def pairs_of_sizes() -> list[tuple[int, int]]:
    sides = (40, 64, 72, 88, 96, 104, 128)  # latents of 320 to 1024 pixels, odd after some halvings
    return [*itertools.product(sides, sides), (1, 7), (9, 33), (144, 112), (152, 104), (21, 13)]


def test_a_layers_grid_is_the_latents_halved_and_rounded_up() -> None:
    for size in pairs_of_sizes():
        height, width = size
        for _ in range(4):
            assert layer_grid(height * width, size) == (height, width)
            down = torch.nn.Conv2d(1, 1, 3, stride=2, padding=1).to("meta")  # as UNets do
            height, width = down(torch.empty(1, 1, height, width, device="meta")).shape[-2:]


def test_a_mask_of_any_shape_is_stretched_over_the_output() -> None:
    """The left half of a square mask is the left half of a portrait."""
    for shape in ((64, 64), (32, 64), (8, 2), (300, 200)):
        weights = torch.zeros(1, *shape)
        weights[:, :, : shape[1] // 2] = 1
        for height, width in ((96, 64), (64, 96), (48, 32), (152, 104)):
            found = (
                RegionMask(weights)
                .at(height * width, (height, width))
                .unflatten(1, (height, width))
            )
            assert (found[..., : width // 2] == 1).all()
            assert (found[..., width // 2 :] == 0).all()


def test_what_is_no_layer_of_these_latents_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"mask: does not fit a layer.*12x8, halved.*found 13"):
        RegionMask(torch.rand(1, 8, 64)).at(13, (12, 8))


@pytest.mark.parametrize("name", models.ARCHITECTURES)
@pytest.mark.parametrize("size", [(64, 96), (96, 64), (72, 120), (88, 56)])
def test_layers_see_the_mask_where_their_pixels_are(name: str, size: tuple[int, int]) -> None:
    """Against the shape in which each transformer of the UNet gets its features."""
    height, width = size
    mask = Image.new("L", (50, 50))
    mask.paste(255, (0, 0, 25, 20))
    pipe, seen = models.pipeline(name), []

    def note(_module: Any, arguments: tuple[Any, ...]) -> None:
        grid = arguments[0].shape[-2:]
        expected = F.interpolate(mask_weights(mask)[None, None], grid, mode="area").flatten(1)
        region = attachment.hook.prompts[0].slot.groups[0].mask
        found = region.at(grid[0] * grid[1], attachment.hook.prompts[0].slot.latents)
        seen.append(torch.equal(found, expected))

    blocks = [m for m in pipe.unet.modules() if type(m).__name__ == "Transformer2DModel"]
    hooks = [block.register_forward_pre_hook(note) for block in blocks]
    try:
        with attach(pipe, models.adapter("base", pipe.unet)) as attachment:
            attachment.set_reference(Reference([models.picture(1)], masks=[mask]))
            scale = pipe.vae_scale_factor
            latents = torch.randn(1, 4, height // scale, width // scale)
            pipe(
                "x",
                latents=latents,
                height=height,
                width=width,
                num_inference_steps=1,
                output_type="latent",
            )
    finally:
        for hook in hooks:
            hook.remove()
    assert len(seen) == len(blocks)
    assert all(seen)


def test_each_resolution_is_shrunk_once() -> None:
    mask = RegionMask(torch.rand(2, 16, 16))
    assert mask.at(16, (8, 8)) is mask.at(16, (4, 4))
    assert mask.at(16, (4, 4)).shape == (2, 16)


def test_guidance_branches_share_the_items_masks() -> None:
    one, two = RegionMask(torch.rand(1, 8, 8)), RegionMask(torch.rand(2, 8, 8))
    assert one.repeated(2) is one
    assert torch.equal(two.repeated(2).weights, torch.cat([two.weights, two.weights]))


def test_masks_of_two_items_are_of_one_size() -> None:
    pipe = models.pipeline("sd1")
    large, small = (
        Reference([models.picture(1)], masks=[Image.new("L", (side, side), 255)])
        for side in (64, 32)
    )
    with attach(pipe, models.adapter("base", pipe.unet)) as attachment:
        attachment.set_reference([large, large])
        with pytest.raises(ArgumentError, match=r"masks: differ in size\. Draw all at the output"):
            attachment.set_reference([large, small])
