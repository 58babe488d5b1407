"""The main job: a reference image and a text prompt in, a set of images and their record out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipdiverse.sampling.drawing import drawing
from ipdiverse.sampling.request import Request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ipdiverse.bases import Base
    from ipdiverse.sampling.generation import Generation


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
        options: The other fields of `Request`.

    Raises:
        IpdiverseError: An argument, an image, the base or the adapter is unusable.
    """
    if loaded is not None:
        options["base"] = loaded.name
    files = [image] if isinstance(image, (str, Path)) else list(image)
    texts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
    request = Request(image=tuple(str(file) for file in files), prompt=texts, **options)
    with drawing(request, loaded) as work:
        return work.finished([image for _, image in work.images()])
