"""Variety in pipelines that users call themselves: `attach`, `diversify`, and their dial.

Also `scale_references`, for models that read references without an adapter.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.hooks import ModelHook
from torch.nn import functional as F

from ipdiverse.adapter.attach.attach import Attachment, checked_denoiser, detach, set_hook
from ipdiverse.adapter.attach.attach import attach as attach_adapters
from ipdiverse.adapter.attach.hook import argument_names
from ipdiverse.adapter.attach.stock import (
    StockCalls,
    projections,
    shadow,
    stock_adapters,
    take_off,
)
from ipdiverse.adapter.files.checkpoint import load_adapter
from ipdiverse.adapter.imagine import VariationSpace
from ipdiverse.adapter.model import ImagePromptAdapter
from ipdiverse.adapter.scale import checked_items
from ipdiverse.base.adapters import adapter_file
from ipdiverse.base.pipelines import denoiser_of
from ipdiverse.dial import OFF
from ipdiverse.errors import ArgumentError, ModelError, check_range
from ipdiverse.provenance import derived_seed
from ipdiverse.sampling.denoiser import release, steer
from ipdiverse.sampling.fast import level_of
from ipdiverse.sampling.sample import dial_for, space_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ipdiverse.dial import Levers

_REFERENCES = "ipdiverse.references"
_READ_REFERENCES = ("FluxTransformer2DModel", "Flux2Transformer2DModel")


def attach(
    pipe: Any,
    *adapters: ImagePromptAdapter | str | Path,
    image_encoder: Any = None,
    image_processor: Any = None,
) -> DialedAttachment:
    """Put adapters on a stock pipeline.

    The pipeline must be called itself: another that shares its UNet (`from_pipe`) is refused.
    `ip_adapter_image`, `ip_adapter_image_embeds`, `set_ip_adapter_scale` and the masks of
    `IPAdapterMaskProcessor` act as in stock while it is attached; `detach` puts everything back.

    Args:
        pipe: A pipeline of diffusers, of any task: Stable Diffusion 1.x, 2.x, XL or 3.5, Flux.1.
        adapters: One or several whose layers have the denoiser's sizes, or what names them: a
            file, a folder, or a hub id with the file's path behind it.
        image_encoder: A CLIP vision model with projection, or SigLIP's; None takes the pipeline's.
        image_processor: Its preprocessing; None takes the pipeline's.

    Raises:
        ModelError: The model is of another kind, something is attached already, sizes differ, or
            attention is sliced or fused.
        CheckpointError: A file is missing or holds no adapter.
    """
    opened = [
        one
        if isinstance(one, ImagePromptAdapter)
        else load_adapter(adapter_file(str(getattr(pipe, "name_or_path", "")), str(one)))
        for one in adapters
    ]
    attachment = attach_adapters(
        pipe,
        *opened,
        image_encoder=image_encoder,
        image_processor=image_processor,
        made=DialedAttachment,
    )
    attachment.on_detach(StockCalls(attachment).release)
    return attachment


class DialedAttachment(Attachment):
    """Adapters on a pipeline, with a dial: set references, scales and diversity here.

    A context manager: leaving the `with` block detaches.
    """

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self._unshadow: Callable[[], None] | None = None
        self.on_detach(self._unwatch)

    def undo(self) -> None:
        """Put the pipeline back as it was, to the bit, as `ipdiverse.detach` does."""
        detach(self.pipe)

    def set_diversity(
        self,
        diversity: float,
        *,
        space: VariationSpace | str | Path | None = None,
        fast: int = 0,
    ) -> None:
        """Vary the images of the next calls of the pipeline.

        Each image's variation follows the seed of its generator alone: pass a list of generators,
        one for each image, and image i is the same whatever the others are.

        Args:
            diversity: 0..1; 0 is stock IP-Adapter, to the bit.
            space: A variation space of the adapter (`ipdiverse fit`), or its file; None takes the
                one that ships for it, if any.
            fast: 0 to 3: how much of the work to leave out, at a small loss; 0 is none, exactly.

        Raises:
            ArgumentError: It is out of range, or the pipeline draws its noise elsewhere.
            ModelError: The space belongs to another adapter.
        """
        check_range("diversity", diversity, 0, 1)
        level_of(fast)
        if space is not None or self.scenes is None:
            known = isinstance(space, VariationSpace)
            self.set_space(space if known else space_of(str(space or ""), self.adapters[0]))
        levers = dial_for(self.adapters[0], self.scenes is not None).at(diversity)
        self._unwatch()
        release(self)
        if levers != OFF or fast:  # at 0 too: what a fusion adds has to be taken off
            self._watch(levers, fast)

    def _watch(self, levers: Levers, fast: int) -> None:
        """Steer each call of the pipeline as soon as its noise is drawn."""
        original = getattr(self.pipe, "prepare_latents", None)
        if original is None:
            raise ArgumentError(
                "does not say which noise an image starts from",
                where=type(self.pipe).__name__,
                fix="Use `ipdiverse.steer` with seeds of your own.",
            )
        signature = inspect.signature(original)

        @functools.wraps(original)
        def steered(*args: Any, **kwargs: Any) -> Any:
            self._steer(signature.bind(*args, **kwargs).arguments.get("generator"), levers, fast)
            return original(*args, **kwargs)

        self._unshadow = shadow(self.pipe, "prepare_latents", steered)

    def _unwatch(self) -> None:
        if self._unshadow is not None:
            self._unshadow()

    def _steer(self, generators: Any, levers: Levers, fast: int) -> None:
        """Give the levers the seeds and the prompts of the call that has begun."""
        if not self.hook.encoded:
            raise ArgumentError(
                "were not encoded by this pipeline",
                where="prompts",
                fix="Call the pipeline that the adapter is attached to.",
            )
        # Flux encodes the negative prompt after the prompt; neither has reached the denoiser yet
        new = [one for one in self.hook.encoded if one.alone and one.branch is None]
        now = (new[-2:] or [self.hook.encoded[-1]])[0]
        if levers.recombine and not now.texts:
            warnings.warn(
                "prompt_embeds come without their text, so scenes are drawn whether they fit it or "
                "not: give the prompt as text, or several to ipdiverse.steer",
                stacklevel=5,
            )
        seeds = seeds_of(generators, len(now.positive))
        steer(self, levers, seeds, now.texts or None, fast)


def seeds_of(generators: Any, items: int) -> list[int]:
    """A seed for each image: its generator's, or one derived from the generator that all share."""
    if isinstance(generators, (list, tuple)) and len(generators) == items:
        return [generator.initial_seed() for generator in generators]
    shared = generators[0] if isinstance(generators, (list, tuple)) else generators
    # the state too, as one generator may serve several calls; nothing is drawn from it, so that
    # the pipeline's own noise stays what it was
    state = torch.get_rng_state() if shared is None else shared.get_state()
    start = torch.initial_seed() if shared is None else shared.initial_seed()
    key = derived_seed(start, state.cpu().numpy().tobytes().hex())
    return [derived_seed(key, number) for number in range(items)]


def diversify(
    pipe: Any, diversity: float = 0.5, *, space: VariationSpace | str | Path | None = None
) -> DialedAttachment:
    """Give variety to a pipeline on which `load_ip_adapter` was called; nothing else changes.

    Example:
        One line in a script that works already::

            pipe.load_ip_adapter("h94/IP-Adapter", subfolder="models", weight_name="…")
            ipdiverse.diversify(pipe, 0.7)
            pipe("in the snow", ip_adapter_image=photo, num_images_per_prompt=8)

    Args:
        pipe: A pipeline of Stable Diffusion or Flux.1 with one or several adapters.
        diversity: 0..1; 0 draws what stock draws.
        space: As `DialedAttachment.set_diversity` takes it.

    Called again on the same pipeline, it turns the dial.

    Raises:
        ModelError: No adapter is loaded, or the pipeline is of another kind.
        ArgumentError: The diversity is out of range.
    """
    check_range("diversity", diversity, 0, 1)
    answering = StockCalls.of(pipe)
    if answering is not None:  # a notebook's cell that is run again
        answering.attachment.set_diversity(diversity, space=space)
        return answering.attachment
    denoiser: Any = denoiser_of(pipe)
    loaded = stock_adapters(denoiser)
    if not loaded:
        checked_denoiser(pipe)  # another load_ip_adapter would not help a pipeline of another kind
        raise ModelError(
            "has no IP-Adapter",
            where=type(pipe).__name__,
            fix="Call pipe.load_ip_adapter first, or ipdiverse.attach with an adapter.",
        )
    layers, processors = projections(denoiser), denoiser.attn_processors
    put_back = take_off(denoiser)
    try:
        attachment = attach(pipe, *[adapter for adapter, _ in loaded])
        attachment.stock_layers = layers
        attachment.hook.before = dict(processors)
        attachment.on_detach(put_back)
        for number, (_, scales) in enumerate(loaded):
            by_layer = [scales[layer.number] for layer in attachment.hook.layers]
            attachment.set_scale(by_layer, adapter=number)
        attachment.set_diversity(diversity, space=space)
    except BaseException:
        with suppress(ModelError):  # it may not be attached yet
            detach(pipe)
        put_back()
        raise
    return attachment


def scale_references(
    pipe: Any, scale: float | Sequence[float], *, start_at: float = 0.0, end_at: float = 1.0
) -> None:
    """How strongly Flux Kontext or Flux.2 reads the pictures it is given; no adapter is needed.

    Both read references as latents in the same sequence as what they draw. Acts on every call until
    it is called again; `scale_references(pipe, 1)` puts stock back. Memory-efficient attention
    computes it; kernels that take no mask, such as FlashAttention's, refuse.

    Args:
        pipe: A pipeline of Flux.1 Kontext or Flux.2.
        scale: The references' share of each attention before it is normalised, 0..10, or one for
            each image of the calls. 1 is stock, and 0 stock without a reference, both to the bit.
        start_at: Share of the steps before which it is 0, so that the prompt decides the layout.
        end_at: Share of the steps from which it is 0.

    Raises:
        ArgumentError: A number is out of range.
        ModelError: The pipeline is of another kind.
    """
    model: Any = getattr(pipe, "transformer", None)
    if type(getattr(model, "_orig_mod", model)).__name__ not in _READ_REFERENCES:
        expected, kind = "a pipeline of Flux.1 Kontext or Flux.2", type(pipe).__name__
        raise ModelError("reads no references", where=kind, expected=expected)
    scales = torch.as_tensor(scale, dtype=torch.float32).flatten()
    for number in checked_items(scales).tolist():
        check_range("scale", number, 0, 10)
    for name, share in (("start_at", start_at), ("end_at", end_at)):
        check_range(name, share, 0, 1)
    acts = bool((scales != 1).any()) or (start_at, end_at) != (0, 1)
    scaled = _ScaledReferences(pipe, scales, (start_at, end_at))
    set_hook(model, _REFERENCES, scaled if acts else None)


class _ScaledReferences(ModelHook):
    """Adds log s to the logits of the references' tokens, or leaves them out at 0 (ADR 17)."""

    def __init__(self, pipe: Any, scales: torch.Tensor, window: tuple[float, float]) -> None:
        super().__init__()
        self.pipe, self.scales, self.window = pipe, scales, window
        self._names = argument_names(pipe.transformer)

    @torch.compiler.disable
    def pre_forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        module: torch.nn.Module,  # noqa: ARG002 - diffusers' interface
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The call with its references scaled; any other call as it is."""
        given = dict(zip(self._names, args, strict=False)) | kwargs
        if given.get("kv_cache_mode"):
            what, fix = "keeps its references in a cache", "Use Flux2KleinPipeline."
            raise ModelError(what, where=type(self.pipe).__name__, fix=fix)
        states, ids = given["hidden_states"], given["img_ids"]
        # the first column numbers the pictures: 0 is what is drawn, and comes first
        own = int(((ids[0] if ids.ndim == 3 else ids)[:, 0] == 0).sum())
        if own == states.shape[1]:
            return (), given
        if len(states) % len(self.scales):
            what, expected = "has the wrong length", f"1, or one for each of {len(states)} images"
            raise ArgumentError(what, where="scale", expected=expected, found=len(self.scales))
        scales = self.scales * (self.window[0] <= self._progress() < self.window[1])
        if not scales.any():
            return (), given | {"hidden_states": states[:, :own], "img_ids": ids[..., :own, :]}
        if bool((scales == 1).all()):
            return (), given
        rows = scales.repeat_interleave(len(states) // len(scales)).log()
        before = given["encoder_hidden_states"].shape[1] + own  # text, then what is drawn
        bias = F.pad(rows[:, None].expand(-1, states.shape[1] - own), (before, 0))
        attention = given.get("joint_attention_kwargs") or {}
        if attention.get("attention_mask") is not None:
            what = "is given already, and scaled references need one"
            raise ArgumentError(what, where="attention_mask", fix="Set the scale to 1.")
        attention = {**attention, "attention_mask": bias.to(states)[:, None, None]}
        return (), given | {"joint_attention_kwargs": attention}

    def _progress(self) -> float:
        """Share of the steps that are done."""
        scheduler = self.pipe.scheduler
        first = scheduler.begin_index or 0
        # the scheduler counts from its first step on
        now = first if scheduler.step_index is None else scheduler.step_index
        return (now - first) / self.pipe.num_timesteps
