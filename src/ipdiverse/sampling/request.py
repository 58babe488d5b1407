"""What a user asks for: one frozen value that decides every pixel. It is checked here."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from ipdiverse.base.adapters import check_adapter
from ipdiverse.base.bases import CRITTERS, check_part
from ipdiverse.base.memory import USUAL, Dtype, MemoryOptions, Offload, Quantize, check_quantize
from ipdiverse.base.pipelines import check_known, is_transformer
from ipdiverse.base.presets import PRESETS, FewSteps, few_steps_of
from ipdiverse.config import renamed
from ipdiverse.dial import OFF, RENAMED_LEVERS, Levers, current_names
from ipdiverse.errors import ArgumentError, check_range, check_whole
from ipdiverse.levers import LEVERS

MAX_IMAGES = 1024
MAX_STEPS = 1000
MAX_SIDE = 4096
MAX_WEIGHT = 1000
MAX_FAST = 3
Fit = Literal["crop", "pad", "stretch"]

USED_WITH = {"strength": "init_image", "control_scale": "controlnet"}
"""Fields that change nothing without another; in a batch a flag for all jobs may set them."""
_NEEDS = {"mask_image": "init_image", "control_image": "controlnet", "controlnet": "control_image"}
RENAMED = {"start": "start_at", "end": "end_at", **RENAMED_LEVERS}
"""Fields and levers of version 0.1 by their names of today."""
_SEVERAL = ("image", "prompt", "mask", "weights")


@dataclass(frozen=True)
class Request:
    """Everything that decides the images of one call.

    Args:
        image: The reference image's file; several are one reference together.
        prompt: What to show; empty leaves everything to the reference. Several get `n` images each.
        diversity: The dial, 0 (stock IP-Adapter) to 1. Levers that you set override it. None leaves
            the adapter as it was trained.
        n: How many images of each prompt, 1 to 1024; `-n` for short.
        candidates: Begin this many images of each prompt and finish the `n` of them that differ
            most and show the prompt best. None finishes all that are begun.
        seed: Image i of a prompt depends on the seed and i alone, never on n.
        base: `critters`, a preset that `ipdiverse bases` lists, a hub id, a folder that diffusers
            saved, or a single `.safetensors` file.
        adapter: `diverse`, `plus` or `base` of critters, a preset's name, a file, a folder, or a
            hub id followed by the file's path; empty takes the base's own.
        image_encoder: Folder or hub id of the image encoder; empty takes the base's own.
        revision: Branch, tag or commit of the base's repository; empty takes the preset's.
        safety_checker: Open the base with its safety checker, if it has one.
        dtype: Precision of the base; `auto` is half precision where the device computes in it.
        offload: What waits in main memory while it does not run: nothing, whole models, or layers.
            `auto` is the fastest that fits.
        tiling: Decode large images in tiles; None does so where memory is short.
        quantize: Weights of Flux.1 and SD 3.5 in 8 bits (torchao) or 4 (bitsandbytes, on CUDA).
        scale: Weight of the image prompt (λ): 0 is text alone, 1 the full reference. None takes the
            base's default.
        preset: How the scale varies over the layers: ComfyUI's weight types, or InstantStyle's
            `style` and `layout`. Empty is the same everywhere.
        start_at: Fraction of the steps before the image prompt switches on.
        end_at: Fraction of the steps after which the image prompt is off.
        combine: How several images become one reference: `concat`, `average`, `weighted` or
            `subtract`.
        weights: For `weighted`, one for each image.
        mask: Where each image acts: one picture for each, which acts where it is white, and in part
            where it is grey. Transparency is refused, in `mask_image` too.
        negative_image: An image that guidance moves away from.
        space: A variation space (`ipdiverse fit`), as a file or a hub id; the dial then gives each
            image a scene of its own. Empty takes the package's own, if one fits the adapter.
        scenes: Folder of pictures from which scenes are drawn in place of the space's own, each
            with a caption in a text file of the same name or without.
        faces: File of face embeddings, for adapters that read faces; without one, insightface
            finds the faces in the images.
        init_image: Start from this image (image-to-image), or inpaint it with `mask_image`.
        strength: How much of `init_image` is redone, 0 to 1.
        mask_image: Which part of `init_image` to repaint: white; grey is cut at half.
        fit: How `init_image`, `mask_image` and `control_image` of another shape than the output are
            made to fit: `crop` cuts off what is too long, `pad` adds black bars, which a mask
            repaints, and `stretch` distorts.
        control_image: Pose, depth or edges for the ControlNet.
        controlnet: Folder or hub id of the ControlNet.
        control_scale: Weight of the ControlNet.
        width: In pixels; None takes the base's.
        height: In pixels; None takes the base's.
        steps: Denoising steps; None takes the base's default.
        guidance_scale: Classifier-free guidance; None takes the base's default.
        negative_prompt: Text that guidance moves away from.
        fast: 0 to 3: how much of the work to leave out, at a small loss. 0 is none, exactly; the
            table in `docs/inference.md` has what each level saves and loses.
        few_steps: `lcm`, `lightning`, `hyper` or `tcd`: draw in 4 to 8 steps with the preset's LoRA
            of that name, its scheduler, steps and guidance. Empty draws without.
        levers: What changes sampling to gain variety.

    Raises:
        ArgumentError: A value is out of range, or needs another that is missing.
    """

    image: tuple[str, ...] = ()
    prompt: tuple[str, ...] = ()  # becomes ("",): flags append to what stands here
    diversity: float | None = None
    n: int = 4
    candidates: int | None = None
    seed: int = 0
    base: str = CRITTERS
    adapter: str = ""
    image_encoder: str = ""
    revision: str = ""
    safety_checker: bool = True
    dtype: Dtype = "auto"
    offload: Offload = "auto"
    tiling: bool | None = None
    quantize: Quantize = "none"
    scale: float | None = None
    preset: str = ""
    start_at: float = 0.0
    end_at: float = 1.0
    combine: str = "concat"
    weights: tuple[float, ...] = ()
    mask: tuple[str, ...] = ()
    negative_image: str = ""
    space: str = ""
    scenes: str = ""
    faces: str = ""
    init_image: str = ""
    strength: float = 0.8
    mask_image: str = ""
    fit: Fit = "crop"
    control_image: str = ""
    controlnet: str = ""
    control_scale: float = 1.0
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str = ""
    fast: int = 0
    few_steps: str = ""
    levers: Levers = field(default=OFF)

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str = "request") -> Request:
        """From flat values, as job files, studies, records and keyword arguments have them.

        Names of version 0.1 are understood, with a warning that gives the new ones.

        Args:
            values: Fields of a request and levers, by name.
            where: What holds them, for the warning.

        Raises:
            ArgumentError: As the class says.
            TypeError: There is no such field or lever.
        """
        found = current(values, where)
        levers = {name: found.pop(name) for name in LEVERS if name in found}
        return cls(**found, levers=Levers(**levers))

    def stated(self, *always: str) -> dict[str, Any]:
        """Flat values that are not at their defaults: `Request.of` makes the same request of them.

        Args:
            always: Fields that are stated even when they are at their default.
        """
        usual = type(self)().flat()
        return {
            name: value
            for name, value in self.flat().items()
            if name in always or name not in usual or value != usual[name]
        }

    def flat(self) -> dict[str, Any]:
        """Every field and the levers that are on, by name, as records have them."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "levers"}
        return own | dict(self.levers)

    def __post_init__(self) -> None:
        for name in _SEVERAL:
            value = getattr(self, name)
            several = isinstance(value, (tuple, list))
            object.__setattr__(self, name, tuple(value) if several else (value,))
        if not self.prompt:
            object.__setattr__(self, "prompt", ("",))
        self._check_texts()
        self._check_ranges()
        self._check_needs(_NEEDS)
        self.memory()  # refuses words that it does not know

    @property
    def picture_files(self) -> tuple[str, ...]:
        """Every file that is read as a picture, once."""
        ones = (self.negative_image, self.init_image, self.control_image)
        return tuple(dict.fromkeys(file for file in (*self.image, *ones, *self.mask_files) if file))

    @property
    def mask_files(self) -> tuple[str, ...]:
        """Those of them that are read as masks, once."""
        return tuple(dict.fromkeys(file for file in (*self.mask, self.mask_image) if file))

    def few(self) -> FewSteps | None:
        """The LoRA that draws in few steps, if one is asked for."""
        return few_steps_of(self.few_steps, self.base) if self.few_steps else None

    def memory(self) -> MemoryOptions:
        """How the base is placed (`ArgumentError` for an unknown word)."""
        wishes = (self.dtype, self.offload, self.tiling, self.quantize)
        return USUAL if wishes == ("auto", "auto", None, "none") else MemoryOptions(*wishes)

    def check(self, *, opened: bool = False) -> None:
        """Refuse what could not be drawn, as far as that is known before anything is opened.

        Args:
            opened: The base is open already, whatever it is called.

        Raises:
            IpdiverseError: An unknown name, something missing, or something that has no effect.
        """
        self.check_files()
        self._check_needs(USED_WITH)
        if not opened:
            check_known(self.base)
            if self.base in PRESETS:  # before gigabytes are downloaded
                check_quantize(self.quantize, self.base, transformer=is_transformer(self.base))
        self.few()
        check_adapter(self.base, self.adapter)
        for part in (self.image_encoder, self.controlnet):
            if part:
                check_part(part)
        if self.faces and self.reads_faces is False:
            raise self.faces_unread()
        if self.faces and not Path(self.faces).is_file():
            raise ArgumentError("no such file", where=self.faces, fix="Check the path.")
        # these import torch, which takes seconds: last
        from ipdiverse.adapter.reference import check_parts
        from ipdiverse.adapter.scale import check_preset

        if self.preset:
            check_preset(self.preset, "preset")
        count = len(self.image) or None
        check_parts(count, self.combine, self.weights or None, self.mask or None, "mask")

    @property
    def reads_faces(self) -> bool | None:
        """Whether the adapter reads face embeddings; None where only its file says."""
        preset = PRESETS.get(self.adapter or self.base)
        return None if preset is None else preset.faces

    def faces_unread(self) -> ArgumentError:
        """The error for face embeddings that would have no effect."""
        faces = ", ".join(name for name, preset in PRESETS.items() if preset.faces)
        fix = f"Leave out --faces, or name an adapter that reads them with --adapter ({faces})."
        found = self.adapter or self.base
        return ArgumentError("are not read by this adapter", where="faces", found=found, fix=fix)

    def check_files(self) -> None:
        """Refuse a request without a reference, and names of files that are empty."""
        if not self.image and not self.faces:
            raise ArgumentError("is missing", where="image", fix="Give a reference: --image FILE.")
        for name in ("image", "mask"):  # empty as of a variable that is not set
            if not all(file.strip() for file in getattr(self, name)):
                raise ArgumentError("is empty", where=name, expected="a file")

    def _check_texts(self) -> None:
        lists = [
            (name, text) for name in ("image", "prompt", "mask") for text in getattr(self, name)
        ]
        texts = [(one.name, getattr(self, one.name)) for one in fields(self) if one.type == "str"]
        for name, text in lists + texts:
            if not isinstance(text, str):
                raise ArgumentError("is not text", where=name, expected="a str", found=repr(text))
            try:
                text.encode()  # half a surrogate pair, as of a broken file name
            except UnicodeEncodeError as error:
                raise ArgumentError(
                    "is not valid Unicode", where=name, found=ascii(text)
                ) from error
        for file in self.picture_files:
            if re.match(r"[a-z][a-z0-9+.-]+://|data:", file, re.IGNORECASE):
                fix = "Download it first, and give the file."
                raise ArgumentError("is an address", where=file, expected="a file", fix=fix)

    def _check_ranges(self) -> None:
        whole = {
            "n": (1, MAX_IMAGES),
            "seed": (0, 2**63 - 1),
            "candidates": (self.n, MAX_IMAGES),
            "steps": (1, MAX_STEPS),
            "fast": (0, MAX_FAST),
            "width": (8, MAX_SIDE),
            "height": (8, MAX_SIDE),
        }
        ranges = {
            "scale": (0, 10),
            "start_at": (0, 1),
            "end_at": (self.start_at, 1),
            "strength": (0, 1),
            "control_scale": (0, 10),
            "guidance_scale": (0, 100),
            "diversity": (0, 1),
        }
        for name, limits in (whole | ranges).items():
            if (value := getattr(self, name)) is not None:
                if name in whole:
                    check_whole(name, value)
                check_range(name, value, *limits)
        check_range("n × prompts", self.n * len(self.prompt), 1, MAX_IMAGES)
        for weight in self.weights:
            check_range("weights", weight, -MAX_WEIGHT, MAX_WEIGHT)
        for name in ("width", "height"):
            if (getattr(self, name) or 0) % 8:  # the VAE halves them three times
                raise ArgumentError("is not a multiple of 8", where=name, found=getattr(self, name))

        if self.fit not in get_args(Fit):
            expected = " | ".join(get_args(Fit))
            raise ArgumentError("is unknown", where="fit", expected=expected, found=self.fit)

    def _check_needs(self, needs: Mapping[str, str]) -> None:
        for name, needed in needs.items():
            default = getattr(type(self), name)
            if getattr(self, name) != default and not getattr(self, needed):
                raise ArgumentError(f"needs {needed}", where=name, fix=f"Give --{_flag(needed)}.")

    def command(self, out: str) -> str:
        """The shell command that repeats this request exactly."""
        parts = ["ipdiverse", "generate"]
        for name, value in self.stated(*ALWAYS).items():
            flag = f"--{_flag(name)}"
            if isinstance(value, bool):
                parts.append(flag if value else f"--no-{_flag(name)}")
            elif isinstance(value, tuple) and name not in _SEVERAL:
                parts += [flag, *map(str, value)]
            elif value is not None:
                several = value if isinstance(value, tuple) else (value,)
                parts += [f"{flag}={shlex.quote(str(one))}" for one in several]
        return " ".join([*parts, f"--out={shlex.quote(out)}"])


ALWAYS = ("prompt", "n", "seed", "base", "adapter", "scale", "steps", "guidance_scale")
"""What a recorded command states even when it is at its default, so that it lasts longer."""


def current(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Flat values of version 0.1 in today's names, with a warning where they change."""
    return current_names(renamed(values, RENAMED, where), where)


def _flag(name: str) -> str:
    return name.replace("_", "-")
