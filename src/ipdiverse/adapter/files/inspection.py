"""Say what a checkpoint file is, from names and shapes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ipdiverse.adapter.files.checkpoint import spec_of
from ipdiverse.adapter.files.containers import Contents, open_checkpoint
from ipdiverse.adapter.files.layouts import (
    BASE_WEIGHTS,
    Normalised,
    normalise,
    recognise,
    with_base_weights,
)
from ipdiverse.adapter.files.structure import describe, dtype_name, misfits, skeleton
from ipdiverse.adapter.model import ImagePromptAdapter
from ipdiverse.errors import CheckpointError
from ipdiverse.loading import what_is

_FLUX_LAYER = re.compile(r"double_blocks\.([0-9]+)\..+_k_proj\.weight")
_NAMED = 5

Report = dict[str, Any]


@dataclass(frozen=True)
class _Found:
    """What was understood; `adapter` is None when nothing was.

    `tensors` include the base weights, wherever they are stored; `loads` is False where something
    is wrong that keys and shapes do not show.
    """

    layout: str
    tensors: Mapping[str, Tensor]
    frozen: tuple[str, ...]
    notes: tuple[str, ...]
    adapter: ImagePromptAdapter | None
    loads: bool


def inspect_checkpoint(file: Path) -> Report:
    """Kind, base family, tokens, widths and fusion of an adapter, and what does not fit.

    Whether weights are finite is not checked: they are not read.
    """
    contents = open_checkpoint(file)
    kind = what_is(contents.tensors)
    if kind is None or kind[0] != "an IP-Adapter" or recognise(contents.tensors) != "flux":
        normalise(contents.tensors, file)  # refuses what is something else, or claims too much
    if kind is None:
        raise CheckpointError(
            "is not an adapter",
            where=file,
            expected="tensors named image_proj.* and ip_adapter.*",
            found=", ".join(sorted(contents.tensors)[:3]) or "no tensors",
        )
    spec = spec_of(contents)
    found = _understand(contents, spec)
    about = _nothing() if found.adapter is None else _about(found.adapter, found.tensors, spec)
    if found.layout == "flux":
        about |= _about_flux(contents.tensors)
    if found.adapter is None:
        wrong = {"missing": [], "unexpected": [], "mismatched": []}
    else:
        wrong = misfits(found.tensors, found.adapter)
    return {
        "file": str(file),
        "container": contents.container,
        "bytes": contents.size,
        "layout": "ipdiverse" if spec else found.layout,
        **about,
        **_stored(found.tensors),
        "frozen_tensors": len(found.frozen),
        **wrong,
        "loads": found.loads and not any(wrong.values()),
        "notes": list(found.notes),
        "spec": spec,
    }


def as_text(report: Report) -> str:
    """A report for people."""
    rows = {
        "layout": f"{report['layout']} ({report['container']}, {report['bytes'] / 1e6:.1f} MB)",
        "kind": report["kind"] or "no adapter",
        "base family": report["family"] or "unknown",
        "image tokens": _tokens(report),
        "reads": _reads(report),
        "layers": f"{report['layers']} with an image branch",
        "fusion": _fusion(report["fusion"]),
        "LoRA": _lora(report["lora"]),
        "weights": f"{report['parameters'] / 1e6:.1f} M as {_dtypes(report['dtypes'])}"
        + (", its base weights included" if report["holds_base_weights"] else ""),
    }
    if report["frozen_tensors"]:
        rows["base model"] = (
            f"{report['frozen_tensors']} frozen tensors in the same file, never read"
        )
    rows |= {kind: _list(report[kind]) for kind in ("missing", "unexpected", "mismatched")}
    rows["loads"] = "yes" if report["loads"] else "no"
    lines = [report["file"], *(f"  {name:<13} {text}" for name, text in rows.items())]
    return "\n".join([*lines, *(f"  note          {note}" for note in report["notes"])])


def _understand(contents: Contents, spec: Mapping[str, Any]) -> _Found:
    """As far as it goes; what stands in the way becomes a note."""
    layout, tensors = recognise(contents.tensors), contents.tensors
    found = Normalised(layout, tensors)
    notes: tuple[str, ...] = ()
    adapter, loads = None, False
    try:
        found = normalise(tensors, contents.file.name)
        adapter = skeleton(ImagePromptAdapter, found.tensors, contents.file.name, spec)
        if adapter.kind == "faceid-plus" and "shortcut" not in spec:
            notes = ("FaceID-Plus version 1 or 2: nothing in the file tells which",)
        tensors = found.tensors
        tensors, _ = with_base_weights(found.tensors, spec, contents.file)
        loads = True
    except CheckpointError as error:
        notes = (str(error),)
    notes = found.notes + notes
    return _Found(layout, tensors, found.frozen, notes, adapter, loads)


def _nothing() -> Report:
    sizes = dict.fromkeys(("num_tokens", "token_width", "clip_dim", "face_dim"))
    parts = {"fusion": None, "lora": None, "holds_base_weights": False}
    return {"kind": None, "family": None, **sizes, "layers": 0, **parts}


def _about(
    adapter: ImagePromptAdapter, tensors: Mapping[str, Tensor], spec: Mapping[str, Any]
) -> Report:
    described = describe(adapter)
    about = {
        "kind": described["kind"],
        "family": described["family"],
        **described["dims"],
        "fusion": described["fusion"],
        "lora": _lora_of(tensors),
        "holds_base_weights": any(name.startswith(BASE_WEIGHTS) for name in tensors),
    }
    if adapter.kind == "faceid-plus":
        about["shortcut"] = spec.get("shortcut")
    return about


def _about_flux(tensors: Mapping[str, Tensor]) -> Report:
    about: Report = {"kind": "flux", "family": "Flux"}
    layers = {found[1] for name in tensors if (found := _FLUX_LAYER.match(name))}
    about["layers"] = len(layers)
    proj = tensors.get("ip_adapter_proj_model.proj.weight")
    norm = tensors.get("ip_adapter_proj_model.norm.weight")
    if proj is not None and norm is not None and proj.ndim == 2 and norm.numel():
        about["token_width"], about["clip_dim"] = norm.numel(), proj.shape[1]
        about["num_tokens"] = proj.shape[0] // norm.numel()
    return about


def _lora_of(tensors: Mapping[str, Tensor]) -> Report | None:
    downs = [name for name in tensors if name.endswith("_lora.down.weight")]
    if not downs:
        return None
    ranks = sorted({tensors[name].shape[0] for name in downs if tensors[name].ndim})
    return {"ranks": ranks, "layers": len({name.split(".")[1] for name in downs})}


def _stored(tensors: Mapping[str, Tensor]) -> Report:
    dtypes = Counter(dtype_name(tensor) for tensor in tensors.values())
    parameters = sum(tensor.numel() for tensor in tensors.values())
    return {"dtypes": dict(dtypes), "parameters": parameters}


def _tokens(report: Report) -> str:
    if report["token_width"] is None:
        return "unknown"
    count = report["num_tokens"] or "as many as the image encoder has states"
    return f"{count}, of width {report['token_width']}"


def _reads(report: Report) -> str:
    images = {"base": "the pooled image embedding", "flux": "the pooled image embedding"}
    parts = []
    if report["face_dim"] is not None:
        parts.append(f"a face embedding of width {report['face_dim']}")
    if report["clip_dim"] is not None:
        name = images.get(report["kind"], "the image encoder's hidden states")
        parts.append(f"{name} of width {report['clip_dim']}")
    return " and ".join(parts) or "unknown"


def _fusion(fusion: Report | None) -> str:
    if fusion is None:
        return "none"
    return fusion["kind"] + (f", {fusion['heads']} heads" if "heads" in fusion else "")


def _lora(lora: Report | None) -> str:
    if lora is None:
        return "none"
    return f"rank {', '.join(map(str, lora['ranks']))} in {lora['layers']} layers"


def _dtypes(dtypes: Mapping[str, int]) -> str:
    return ", ".join(sorted(dtypes)) or "nothing"


def _list(problems: list[str]) -> str:
    more = f" and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
    return ", ".join(problems[:_NAMED]) + more or "nothing"
