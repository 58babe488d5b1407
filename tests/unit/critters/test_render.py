from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ipdiverse.critters import shapes
from ipdiverse.critters.render import render
from ipdiverse.critters.scene import ATTRIBUTES, Scene, sample_scene


@pytest.fixture
def scene() -> Scene:
    return sample_scene(np.random.default_rng(4))


def test_the_same_scene_and_seed_give_the_same_pixels(scene: Scene) -> None:
    np.testing.assert_array_equal(render(scene, 3), render(scene, 3))
    assert not np.array_equal(render(scene, 3), render(scene, 4))


@pytest.mark.parametrize("size", [32, 64, 96, 257])
def test_any_size_is_drawn(scene: Scene, size: int) -> None:
    image = render(scene, 0, size)
    assert image.shape == (size, size, 3)
    assert image.dtype == np.uint8


def test_sizes_agree_on_the_picture(scene: Scene) -> None:
    large = render(scene, 0, 256).reshape(64, 4, 64, 4, 3).mean((1, 3))
    assert np.abs(large - render(scene, 0, 64)).mean() < 3


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_every_value_of_every_attribute_is_visible(scene: Scene, name: str) -> None:
    images = [render(replace(scene, **{name: value}), 0) for value in ATTRIBUTES[name]]
    for i, one in enumerate(images):
        for other in images[:i]:
            changed = np.abs(one.astype(int) - other).max(-1) > 40
            assert changed.sum() >= 12, f"{name} can hardly be seen"


def test_a_box_covers_exactly_its_pixels() -> None:
    canvas = np.zeros((8, 8, 3), np.float32)
    shapes.paint(canvas, shapes.box(0.5, 0.5, 0.25, 0.25), (1.0, 1.0, 1.0))
    expected = np.zeros((8, 8))
    expected[2:6, 2:6] = 1
    np.testing.assert_allclose(canvas[..., 0], expected, atol=1e-6)


def test_areas_are_right() -> None:
    for shape, area in (
        (shapes.ellipse(0.5, 0.5, 0.3, 0.3), np.pi * 0.09),
        (shapes.polygon(((0.2, 0.2), (0.8, 0.2), (0.8, 0.8))), 0.18),
        (shapes.capsule(0.3, 0.5, 0.7, 0.5, 0.1), 0.08 + np.pi * 0.01),
        (shapes.polygon(shapes.star(0.5, 0.5, 0.4, 0.2)), 5 * 0.4 * 0.2 * np.sin(np.pi / 5)),
    ):
        canvas = np.zeros((256, 256, 3), np.float32)
        shapes.paint(canvas, shape, (1.0, 1.0, 1.0))
        assert canvas[..., 0].mean() == pytest.approx(area, rel=0.01)


def test_a_shape_outside_the_canvas_paints_nothing() -> None:
    canvas = np.zeros((8, 8, 3), np.float32)
    shapes.paint(canvas, shapes.ellipse(3, 3, 0.1, 0.1), (1.0, 1.0, 1.0))
    assert not canvas.any()
