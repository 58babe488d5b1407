"""Watching a pipeline's prompts leaves what stood there, and what is put there meanwhile."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch

from ipdiverse.adapter.attach.attach import attach, detach
from ipdiverse.adapter.fusion import GatedFusion
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
