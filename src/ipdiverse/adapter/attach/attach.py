"""Attach adapters to a stock pipeline, and take them off again, both exactly.

While attached, each attention layer has another processor, and the denoiser one hook.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry, ModelHook

from ipdiverse.adapter.attach.branches import forget_prompts, watch_prompts
from ipdiverse.adapter.attach.encoding import (
    EmbedChange,
    ImageEncoding,
    Scenes,
    encode_references,
)
from ipdiverse.adapter.attach.hook import ActiveAdapter, ImagePromptHook
from ipdiverse.adapter.attach.joint import (
    JointAttention,
    attended,
    check_fits,
    checked_transformer,
    transformer_layers,
)
from ipdiverse.adapter.attention import DecoupledAttention, Slot
from ipdiverse.adapter.model import (
    ImagePromptAdapter,
    attention_layers,
    check_encoder,
)
from ipdiverse.adapter.reference import Reference, as_reference, split_batch
from ipdiverse.adapter.scale import Scale, resolve_scale, unet_layers
from ipdiverse.base.pipelines import check_caches, denoiser_of
from ipdiverse.errors import ArgumentError, ModelError, check_range, check_whole

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL import Image
    from torch import Tensor

    from ipdiverse.adapter.imagine import VariationSpace
    from ipdiverse.adapter.reference import ImageLike
    from ipdiverse.adapter.scale import ScaleLike

Made = TypeVar("Made", bound="Attachment")
_HOOK = "ipdiverse.image_prompt"
LEVERS_HOOK = "ipdiverse.levers"
"""Outside the other: decides which branches the UNet is called with."""
_MOVING = ("Motion", "3D", "SpatioTemporal", "I2VGen")  # UNets of AnimateDiff and its like
_SEVERAL_PROMPTS = ("LEdits", "CycleDiffusion")  # pipelines with a source and a target prompt


class Attachment:
    """Adapters on a pipeline: set their references and scales here.

    A context manager: leaving the `with` block detaches.

    Args:
        pipe: The pipeline.
        hook: What hands image tokens to the layers; levers act through it.
        encoding: The image encoder, whose parts are `image_encoder` and `image_processor`.
    """

    stock_layers: Sequence[Any] = ()  # projections that stock had loaded; FaceID Plus reads them

    def __init__(self, pipe: Any, hook: ImagePromptHook, encoding: ImageEncoding) -> None:
        self.pipe, self.hook, self.encoding = pipe, hook, encoding
        self.image_encoder, self.image_processor = encoding.encoder, encoding.processor
        # of the call of the pipeline that runs, and else of set_reference
        self._given = ChainMap[int, tuple[Sequence[Reference], Reference | None]]({}, {})
        self._change: EmbedChange | None = None
        self.scenes: Scenes | None = None

    @property
    def adapters(self) -> list[ImagePromptAdapter]:
        """What is attached, in order."""
        return [prompt.adapter for prompt in self.hook.prompts]

    def set_reference(
        self,
        references: ImageLike | Reference | Sequence[ImageLike | Reference],
        *,
        adapter: int | None = 0,
        negative: ImageLike | Reference | None = None,
    ) -> None:
        """Prompt with images.

        Args:
            references: Images (PIL, files, arrays, tensors; see `as_reference`). One for all
                outputs, or a list or batch: one for each prompt or each output of the next call,
                in order. Several images for one output are one `Reference`.
            adapter: Which adapter, when several are attached; None is all.
            negative: The unconditional branch's image; None is no image.

        Raises:
            ArgumentError: References that do not fit together or this adapter.
            ImageError: A file cannot be read.
        """
        many = [as_reference(item) for item in split_batch(references)]
        if not many:
            raise ArgumentError("is empty", where="references", fix="Give at least one.")
        against = None if negative is None else as_reference(negative)
        self.set_call(())
        for number in self._numbers(adapter):
            self._given.maps[1][number] = many, against
            self._encode(number)

    def set_call(
        self, references: Sequence[Reference], negatives: Sequence[Reference | None] = ()
    ) -> None:
        """Prompt one call of the pipeline; for the next, `set_reference` holds again.

        Args:
            references: One for each adapter; none ends what an earlier call brought.
            negatives: As many, of the unconditional branch; none is no image.
        """
        ended, against = self._given.maps[0], negatives or [None] * len(references)
        both = enumerate(zip(references, against, strict=True))
        self._given.maps[0] = {number: ([one], none) for number, (one, none) in both}
        for number in {*ended, *self._given.maps[0]}:
            self.hook.prompts[number].references = []
            if number in self._given:
                self._encode(number)
        self.hook.changed()

    def _encode(self, adapter: int) -> None:
        prompt, (references, negative) = self.hook.prompts[adapter], self._given[adapter]
        if not prompt.adapter.reads:
            fix = "Call detach, then attach with Flux Redux' file."
            raise ArgumentError("is read from prompt_embeds", where="reference", fix=fix)
        prompt.refresh()
        prompt.references = encode_references(
            references, negative, prompt.acting, self.encoding, self._change
        )
        self.hook.changed()

    def references(self, adapter: int = 0) -> list[Reference]:
        """What was set: one for all items, or one for each."""
        return list(self._given[adapter][0]) if adapter in self._given else []

    def change_embeds(self, change: EmbedChange | None) -> None:
        """Encode references with a change of their embeddings, those already set too."""
        if change is None and self._change is None:
            return
        self._change = change
        for adapter in self._given:
            self._encode(adapter)

    def set_space(self, space: VariationSpace | None) -> None:
        """Draw scenes from a variation space, where the lever `recombine` is on.

        Raises:
            ModelError: It was fitted on another adapter's projection than the first one's.
        """
        if space is not None:
            space.check(self.adapters[0])
        self.scenes = None if space is None else Scenes(space, self.pipe)
        self.hook.changed()

    def set_scenes(self, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
        """Draw scenes from these pictures, with a caption or "" for each.

        Raises:
            ModelError: No variation space was set.
        """
        scenes = self._with_space()
        bank = scenes.bank_of(images, captions, self.adapters[0], self.encoding)
        self.set_space(replace(scenes.space, bank=bank))

    def recombined(
        self, tokens: Tensor, strength: float, prompts: Sequence[str], seeds: Sequence[int]
    ) -> Tensor:
        """Each item's tokens, (items, references, tokens, width), in a scene of its own.

        Raises:
            ModelError: No variation space was set.
        """
        return self._with_space().put(tokens, strength, prompts, seeds)

    def _with_space(self) -> Scenes:
        if self.scenes is None:
            raise ModelError(
                "needs a variation space",
                where="recombine",
                fix="Give one with --space, or in Python with attachment.set_space; "
                "`ipdiverse fit` makes one.",
            )
        return self.scenes

    def set_scale(
        self,
        scale: ScaleLike,
        *,
        adapter: int | None = None,
        weight: float = 1.0,
        start_at: float = 0.0,
        end_at: float = 1.0,
    ) -> None:
        """Weight of the image branch (λ); 0 is text alone, exactly.

        FaceID's low-rank changes of the UNet stay on at any scale, as in stock diffusers.

        Args:
            scale: See `scale.resolve_scale`.
            adapter: Which adapter; None is all.
            weight: Multiplies a preset.
            start_at: Share of the steps before which it is 0.
            end_at: Share of the steps from which it is 0.

        Raises:
            ArgumentError: A scale that does not fit this UNet.
        """
        resolved = resolve_scale(
            scale, self.hook.layers, weight=weight, start_at=start_at, end_at=end_at
        )
        for number in self._numbers(adapter):
            self.hook.prompts[number].scale = resolved

    def set_fusion_strength(self, strength: float, *, adapter: int | None = None) -> None:
        """Weight of what text-image fusion adds: 1 as trained, 0 plain IP-Adapter, exactly."""
        check_range("fusion strength", strength, 0, 10)
        for number in self._numbers(adapter):
            self.hook.prompts[number].fusion_strength = float(strength)
        self.hook.changed()

    def set_words(self, words: Tensor | None, negative: Tensor | None = None) -> None:
        """Say which tokens of `prompt_embeds` are words, for adapters with a fusion.

        Prompts that are given as text need none of this: the pipeline's tokenizer knows.

        Args:
            words: The tokenizer's `attention_mask` of the prompts, (prompts, tokens); None forgets.
            negative: The same of `negative_prompt_embeds`.
        """
        both = (words, negative)
        given = [None if mask is None else torch.as_tensor(mask).bool() for mask in both]
        for mask in given:
            if mask is not None and mask.ndim != 2:
                what, expected = "has the wrong shape", "(prompts, tokens)"
                found = tuple(mask.shape)
                raise ArgumentError(what, where="set_words", expected=expected, found=found)
        self.hook.words.positive, self.hook.words.negative = given

    def set_seeds(self, seeds: Sequence[int] | None) -> None:
        """Seeds of the next calls' images, for adapters whose fusion draws; None numbers them."""
        for prompt in self.hook.prompts:
            prompt.seeds = None if seeds is None else tuple(seeds)
        self.hook.changed()

    def set_interpolation(self, share: float, *, adapter: int | None = None) -> None:
        """Act with weights between an adapter's base weights (0) and its own (1).

        Args:
            share: 0..1.
            adapter: Which adapter; None is all.

        Raises:
            ArgumentError: The share is out of range.
            ModelError: An adapter does not hold its base weights.
        """
        for number in self._numbers(adapter):
            if self.hook.prompts[number].interpolation != share:
                self.hook.prompts[number].interpolate(share)
                if number in self._given:  # the projection's weights changed too
                    self._encode(number)
        for _, processor in self.hook.processors:
            processor.forget()
        self.hook.changed()

    def _numbers(self, adapter: int | None) -> Sequence[int]:
        """The adapter that is meant, or all."""
        if adapter is None:
            return range(len(self.hook.prompts))
        check_whole("adapter", adapter)
        check_range("adapter", adapter, 0, len(self.hook.prompts) - 1)
        return [adapter]

    def on_detach(self, undo: Callable[[], object]) -> None:
        """Call this when the adapters are taken off."""
        self.hook.on_detach.append(undo)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        detach(self.pipe)


def attach(
    pipe: Any,
    *adapters: ImagePromptAdapter,
    image_encoder: Any = None,
    image_processor: Any = None,
    made: type[Made] = Attachment,
) -> Made:
    """Put adapters on a stock pipeline (`sampling.diversify.attach` is the public one).

    The adapter itself is not changed: where the UNet is of another type or on another device, a
    copy acts. It is this pipeline that must be called: whether it guides, and at which step it is,
    is read from it, and a call with text that it did not encode is refused, such as one of another
    pipeline that shares its UNet (`from_pipe`).

    Args:
        pipe: A pipeline of diffusers, of any task: Stable Diffusion 1.x, 2.x, XL or 3.5, Flux.1.
        adapters: One or several whose layers have the denoiser's sizes.
        image_encoder: A CLIP vision model with projection, or SigLIP's; None takes the pipeline's.
        image_processor: Its preprocessing; None takes the pipeline's.
        made: The class of what is returned.

    Raises:
        ModelError: The model is of another kind, something is attached already, sizes differ, or
            attention is sliced or fused.
    """
    unet, joint = checked_denoiser(pipe)
    if hook_of(unet) is not None:
        raise ModelError(
            "an adapter is attached already", where="pipeline", fix="Call detach first."
        )
    if not adapters:
        raise ArgumentError("is missing", where="adapter", fix="Give at least one.")
    encoding = ImageEncoding(
        image_encoder or getattr(pipe, "image_encoder", None),
        image_processor or getattr(pipe, "feature_extractor", None),
    )
    for adapter in adapters:
        check_fits(adapter, unet)
        check_encoder(adapter, encoding.encoder)
    one = Scale(lambda _layer, _progress: 1.0)
    prompts = [ActiveAdapter(adapter, Slot(adapter.layers()), one) for adapter in adapters]
    for prompt in prompts:
        prompt.place(unet.device, unet.dtype)
    before = dict(unet.attn_processors)  # diffusers takes a dict only if it names every layer
    slots = [prompt.slot for prompt in prompts]
    mine = _processors(unet, slots, joint)
    layers = transformer_layers(unet, slots) if joint else unet_layers(unet)
    unet.set_attn_processor({name: mine.get(name, old) for name, old in before.items()})
    homes = [(unet.get_submodule(n.removesuffix(".processor")), p) for n, p in mine.items()]
    hook = ImagePromptHook(pipe, prompts, layers, homes, before)
    set_hook(unet, _HOOK, hook)
    # words are for fusion alone: finding them tokenizes every prompt once more
    fuses = any(adapter.fusion is not None for adapter in adapters)
    watch_prompts(pipe, hook.encoded, hook.words if fuses else None)
    hook.attachment = attachment = made(pipe, hook, encoding)
    return attachment


def detach(pipe: Any) -> None:
    """Undo `attach` exactly.

    Raises:
        ModelError: Nothing is attached.
    """
    denoiser = denoiser_of(pipe)
    hook = hook_of(denoiser)
    if hook is None:
        raise ModelError("no adapter is attached", where="pipeline")
    for undo in reversed(hook.on_detach):
        undo()
    forget_prompts(pipe)
    for name, processor in hook.before.items():
        # one by one: stock counts the layers of a projection that was loaded meanwhile too
        denoiser.get_submodule(name.removesuffix(".processor")).set_processor(processor)
    for name in (LEVERS_HOOK, _HOOK):
        set_hook(denoiser, name)


def set_hook(denoiser: Any, name: str, hook: ModelHook | None = None) -> bool:
    """Put a hook in place of the one with its name, or none; whether there was one.

    `enable_model_cpu_offload` unwraps and wraps `forward` again after every call of the pipeline,
    and so drops what was put around its wrapper, or brings back what was taken out from under it.
    So that comes off meanwhile, and goes back around what is there.
    """
    offloading = getattr(denoiser, "_hf_hook", None)
    if offloading is not None:
        remove_hook_from_module(denoiser)
    try:
        registry = HookRegistry.check_if_exists_or_initialize(denoiser)
        if found := registry.get_hook(name) is not None:  # a second of one name is refused
            registry.remove_hook(name, recurse=False)
        if hook is not None:
            registry.register_hook(hook, name)
    finally:
        if offloading is not None:
            add_hook_to_module(denoiser, offloading)
    return found


def hook_of(unet: Any) -> ImagePromptHook | None:
    """What hands a denoiser its image tokens, if something is attached."""
    registry = getattr(unet, "_diffusers_hook", None)
    hook = None if registry is None else registry.get_hook(_HOOK)
    return hook if isinstance(hook, ImagePromptHook) else None


def _processors(denoiser: Any, slots: list[Slot], joint: bool) -> dict[str, Any]:
    """A processor for each layer that has an image branch or a low-rank change."""
    touched = {number for slot in slots for number in slot.weights}
    return {
        name: JointAttention(number, slots, before, text_first=name.startswith("single"))
        if joint
        else DecoupledAttention(number, slots, attended)
        for number, (name, before) in enumerate(denoiser.attn_processors.items())
        if number in touched
    }


def checked_denoiser(pipe: Any) -> tuple[Any, bool]:
    """The denoiser of a pipeline, and whether it is a transformer."""
    joint = getattr(pipe, "unet", None) is None and hasattr(pipe, "transformer")
    denoiser = checked_transformer(pipe) if joint else _checked_unet(pipe)
    named = "transformer" if joint else "UNet"
    if any(hasattr(processor, "to_k_ip") for processor in denoiser.attn_processors.values()):
        raise ModelError(
            "has an adapter of load_ip_adapter",
            where="pipeline",
            fix="ipdiverse.diversify(pipe) takes it over; or call pipe.unload_ip_adapter() first.",
        )
    if denoiser.device.type == "meta":
        raise ModelError(
            "is offloaded layer by layer",
            where=named,
            fix="Call enable_model_cpu_offload in place of enable_sequential_cpu_offload.",
        )
    check_caches(denoiser)
    for name in attention_layers(denoiser).values():
        attention = denoiser.get_submodule(name)
        if getattr(attention, "fused_projections", False):
            fix = f"Call {named.lower()}.unfuse_qkv_projections()."
            raise ModelError("query, key and value are fused", where=name, fix=fix)
        if not joint:
            _check_attention(attention, name)
    return denoiser, joint


def _checked_unet(pipe: Any) -> Any:
    """The UNet of a pipeline, of a kind that adapters can be attached to."""
    unet = getattr(pipe, "unet", None)
    if unet is None or not hasattr(unet, "attn_processors"):
        raise ModelError(
            "has no UNet with attention processors",
            where=type(pipe).__name__,
            expected="a pipeline of Stable Diffusion 1.x, 2.x, XL or 3.x, of Kolors or Flux.1",
        )
    if any(word in type(unet).__name__ for word in _MOVING):
        raise ModelError(
            "draws videos, and image prompts have no place in its layers of motion",
            where=type(pipe).__name__,
            fix="Draw images with a Stable Diffusion pipeline; AnimateDiff has a load_ip_adapter "
            "of its own, which goes on without variety.",
        )
    if type(pipe).__name__.startswith(_SEVERAL_PROMPTS):
        raise ModelError(
            "draws one image with several prompts, and the image prompt has a place in one",
            where=type(pipe).__name__,
            fix="Use a text-to-image, image-to-image or inpainting pipeline.",
        )
    # an attribute: diffusers sets it without the entry of the config
    projected = getattr(unet.config, "encoder_hid_dim_type", None)
    # Kolors' own narrows ChatGLM's text, which has nothing to do with images; load_ip_adapter's
    # goes with its processors
    if projected not in (None, "text_proj", "ip_image_proj"):
        raise ModelError(
            "already projects another prompt",
            where="UNet",
            found=f"encoder_hid_dim_type {projected!r}",
        )
    return unet


def _check_attention(attention: Any, name: str) -> None:
    if "Sliced" in type(attention.processor).__name__:  # ours cannot slice: it would be lost
        raise ModelError(
            "attention is sliced",
            where=name,
            fix="Call pipe.disable_attention_slicing(), then attach.",
        )
    # stock processors handle these; ours would silently leave them out
    unusual = [
        part
        for part in ("added_kv_proj_dim", "norm_cross", "group_norm", "spatial_norm", "norm_q")
        if getattr(attention, part, None)
    ]
    if unusual or not hasattr(attention, "to_q"):
        raise ModelError(
            "attention of a kind that image prompts do not support",
            where=name,
            found=", ".join(unusual) or type(attention).__name__,
        )
