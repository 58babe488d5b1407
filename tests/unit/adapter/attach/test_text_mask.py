"""Watching a pipeline's prompts leaves what stood there, and what is put there meanwhile."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np
import pytest
import torch

from ipdiverse.adapter.attach.attach import attach, detach
from ipdiverse.adapter.fusion import GatedFusion
from ipdiverse.errors import ArgumentError
from tests import models


def users(original: Any) -> Any:
    """A wrapper of the user's own."""

    @functools.wraps(original)
    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    return encode_prompt


def attached(pipe: Any, *, fusing: bool) -> Any:
    adapter = models.adapter("plus", pipe.unet)
    if fusing:
        adapter.fusion = GatedFusion(adapter.token_width, 8, heads=2)
    return attach(pipe, adapter)


@pytest.mark.parametrize("fusing", [False, True])
def test_a_wrapper_from_before_stays(fusing: bool) -> None:
    pipe = models.pipeline("sd1")
    mine = pipe.encode_prompt = users(pipe.encode_prompt)
    attached(pipe, fusing=fusing)
    assert pipe.encode_prompt is not mine
    detach(pipe)
    assert pipe.__dict__["encode_prompt"] is mine


def test_a_wrapper_around_ours_stays() -> None:
    pipe = models.pipeline("sd1")
    attached(pipe, fusing=True)
    mine = pipe.encode_prompt = users(pipe.encode_prompt)
    detach(pipe)
    assert pipe.__dict__["encode_prompt"] is mine


def test_where_nothing_stood_nothing_stays() -> None:
    pipe = models.pipeline("sd1")
    signature = inspect.signature(pipe.encode_prompt)
    attachment = attached(pipe, fusing=True)
    assert inspect.signature(pipe.encode_prompt) == signature
    pipe.encode_prompt("a critter", torch.device("cpu"), 1, False)
    (noted,) = attachment.hook.encoded
    assert noted.words is not None
    assert noted.words.any()
    detach(pipe)
    assert "encode_prompt" not in pipe.__dict__


TEXTS = {"prompt": ["a red critter", "snow"], "negative_prompt": ["a blue critter"] * 2}


def drawn(pipe: Any, **prompts: Any) -> np.ndarray:
    return pipe(
        **prompts,
        num_images_per_prompt=2,
        num_inference_steps=2,
        generator=[torch.Generator().manual_seed(seed) for seed in range(4)],
        output_type="latent",
    ).images.numpy()


def test_embeddings_with_their_words_draw_what_the_text_draws() -> None:
    """As compel and its like hand them over; without words the loss is said."""
    pipe = models.pipeline("sd1")
    tokens = [
        pipe.tokenizer(text, padding="max_length", max_length=40, return_tensors="pt")
        for text in TEXTS.values()
    ]
    positive, negative = (pipe.text_encoder(one.input_ids)[0].detach() for one in tokens)
    words, unwanted = (one.attention_mask for one in tokens)
    embeds = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    with attached(pipe, fusing=True) as attachment:
        torch.nn.init.constant_(attachment.adapters[0].fusion.gate, 1.0)
        attachment.hook.changed()
        attachment.set_reference(models.picture(1))
        before = drawn(pipe, **TEXTS)
        with pytest.warns(UserWarning, match="give attachment.set_words") as said:
            without, _ = (drawn(pipe, **embeds) for _ in range(2))
        assert len(said) == 1, "said once"
        assert np.abs(without - before).max() > 1e-3
        attachment.set_words(words, unwanted)
        assert np.array_equal(drawn(pipe, **embeds), before)
        mixed = {"prompt": TEXTS["prompt"], "negative_prompt_embeds": negative}
        assert np.array_equal(drawn(pipe, **mixed), before)
        attachment.set_words(words[:, :9])
        with pytest.raises(ArgumentError, match=r"set_words: does not fit.*expected 40.*found 9"):
            drawn(pipe, prompt_embeds=positive, guidance_scale=1.0)
        with pytest.raises(ArgumentError, match=r"set_words: has the wrong shape.*found \(40,\)"):
            attachment.set_words(words[0])


def test_a_plain_adapter_needs_no_words(recwarn: pytest.WarningsRecorder) -> None:
    pipe = models.pipeline("sd1")
    embeds = pipe.encode_prompt("a critter", torch.device("cpu"), 1, False)[0]
    with attached(pipe, fusing=False) as attachment:
        attachment.set_reference(models.picture(1))
        pipe(prompt_embeds=embeds, guidance_scale=1.0, num_inference_steps=1, output_type="latent")
    assert not [one for one in recwarn if "set_words" in str(one.message)]
