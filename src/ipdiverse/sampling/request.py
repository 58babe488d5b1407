"""What a user asks for: one frozen value that decides every pixel."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields

from ipdiverse.bases import CRITTERS
from ipdiverse.errors import ArgumentError, check_range

MAX_IMAGES = 1024
MAX_STEPS = 1000


@dataclass(frozen=True)
class Request:
    """Everything that decides the images of one call.

    Args:
        image: The reference image's file.
        prompt: What to show; empty leaves everything to the reference.
        n: How many images, 1 to 1024.
        seed: Image i depends on the seed and i alone, never on n.
        base: `critters`, or a folder that diffusers saved.
        adapter: `plus` or `base` of critters, or a safetensors file.
        scale: Weight of the image prompt (λ); 0 is text alone, 1 the full reference.
        steps: Denoising steps.
        guidance_scale: Classifier-free guidance; None takes the base's default.
        negative_prompt: What guidance moves away from.
    """

    image: str
    prompt: str = ""
    n: int = 4
    seed: int = 0
    base: str = CRITTERS
    adapter: str = "plus"
    scale: float = 1.0
    steps: int = 25
    guidance_scale: float | None = None
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        for name in ("n", "steps", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ArgumentError(
                    "is no whole number", where=name, expected="an int", found=repr(value)
                )
        for name in ("image", "prompt", "base", "adapter", "negative_prompt"):
            _check_text(name, getattr(self, name))
        check_range("n", self.n, 1, MAX_IMAGES)
        check_range("steps", self.steps, 1, MAX_STEPS)
        check_range("scale", self.scale, 0, 10)
        check_range("seed", self.seed, 0, 2**63 - 1)
        if self.guidance_scale is not None:
            check_range("guidance_scale", self.guidance_scale, 0, 100)

    def command(self, out: str) -> str:
        """The shell command that repeats this request exactly."""
        parts = ["ipdiverse", "generate"]
        for name, value in ((f.name, getattr(self, f.name)) for f in fields(Request)):
            if value is not None:
                parts.append(f"--{name.replace('_', '-')}={shlex.quote(str(value))}")
        return " ".join([*parts, f"--out={shlex.quote(out)}"])


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ArgumentError("is no text", where=name, expected="a str", found=repr(value))
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ArgumentError("is not valid Unicode", where=name, found=ascii(value)) from error
