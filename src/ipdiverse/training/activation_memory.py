"""How a frozen UNet takes less memory and time between the forward and the backward pass.

Gradients run through it to the adapter, and none to its own weights. Autograd keeps more than that
needs: on SD 1.5 at 512 pixels 1.47 GB for an image, where 0.80 GB are enough, for 4 % more
operations (`benchmarks/training.py`). Losses and gradients are the same to rounding.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.grad import conv2d_input
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

_PARTS = 4
"""Parts of the tokens; a feed-forward that is computed again needs memory for one at a time."""
_FEW_TOKENS = 256


def hold_less(unet: nn.Module) -> None:
    """Keep no input of a convolution, and nothing of the feed-forwards but in the widest blocks.

    A feed-forward of width w keeps twelve numbers for each of its inputs, and computing it again
    costs 24 w operations: the narrower it is, the more memory is saved for the price.
    """
    from diffusers.models.attention import BasicTransformerBlock

    modules: list[Any] = list(unet.modules())
    for module in modules:
        usual = isinstance(module, nn.Conv2d) and module.padding_mode == "zeros"
        if usual and isinstance(module.padding, tuple):  # `_convolved` knows no others
            module.forward = partial(_convolved, module)
    blocks: list[Any] = [m for m in modules if isinstance(m, BasicTransformerBlock)]
    widest = max((block.dim for block in blocks), default=0)
    for block in blocks:
        if block.dim < widest and "forward" not in block.ff.__dict__:  # not twice
            block.ff.forward = partial(_again, block.ff.forward)


def hold_as_computed(unet: nn.Module, mixed_precision: str) -> None:
    """Keep frozen matrices in the type that autocast computes them in; norms stay in float32."""
    if mixed_precision == "no":
        return
    dtype = torch.bfloat16 if mixed_precision == "bf16" else torch.float16
    for module in unet.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.to(dtype)
        else:
            # Weights that were just loaded are pages of their file, which stay in memory as long
            # as one of them is used: so norms are copied.
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.clone()


def fast_backward(latents: Tensor, mixed_precision: str) -> AbstractContextManager[Any]:
    """A context for the forward and the backward pass: the attention that is fastest in both.

    PyTorch's fused attention is at least twice as fast and keeps no attention matrix, except for
    few tokens in half precision on a CPU, where its backward pass is slower than plain attention's
    (`benchmarks/attention.py`). Gradient checkpointing runs the forward pass in the backward pass.
    """
    few = latents.shape[-2] * latents.shape[-1] <= _FEW_TOKENS
    plain = latents.device.type == "cpu" and mixed_precision != "no" and few
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


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
    """Keeps its weights alone: its input would serve only the gradients of those."""

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
