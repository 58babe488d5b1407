"""Which stock pipeline a request needs, and what it is given besides the prompt."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipdiverse.base.bases import Base, load_part
from ipdiverse.base.memory import arrange
from ipdiverse.errors import ArgumentError, ModelError
from ipdiverse.image_io import load_image
from ipdiverse.loading import quiet

if TYPE_CHECKING:
    from PIL import Image

    from ipdiverse.sampling.request import Request


@dataclass(frozen=True)
class Task:
    """A pipeline for one request.

    Args:
        base: The base with the pipeline of this task; its parts are shared, not copied.
        pictures: Arguments that are one picture for each item of a batch.
        settings: Arguments that are the same for the whole batch.
        notes: What the user should know of what was drawn.
    """

    base: Base
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def arguments(self, batch: int) -> dict[str, Any]:
        """What a call for so many items is given besides prompts and generators."""
        return {name: [picture] * batch for name, picture in self.pictures.items()} | self.settings


def task_for(base: Base, request: Request) -> Task:
    """Text-to-image, image-to-image or inpainting, with a ControlNet or without.

    Raises:
        ArgumentError: So little of the picture is to be redone that no step would be.
        ModelError: The base has no pipeline for the task, or the ControlNet cannot be opened.
        ImageError: A picture is unusable.
    """
    _check_strength(base, request)
    size = image_size(base, request)
    pictures: dict[str, Image.Image] = {}
    settings: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    if request.width or request.height:
        settings |= {"width": size[0], "height": size[1]}
    if request.controlnet:
        extra["controlnet"] = load_part("ControlNetModel", request.controlnet, base)
        settings["controlnet_conditioning_scale"] = request.control_scale
    kind = "Text2Image"
    if request.init_image:
        kind = "Inpainting" if request.mask_image else "Image2Image"
        pictures["image"] = _picture(request.init_image, size)
        settings["strength"] = request.strength
    if request.mask_image:
        pictures["mask_image"] = _picture(request.mask_image, size).convert("L")
    if request.control_image:
        name = "control_image" if request.init_image else "image"
        pictures[name] = _picture(request.control_image, size)
    if kind == "Text2Image" and not extra:
        return Task(base, pictures, settings)
    return Task(replace(base, pipe=_pipeline(kind, base, extra)), pictures, settings)


def image_size(base: Base, request: Request) -> tuple[int, int]:
    """Width and height of what is made, in pixels."""
    pipe: Any = base.pipe
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return request.width or side, request.height or side


def _check_strength(base: Base, request: Request) -> None:
    steps = base.steps if request.steps is None else request.steps
    if request.init_image and int(steps * request.strength) == 0:  # as diffusers counts them
        raise ArgumentError(
            f"redoes none of {steps} steps",
            where="strength",
            expected=f"1/{steps} or more",
            found=request.strength,
            fix="Raise --strength or --steps.",
        )


def _pipeline(kind: str, base: Base, extra: dict[str, Any]) -> Any:
    import diffusers

    auto = getattr(diffusers, f"AutoPipelineFor{kind}")
    with quiet():
        try:
            pipe = auto.from_pipe(base.pipe, **extra)
        except (ValueError, TypeError) as error:
            raise ModelError(
                f"has no pipeline for {kind.lower()}", where=base.name, found=str(error)[:200]
            ) from error
    pipe.set_progress_bar_config(disable=True)
    if base.plan is not None:  # what diffusers keeps of it belongs to the pipeline, not its parts
        arrange(pipe, base.plan)
    return pipe


def _picture(file: str, size: tuple[int, int]) -> Image.Image:
    from PIL import Image

    image = load_image(Path(file))
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)
