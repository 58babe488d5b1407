"""A batch of samples to their losses: of a frozen UNet with an adapter, or of a flow of tokens.

Gradients run through a UNet to the adapter, and none to its own weights. Autograd keeps more than
that needs: on SD 1.5 at 512 pixels 1.47 GB for an image, where 0.80 GB are enough, for 4 % more
operations (`benchmarks/training.py`). Losses and gradients are the same to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.grad import conv2d_input
from torch.utils.checkpoint import checkpoint

from ipdiverse.adapter.model import ImagePromptAdapter
from ipdiverse.errors import ModelError

_PARTS = 4
"""Parts of the tokens; a feed-forward that is computed again needs memory for one at a time."""
_FEW_TOKENS = 256
"""Up to these, plain attention is faster (`fast_backward`): a latent of 16 by 16."""


class PromptedUnet(nn.Module):
    """A frozen UNet with an adapter that learns."""

    def __init__(self, pipe: Any, adapter: ImagePromptAdapter, min_snr: float) -> None:
        super().__init__()
        self.adapter = adapter
        # The pipeline's own scheduler may be Euler, as SDXL's is, whose add_noise scales by σ
        # rather than by √ᾱ, or PNDM, which knows no velocity. All share the noise schedule.
        schedule: Any = DDPMScheduler.from_config(pipe.scheduler.config)
        kind = schedule.config.prediction_type
        if kind not in ("epsilon", "v_prediction"):
            usual = "prediction type epsilon or v_prediction"
            raise ModelError("cannot be trained on", where="base", expected=usual, found=kind)
        # in a tuple, so that the UNet is not a submodule: it would be wrapped and saved
        self._frozen = (pipe.unet, schedule, pipe.vae_scale_factor)
        self._min_snr = min_snr

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Each sample's weighted squared error, (batch,), in float32."""
        unet, schedule, factor = self._frozen
        latents, noise, timestep = batch["latents"], batch["noise"], batch["timestep"]
        text = batch["text_states"]
        tokens = self.adapter.tokens(batch["image"])
        tokens = self.adapter.fuse(tokens, text, batch.get("text_mask"))
        noisy = schedule.add_noise(latents, noise, timestep)
        added = _added(batch, unet.config, noisy.shape, factor)
        predicted = unet(noisy, timestep, (text, [tokens]), added_cond_kwargs=added).sample
        v = schedule.config.prediction_type == "v_prediction"
        target = schedule.get_velocity(latents, noise, timestep) if v else noise
        error = (predicted.float() - target.float()).square().mean(dim=(1, 2, 3))
        if not self._min_snr:
            return error
        return error * min_snr_weight(compute_snr(schedule, timestep), self._min_snr, v)


class TokenFlow(nn.Module):
    """A generative fusion that learns; the adapter around it is frozen, and no UNet is needed."""

    def __init__(self, adapter: ImagePromptAdapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Each sample's squared error, (batch,), in float32."""
        with torch.no_grad():
            image, target = (self.adapter.tokens(batch[name]) for name in ("image", "target"))
        text, mask = batch["text_states"], batch.get("text_mask")
        flow: Any = self.adapter.fusion
        return flow.losses(image, target, text, mask, batch["noise"], batch["timestep"])


def min_snr_weight(snr: Float[Tensor, " batch"], gamma: float, v: bool) -> Float[Tensor, " batch"]:
    """min(SNR, γ) / SNR for ε, min(SNR, γ) / (SNR + 1) for v (arXiv:2303.09556, section 3.4).

    Args:
        snr: Signal-to-noise ratio of each sample's timestep, ᾱ / (1 − ᾱ).
        gamma: γ, 5 in the paper.
    """
    # a schedule rescaled to zero SNR ends at 0, and 0 / 0 would lose the batch
    return snr.clamp(max=gamma) / (snr + 1 if v else snr.clamp_min(1e-8))


def _added(
    batch: dict[str, Tensor], config: Any, shape: torch.Size, factor: int
) -> dict[str, Tensor] | None:
    """SDXL's pooled text and sizes: uncropped, at the size of the target."""
    if "text_pooled" not in batch or config.get("addition_embed_type") != "text_time":
        return None
    height, width = (factor * side for side in shape[-2:])
    sizes = torch.tensor([height, width, 0, 0, height, width]).to(batch["text_pooled"])
    return {"text_embeds": batch["text_pooled"], "time_ids": sizes.expand(shape[0], -1)}


def hold_less(unet: nn.Module) -> None:
    """Keep no input of a convolution, and nothing of the feed-forwards but in the widest blocks.

    A feed-forward of width w keeps twelve numbers for each of its inputs, and computing it again
    costs 24 w operations: the narrower it is, the more memory is saved for the price.
    """
    from diffusers.models.attention import BasicTransformerBlock

    modules: list[Any] = list(unet.modules())
    convolutions = [m for m in modules if isinstance(m, nn.Conv2d) and m.padding_mode == "zeros"]
    # padding may also be a word, "same", which the gradient's function does not know
    usual: list[Any] = [m for m in convolutions if isinstance(m.padding, tuple)]
    for module in usual:
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
