"""What a frozen UNet need not hold from the forward pass to the backward pass.

Gradients run through it to the adapter, and none to its own weights. Autograd holds more than that
takes: on SD 1.5 at 512 pixels 1.47 GB for an image, where 0.80 do, for 4 % more operations
(`benchmarks/training.py`). Losses and gradients are the same to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_input
from torch.utils.checkpoint import checkpoint

_PARTS = 4
"""Of the tokens, so that a feed-forward that is computed again needs little room of its own."""


def hold_less(unet: nn.Module) -> None:
    """Hold no input of a convolution, and nothing of the feed-forwards but in the widest blocks.

    A feed-forward of width w holds twelve numbers for each that it is given and costs 24 w
    operations for it to be computed again: the narrower, the more memory for the price.

    Args:
        unet: Frozen; changed in place. Its feed-forwards have no dropout.
    """
    from diffusers.models.attention import BasicTransformerBlock

    modules: list[Any] = list(unet.modules())
    for module in modules:
        if _is_usual(module):
            module.forward = partial(_convolved, module)
    blocks: list[Any] = [m for m in modules if isinstance(m, BasicTransformerBlock)]
    widest = max((block.dim for block in blocks), default=0)
    for block in blocks:
        if block.dim < widest and "forward" not in block.ff.__dict__:  # once is enough
            block.ff.forward = partial(_again, block.ff.forward)


def _is_usual(module: Any) -> bool:
    """Whether this is a convolution that pads with zeros, by numbers."""
    if not isinstance(module, nn.Conv2d):
        return False
    return module.padding_mode == "zeros" and isinstance(module.padding, tuple)


def _again(feed_forward: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    """A feed-forward of (batch, tokens, width), computed a second time in the backward pass."""
    again = partial(checkpoint, feed_forward, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([again(part) for part in states.chunk(_PARTS, dim=1)], dim=1)


def _convolved(module: nn.Conv2d, states: Tensor) -> Tensor:
    """A convolution of (batch, channels, h, w); autograd's own once its weights learn."""
    bias = module.bias
    if module.weight.requires_grad or (bias is not None and bias.requires_grad):
        return nn.Conv2d.forward(module, states)
    settings = (module.stride, module.padding, module.dilation, module.groups)
    return _FrozenConvolution.apply(states, module.weight, bias, settings)


class _FrozenConvolution(torch.autograd.Function):
    """Autograd's own holds its input, which only the gradients of its weights would need."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, settings: tuple[Any, ...]
    ) -> Tensor:
        ctx.settings, ctx.given = settings, (states.shape, states.dtype)
        ctx.save_for_backward(weight)
        return F.conv2d(states, weight, bias, *settings)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (weight,), (shape, dtype) = ctx.saved_tensors, ctx.given
        found = conv2d_input(shape, weight.to(grad.dtype), grad, *ctx.settings)
        return found.to(dtype), None, None, None
