"""What a user asks for: one frozen value that decides every pixel."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields

from ipdiverse.base.bases import CRITTERS
from ipdiverse.base.memory import Dtype, MemoryOptions, Offload
from ipdiverse.dial import Levers
from ipdiverse.errors import ArgumentError, check_range, check_whole

MAX_IMAGES = 1024
MAX_STEPS = 1000
MAX_SIDE = 4096
MAX_WEIGHT = 1000

USED_WITH = {"strength": "init_image", "control_scale": "controlnet"}
"""Fields that change nothing without another."""
_SEVERAL = ("image", "prompt", "mask", "weights")
_WHOLE = ("n", "seed")
_MAYBE_WHOLE = (("steps", 1, MAX_STEPS), ("width", 8, MAX_SIDE), ("height", 8, MAX_SIDE))


@dataclass(frozen=True)
class Request(Levers):
    """Everything that decides the images of one call; levers are among it.

    Args:
        diversity: The dial, 0 (stock IP-Adapter) to 1; levers that are not at their defaults hold
            over its path. None leaves the adapter as it was trained.
        candidates: Begin so many images of each prompt and finish the `n` that differ most while
            they show the prompt; None begins no more than are finished.
        image: The reference image's file; several are one reference together.
        prompt: What to show; empty leaves everything to the reference. Several get `n` images each.
        n: How many images of each prompt, 1 to 1024.
        seed: Image i of a prompt depends on the seed and i alone, never on n.
        base: `critters`, a preset that `ipdiverse bases` lists, a hub id, a folder that diffusers
            saved, or a single `.safetensors` file.
        adapter: `diverse`, `plus` or `base` of critters, a preset's name, a file, a folder, or a
            hub id with the file's path behind it; empty is the base's own.
        image_encoder: Folder or hub id of the image encoder; empty takes the base's own.
        revision: Branch, tag or commit of the base's repository; empty takes the preset's.
        safety_checker: Open the base with its safety checker, if it has one.
        dtype: Precision of the base; `auto` is half precision where the device computes in it.
        offload: What waits in main memory while it does not run: nothing, whole models, or layers;
            `auto` is the fastest that fits.
        tiling: Decode large images in tiles; None does where memory asks for it.
        scale: Weight of the image prompt (λ); 0 is text alone, 1 the full reference, None the
            base's default.
        preset: How the scale varies over the layers: ComfyUI's weight types, or InstantStyle's
            `style` and `layout`; empty is the same everywhere.
        start: Share of the steps before which the image prompt is off.
        end: Share of the steps from which it is off.
        combine: Several images: `concat`, `average`, `weighted` or `subtract`.
        weights: For `weighted`, one for each image.
        mask: Where each image acts: one picture for each, white acts.
        negative_image: What guidance moves away from.
        faces: File of face embeddings, for adapters that read faces; without one, insightface
            finds the faces of the images.
        init_image: Start from this image (image-to-image), or inpaint it with `mask_image`.
        strength: How much of it is redone, 0 to 1.
        mask_image: What of `init_image` to paint anew: white.
        control_image: Pose, depth or edges for the ControlNet.
        controlnet: Folder or hub id of the ControlNet.
        control_scale: Its weight.
        width: In pixels; None takes the base's.
        height: In pixels; None takes the base's.
        steps: Denoising steps; None takes the base's default.
        guidance_scale: Classifier-free guidance; None takes the base's default.
        negative_prompt: What guidance moves away from.
    """

    diversity: float | None = None
    candidates: int | None = None
    image: tuple[str, ...] = ()
    prompt: tuple[str, ...] = ("",)
    n: int = 4
    seed: int = 0
    base: str = CRITTERS
    adapter: str = ""
    image_encoder: str = ""
    revision: str = ""
    safety_checker: bool = True
    dtype: Dtype = "auto"
    offload: Offload = "auto"
    tiling: bool | None = None
    scale: float | None = None
    preset: str = ""
    start: float = 0.0
    end: float = 1.0
    combine: str = "concat"
    weights: tuple[float, ...] = ()
    mask: tuple[str, ...] = ()
    negative_image: str = ""
    faces: str = ""
    init_image: str = ""
    strength: float = 0.8
    mask_image: str = ""
    control_image: str = ""
    controlnet: str = ""
    control_scale: float = 1.0
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _SEVERAL:
            value = getattr(self, name)
            several = isinstance(value, (tuple, list))
            object.__setattr__(self, name, tuple(value) if several else (value,))
        if not self.prompt:
            object.__setattr__(self, "prompt", ("",))
        for name in _WHOLE:
            check_whole(name, getattr(self, name))
        self._check_texts()
        self._check_ranges()
        self._check_together()
        self.memory()

    @property
    def pictures(self) -> tuple[str, ...]:
        """Every file that is read as a picture; empty where there is none."""
        ones = (self.negative_image, self.init_image, self.mask_image, self.control_image)
        return (*self.image, *self.mask, *ones)

    def memory(self) -> MemoryOptions:
        """How the base is to be placed.

        Raises:
            ArgumentError: A word that is not among these.
        """
        return MemoryOptions(self.dtype, self.offload, self.tiling)

    def _check_texts(self) -> None:
        for field in fields(Request):
            value = getattr(self, field.name)
            if field.name in ("image", "prompt", "mask"):
                for part in value:
                    _check_text(field.name, part)
            elif field.type == "str":
                _check_text(field.name, value)

    def _check_ranges(self) -> None:
        check_range("n", self.n, 1, MAX_IMAGES)
        check_range("n × prompts", self.n * len(self.prompt), 1, MAX_IMAGES)
        if self.scale is not None:
            check_range("scale", self.scale, 0, 10)
        check_range("start", self.start, 0, 1)
        check_range("end", self.end, self.start, 1)
        check_range("strength", self.strength, 0, 1)
        check_range("control_scale", self.control_scale, 0, 10)
        check_range("seed", self.seed, 0, 2**63 - 1)
        for weight in self.weights:
            check_range("weights", weight, -MAX_WEIGHT, MAX_WEIGHT)
        if self.guidance_scale is not None:
            check_range("guidance_scale", self.guidance_scale, 0, 100)
        if self.diversity is not None:
            check_range("diversity", self.diversity, 0, 1)
        if self.candidates is not None:
            check_whole("candidates", self.candidates)
            check_range("candidates", self.candidates, self.n, MAX_IMAGES)
        self._check_numbers()

    def _check_numbers(self) -> None:
        """What may be left to the base."""
        for name, low, high in _MAYBE_WHOLE:
            value = getattr(self, name)
            if value is not None:
                check_whole(name, value)
                check_range(name, value, low, high)
                if low == 8 and value % 8:
                    raise ArgumentError("is no multiple of 8", where=name, found=value)

    def _check_together(self) -> None:
        for name, needed in (
            ("mask_image", "init_image"),
            ("control_image", "controlnet"),
            ("controlnet", "control_image"),
        ):
            self._check_needs(name, needed)

    def check_used(self) -> None:
        """Refuse what would change nothing.

        The flags of a batch are a request too, and may be for some of its jobs alone.

        Raises:
            ArgumentError: Something would.
        """
        for name, needed in USED_WITH.items():
            self._check_needs(name, needed)

    def _check_needs(self, name: str, needed: str) -> None:
        default = getattr(type(self), name)
        if getattr(self, name) != default and not getattr(self, needed):
            raise ArgumentError(f"needs {needed}", where=name, fix=f"Give --{_flag(needed)}.")

    def command(self, out: str) -> str:
        """The shell command that repeats this request exactly."""
        parts = ["ipdiverse", "generate"]
        for field in fields(Request):
            value = getattr(self, field.name)
            if value is None or (value == field.default and field.name not in _ALWAYS):
                continue
            if isinstance(value, bool):
                parts.append(f"--{'' if value else 'no-'}{_flag(field.name)}")
                continue
            if isinstance(value, tuple) and field.name not in _SEVERAL:
                parts += [f"--{_flag(field.name)}", *map(str, value)]
                continue
            for one in value if isinstance(value, tuple) else (value,):
                parts.append(f"--{_flag(field.name)}={shlex.quote(str(one))}")
        return " ".join([*parts, f"--out={shlex.quote(out)}"])


_ALWAYS = ("prompt", "n", "seed", "base", "adapter", "scale", "steps", "guidance_scale")
"""Flags that a recorded command states even when they are at their default."""


def _flag(name: str) -> str:
    return name.replace("_", "-")


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ArgumentError("is no text", where=name, expected="a str", found=repr(value))
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError("is not valid Unicode", where=name, found=ascii(value)) from error
