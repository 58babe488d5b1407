"""Text-image fusion: its equations, its gate, its padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipdiverse.adapter.fusion import BlendFusion, GatedFusion


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(
    heads=st.sampled_from([1, 2, 4]),
    width=st.sampled_from([16, 48]),
    tokens=st.integers(1, 9),
    words=st.integers(1, 12),
)
@settings(max_examples=15, deadline=None)
def test_an_untrained_gated_fusion_changes_no_bit(
    heads: int, width: int, tokens: int, words: int
) -> None:
    fusion = GatedFusion(24, tokens, heads, width)
    image = random(2, tokens, 24)
    assert torch.equal(fusion(image, random(2, words, 24, seed=1)), image)


def opened(fusion: GatedFusion) -> GatedFusion:
    torch.nn.init.constant_(fusion.gate, 0.5)
    return fusion


def test_gated_fusion_is_its_equation() -> None:
    fusion = opened(GatedFusion(24, 3, heads=1))
    image, text = random(2, 3, 24), random(2, 5, 24, seed=1)
    query = fusion.to_q(fusion.norm_image(image))
    normed = fusion.norm_text(text)
    weights = (query @ fusion.to_k(normed).transpose(1, 2) / 24**0.5).softmax(-1)
    expected = image + torch.tanh(torch.tensor(0.5)) * fusion.to_out(weights @ fusion.to_v(normed))
    torch.testing.assert_close(fusion(image, text), expected)


def test_blend_fusion_is_its_equation() -> None:
    fusion = BlendFusion(24, blend=0.7)
    image, text = random(2, 3, 24), random(2, 5, 24, seed=1)
    weights = (fusion.query(image) @ fusion.key(text).transpose(1, 2) / 24**0.5).softmax(-1)
    expected = 0.7 * image + 0.3 * (weights @ fusion.value(text))
    torch.testing.assert_close(fusion(image, text), expected)


@pytest.mark.parametrize("fusion", [opened(GatedFusion(24, 3, 2)), BlendFusion(24)])
def test_padding_says_nothing(fusion: GatedFusion | BlendFusion) -> None:
    image, text = random(1, 3, 24), random(1, 5, 24, seed=1)
    mask = torch.tensor([[True, True, True, False, False]])
    other = torch.cat([text[:, :3], random(1, 2, 24, seed=2)], dim=1)
    torch.testing.assert_close(fusion(image, text, mask), fusion(image, other, mask))
    torch.testing.assert_close(fusion(image, text, mask), fusion(image, text[:, :3]))
    assert (fusion(image, text) - fusion(image, other)).abs().max() > 1e-3


@pytest.mark.parametrize("fusion", [opened(GatedFusion(24, 3, 2)), BlendFusion(24)])
def test_strength_zero_is_the_identity_and_one_the_default(
    fusion: GatedFusion | BlendFusion,
) -> None:
    image, text = random(2, 3, 24), random(2, 5, 24, seed=1)
    assert torch.equal(fusion(image, text, strength=0.0), image)
    torch.testing.assert_close(fusion(image, text, strength=1.0), fusion(image, text))


def test_items_do_not_see_each_others_text() -> None:
    fusion = opened(GatedFusion(24, 3, 2))
    image, text = random(2, 3, 24), random(2, 5, 24, seed=1)
    torch.testing.assert_close(fusion(image, text)[1:], fusion(image[1:], text[1:]))


def test_heads_that_do_not_divide_are_named() -> None:
    with pytest.raises(ValueError, match="5 heads do not divide a width of 24"):
        GatedFusion(24, 3, heads=5)
