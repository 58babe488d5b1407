"""Attach an adapter to a stock pipeline, and take it off again, both exactly.

Two things change while attached: each cross-attention layer's processor, and one hook at the
UNet's boundary that adds the image tokens to the text. The pipeline itself stays stock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers.hooks import HookRegistry, ModelHook

from ipdiverse.adapter.model import ImagePromptAdapter, cross_attention_layers, layer_widths
from ipdiverse.errors import ArgumentError, ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from PIL import Image
    from torch import Tensor

_HOOK = "ipdiverse.image_prompt"


class ImagePromptHook(ModelHook):
    """Adds image tokens at every UNet call; projects them once per reference.

    The pipeline's batch is (branches × items): unconditional items first when it guides.
    """

    def __init__(self, adapter: ImagePromptAdapter, processors_before: dict[str, Any]) -> None:
        super().__init__()
        self.adapter, self.processors_before = adapter, processors_before
        self.positive: Tensor | None = None
        self.negative: Tensor | None = None
        self.pass_through = False

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Replace the text by `(text, [image_tokens])`."""
        if self.pass_through:
            return args, kwargs
        text = kwargs["encoder_hidden_states"]
        kwargs["encoder_hidden_states"] = (text, [self._tokens(text)])
        return args, kwargs

    def _tokens(self, text: Tensor) -> Tensor:
        if self.positive is None or self.negative is None:
            raise ArgumentError("no reference was set", where="adapter", fix="Call set_reference.")
        items, batch = len(self.positive), len(text)
        if batch == items:
            return self.positive.to(text)
        if batch == 2 * items:
            return torch.cat([self.negative.expand(items, -1, -1), self.positive]).to(text)
        raise ArgumentError(
            "the number of references does not fit the batch",
            where="adapter",
            expected=f"{items} or {2 * items} items in the UNet's batch",
            found=batch,
            fix="Give one reference per item: set_reference(images) with one entry per output.",
        )


class Attachment:
    """An adapter on a pipeline: set its reference and scale here.

    Args:
        pipe: The pipeline.
        adapter: The adapter on it.
        hook: What passes image tokens on.
    """

    def __init__(
        self, pipe: StableDiffusionPipeline, adapter: ImagePromptAdapter, hook: ImagePromptHook
    ) -> None:
        self.pipe: Any = pipe  # diffusers types its components as None
        self.adapter, self._hook = adapter, hook
        self._cache: dict[bytes, Tensor] = {}

    @torch.no_grad()
    def set_reference(self, images: Sequence[Image.Image]) -> None:
        """Prompt every item with its own image.

        Args:
            images: One per output of the next call, in order; equal ones are encoded once.
        """
        pixels = [self._pixels(image) for image in images]
        embeds = torch.cat([self._encode(p) for p in pixels])
        self._hook.positive = self.adapter.tokens(embeds)
        self._hook.negative = self.adapter.tokens(self._unconditional(pixels[0]))

    def set_scale(self, scale: float) -> None:
        """Weight of the image branch, 0..1 in practice; 0 is text alone, exactly."""
        for layer in self.adapter.layers().values():
            layer.scale = scale

    def set_pass_through(self, on: bool) -> None:
        """Whether the caller passes `(text, [image_tokens])` itself, as training does."""
        self._hook.pass_through = on

    def _pixels(self, image: Image.Image) -> Tensor:
        return self.pipe.feature_extractor(image, return_tensors="pt").pixel_values

    def _encode(self, pixels: Tensor) -> Tensor:
        """Image embeddings of one image, from the cache if it was seen before."""
        key = pixels.numpy().tobytes()
        if key not in self._cache:
            encoder = self.pipe.image_encoder
            pixels = pixels.to(encoder.device, encoder.dtype)
            self._cache[key] = image_embeds(encoder, pixels, self.adapter.kind)
        return self._cache[key]

    def _unconditional(self, pixels: Tensor) -> Tensor:
        """What stock diffusers uses: a zero embedding (base), or a zero image's states (plus)."""
        if self.adapter.kind == "base":
            return torch.zeros_like(self._encode(pixels))
        return self._encode(torch.zeros_like(pixels))


def image_embeds(encoder: torch.nn.Module, pixels: Tensor, kind: str) -> Tensor:
    """What an adapter of this kind reads from the image encoder.

    Returns:
        base: the pooled projection, (batch, clip_dim); plus: the penultimate hidden states,
        (batch, patches, clip_dim).
    """
    if kind == "base":
        return encoder(pixels).image_embeds
    return encoder(pixels, output_hidden_states=True).hidden_states[-2]


def attach(pipe: StableDiffusionPipeline, adapter: ImagePromptAdapter) -> Attachment:
    """Put an adapter on a stock pipeline.

    Args:
        pipe: A Stable Diffusion pipeline with an image encoder and a feature extractor.
        adapter: An adapter whose layers have the UNet's sizes.

    Raises:
        ModelError: Something is attached already, the pipeline has no image encoder, or sizes
            differ.
    """
    unet = pipe.unet
    registry = HookRegistry.check_if_exists_or_initialize(unet)
    if registry.get_hook(_HOOK) is not None:
        raise ModelError(
            "an adapter is attached already", where="pipeline", fix="Call detach first."
        )
    if pipe.image_encoder is None or pipe.feature_extractor is None:
        raise ModelError(
            "has no image encoder",
            where=getattr(pipe, "name_or_path", "") or "pipeline",
            fix="Save the base with an image_encoder and a feature_extractor.",
        )
    _check_fit(adapter, unet)
    _check_encoder(adapter, pipe)
    adapter.to(unet.device, unet.dtype).eval()
    names = {name: number for number, name in cross_attention_layers(unet).items()}
    before = dict(unet.attn_processors)
    unet.set_attn_processor(
        {n: adapter.ip_adapter[str(names[n])] if n in names else p for n, p in before.items()}
    )
    hook = ImagePromptHook(adapter, before)
    registry.register_hook(hook, _HOOK)
    return Attachment(pipe, adapter, hook)


def detach(pipe: StableDiffusionPipeline) -> None:
    """Undo `attach` exactly.

    Raises:
        ModelError: Nothing is attached.
    """
    registry = HookRegistry.check_if_exists_or_initialize(pipe.unet)
    hook = registry.get_hook(_HOOK)
    if not isinstance(hook, ImagePromptHook):
        raise ModelError("no adapter is attached", where="pipeline")
    pipe.unet.set_attn_processor(dict(hook.processors_before))
    registry.remove_hook(_HOOK, recurse=False)


def _check_fit(adapter: ImagePromptAdapter, unet: UNet2DConditionModel) -> None:
    mine = {
        number: (layer.to_k_ip.in_features, layer.to_k_ip.out_features)
        for number, layer in adapter.layers().items()
    }
    theirs = layer_widths(unet)
    if mine != theirs:
        different = sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))
        first = different[0]
        raise ModelError(
            f"layer {first} does not fit this UNet",
            where="adapter",
            expected=f"(tokens, hidden) {theirs.get(first, 'no such layer')}",
            found=mine.get(first, "no such layer"),
            fix="It was trained for another base model.",
        )


def _check_encoder(adapter: ImagePromptAdapter, pipe: Any) -> None:
    config = pipe.image_encoder.config
    width = config.projection_dim if adapter.kind == "base" else config.hidden_size
    if adapter.clip_dim != width:
        raise ModelError(
            "does not fit this image encoder",
            where="adapter",
            expected=f"embeddings of width {width}",
            found=adapter.clip_dim,
            fix="It was trained for another image encoder.",
        )
