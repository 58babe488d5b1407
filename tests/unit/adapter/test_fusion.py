"""Text-image fusion: its equations, its gate, its padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ipdiverse.adapter.fusion import BlendFusion, GatedFusion
from ipdiverse.adapter.generative import GenerativeFusion


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


def flow(guidance: float = 1.0) -> GenerativeFusion:
    """A flow with weights that do something, on a space with two directions of the subject."""
    torch.manual_seed(0)
    fusion = GenerativeFusion(16, 3, directions=8, words=2, width=64, depth=2, guidance=guidance)
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    basis = torch.linalg.qr(random(48, 8, seed=3))[0]
    deviations, scene = torch.linspace(3, 1, 8), torch.eye(8)[:, 2:]
    fusion.variation.set(random(48, seed=4), basis, deviations, scene)
    return fusion


def test_coordinates_there_and_back_are_the_tokens_in_the_space() -> None:
    variation = flow().variation
    x = random(2, 8)
    tokens = variation.mean.view(3, 16) + variation.across(x * variation.unit, 3)
    torch.testing.assert_close(variation.coordinates(tokens), x)
    torch.testing.assert_close(variation.root.square().mean(), torch.tensor(1.0))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_drawn_tokens_keep_the_subject_and_what_lies_outside(guidance: float) -> None:
    fusion, image, text = flow(guidance), random(2, 3, 16), random(2, 5, 16, seed=1)
    change = (fusion(image, text, seeds=[5, 6]) - image).flatten(1)
    along = change @ fusion.variation.directions
    assert along[:, 2:].abs().min() > 1e-4, "the scene is another"
    torch.testing.assert_close(along[:, :2], torch.zeros(2, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(along @ fusion.variation.directions.T, change, atol=1e-5, rtol=0)


def test_strength_leads_from_the_reference_to_noise() -> None:
    fusion, image, text = flow(), random(1, 3, 16), random(1, 5, 16, seed=1)
    assert fusion(image, text, None, 0.0) is image
    moved = [(fusion(image, text, None, d) - image).norm() for d in (1e-4, 0.25, 0.5, 1.0)]
    assert moved == sorted(moved)
    assert moved[0] < 1e-2
    assert torch.equal(fusion(image, text, None, 1.0), fusion(image, text, None, 10.0))


def test_a_row_depends_on_its_own_seed_alone() -> None:
    fusion, image, text = flow(), random(3, 3, 16), random(3, 5, 16, seed=1)
    whole = fusion(image, text, seeds=[7, 8, 9])
    torch.testing.assert_close(fusion(image[1:2], text[1:2], seeds=[8]), whole[1:2])
    assert not torch.allclose(fusion(image, text, seeds=[1, 2, 3]), whole)
    mask = torch.tensor([[True] * 3 + [False] * 2]).expand(3, -1)
    other = torch.cat([text[:, :3], random(3, 2, 16, seed=2)], dim=1)
    torch.testing.assert_close(fusion(image, text, mask), fusion(image, other, mask))


def test_the_flow_learns_what_pairs_have_in_common() -> None:
    """Scenes that the text tells: after learning, drawn tokens are near those of the pair."""
    fusion = flow()
    optimizer = torch.optim.AdamW(fusion.parameters(), lr=3e-3)
    variation, scenes = fusion.variation, random(2, 8, seed=9)
    words = random(2, 1, 16, seed=10)
    source = torch.Generator().manual_seed(0)

    def tokens(x: torch.Tensor) -> torch.Tensor:
        return variation.mean.view(3, 16) + variation.across(x * variation.unit, 3)

    for _ in range(150):
        which = torch.randint(2, (64,), generator=source)
        subject = torch.randn(64, 8, generator=source)
        noise, time = torch.randn(64, 2, 3, 16, generator=source), torch.rand(64, generator=source)
        losses = fusion.losses(
            tokens(subject), tokens(scenes[which]), words[which], None, noise, time
        )
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
    subject = tokens(torch.randn(16, 8, generator=source))
    for which in (0, 1):
        drawn = variation.coordinates(fusion(subject, words[which].expand(16, 1, 16)))
        error = (drawn - scenes[which])[:, 2:].square().mean()
        assert error < 0.3 * scenes[which][2:].square().mean()
