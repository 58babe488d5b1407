"""From references to image tokens; every distinct image goes through the encoder once."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ipdiverse.adapter.imagine import SceneBank
from ipdiverse.adapter.reference import (
    Reference,
    ReferenceTokens,
    RegionMask,
    check_parts,
    combine_embeds,
    mask_weights,
)
from ipdiverse.errors import ArgumentError, ModelError
from ipdiverse.writing import tensors_hash

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ipdiverse.adapter.imagine import VariationSpace
    from ipdiverse.adapter.model import ImagePromptAdapter

_AXES = {"pooled": 2, "face": 2, "hidden": 3, "last": 3}
"""Of a reference's embeddings, (count, ...)."""
_REMEMBERED = 64
"""Images whose embeddings one encoder keeps."""

# of the process, not of an attachment: a pass of CLIP ViT-H takes seconds on a CPU
_ZERO_IMAGES: WeakKeyDictionary[torch.nn.Module, Tensor] = WeakKeyDictionary()
"""Each encoder's hidden states of a black image."""


class ImageEncoding:
    """An image encoder with its preprocessing, and what it saw; None if only embeddings come."""

    def __init__(self, encoder: Any, processor: Any) -> None:
        self.encoder, self.processor = encoder, processor
        self._seen: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def image(self, image: Image.Image) -> dict[str, Tensor]:
        """`pooled` (1, clip_dim) and `hidden` (1, patches, clip_dim) of one image."""
        key = _image_key(image)
        if key not in self._seen:
            encoded = self.images([image])
            if len(self._seen) == _REMEMBERED:
                self._seen.pop(next(iter(self._seen)))  # the oldest: dicts keep their order
            self._seen[key] = encoded
        return self._seen[key]

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """The same of several in one pass, (images, …); a training set is too large to keep."""
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
        # SigLIP pools its states in place of projecting them
        pooled, more = getattr(output, "image_embeds", None), {}
        if pooled is None:
            pooled, more = output.pooler_output, {"last": output.last_hidden_state}
        # the last layer but one, on which the authors trained `plus`
        return {"pooled": pooled, "hidden": output.hidden_states[-2]} | more

    def _checked(self) -> ImageEncoding:
        if self.encoder is None or self.processor is None:
            raise ModelError(
                "has no image encoder",
                where="pipeline",
                fix="Name one with --image-encoder. In Python: attach(…, image_encoder="
                "CLIPVisionModelWithProjection.from_pretrained('h94/IP-Adapter', subfolder="
                "'models/image_encoder'), image_processor=CLIPImageProcessor()), or references as "
                "embeds.",
            )
        return self


def text_tower(pipe: Any, width: int) -> tuple[Any, Any] | None:
    """The tokenizer and text encoder whose embeddings lie in an image encoder's space, if known.

    Of published bases SDXL has one, where its second text encoder and the image encoder are halves
    of one CLIP. Equal widths do not prove that: `fit` measures it.
    """
    for suffix in ("", "_2"):
        encoder = getattr(pipe, f"text_encoder{suffix}", None)
        config = getattr(encoder, "config", None)
        shared = getattr(config, "pooled_in_image_space", False) or hasattr(
            encoder, "text_projection"
        )
        if shared and getattr(config, "projection_dim", None) == width:
            return getattr(pipe, f"tokenizer{suffix}"), encoder
    # a preset's image encoder names the other half of its CLIP, if its files are at hand
    half = getattr(getattr(pipe, "image_encoder", None), "text_half", None)
    found = None if half is None else half()
    return found if found and found[1].config.projection_dim == width else None


@torch.no_grad()
def text_embeds(pipe: Any, tower: tuple[Any, Any] | None, texts: Sequence[str]) -> Tensor:
    """One embedding of each text, (texts, width); without a tower, of the base's own encoder."""
    tokenizer, encoder = tower or (pipe.tokenizer, pipe.text_encoder)
    own = any(encoder is part for part in pipe.components.values())
    # an encoder of the pipeline may be offloaded, and move itself to the device it executes on
    device = (getattr(pipe, "_execution_device", None) if own else None) or encoder.device
    found = []
    for text in texts:  # one by one, so that a text's embedding never depends on the others
        read = tokenizer(
            text,
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        )
        output = encoder(read.input_ids.to(device))
        embeds = getattr(output, "text_embeds", None)
        found.append((output.pooler_output if embeds is None else embeds).float().cpu())
    return torch.cat(found)


class Scenes:
    """Scenes of a variation space for the prompts of a pipeline."""

    def __init__(self, space: VariationSpace, pipe: Any) -> None:
        self.space, self._pipe = space, pipe
        self._tower = None
        if space.reads == "image":
            self._tower = text_tower(pipe, space.key_means.shape[1])
            if self._tower is None and space.bank.keys.shape[1]:
                raise ModelError(
                    "finds scenes with a text encoder that this base has not",
                    where="space",
                    fix="Fit one on this base: ipdiverse fit DATA --base … --out FILE.",
                )
        self._queries: dict[str, Tensor | None] = {}

    def query(self, prompt: str) -> Tensor | None:
        """What the bank is asked for a prompt; None asks for any scene."""
        if prompt not in self._queries:
            known = prompt.strip() and self.space.bank.keys.shape[1]
            embeds = text_embeds(self._pipe, self._tower, [prompt])[0] if known else None
            asked = None if embeds is None else self.space.keys_of(embeds, prompts=True)
            self._queries[prompt] = asked
        return self._queries[prompt]

    def share(self, prompt: str) -> float:
        """How much of a scene may be imposed, as the bank has pictures near to a prompt."""
        return self.space.bank.candidates(self.query(prompt))[1]

    @torch.no_grad()
    def bank_of(
        self,
        images: Sequence[Image.Image],
        captions: Sequence[str],
        adapter: ImagePromptAdapter,
        encoding: ImageEncoding,
    ) -> SceneBank:
        """A bank of other pictures; without captions, where these are compared, any fits."""
        parameter, scenes, keys = next(adapter.parameters()), [], []
        for image in images:
            embeds = encoding.images([image])
            tokens = adapter.tokens(*[embeds[name].to(parameter) for name in adapter.reads])
            scenes.append(self.space.reduce(tokens.float().cpu()))
            keys.append(embeds["pooled"].float().cpu())
        if self.space.reads != "image":
            keys = [text_embeds(self._pipe, None, [caption]) for caption in captions if caption]
        known = len(keys) == len(images) and self.space.key_directions.shape[1] > 0
        found = self.space.keys_of(torch.cat(keys), prompts=False) if known else None
        empty = torch.zeros(len(images), 0)
        return SceneBank(torch.cat(scenes), empty if found is None else found, tuple(captions))

    def put(
        self, tokens: Tensor, strength: float, prompts: Sequence[str], seeds: Sequence[int]
    ) -> Tensor:
        """Each item's tokens, (items, references, tokens, width), in a scene for its prompt."""
        rows = []
        for row, prompt, seed in zip(tokens, prompts or [""] * len(seeds), seeds, strict=True):
            scene, share = self.space.drawn(self.query(prompt), seed)
            rows.append(self.space.recombined(row, scene, strength * share))
        return torch.stack(rows)


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
    """Project every item's references; equal ones once."""
    projected = _Projected(adapter, encoding, change)
    split = [projected.unstacked(reference) for reference in references]
    references = [reference for items, _ in split for reference in items]
    negative = negative or split[0][1]
    if change is not None:  # each image of a prompt is an item of its own, changed on its own
        repeats = max(1, change.items // len(references))
        references = [reference for reference in references for _ in range(repeats)]
    rows = [projected.tokens(reference, item) for item, reference in enumerate(references)]
    if len({row.shape for row in rows}) > 1:
        raise ArgumentError(
            "differ in number between the items of a batch",
            where="references",
            expected="as many for each item",
            found=" and ".join(str(n) for n in sorted({len(row) for row in rows})),
        )
    positive = torch.stack(rows)
    no_image = (
        projected.no_image(positive) if negative is None else projected.tokens(negative, None)
    )
    count = positive.shape[1]
    if len(no_image) not in (1, count):
        raise ArgumentError("must be one image", where="negative reference", found=len(no_image))
    no_image = no_image.expand(count, -1, -1)
    masked = [reference.masks is not None for reference in references]
    if not any(masked):
        return [ReferenceTokens(positive, no_image[None])]
    if not all(masked):
        raise ArgumentError("must be given for every item or for none", where="masks")
    for given in references:
        check_parts(count, given.combine, None, given.masks)
    return [
        ReferenceTokens(positive[:, i : i + 1], no_image[None, i : i + 1], _mask(references, i))
        for i in range(count)
    ]


class _Projected:
    """Tokens of references, each distinct one projected once."""

    def __init__(
        self, adapter: ImagePromptAdapter, encoding: ImageEncoding, change: EmbedChange | None
    ) -> None:
        self.adapter, self.encoding, self.change = adapter, encoding, change
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def tokens(self, reference: Reference, item: int | None) -> Tensor:
        """(references, tokens, width) of an item, or unchanged; one unless concatenated."""
        names = self.adapter.reads
        parts = [self._embeds(reference, name, i) for i, name in enumerate(names)]
        if len({len(part) for part in parts}) > 1:
            raise ArgumentError(
                "differ in number",
                where="reference",
                expected=f"as many {' as '.join(names)} embeddings",
                found=" and ".join(str(len(part)) for part in parts),
            )
        embeds = [combine_embeds(part, reference.combine, reference.weights) for part in parts]
        if self.change is not None and item is not None:
            embeds = [self.change(item, n, part) for n, part in zip(names, embeds, strict=True)]
        key = tensors_hash(dict(zip(names, embeds, strict=True)))
        if key not in self._known:
            self._known[key] = self._project(embeds)
        return self._known[key]

    def _project(self, embeds: list[Tensor]) -> Tensor:
        parameter = next(self.adapter.parameters())
        return self.adapter.tokens(*[e.to(parameter.device, parameter.dtype) for e in embeds])

    @torch.no_grad()
    def no_image(self, positive: Tensor) -> Tensor:
        """What stands for "no image", as in the original: zeros, or a zero image's states."""
        joint, encoder = self.adapter.joint, self.encoding.encoder
        if joint is not None and joint.style in {"sd3", "redux"}:
            return torch.zeros_like(positive[0, :1])  # as many states: attention counts them
        if joint is not None and joint.style == "xlabs" and encoder is not None:
            size = encoder.config.image_size
            return self._project([self.encoding.image(Image.new("RGB", (size, size)))["pooled"]])
        return self._project(
            [
                self.encoding.zero_image()
                if name == "hidden"
                else torch.zeros(1, self._width(name))
                for name in self.adapter.reads
            ]
        )

    def unstacked(self, reference: Reference) -> tuple[list[Reference], Reference | None]:
        """Each item's reference and the negative one, of embeddings as stock diffusers has them."""
        stacked, names = reference.embeds, self.adapter.reads
        if stacked is None:
            return [reference], None
        if len(stacked) != len(names):
            raise ArgumentError(
                "has the wrong number of embeddings",
                where="reference",
                expected=f"{len(names)}, of {' and '.join(names)}, for this adapter",
                found=len(stacked),
            )
        # faces as in stock's own guide, (2, count, 1, width)
        stacked = [
            part.squeeze(2) if name == "face" and part.ndim == 4 and part.shape[2] == 1 else part
            for name, part in zip(names, stacked, strict=True)
        ]
        over = {part.ndim - _AXES[name] for name, part in zip(names, stacked, strict=True)}
        rows = {len(part) for part in stacked}
        if over == {1} and rows == {1}:
            return [replace(reference, embeds=[part[0] for part in stacked])], None
        if over != {1} or len(rows) > 1 or rows.pop() % 2:
            return [reference], None  # as ours, or of a shape that `_checked` refuses
        halves = [part.chunk(2) for part in stacked]
        if not all(torch.equal(none, none[:1].expand_as(none)) for none, _ in halves):
            raise ArgumentError(
                "differ between items", where="reference: negative embeddings", expected="the same"
            )
        items = range(len(halves[0][1]))
        return (
            [replace(reference, embeds=[part[item] for _, part in halves]) for item in items],
            replace(reference, embeds=[none[0] for none, _ in halves], masks=None),
        )

    def _width(self, name: str) -> int:
        projection = self.adapter.image_proj
        return (projection.face_dim if name == "face" else projection.clip_dim) or 0

    def _checked(self, given: Tensor, name: str) -> Tensor:
        """Embeddings of the axes and the width that the adapter reads."""
        if given.ndim != _AXES[name] or given.shape[-1] != self._width(name):
            own = f"count, {'patches, ' if _AXES[name] == 3 else ''}{self._width(name)}"
            raise ArgumentError(
                "has the wrong shape",
                where=f"reference: {name} embeddings",
                expected=f"({own}), or stock diffusers' (2 · items, {own})",
                found=tuple(given.shape),
            )
        return given

    def _embeds(self, reference: Reference, name: str, position: int) -> Tensor:
        if reference.embeds is not None:
            return self._checked(reference.embeds[position], name)
        if name == "face":
            if reference.faces is None:
                raise ArgumentError(
                    "needs face embeddings",
                    where=f"a {self.adapter.kind} adapter",
                    fix="Give --faces FILE; in Python Reference(faces=…): an array, or a file by "
                    "`load_face_embeddings`.",
                )
            return self._checked(reference.faces, name)
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
    """A hash of what the encoder will read, so also of the mode: palette and transparency."""
    pixels = torch.from_numpy(np.array(image.convert("RGBA")))
    return tensors_hash({image.mode: pixels})
