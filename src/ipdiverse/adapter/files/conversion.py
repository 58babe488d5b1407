"""Turn a checkpoint of any layout into another, bit for bit, and prove it by reading it back."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from ipdiverse.adapter.files.checkpoint import (
    adapter_from_tensors,
    as_safetensors,
    load_adapter,
    read_whole,
    save_adapter,
    spec_of,
    stored_dtype,
)
from ipdiverse.adapter.files.containers import open_checkpoint
from ipdiverse.adapter.files.layouts import ANCESTOR_BLEND, BASE_WEIGHTS, PACKED, normalise
from ipdiverse.adapter.files.structure import describe, stock_notes
from ipdiverse.adapter.model import ImagePromptAdapter, remember_base_weights
from ipdiverse.errors import CheckpointError, OutputError
from ipdiverse.writing import tensors_hash, write_bytes_atomic

Target = Literal["ipdiverse", "diffusers", "tencent"]

_SUFFIXES: dict[Target, tuple[str, ...]] = {
    "ipdiverse": (".safetensors",),
    "diffusers": (".safetensors",),
    "tencent": (".bin", ".safetensors"),
}


_UNREAD = {"diffusers": ("instantx", "redux"), "tencent": ("xlabs", "redux")}
"""Kinds of adapters of transformers that the readers of a layout do not know (`model.Joint`)."""


def convert(
    source: Path,
    target: str | os.PathLike[str],
    to: Target,
    *,
    force: bool = False,
    face_id_plus_v2: bool | None = None,
) -> list[str]:
    """Write an adapter in another layout; tensors keep their type and every bit."""
    goal = Path(target)
    _check_target(Path(source), goal, to, force)
    found, spec = read_whole(Path(source))
    # only our spec has a place for the version, so other layouts need not be told it
    version = face_id_plus_v2 if to == "ipdiverse" or "shortcut" in spec else bool(face_id_plus_v2)
    adapter = adapter_from_tensors(found.tensors, source, spec, version)
    style = adapter.joint.style if adapter.joint else ""
    if style in _UNREAD.get(to, ()):
        what, fix = f"nobody reads {style} adapters in the layout {to}", "Choose --to ipdiverse."
        raise OutputError(what, where=goal, fix=fix)
    kept, notes = _kept(found.tensors, adapter, to)
    if not spec and to == "ipdiverse":
        spec = {"converted_from": found.layout}
    data = _as_bytes(kept, adapter, to, spec, goal)
    write_bytes_atomic(goal, data, check=lambda written: _verify(written, kept, goal, adapter))
    return [*found.notes, *notes]


def _check_target(source: Path, target: Path, to: Target, force: bool) -> None:
    if target.suffix.lower() not in _SUFFIXES[to]:
        raise OutputError(
            f"the layout {to} is not written under this name",
            where=target,
            expected=f"a name that ends in {' or '.join(_SUFFIXES[to])}",
            found=target.suffix or "no extension",
            fix="Change the extension.",
        )
    if not target.exists():
        return
    if source.exists() and target.samefile(source):
        raise OutputError("is the input itself", where=target, fix="Choose another name.")
    if not force or target.is_dir():
        fix = "Choose another name." if target.is_dir() else "Add --force to replace it."
        raise OutputError("is there already", where=target, fix=fix)


def _kept(
    tensors: Mapping[str, Tensor], adapter: ImagePromptAdapter, to: Target
) -> tuple[dict[str, Tensor], list[str]]:
    """Copies of what the layout can hold, and notes on what it cannot."""
    fusion, notes = adapter.fusion, []
    with_fusion = to == "ipdiverse" or (
        to == "tencent" and fusion is not None and fusion.kind == "blend"
    )
    kept = {
        name: tensor.detach().contiguous().clone()
        for name, tensor in tensors.items()
        if (with_fusion or not name.startswith("fusion."))
        and (to == "ipdiverse" or not name.startswith(BASE_WEIGHTS))
    }
    if fusion is not None and not with_fusion:
        notes.append(f"the {fusion.kind} fusion is left out: {to} has none")
    if adapter.base_weights and to != "ipdiverse":
        notes.append(f"the base weights are left out: {to} has no place for them")
    blend = kept.pop("fusion.blend", None) if to == "tencent" else None
    if blend is not None and blend != torch.tensor(ANCESTOR_BLEND, dtype=blend.dtype):
        notes.append(
            f"the fusion's blend, {float(blend):.4g}, is left out: the layout has no place for it, "
            f"and readers take {ANCESTOR_BLEND}"
        )
    return kept, notes + (stock_notes(adapter) if to == "diffusers" else [])


def _as_bytes(
    tensors: dict[str, Tensor],
    adapter: ImagePromptAdapter,
    to: Target,
    spec: Mapping[str, Any],
    target: Path,
) -> bytes:
    if to == "ipdiverse":
        return as_safetensors(tensors, {**spec, **describe(adapter)})
    named = {name.removeprefix("fusion."): tensor for name, tensor in tensors.items()}
    if target.suffix.lower() == ".safetensors":
        return save(named, {"format": "pt"})
    nested: dict[str, dict[str, Tensor]] = {}
    for name, tensor in named.items():
        top, _, rest = name.partition(".")
        nested.setdefault(top, {})[rest] = tensor
    buffer = io.BytesIO()
    torch.save(nested, buffer)
    return buffer.getvalue()


def _verify(
    written: Path, expected: Mapping[str, Tensor], target: Path, adapter: ImagePromptAdapter
) -> None:
    """Load the result and compare every tensor."""
    contents = open_checkpoint(written)
    found = normalise(contents.tensors, target).tensors
    version = bool(getattr(adapter.image_proj, "shortcut", False))
    adapter_from_tensors(found, target, spec_of(contents), version)
    wrong = [  # by hash, to the bit: torch.equal takes -0 for 0
        name
        for name, tensor in expected.items()
        if name not in found or tensors_hash({"": found[name]}) != tensors_hash({"": tensor})
    ]
    wrong += sorted(found.keys() - expected.keys() - {"fusion.blend"})
    if wrong:
        raise CheckpointError(
            "was not written as it should be", where=target, found=", ".join(wrong[:5])
        )


def copy_with_spec(source: Path, target: Path, changes: Mapping[str, Any]) -> None:
    """Write an adapter of ours again, its tensors to the bit, with more in its spec."""
    found, spec = read_whole(source)
    adapter_from_tensors(found.tensors, source, spec)
    stored = normalise(open_checkpoint(source).tensors, source).tensors
    tensors = stored if PACKED in stored else found.tensors  # what is packed stays so
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_bytes_atomic(target, as_safetensors(kept, {**spec, **changes}))


def store_base_weights(source: Path, base: Path, target: Path) -> None:
    """Write an adapter of ours again, with the base weights that it was fine-tuned from."""
    adapter = load_adapter(source)
    remember_base_weights(adapter, load_adapter(base))
    save_adapter(adapter, target, adapter.spec, stored_dtype(source))
