"""Region masks, shrunk to each layer's grid."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from ipdiverse.adapter.attach.attach import attach
from ipdiverse.adapter.reference import Reference, RegionMask, mask_weights
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
    shrunk = RegionMask(weights).at(grid[0] * grid[1]).unflatten(1, grid)
    assert shrunk[:, :, : grid[1] // 2].abs().max() == 0
    assert (shrunk[:, :, grid[1] // 2 :] == 1).all()


def test_grids_follow_the_aspect_ratio_and_rows_come_first() -> None:
    weights = torch.zeros(1, 32, 64)
    weights[:, :16] = 1
    shrunk = RegionMask(weights).at(8).unflatten(1, (2, 4))
    assert shrunk.tolist() == [[[1, 1, 1, 1], [0, 0, 0, 0]]]


def test_each_resolution_is_shrunk_once() -> None:
    mask = RegionMask(torch.rand(2, 16, 16))
    assert mask.at(16) is mask.at(16)
    assert mask.at(16).shape == (2, 16)


def test_guidance_branches_share_the_items_masks() -> None:
    one, two = RegionMask(torch.rand(1, 8, 8)), RegionMask(torch.rand(2, 8, 8))
    assert one.repeated(2) is one
    assert torch.equal(two.repeated(2).weights, torch.cat([two.weights, two.weights]))


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"mask: does not have the output's aspect ratio"):
        RegionMask(torch.rand(1, 8, 64)).at(13)


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
