"""The main job: a reference image and a text prompt in, a set of images and their record out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipdiverse.errors import ArgumentError
from ipdiverse.sampling.drawing import drawing
from ipdiverse.sampling.request import Request

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ipdiverse.base.bases import Base
    from ipdiverse.sampling.generation import Generation

_OF_OPENING = ("revision", "safety_checker", "dtype", "offload", "tiling")
"""Fields that say how a base is opened."""


def generate(
    image: str | Path | Sequence[str | Path],
    prompt: str | Sequence[str] = "",
    *,
    loaded: Base | None = None,
    **options: Any,
) -> Generation:
    """Generate images from a reference and a prompt.

    Args:
        image: The reference image's file; several are one reference together.
        prompt: What to show; several get `n` images each.
        loaded: An open base, to reuse between calls and in place of `base`; None opens `base`.
        options: The other fields of `Request`; with `loaded` none that say how it is opened.

    Raises:
        IpdiverseError: An argument, an image, the base or the adapter is unusable.
    """
    if loaded is not None:
        _check_open(loaded, options)
        options["base"] = loaded.name
    if isinstance(image, str) or not isinstance(image, Sequence):
        image = [image]
    texts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
    request = Request(image=tuple(_file(one) for one in image), prompt=texts, **options)
    with drawing(request, loaded) as work:
        return work.finished([image for _, image in work.images()])


def _file(image: object) -> str:
    if isinstance(image, (str, Path)):
        return str(image)
    raise ArgumentError(
        "is no file's path",
        where="image",
        expected="a str or Path, which the record repeats",
        found=type(image).__name__,
        fix="Save it first, or give it to `attach(pipe, adapter).set_reference`.",
    )


def _check_open(loaded: Base, options: Mapping[str, Any]) -> None:
    """Refuse what only opening a base could heed.

    Raises:
        ArgumentError: There is some.
    """
    idle = {name: getattr(Request, name) for name in _OF_OPENING} | {"base": loaded.name}
    for name, value in idle.items():
        if options.get(name, value) != value:
            raise ArgumentError(
                "does not go with loaded, which is open already",
                where=name,
                found=options[name],
                fix="Give it to load_base, or leave loaded out.",
            )
