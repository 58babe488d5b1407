"""Flux Kontext and Flux.2 read references without an adapter: how strongly, and from when on."""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np
import pytest
import torch

import ipdiverse
from ipdiverse.errors import ArgumentError, ModelError
from tests import joint_models, models

STEPS = 4
KINDS = ("kontext", "flux2")


@functools.cache
def pipeline(kind: str) -> Any:
    if kind == "kontext":
        return joint_models.pipeline("flux", "Kontext")
    return joint_models.flux2_pipeline()


def drawn(
    kind: str, *, image: bool = True, seeds: tuple[int, ...] = (3,), steps: int = STEPS
) -> Any:
    pipe, text = pipeline(kind), torch.Generator().manual_seed(7)
    words = torch.randn(1, 5, joint_models.TEXT_WIDTH, generator=text).repeat(len(seeds), 1, 1)
    given: dict[str, Any] = {"image": models.picture(4) if image else None}
    if kind == "kontext":
        pooled = torch.randn(1, 64, generator=text).repeat(len(seeds), 1)
        given |= {"pooled_prompt_embeds": pooled, "_auto_resize": False, "max_area": 64**2}
    return pipe(
        prompt_embeds=words,
        num_inference_steps=STEPS,
        guidance_scale=1.0,
        height=models.SIZE,
        width=models.SIZE,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="latent",
        **given,
    ).images.numpy()


def far(one: Any, other: Any) -> float:
    return float(np.linalg.norm(one - other))


@pytest.fixture(autouse=True)
def stock_again() -> Any:
    yield
    for kind in KINDS:
        ipdiverse.scale_references(pipeline(kind), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_from_stock_without_the_reference_to_stock_with_it(kind: str) -> None:
    pipe = pipeline(kind)
    without, stock = drawn(kind, image=False), drawn(kind)
    assert far(stock, without) > 0.01 * np.linalg.norm(stock)
    ipdiverse.scale_references(pipe, 0)
    np.testing.assert_array_equal(drawn(kind), without)
    away, back = [], []
    for scale in (0.05, 0.3, 0.7, 1.5):
        ipdiverse.scale_references(pipe, scale)
        found = drawn(kind)
        away.append(far(found, without))
        back.append(far(found, stock))
    assert away == sorted(away), "monotonic in the scale"
    assert back[:3] == sorted(back[:3], reverse=True)
    # nearly on the line between both, so that the reference is weakened and not made another one
    assert all(a + b < 1.15 * far(stock, without) for a, b in zip(away[:3], back, strict=False))
    ipdiverse.scale_references(pipe, 1)
    assert pipe.transformer._diffusers_hook.get_hook("ipdiverse.references") is None
    np.testing.assert_array_equal(drawn(kind), stock)


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_for_each_image(kind: str) -> None:
    pipe, alone = pipeline(kind), {}
    for scale in (0.0, 0.5):
        ipdiverse.scale_references(pipe, scale)
        alone[scale] = drawn(kind, seeds=(3, 4))
    ipdiverse.scale_references(pipe, [0.0, 0.5])
    both = drawn(kind, seeds=(3, 4))
    np.testing.assert_allclose(both[0], alone[0.0][0], atol=1e-5)  # -inf, where one row needs it
    np.testing.assert_allclose(both[1], alone[0.5][1], atol=1e-5)
    ipdiverse.scale_references(pipe, [0.5, 1.0, 0.5])
    with pytest.raises(ArgumentError, match=r"scale: has the wrong length; .* 2 images; found 3"):
        drawn(kind, seeds=(3, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_delayed_references_are_not_in_the_sequence(kind: str) -> None:
    pipe, lengths = pipeline(kind), []
    noted = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda _module, _args, given: lengths.append(given["hidden_states"].shape[1]),
        with_kwargs=True,
    )
    ipdiverse.scale_references(pipe, 1, start_at=0.5)
    late = drawn(kind)
    ipdiverse.scale_references(pipe, 1, end_at=0.25)
    drawn(kind)
    drawn(kind, image=False)  # a call without references is stock's
    noted.remove()
    own, both = sorted(set(lengths))
    assert lengths == [own, own, both, both, both, own, own, own] + [own] * STEPS
    assert both > own
    assert far(late, drawn(kind)) > 0


def test_what_cannot_be_scaled_is_one_line() -> None:
    expected = re.escape("expected a pipeline of Flux.1 Kontext or Flux.2")
    for pipe in (models.pipeline("sd1"), joint_models.pipeline("sd3")):
        with pytest.raises(ModelError, match=f"reads no references; {expected}"):
            ipdiverse.scale_references(pipe, 0.5)
    pipe = pipeline("kontext")
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"scale": -1}, "scale"),
        ({"scale": [1, 11]}, "scale"),
        ({"scale": 1, "start_at": 2}, "start_at"),
    )
    for given, name in wrong:
        with pytest.raises(ArgumentError, match=f"^{name}: "):
            ipdiverse.scale_references(pipe, **given)
    ipdiverse.scale_references(pipeline("flux2"), 0.5)
    with pytest.raises(ModelError, match=r"keeps its references in a cache\. Use Flux2KleinPip"):
        pipeline("flux2").transformer(kv_cache_mode="extract")


def test_beside_flux_redux_is_one_line() -> None:
    pipe, redux = pipeline("kontext"), joint_models.adapter(joint_models.redux_tensors())
    with ipdiverse.attach(pipe, redux, image_encoder=joint_models.siglip()) as attachment:
        attachment.set_reference(models.picture(5))
        ipdiverse.scale_references(pipe, 0.5)
        with pytest.raises(ArgumentError, match=r"attention_mask: is given already"):
            drawn("kontext")


def test_beside_an_adapter() -> None:
    """Kontext takes both: the adapter's tokens stay where the reference is left out."""
    pipe = pipeline("kontext")
    stock = drawn("kontext")
    with ipdiverse.attach(pipe, joint_models.adapter(joint_models.xlabs_tensors())) as attachment:
        attachment.set_reference(models.picture(5))
        plain = drawn("kontext", image=False)
        ipdiverse.scale_references(pipe, 0)
        np.testing.assert_array_equal(drawn("kontext"), plain)
        ipdiverse.scale_references(pipe, 0.5)
        assert far(drawn("kontext"), plain) > 0
    ipdiverse.scale_references(pipe, 1)
    np.testing.assert_array_equal(drawn("kontext"), stock)
