"""What the encoders are shown."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ipdiverse.errors import ArgumentError
from ipdiverse.training.frozen import Preprocessing


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards: a crop and a flip can be read off."""
    red = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    green = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return Image.fromarray(np.stack([red, green, red * 0], -1).astype(np.uint8))


def test_variant_0_is_the_centre() -> None:
    pixels = Preprocessing(resolution=32).target(gradient(128, 64), "a", 0)
    assert pixels.shape == (3, 32, 32)
    assert pixels.min() >= -1
    assert pixels[0].mean() == pytest.approx(0, abs=0.02)
    assert float(pixels[0, :, 0].mean()) == pytest.approx(-0.5, abs=0.05), "the middle half"
    assert float(pixels[1, 0].mean()) == pytest.approx(-1, abs=0.05), "all of the height"


def test_variants_repeat_differ_and_flip_only_when_asked() -> None:
    image = gradient(128, 64)
    plain = Preprocessing(resolution=32, variants=20)
    drawn = [plain.target(image, "a", v) for v in range(1, 20)]
    assert torch.equal(drawn[4], plain.target(image, "a", 5))
    assert len({float(d[0].mean()) for d in drawn}) > 10
    assert all(d[0, 0, -1] > d[0, 0, 0] for d in drawn), "never mirrored"
    flipping = Preprocessing(resolution=32, variants=20, flip=True)
    mirrored = [
        t[0, 0, -1] < t[0, 0, 0] for v in range(1, 20) for t in [flipping.target(image, "a", v)]
    ]
    assert 3 < sum(mirrored) < 17
    assert not torch.equal(plain.target(image, "b", 5), drawn[4]), "each image has its own"


def test_a_small_image_is_scaled_up() -> None:
    assert Preprocessing(resolution=64).target(gradient(20, 30), "a", 0).shape == (3, 64, 64)


def test_reference_0_is_the_image_and_the_others_are_changed_and_repeat() -> None:
    image, preprocessing = gradient(40, 40), Preprocessing(changed=2)
    assert preprocessing.reference(image, "a", 0) is image
    one, again = (np.asarray(preprocessing.reference(image, "a", 1)) for _ in range(2))
    np.testing.assert_array_equal(one, again)
    assert (one != np.asarray(preprocessing.reference(image, "a", 2))).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 60}, "resolution modulo 8: is out of range"),
        ({"resolution": 8}, "resolution: is out of range"),
        ({"variants": 0}, "variants: is out of range"),
        ({"changed": -1}, "changed: is out of range"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Preprocessing(**changes)
