"""The layouts in which adapters are found, each turned into ours.

Ours is the published one, flat: `image_proj.*` and `ip_adapter.N.*`, N being the layer's index in
`unet.attn_processors`; a fusion is `fusion.*`; the base weights of a fine-tuned adapter are
`base_weights.image_proj.*` and `base_weights.ip_adapter.N.*`, or packed into one tensor. Files of
version 0.1 have `plain.*` instead, or name a second file that holds them, and perhaps `noise.*`.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ipdiverse.adapter.files.containers import open_checkpoint, refuse_others
from ipdiverse.adapter.model import shared_parts
from ipdiverse.errors import CheckpointError
from ipdiverse.writing import tensors_hash

BASE_WEIGHTS = "base_weights."
"""Prefix of the base weights' keys."""
PACKED = "base_weights_packed"
"""Key of the base weights where they are stored as what differs (`pack_base_weights`)."""
OLD_BASE_WEIGHTS = "plain."
"""The prefix in files of version 0.1."""

NOISE_NOTE = "noise conditioning no longer acts; the weights of it are left out"

ANCESTOR_BLEND = 0.8
"""The blend that the first fusion project used at inference; its files do not hold it."""

BLEND_NOTE = (
    f"the file does not hold its fusion's blend; {ANCESTOR_BLEND} is taken, as its project did "
    "when it generated"
)

BOUNDS = {
    "parameters": 4_000_000_000,  # the largest published, InstantX's for Flux.1, has 2.6
    "layers with an image branch": 1024,  # SDXL has 140 attention layers
    "resampler layers": 64,
    "image tokens": 4096,
    "axes": 4,
}
"""The most that an adapter's file may claim."""
_LAYER = re.compile(r"ip_adapter\.[^.]+\.")
_RESAMPLER = re.compile(r"image_proj\.(?:perceiver_resampler\.)?layers\.[^.]+\.")
_FUSION = ("query", "key", "value")
_BLOCKS = ("down_blocks", "up_blocks", "mid_block")  # the order of `unet.attn_processors`
_PREFIXES = {
    "image_proj_model": "image_proj.",
    "ip_adapter_proj_model": "image_proj.",
    "adapter_modules": "ip_adapter.",
    "plain": BASE_WEIGHTS,
}
_XLABS = re.compile(
    r"double_blocks\.([0-9]+)\.processor\.ip_adapter_double_stream_([kv])_proj\.(.+)"
)
_PROCESSOR = re.compile(r"unet\.(.+)\.processor\.(.+)")
_QUERY = re.compile(r"unet\.(.+)\.to_q\.weight")


@dataclass(frozen=True)
class Normalised:
    """A checkpoint in our own layout."""

    layout: str  # the one it was found in
    tensors: dict[str, Tensor]  # with our keys; unknown keys are kept, and named by `misfits`
    frozen: tuple[str, ...] = ()  # names of the base model's own weights, which are left out
    notes: tuple[str, ...] = ()  # what was assumed


def recognise(names: Iterable[str]) -> str:
    """The layout of a checkpoint with these tensors; `ipdiverse` is `published` with more."""
    tops = {name.split(".", 1)[0] for name in names}
    if tops & {"ip_adapter_proj_model", "double_blocks", "redux_up", "redux_down"}:
        return "redux" if "redux_up" in tops else "xlabs"
    if tops & {"unet", "image_proj_model", "adapter_modules"}:
        if tops & set(_FUSION):
            return "fusion checkpoint"
        return "accelerate" if "adapter_modules" in tops else "accelerate, shared tensors dropped"
    if tops & set(_FUSION):
        return "five-key"
    if tops & {"fusion", "noise", "plain", "base_weights", PACKED}:
        return "ipdiverse"
    return "published" if tops & {"image_proj", "ip_adapter"} else "unknown"


def normalise(tensors: Mapping[str, Tensor], where: object) -> Normalised:
    """Rename a checkpoint's tensors to our keys and leave out the base model's own."""
    refuse_others(tensors, where)
    layout = recognise(tensors)
    numbers = _numbers(tensors)
    ours: dict[str, Tensor] = {}
    frozen: list[str] = []
    notes: tuple[str, ...] = ()
    # the trainer's own names come last: where a tensor has both, they are the same tensor
    for name in sorted(tensors, key=lambda name: not name.startswith("unet.")):
        renamed = _renamed(name, numbers)
        if name.startswith("noise."):
            notes = (NOISE_NOTE,)
        elif renamed is None:
            frozen.append(name)
        else:
            ours[renamed] = tensors[name]
    if layout in {"five-key", "fusion checkpoint"} and "fusion.query.weight" in ours:
        dtype = ours["fusion.query.weight"].dtype
        ours.setdefault("fusion.blend", torch.tensor(ANCESTOR_BLEND, dtype=dtype))
        notes = (*notes, BLEND_NOTE)
    _check_bounds(ours, where)
    return Normalised(layout, dict(sorted(ours.items())), tuple(frozen), notes)


def _check_bounds(tensors: Mapping[str, Tensor], where: object) -> None:
    """Refuse what no adapter has, before modules or weights take the memory that is claimed."""
    own = sum(t.numel() for name, t in tensors.items() if not name.startswith(BASE_WEIGHTS))
    tokens = tensors.get("image_proj.latents")
    found = {
        "parameters": max(own, sum(t.numel() for t in tensors.values()) - own),
        "layers with an image branch": len({n.split(".")[1] for n in tensors if _LAYER.match(n)}),
        "resampler layers": len({m[0] for n in tensors if (m := _RESAMPLER.match(n))}),
        "image tokens": tokens.shape[1] if tokens is not None and tokens.ndim == 3 else 0,
        "axes": max((t.ndim for t in tensors.values()), default=0),
    }
    for name, most in BOUNDS.items():
        if found[name] > most:
            raise CheckpointError(
                "claims more than any adapter has",
                where=where,
                expected=f"at most {most} {name}",
                found=found[name],
            )


def _renamed(name: str, numbers: Mapping[str, int]) -> str | None:
    """Our name for a tensor; None for one of the base model's own."""
    top, _, rest = name.partition(".")
    if found := _XLABS.fullmatch(name):
        return f"ip_adapter.{found[1]}.to_{found[2]}_ip.{found[3]}"
    if top == "unet":
        found = _PROCESSOR.fullmatch(name)
        return f"ip_adapter.{numbers[found[1]]}.{found[2]}" if found else None
    if top in _FUSION:
        return f"fusion.{name}"
    if top in {"redux_up", "redux_down"}:
        return f"image_proj.{name}"
    return _PREFIXES.get(top, f"{top}." if rest else top) + rest


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


def pack_base_weights(own: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> Tensor:
    """Base weights as what differs from an adapter's own, compressed without loss, (bytes,)."""
    # fine-tuning hardly changes a weight's sign and exponent, so of the exclusive or of both the
    # upper bytes are nearly all zero: of the shipped adapter 79 % are stored
    names = sorted(base)
    differs = np.concatenate([_halves(own[name]) ^ _halves(base[name]) for name in names])
    planes = np.concatenate([differs >> 8, differs & 0xFF]).astype(np.uint8)
    return torch.from_numpy(np.frombuffer(zlib.compress(planes.tobytes(), 9), np.uint8).copy())


def _unpacked(tensors: Mapping[str, Tensor], where: object) -> dict[str, Tensor]:
    """The base weights of tensors that hold them packed."""
    own, packed = shared_parts(tensors), tensors[PACKED]
    size = sum(tensor.numel() for tensor in own.values())
    halves = all(tensor.dtype == torch.float16 for tensor in own.values())
    planes = b""
    if halves and packed.dtype == torch.uint8 and packed.ndim == 1:
        stream = zlib.decompressobj()
        try:  # never more than the adapter's own weights take, whatever the stream claims
            planes = stream.decompress(packed.numpy().tobytes(), 2 * size + 1)
        except zlib.error:
            planes = b""
    if len(planes) != 2 * size or not size:
        raise CheckpointError("its packed base weights are broken", where=where)
    upper, lower = np.frombuffer(planes, np.uint8).astype(np.uint16).reshape(2, size)
    differs, base, start = upper << 8 | lower, dict[str, Tensor](), 0
    for name in sorted(own):
        part = differs[start : start + own[name].numel()]
        bits = (_halves(own[name]) ^ part).view(np.float16).reshape(own[name].shape)
        base[name], start = torch.from_numpy(bits), start + part.size
    return base


def _halves(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().flatten().numpy().view(np.uint16)


def with_base_weights(
    tensors: Mapping[str, Tensor], spec: Mapping[str, Any], file: Path
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An adapter's tensors and spec, with its base weights among the tensors if it has any."""
    kept = {name: tensor for name, tensor in tensors.items() if name != PACKED}
    rest = {k: v for k, v in spec.items() if k != "plain" and (k != "noise_conditioned" or not v)}
    base: dict[str, Tensor] = {}
    if PACKED in tensors:
        base = _unpacked(tensors, file)
    elif "plain" in spec:
        base = _named(spec["plain"], file)
    return {**kept, **{BASE_WEIGHTS + name: tensor for name, tensor in base.items()}}, rest


def _named(named: Any, file: Path) -> dict[str, Tensor]:
    """Base weights in the file that an adapter of version 0.1 names."""
    told = named if isinstance(named, dict) else {}
    name, wanted = str(told.get("file", "")), told.get("sha256")
    # a name of its folder alone, on any system: a file from elsewhere must not reach others
    alone = {PureWindowsPath(name).name, PurePosixPath(name).name} == {name} and ":" not in name
    plausible = alone and name.isprintable() and len(name) < 256
    base = file.parent / name
    if not (plausible and name.endswith(".safetensors") and base.is_file()):
        raise CheckpointError(
            "its base weights are in another file, which is not in its folder",
            where=file,
            expected=ascii(name)[:200],
            fix="Put that file there; `ipdiverse convert` then writes one file that holds both.",
        )
    found = shared_parts(normalise(open_checkpoint(base).tensors, base).tensors)
    if tensors_hash(found) != wanted:
        raise CheckpointError(
            "its base weights are in another file, and that file holds other weights",
            where=file,
            expected=f"{name} with weights of SHA-256 {ascii(wanted)[1:13]}…",
        )
    return found
