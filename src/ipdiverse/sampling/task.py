"""What a request opens: its base, and the stock pipeline of its task on it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ipdiverse.base.adapters import CRITTERS_SPACES, default_adapter
from ipdiverse.base.bases import Base, load_base, load_part
from ipdiverse.base.memory import arrange
from ipdiverse.base.pipelines import CRITTERS, native_side
from ipdiverse.base.presets import PRESETS, preset_files
from ipdiverse.errors import ArgumentError, ModelError, quoted
from ipdiverse.image_io import load_image, load_mask
from ipdiverse.loading import one_line, quiet

if TYPE_CHECKING:
    from ipdiverse.base.presets import HubFile
    from ipdiverse.sampling.request import Fit, Request

_HALF = 128
"""From this grey on, pipelines repaint (`VaeImageProcessor` with `do_binarize`)."""

_FAR = 0.074
"""Share of an embedding outside the directions of critters' own (`is_far`)."""
_SMALL_WORDS = {"and", "are", "as", "by", "for", "from", "is", "it", "or", "that", "to", "under"}
"""Nobody misses these, known or not."""


class Pictures(NamedTuple):
    """A request's decoded files by their names; one file may be both."""

    images: dict[str, Image.Image]
    masks: dict[str, Image.Image]


def decoded(request: Request) -> Pictures:
    """Decode what a request names (`IpdiverseError` where a picture or mask cannot be used)."""
    ones = (*request.image, request.negative_image, request.init_image, request.control_image)
    images = {file: load_image(Path(file)) for file in dict.fromkeys(ones) if file}
    masks = {file: load_mask(Path(file)) for file in request.mask_files}
    if request.mask_image:
        _repainted(masks[request.mask_image], request.mask_image)
    return Pictures(images, masks)


@dataclass(frozen=True)
class Task:
    """A pipeline for one request."""

    base: Base
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def arguments(self, batch: int) -> dict[str, Any]:
        """What a call for so many items is given besides prompts and generators."""
        return {name: [picture] * batch for name, picture in self.pictures.items()} | self.settings


def task_for(base: Base, request: Request, pictures: Pictures) -> Task:
    """Text-to-image, image-to-image or inpainting, with a ControlNet or without."""
    _check_strength(base, request)
    _check_channels(base, request)
    size = image_size(base, request)
    fitted: dict[str, Image.Image] = {}
    notes: list[str] = []
    settings: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    if request.width or request.height:
        settings |= {"width": size[0], "height": size[1]}
    if request.controlnet:
        extra["controlnet"] = _controlnet(base, request)
        settings["controlnet_conditioning_scale"] = request.control_scale
    kind = "Text2Image"
    if request.init_image:
        kind = "Inpainting" if request.mask_image else "Image2Image"
        picture = pictures.images[request.init_image]
        fitted["image"] = _fitted("init image", picture, size, request.fit, notes)
        settings["strength"] = request.strength
    if request.mask_image:
        mask = pictures.masks[request.mask_image]
        fitted["mask_image"] = _fitted("mask image", mask, size, request.fit, notes)
        every = getattr(base.pipe, "vae_scale_factor", 8)
        share = _repainted(fitted["mask_image"], request.mask_image, every)
        grey = "; grey is cut at half" if any(mask.histogram()[1:-1]) else ""
        notes.append(f"mask image: {100 * share:.3g} % of the picture is repainted{grey}")
    for file in request.mask:
        share = float(np.asarray(pictures.masks[file]).mean()) / 255
        notes.append(f"mask {quoted(file)}: its image acts on {100 * share:.3g} % of the picture")
    if request.control_image:
        plain = getattr(base.pipe, "unet", None) is not None and not request.init_image
        name = "image" if plain else "control_image"
        picture = pictures.images[request.control_image]
        fitted[name] = _fitted("control image", picture, size, request.fit, notes)
    notes += [note for text in request.prompt for note in _cut_words(base, "prompt", text)]
    notes += _cut_words(base, "negative prompt", request.negative_prompt)
    if request.negative_prompt and type(base.pipe).__name__.startswith("Flux"):
        notes.append("the negative prompt has no effect: Flux.1 is guided without one")
    notes += [f"memory: {base.plan.line()}"] if base.plan else []
    if base.name == CRITTERS:
        notes += _beyond_critters(base, request, pictures)
    if kind == "Text2Image" and not extra:
        return Task(base, fitted, settings, notes)
    return Task(replace(base, pipe=_pipeline(kind, base, extra)), fitted, settings, notes)


def _controlnet(base: Base, request: Request) -> Any:
    if getattr(base.pipe, "unet", None) is not None:
        return load_part("ControlNetModel", request.controlnet, base)
    if request.init_image:
        what, fix = "has no ControlNet with an init image", "Leave one of them out."
        raise ArgumentError(what, where=base.name, fix=fix)
    kind = type(base.pipe.transformer).__name__.replace("Transformer2D", "ControlNet")
    return load_part(kind, request.controlnet, base)


def _cut_words(base: Any, name: str, prompt: str) -> list[str]:
    """A note if a prompt is longer than the text encoder reads."""
    tokenizers = [getattr(base.pipe, f"tokenizer{end}", None) for end in ("", "_2", "_3")]
    # where there are several, no word is lost that one of them reads
    tokenizer = max(filter(None, tokenizers), key=lambda one: one.model_max_length)
    limit = tokenizer.model_max_length
    with quiet():
        ids = tokenizer(prompt).input_ids
    if len(ids) <= limit:
        return []
    cut = tokenizer.decode(ids[limit - 1 : -1])
    return [f"the {name} is longer than {limit} tokens; cut: {cut!r}"]


def _beyond_critters(base: Base, request: Request, pictures: Pictures) -> list[str]:
    """One note where references or words are beyond the embedded model."""
    shown = [pictures.images[file] for file in request.image]
    words = dict.fromkeys(re.findall(r"[^\W\d_]+", " ".join(request.prompt).lower()))
    # each word of its captions is one token, any other a row of letters
    tokens = base.pipe.tokenizer.tokenize
    unknown = [word for word in words if len(tokens(word)) > 1 and word not in _SMALL_WORDS]
    reasons = ["the reference looks like none"] if any(is_far(base, one) for one in shown) else []
    reasons += [f"it does not know {quoted(', '.join(unknown))}"] if unknown else []
    if not reasons:
        return []
    why = " and ".join(reasons)
    return [f"the bundled model draws critters alone, and {why}; base sd15-plus draws photos"]


def is_far(base: Base, image: Image.Image) -> bool:
    """Whether a picture is unlike all critters, by the encoder that reads references.

    Far is what has more outside the directions of critters' embeddings than nearly all held-out
    critters (7 of 300; 5 of 200 scaled or saved as JPEG, 3 of 72 that the model drew); of 103
    photographs of 20 things, 99 have.
    """
    from ipdiverse.adapter.attach.encoding import ImageEncoding
    from ipdiverse.adapter.imagine import load_space

    space = load_space(CRITTERS_SPACES / "base.safetensors")
    encoding = ImageEncoding(base.pipe.image_encoder, base.pipe.feature_extractor)
    return float(space.outside(encoding.images([image])["pooled"])) > _FAR


def image_size(base: Base, request: Request) -> tuple[int, int]:
    """Width and height of what is made, in pixels."""
    pipe: Any = base.pipe
    side = native_side(pipe)
    size = (request.width or side, request.height or side)
    # transformers read latents in squares of two by two, and Flux cuts what is left over
    step = 2 * pipe.vae_scale_factor if getattr(pipe, "unet", None) is None else 1
    for name, pixels in zip(("width", "height"), size, strict=True):
        if pixels % step:
            raise ArgumentError(f"is not a multiple of {step}", where=name, found=pixels)
    return size


def steps_of(base: Base, request: Request) -> int:
    """Denoising steps: the request's, or the base's default."""
    return base.steps if request.steps is None else request.steps


def _check_strength(base: Base, request: Request) -> None:
    steps = steps_of(base, request)
    if request.init_image and int(steps * request.strength) == 0:  # as diffusers counts them
        raise ArgumentError(
            f"redoes none of {steps} steps",
            where="strength",
            expected=f"1/{steps} or more",
            found=request.strength,
            fix="Raise --strength or --steps.",
        )


def _check_channels(base: Base, request: Request) -> None:
    """Refuse a UNet that is given more than latents, unless inpainting gives it that."""
    pipe: Any = base.pipe
    if getattr(pipe, "unet", None) is None:
        return
    takes, latents = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if takes == latents or (request.mask_image and takes == 2 * latents + 1):
        return
    paints = takes == 2 * latents + 1
    raise ModelError(
        "is a base for inpainting" if paints else "is a base of another task",
        where=base.name,
        expected=f"a UNet of {latents} input channels",
        found=takes,
        fix="Give --init-image and --mask-image." if paints else "Choose a text-to-image base.",
    )


def _pipeline(kind: str, base: Base, extra: dict[str, Any]) -> Any:
    import diffusers

    with quiet(), one_line(f"has no pipeline for {kind.lower()}", base.name):
        pipe = getattr(diffusers, f"AutoPipelineFor{kind}").from_pipe(base.pipe, **extra)
    pipe.set_progress_bar_config(disable=True)  # from_pipe does not take it over
    if base.plan is not None:  # what diffusers keeps of it belongs to the pipeline, not its parts
        arrange(pipe, base.plan)
    return pipe


def _fitted(
    name: str, image: Image.Image, size: tuple[int, int], how: Fit, notes: list[str]
) -> Image.Image:
    """The picture at the output's size, and a note where its shape is another."""
    if image.size == size:
        return image
    if abs(image.width * size[1] / image.height - size[0]) >= 1:
        shapes = "{}x{} is fitted to {}x{}".format(*image.size, *size)
        notes.append(f"{name}: {shapes} by {how}; --fit takes crop, pad or stretch")
    if how == "crop":
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    if how == "pad":  # what a mask says of the bars is that they are to be filled
        bars = "white" if image.mode == "L" else "black"
        return ImageOps.pad(image, size, Image.Resampling.LANCZOS, color=bars)
    return image.resize(size, Image.Resampling.LANCZOS)


def _repainted(mask: Image.Image, file: str, every: int = 1) -> float:
    """The share that a mask repaints; latents take one of every so many pixels of a row."""
    share = float((np.asarray(mask)[::every, ::every] >= _HALF).mean())
    if share == 0:
        thin = f" in areas of more than {every} px, or take another --fit" if every > 1 else ""
        raise ArgumentError(
            "the mask repaints nothing",
            where=file,
            expected="white, or grey from 128 on, where to repaint",
            found=f"a lightest grey of {mask.getextrema()[1]}",
            fix=f"Draw in white{thin}.",
        )
    if share == 1:
        raise ArgumentError(
            "the mask repaints everything",
            where=file,
            expected="black where the picture stays",
            found=f"a darkest grey of {mask.getextrema()[0]}",
            fix="Leave out --mask-image to redo the whole picture.",
        )
    return share


class LastBase:
    """Opens bases, and keeps the last one open for requests that can share it."""

    def __init__(self) -> None:
        self._base: Base | None = None
        self._opening: tuple[object, ...] | None = None

    def open(self, request: Request) -> Base:
        """A request's base."""
        wanted = opening(request)
        if self._base is None or self._opening != wanted:
            self._base = None  # two of them need not fit into memory
            self._base, self._opening = open_base(request), wanted
        return self._base


def open_base(request: Request) -> Base:
    """The base that a request names, placed as it asks."""
    encoder = request.adapter if request.adapter in PRESETS else None
    return load_base(
        request.base,
        revision=request.revision,
        safety_checker=request.safety_checker,
        encoder="" if request.image_encoder else encoder,
        memory=request.memory(),
    )


def opening(request: Request) -> tuple[object, ...]:
    """What decides how `open_base` opens a base: requests that agree can share one."""
    adapter = request.adapter or default_adapter(request.base)
    encoder = request.image_encoder or (adapter if adapter in PRESETS else "")
    return (request.base, encoder, request.revision, request.safety_checker, request.memory())


def needed_files(request: Request) -> list[HubFile]:
    """What a request takes from the hub for the presets that it names."""
    adapter = request.adapter or request.base
    encoder = "" if request.image_encoder else adapter if adapter in PRESETS else request.base
    checker = request.safety_checker
    few = request.few()
    files = preset_files(request.base, adapter, encoder, request.revision, checker=checker)
    return files if few is None else [*files, few.lora]


def settled(request: Request, base: Base) -> Request:
    """The request with what it leaves to the base filled in, so that its record repeats it."""
    few = request.few()
    usual = {} if few is None else {"steps": few.steps, "guidance_scale": few.guidance_scale}
    filled: dict[str, Any] = {
        name: usual.get(name, getattr(base, name))
        for name in ("steps", "scale", "guidance_scale")
        if getattr(request, name) is None
    }
    if base.plan is not None:
        filled |= {"dtype": base.plan.dtype, "tiling": base.plan.tiling}
    if request.base in PRESETS and not request.revision:
        filled["revision"] = PRESETS[request.base].base.revision
    return replace(request, **filled)
