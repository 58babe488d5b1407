"""Less is held for the backward pass, and what comes out is the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from torch import nn

from ipdiverse.training.loss import hold_less
from tests import models


def passed(
    unet: nn.Module, context: torch.Tensor, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Output, gradient of the context, and bytes that the forward pass left to the backward one."""
    context = context.clone().requires_grad_()
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    known = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    held: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    build: Any = unet
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype is not None),
    ):
        out = build(latents, 500, context).sample
        bytes_held = sum(storage.nbytes() for storage in held.values())
        out.float().square().mean().backward()
    assert context.grad is not None
    return out.detach(), context.grad, bytes_held


def fed(unet: nn.Module) -> list[nn.Module]:
    """Feed-forwards that were changed."""
    return [m for m in unet.modules() if isinstance(m, FeedForward) and "forward" in m.__dict__]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_less_is_held_and_gradients_are_the_same(dtype: torch.dtype | None) -> None:
    unet = copy.deepcopy(models.unet("sd1")).requires_grad_(False)
    width = unet.config.cross_attention_dim
    context = torch.randn(2, 7, width, generator=torch.Generator().manual_seed(1))
    out, gradient, before = passed(unet, context, dtype)
    hold_less(unet)
    again, same, after = passed(unet, context, dtype)
    for one, other in ((again, out), (same, gradient)):
        rounding = 1e-5 if dtype is None else 0.03
        torch.testing.assert_close(one, other, rtol=0, atol=rounding * float(other.abs().max()))
    assert after < 0.75 * before


def test_the_widest_blocks_are_left_alone() -> None:
    unet = copy.deepcopy(models.unet("sd1")).requires_grad_(False)
    hold_less(unet)
    blocks = [m for m in unet.modules() if isinstance(m, BasicTransformerBlock)]
    widest = max(block.dim for block in blocks)
    changed = {block.dim for block in blocks if "forward" in block.ff.__dict__}
    assert changed == {block.dim for block in blocks} - {widest}


def test_a_second_time_changes_nothing() -> None:
    unet = copy.deepcopy(models.unet("sd1")).requires_grad_(False)
    hold_less(unet)
    before = [m.__dict__["forward"] for m in fed(unet)]
    hold_less(unet)
    assert before
    assert [m.__dict__["forward"] for m in fed(unet)] == before


def test_weights_that_learn_again_get_their_gradients() -> None:
    convolution = nn.Conv2d(2, 3, 3, padding=1).requires_grad_(False)
    hold_less(convolution)
    convolution.requires_grad_(True)
    convolution(torch.ones(1, 2, 4, 4)).sum().backward()
    for parameter in convolution.parameters():
        assert parameter.grad is not None


def test_other_paddings_are_autograds_own() -> None:
    usual, other = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding="same")
    ring = nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")
    hold_less(nn.ModuleList([usual, other, ring]))
    assert "forward" in usual.__dict__
    assert "forward" not in other.__dict__
    assert "forward" not in ring.__dict__
