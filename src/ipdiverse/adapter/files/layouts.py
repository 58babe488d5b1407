"""The layouts in which adapters are found, each turned into ours.

Ours is the published one, flat: `image_proj.*` and `ip_adapter.N.*`, N being the layer's index in
`unet.attn_processors`; a fusion is `fusion.*`, noise conditioning `noise.*`, the weights that it
went on from `plain.image_proj.*` and `plain.ip_adapter.N.*`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ipdiverse.errors import CheckpointError

ANCESTOR_BLEND = 0.8
"""The blend that the first fusion project used at inference; its files do not hold it."""

BLEND_NOTE = (
    f"the file does not hold its fusion's blend; {ANCESTOR_BLEND} is taken, as its project did "
    "when it generated"
)

_FUSION = ("query", "key", "value")
_BLOCKS = ("down_blocks", "up_blocks", "mid_block")  # the order of `unet.attn_processors`
_PROCESSOR = re.compile(r"unet\.(.+)\.processor\.(.+)")
_QUERY = re.compile(r"unet\.(.+)\.to_q\.weight")


@dataclass(frozen=True)
class Normalised:
    """A checkpoint in our own layout.

    Args:
        layout: The one it was found in.
        tensors: With our keys; keys that are none of an adapter's are kept as they were.
        frozen: Names of the base model's own weights beside it.
        notes: What was assumed.
    """

    layout: str
    tensors: dict[str, Tensor]
    frozen: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def recognise(names: Iterable[str]) -> str:
    """The layout of a checkpoint with these tensors.

    Returns:
        `ipdiverse` (published, with a fusion), `published`, `five-key`, `accelerate`,
        `accelerate, shared tensors dropped`, `fusion checkpoint`, `flux` or `unknown`.
    """
    tops = {name.split(".", 1)[0] for name in names}
    if tops & {"ip_adapter_proj_model", "double_blocks"}:
        return "flux"
    if tops & {"unet", "image_proj_model", "adapter_modules"}:
        if tops & set(_FUSION):
            return "fusion checkpoint"
        return "accelerate" if "adapter_modules" in tops else "accelerate, shared tensors dropped"
    if tops & set(_FUSION):
        return "five-key"
    if tops & {"fusion", "noise", "plain"}:
        return "ipdiverse"
    return "published" if tops & {"image_proj", "ip_adapter"} else "unknown"


def normalise(tensors: Mapping[str, Tensor], where: object) -> Normalised:
    """Rename a checkpoint's tensors to our keys and leave out the base model's own.

    Args:
        tensors: Flat, in any layout; none is read.
        where: The source's name, for messages.

    Raises:
        CheckpointError: The adapter is for another kind of model.
    """
    layout = recognise(tensors)
    if layout == "flux":
        raise CheckpointError(
            "is a Flux adapter; ipdiverse prompts Stable Diffusion models",
            where=where,
            fix="Use an adapter for SD 1.x, SD 2.x or SDXL.",
        )
    numbers = _numbers(tensors)
    ours: dict[str, Tensor] = {}
    frozen: list[str] = []
    # the trainer's own names come last: where a tensor has both, they are the same tensor
    for name in sorted(tensors, key=lambda name: not name.startswith("unet.")):
        renamed = _renamed(name, numbers)
        if renamed is None:
            frozen.append(name)
        else:
            ours[renamed] = tensors[name]
    notes: tuple[str, ...] = ()
    if layout in {"five-key", "fusion checkpoint"} and "fusion.query.weight" in ours:
        dtype = ours["fusion.query.weight"].dtype
        ours.setdefault("fusion.blend", torch.tensor(ANCESTOR_BLEND, dtype=dtype))
        notes = (BLEND_NOTE,)
    return Normalised(layout, dict(sorted(ours.items())), tuple(frozen), notes)


def _renamed(name: str, numbers: Mapping[str, int]) -> str | None:
    """Our name for a tensor; None for one of the base model's own."""
    top, _, rest = name.partition(".")
    if top == "unet":
        found = _PROCESSOR.fullmatch(name)
        return f"ip_adapter.{numbers[found[1]]}.{found[2]}" if found else None
    if top in _FUSION:
        return f"fusion.{name}"
    return {"image_proj_model": "image_proj.", "adapter_modules": "ip_adapter."}.get(
        top, f"{top}." if rest else top
    ) + rest


def _numbers(names: Iterable[str]) -> dict[str, int]:
    """Attention modules under `unet.` to their index in `unet.attn_processors`.

    The order is the UNet's: down, up, mid; within a block by number; self-attention (`attn1`)
    before cross-attention (`attn2`), whether or not the file holds it.
    """
    paths = {
        found[1]
        for name in names
        if (found := _PROCESSOR.fullmatch(name) or _QUERY.fullmatch(name)) is not None
    }
    paths |= {path.removesuffix("attn2") + "attn1" for path in paths if path.endswith("attn2")}
    return {path: number for number, path in enumerate(sorted(paths, key=_place))}


def _place(path: str) -> tuple[int, list[tuple[int, str]]]:
    block, _, rest = path.partition(".")
    parts = [(int(p), "") if p.isascii() and p.isdigit() else (0, p) for p in rest.split(".")]
    return _BLOCKS.index(block) if block in _BLOCKS else len(_BLOCKS), parts
