"""What is wrong with a request, as far as that is known before anything is opened or downloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipdiverse.base.adapters import check_adapter
from ipdiverse.base.bases import check_part
from ipdiverse.base.pipelines import check_known
from ipdiverse.base.presets import PRESETS
from ipdiverse.errors import ArgumentError

if TYPE_CHECKING:
    from ipdiverse.sampling.request import Request


def check(request: Request, *, opened: bool = False) -> None:
    """Refuse names that name nothing, and parts that do not go together.

    Args:
        request: What is asked.
        opened: The base is open already, whatever it is called.

    Raises:
        IpdiverseError: Something is wrong.
    """
    from ipdiverse.adapter.reference import check_parts
    from ipdiverse.adapter.scale import check_preset

    if not request.image and not request.faces:
        raise ArgumentError("is missing", where="image", fix="Give a reference: --image FILE.")
    request.check_used()
    if not opened:
        check_known(request.base)
    check_adapter(request.base, request.adapter)
    for part in (request.image_encoder, request.controlnet):
        if part:
            check_part(part)
    if request.preset:
        check_preset(request.preset, "preset")
    if request.faces and reads_faces(request) is False:
        raise faces_unread(request.adapter or request.base)
    count = len(request.image) or None
    check_parts(count, request.combine, request.weights or None, request.mask or None, "mask")


def reads_faces(request: Request) -> bool | None:
    """Whether the adapter reads face embeddings; None where only its file says."""
    preset = PRESETS.get(request.adapter or request.base)
    return None if preset is None else preset.faces


def faces_unread(adapter: str) -> ArgumentError:
    """What to say to face embeddings that would change nothing."""
    faces = ", ".join(name for name, preset in PRESETS.items() if preset.faces)
    return ArgumentError(
        "are not read by this adapter",
        where="faces",
        found=adapter,
        fix=f"Leave out --faces, or name an adapter that reads them with --adapter ({faces}).",
    )
