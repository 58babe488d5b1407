"""From references to image tokens, and which text tokens are words.

Every distinct image goes through the encoder once. The UNet sees text states alone, and fusion must
not attend to padding: while an adapter with a fusion is attached, `pipe.encode_prompt` also notes
which tokens of the prompts it is given are words.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from ipdiverse.adapter.attach.hook import ImagePromptHook, ReferenceTokens
from ipdiverse.adapter.reference import Reference, RegionMask, combine_embeds, mask_weights
from ipdiverse.errors import ArgumentError, ModelError
from ipdiverse.writing import tensors_hash

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from ipdiverse.adapter.model import ImagePromptAdapter

_REMEMBERED = 64
"""Images whose embeddings one encoder keeps."""

# of the process, not of an attachment: a pass of CLIP ViT-H takes seconds on a CPU
_ZERO_IMAGES: WeakKeyDictionary[torch.nn.Module, Tensor] = WeakKeyDictionary()
"""Hidden states of a black image, once for each encoder of the process."""


class ImageEncoding:
    """An image encoder with its preprocessing, and what it has already seen.

    Args:
        encoder: A CLIP vision model with projection; None when only embeddings will be given.
        processor: Its preprocessing, PIL image to pixel values.
    """

    def __init__(self, encoder: Any, processor: Any) -> None:
        self.encoder, self.processor = encoder, processor
        self._seen: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def image(self, image: Image.Image) -> dict[str, Tensor]:
        """`pooled` (1, clip_dim) and `hidden` (1, patches, clip_dim) of one image."""
        key = _image_key(image)
        if key not in self._seen:
            pixels = self._checked().processor(image, return_tensors="pt").pixel_values
            while len(self._seen) >= _REMEMBERED:
                self._seen.pop(next(iter(self._seen)))
            self._seen[key] = self._encode(pixels)
        return self._seen[key]

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """The same of several, in one pass and not remembered: (images, …)."""
        pixels = self._checked().processor(list(images), return_tensors="pt").pixel_values
        return self._encode(pixels)

    @torch.no_grad()
    def zero_image(self) -> Tensor:
        """Hidden states of an image of zeros, (1, patches, clip_dim)."""
        encoder = self._checked().encoder
        if encoder not in _ZERO_IMAGES:
            size = encoder.config.image_size
            _ZERO_IMAGES[encoder] = self._encode(torch.zeros(1, 3, size, size))["hidden"]
        return _ZERO_IMAGES[encoder]

    def _encode(self, pixels: Tensor) -> dict[str, Tensor]:
        parameter = next(self.encoder.parameters())
        output = self.encoder(
            pixels.to(parameter.device, parameter.dtype), output_hidden_states=True
        )
        # the last layer but one: what the authors trained `plus` on
        return {"pooled": output.image_embeds, "hidden": output.hidden_states[-2]}

    def _checked(self) -> ImageEncoding:
        if self.encoder is None or self.processor is None:
            raise ModelError(
                "has no image encoder",
                where="pipeline",
                fix="Name one with --image-encoder; in Python give attach an image_encoder and an "
                "image_processor, or references as embeds.",
            )
        return self


class EmbedChange(Protocol):
    """What a lever makes of an item's image embeddings before they are projected."""

    items: int

    def __call__(self, item: int, name: str, embeds: Tensor) -> Tensor:
        """Changed embeddings of `name` (`pooled`, `hidden`) of an item."""
        ...


def encode_references(
    references: Sequence[Reference],
    negative: Reference | None,
    adapter: ImagePromptAdapter,
    encoding: ImageEncoding,
    change: EmbedChange | None = None,
) -> list[ReferenceTokens]:
    """Project every item's references; equal ones once.

    Args:
        references: One for each item.
        negative: What guidance moves away from; None is no image.
        adapter: Its projection.
        encoding: The image encoder.
        change: Of the items' embeddings; one reference then becomes one for each of its items.

    Raises:
        ArgumentError: Items have different numbers of references or masks, or lack what the
            adapter reads.
    """
    projected = _Projected(adapter, encoding)
    if change is None:
        rows = [projected.tokens(reference) for reference in references]
    else:
        repeats = max(1, change.items // len(references))
        references = [reference for reference in references for _ in range(repeats)]
        rows = [projected.tokens(r, (change, item)) for item, r in enumerate(references)]
    if len({row.shape for row in rows}) > 1:
        raise ArgumentError(
            "differ in number between the items of a batch",
            where="references",
            expected="as many for each item",
            found=" and ".join(str(n) for n in sorted({len(row) for row in rows})),
        )
    positive = torch.stack(rows)
    no_image = projected.no_image() if negative is None else projected.tokens(negative)
    if len(no_image) != 1:
        raise ArgumentError("must be one image", where="negative reference", found=len(no_image))
    masked = [reference.masks is not None for reference in references]
    if not any(masked):
        return [ReferenceTokens(positive, no_image[None])]
    if not all(masked):
        raise ArgumentError("must be given for every item or for none", where="masks")
    return [
        ReferenceTokens(positive[:, i : i + 1], no_image[None], _mask(references, i))
        for i in range(positive.shape[1])
    ]


class _Projected:
    """Tokens of references, each distinct one projected once."""

    def __init__(self, adapter: ImagePromptAdapter, encoding: ImageEncoding) -> None:
        self.adapter, self.encoding = adapter, encoding
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def tokens(
        self, reference: Reference, changed: tuple[EmbedChange, int] | None = None
    ) -> Tensor:
        """(references, tokens, width); one reference unless they are concatenated."""
        names = self.adapter.reads
        parts = [self._embeds(reference, name, i) for i, name in enumerate(names)]
        embeds = [combine_embeds(part, reference.combine, reference.weights) for part in parts]
        if changed is not None:
            change, item = changed
            embeds = [change(item, n, part) for n, part in zip(names, embeds, strict=True)]
        parameter = next(self.adapter.parameters())
        embeds = [part.to(parameter.device, parameter.dtype) for part in embeds]
        key = tensors_hash(dict(zip(names, embeds, strict=True)))
        if key not in self._known:
            self._known[key] = self.adapter.tokens(*embeds)
        return self._known[key]

    @torch.no_grad()
    def no_image(self) -> Tensor:
        """What stands for "no image", as in the original: zeros, or a zero image's states."""
        parameter = next(self.adapter.parameters())
        parts = []
        for name in self.adapter.reads:
            if name == "hidden":
                parts.append(self.encoding.zero_image())
            else:
                parts.append(torch.zeros(1, self._width(name)))
        return self.adapter.tokens(*[p.to(parameter.device, parameter.dtype) for p in parts])

    def _width(self, name: str) -> int:
        projection: Any = self.adapter.image_proj
        return projection.proj.in_features if name == "pooled" else projection.proj[0].in_features

    def _embeds(self, reference: Reference, name: str, position: int) -> Tensor:
        if reference.embeds is not None:
            return reference.embeds[position]
        if name == "face":
            if reference.faces is None:
                raise ArgumentError(
                    "needs face embeddings",
                    where=f"a {self.adapter.kind} adapter",
                    fix="Give --faces FILE; in Python Reference(faces=…): an array, or a file by "
                    "`load_face_embeddings`.",
                )
            return reference.faces
        if not reference.images:
            raise ArgumentError(
                "needs an image",
                where=f"a {self.adapter.kind} adapter",
                fix="Give --image FILE; in Python Reference([image]).",
            )
        return torch.cat([self.encoding.image(image)[name] for image in reference.images])


def _mask(references: Sequence[Reference], index: int) -> RegionMask:
    weights = [mask_weights(r.masks[index]) for r in references if r.masks is not None]
    if len({w.shape for w in weights}) > 1:
        raise ArgumentError("differ in size", where="masks", fix="Draw all at the output's size.")
    same = all(torch.equal(w, weights[0]) for w in weights)
    return RegionMask(weights[0][None] if same else torch.stack(weights))


def _image_key(image: Image.Image) -> str:
    """Of what the encoder will read; the palette and the transparency are part of it."""
    pixels = torch.from_numpy(np.array(image.convert("RGBA")))
    return tensors_hash({image.mode: pixels})


def watch_words(pipe: Any, hook: ImagePromptHook) -> None:
    """Note the words of every prompt that the pipeline encodes, if a fusion needs them."""
    fusing = any(prompt.adapter.fusion is not None for prompt in hook.prompts)
    original = getattr(pipe, "encode_prompt", None)
    if not fusing or original is None:
        return
    pipe.__dict__["encode_prompt"] = _Watched(pipe, hook, original)


def forget_words(pipe: Any) -> None:
    """Undo `watch_words`; what somebody else put there, before or since, stays."""
    watched = pipe.__dict__.get("encode_prompt")
    if isinstance(watched, _Watched):
        del pipe.__dict__["encode_prompt"]
        if watched.before is not None:
            pipe.__dict__["encode_prompt"] = watched.before


class _Watched:
    """A pipeline's `encode_prompt` that notes the words first."""

    def __init__(self, pipe: Any, hook: ImagePromptHook, original: Any) -> None:
        functools.update_wrapper(self, original)
        self.pipe, self.hook, self.original = pipe, hook, original
        self.signature = inspect.signature(original)
        self.before = pipe.__dict__.get("encode_prompt")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        self.hook.text_mask = text_mask(self.pipe, bound.arguments)
        return self.original(*args, **kwargs)


def text_mask(pipe: Any, arguments: dict[str, Any]) -> Tensor | None:
    """True where a token is a word or a mark of begin or end.

    Args:
        pipe: Whose tokenizer reads the prompts.
        arguments: Of `encode_prompt`.

    Returns:
        (branches × items, tokens), unconditional items first; None when the prompt was given as
        embeddings.
    """
    prompt = arguments.get("prompt")
    if prompt is None:
        return None
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    masks = [_words(pipe, prompts)]
    if arguments.get("do_classifier_free_guidance"):
        if arguments.get("negative_prompt_embeds") is not None:
            return None
        negative = arguments.get("negative_prompt") or ""
        negatives = [negative] if isinstance(negative, str) else list(negative)
        mask = _words(pipe, negatives)
        masks.insert(0, mask.expand(len(prompts), -1) if len(mask) == 1 else mask)
    repeats = arguments.get("num_images_per_prompt") or 1
    return torch.cat([mask.repeat_interleave(repeats, 0) for mask in masks])


def _words(pipe: Any, prompts: list[str]) -> Tensor:
    tokenizer = pipe.tokenizer if getattr(pipe, "tokenizer", None) else pipe.tokenizer_2
    convert = getattr(pipe, "maybe_convert_prompt", None)  # textual inversion's several vectors
    texts = [convert(text, tokenizer) for text in prompts] if convert else prompts
    return tokenizer(
        texts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).attention_mask.bool()
