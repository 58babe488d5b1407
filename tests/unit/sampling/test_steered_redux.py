"""Redux as stock diffusers has it, steered: its image tokens come with the prompt."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from ipdiverse.adapter.attach.attach import attach, detach
from ipdiverse.dial import Levers
from ipdiverse.errors import ArgumentError, ModelError
from ipdiverse.levers import Lever, register_lever
from ipdiverse.sampling.denoiser import steer
from tests import joint_models, models

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ipdiverse.adapter.model import ImagePromptAdapter

PROMPTS, SEEDS = ("a red critter", "a blue critter in a forest"), (3, 4)
PICTURES = [models.picture(10), models.picture(11)]
IMAGE_TOKENS = 16


def run(pipe: Any, items: Sequence[int] = (0, 1), **given: Any) -> np.ndarray:
    settings: dict[str, Any] = {
        "prompt": [PROMPTS[item] for item in items],
        "generator": [torch.Generator().manual_seed(item) for item in items],
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "output_type": "latent",
        "height": models.SIZE,
        "width": models.SIZE,
        "max_sequence_length": 12,
    }
    return pipe(**{**settings, **given}).images.detach().numpy()


def close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= 4e-5 * np.abs(expected).max()


def differ(found: np.ndarray, other: np.ndarray) -> None:
    assert np.isfinite(found).all()
    assert np.abs(found - other).max() > 1e-3 * np.abs(other).max()


def parts() -> tuple[Any, ImagePromptAdapter, Any]:
    """A pipeline of Flux.1, Redux, and the image encoder that it reads."""
    adapter = joint_models.adapter(joint_models.redux_tensors())
    return joint_models.pipeline("flux"), adapter, joint_models.siglip()


@pytest.fixture(scope="module")
def redux() -> dict[str, torch.Tensor]:
    """What stock's prior pipeline gives for two prompts and pictures; the text alone too."""
    pipe, adapter, encoder = parts()
    pixels = models.image_processor()(PICTURES, return_tensors="pt").pixel_values
    with torch.no_grad():
        text, pooled, _ = pipe.encode_prompt(list(PROMPTS), None, max_sequence_length=12)
        tokens = adapter.tokens(encoder(pixels).last_hidden_state)
    return {"text": text, "both": torch.cat([text, tokens], dim=1), "pooled": pooled}


@pytest.fixture(autouse=True)
def _detached() -> Iterator[None]:
    """A test that fails must not leave the others' pipeline steered."""
    yield
    with suppress(ModelError):
        detach(joint_models.pipeline("flux"))


def drawn(pipe: Any, redux: dict[str, torch.Tensor], items: Sequence[int], **given: Any) -> Any:
    which = given.pop("embeds", "both")
    rows = list(items)
    own = {"prompt_embeds": redux[which][rows], "pooled_prompt_embeds": redux["pooled"][rows]}
    return run(pipe, items, prompt=None, **own, **given)


@pytest.mark.parametrize(
    "guided", [{}, {"negative_prompt": ["a stone"] * 2, "true_cfg_scale": 2.0}]
)
def test_redux_of_stock_is_steered_without_attach(
    redux: dict[str, torch.Tensor], guided: dict[str, Any]
) -> None:
    pipe, items = joint_models.pipeline("flux"), (0, 1)
    stock = drawn(pipe, redux, items, **guided)
    text = drawn(pipe, redux, items, embeds="text", **guided)
    steer(pipe, Levers(), SEEDS, image_tokens=IMAGE_TOKENS)
    np.testing.assert_array_equal(drawn(pipe, redux, items, **guided), stock)
    far = []
    for strength in (0.1, 0.5, 3.0):
        steer(pipe, Levers(), SEEDS, strength=strength, image_tokens=IMAGE_TOKENS)
        far.append(float(np.abs(drawn(pipe, redux, items, **guided) - text).max()))
    assert 0 < far[0] < far[1] < far[2]
    steer(pipe, Levers(), SEEDS, strength=0.0, image_tokens=IMAGE_TOKENS)
    np.testing.assert_array_equal(drawn(pipe, redux, items, **guided), text)
    detach(pipe)
    np.testing.assert_array_equal(drawn(pipe, redux, items, **guided), stock)


def test_each_lever_on_tokens_acts_on_redux_of_stock_as_on_an_attached_one(
    redux: dict[str, torch.Tensor],
) -> None:
    pipe, adapter, encoder = parts()
    space, items = joint_models.space(adapter), (0, 1)
    stock = drawn(pipe, redux, items)
    chosen = (Levers(cads=1.0), Levers(image_guidance=1.5), Levers(recombine=1.0))
    with attach(pipe, adapter, image_encoder=encoder) as attachment:
        attachment.set_space(space)
        attachment.set_reference(PICTURES)
        expected = []
        for levers in chosen:
            steer(attachment, levers, SEEDS, PROMPTS)
            expected.append(run(pipe))
    steering = steer(pipe, Levers(), SEEDS, image_tokens=IMAGE_TOKENS)
    steering.attachment.set_space(space)
    for levers, same in zip(chosen, expected, strict=True):
        steer(pipe, levers, SEEDS, PROMPTS, image_tokens=IMAGE_TOKENS)
        together = drawn(pipe, redux, items)
        differ(together, stock)
        close(together, same)
        steer(pipe, levers, SEEDS[1:], PROMPTS[1:], image_tokens=IMAGE_TOKENS)
        close(drawn(pipe, redux, [1]), together[1:])
    detach(pipe)


def test_what_cannot_be_steered_so_is_refused_in_one_line(redux: dict[str, torch.Tensor]) -> None:
    pipe = joint_models.pipeline("flux")
    with pytest.raises(ModelError, match=r"StableDiffusion3Pipeline: reads no image tokens beside"):
        steer(joint_models.pipeline("sd3"), Levers(), SEEDS)
    steer(pipe, Levers(), SEEDS)
    with pytest.raises(ArgumentError, match="prompt_embeds: holds no text before 729 image tokens"):
        drawn(pipe, redux, (0, 1))
    detach(pipe)
    register_lever(Lever("other", "Changes embeddings.", "embeddings", lambda one, *_: one))
    with pytest.raises(ModelError, match="other: changes an image's embeddings, and the prompt"):
        steer(pipe, Levers(other=0.5), SEEDS, image_tokens=IMAGE_TOKENS)  # pyright: ignore[reportCallIssue]
    steering = steer(pipe, Levers(), SEEDS, image_tokens=IMAGE_TOKENS)
    with pytest.raises(ArgumentError, match=r"reference: is read from prompt_embeds\. Call"):
        steering.attachment.set_reference(PICTURES[0])
    detach(pipe)
