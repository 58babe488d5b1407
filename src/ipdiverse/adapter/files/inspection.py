"""Say what a checkpoint file is, from names and shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ipdiverse.adapter.files.checkpoint import spec_of
from ipdiverse.adapter.files.containers import Contents, first_of, open_checkpoint
from ipdiverse.adapter.files.layouts import BASE_WEIGHTS, normalise, recognise, with_base_weights
from ipdiverse.adapter.files.structure import describe, dtype_name, misfits, skeleton
from ipdiverse.adapter.model import ImagePromptAdapter
from ipdiverse.base.presets import encoder_of
from ipdiverse.errors import CheckpointError
from ipdiverse.loading import what_is

_UNKNOWN = ("kind", "family", "num_tokens", "token_width", "clip_dim", "face_dim", "encoder")
_UNKNOWN += ("fusion", "lora")

Report = dict[str, Any]


def inspect_checkpoint(file: Path) -> Report:
    """Kind, base family, tokens, widths and fusion of an adapter, and what does not fit.

    Whether weights are finite is not checked: they are not read.
    """
    contents = open_checkpoint(file)
    kind, layout = what_is(contents.tensors), recognise(contents.tensors)
    normalise(contents.tensors, file)  # refuses what is something else, or claims too much
    if kind is None:
        raise CheckpointError(
            "is not an adapter",
            where=file,
            expected="tensors named image_proj.* and ip_adapter.*",
            found=", ".join(sorted(contents.tensors)[:3]) or "no tensors",
        )
    spec = spec_of(contents)
    about = _understand(contents, spec)
    return {
        "file": str(file),
        "container": contents.container,
        "bytes": contents.size,
        "layout": "ipdiverse" if spec else layout,
        **about,
        "spec": spec,
    }


def as_text(report: Report) -> str:
    """A report for people."""
    fusion, lora = report["fusion"], report["lora"]
    heads = f", {fusion['heads']} heads" if fusion and "heads" in fusion else ""
    width, count = report["token_width"], report["num_tokens"]
    tokens = f"{count or 'as many as the image encoder has states'}, of width {width}"
    changes = (
        f"rank {', '.join(map(str, lora['ranks']))} in {lora['layers']} layers" if lora else ""
    )
    dtypes = ", ".join(sorted(report["dtypes"])) or "nothing"
    rows = {
        "layout": f"{report['layout']} ({report['container']}, {report['bytes'] / 1e6:.1f} MB)",
        "kind": report["kind"] or "no adapter",
        "base family": report["family"] or "unknown",
        "image tokens": "unknown" if width is None else tokens,
        "reads": _reads(report),
        "layers": f"{report['layers']} with an image branch",
        "fusion": fusion["kind"] + heads if fusion else "none",
        "LoRA": changes or "none",
        "weights": f"{report['parameters'] / 1e6:.1f} M as {dtypes}"
        + (", its base weights included" if report["holds_base_weights"] else ""),
    }
    if report["frozen_tensors"]:
        frozen = f"{report['frozen_tensors']} frozen tensors in the same file, never read"
        rows["base model"] = frozen
    rows |= {
        kind: first_of(report[kind]) or "nothing"
        for kind in ("missing", "unexpected", "mismatched")
    }
    rows["loads"] = "yes" if report["loads"] else "no"
    lines = [report["file"], *(f"  {name:<13} {text}" for name, text in rows.items())]
    return "\n".join([*lines, *(f"  note          {note}" for note in report["notes"])])


def _understand(contents: Contents, spec: Mapping[str, Any]) -> Report:
    """As far as it goes; what stands in the way becomes a note."""
    about: Report = {**dict.fromkeys(_UNKNOWN), "layers": 0, "holds_base_weights": False}
    about |= {"frozen_tensors": 0, "missing": [], "unexpected": [], "mismatched": []}
    about |= {"loads": False, "notes": []}
    tensors, adapter = contents.tensors, None
    try:
        found = normalise(tensors, contents.file.name)
        about |= {"frozen_tensors": len(found.frozen), "notes": [*found.notes]}
        adapter = skeleton(ImagePromptAdapter, found.tensors, contents.file.name, spec)
        if adapter.kind == "faceid-plus":
            about["shortcut"] = spec.get("shortcut")
            if "shortcut" not in spec:
                unknown = "FaceID-Plus version 1 or 2: nothing in the file tells which"
                about["notes"].append(unknown)
        tensors = found.tensors
        tensors, _ = with_base_weights(tensors, spec, contents.file)
        about["loads"] = True  # unless keys and shapes show that something is wrong
    except CheckpointError as error:
        about["notes"].append(str(error))
    if adapter is not None:
        described = describe(adapter)
        about |= {name: described[name] for name in ("kind", "family", "fusion")}
        encoder = encoder_of(adapter.reads[-1], adapter.clip_dim or 0)
        about["encoder"] = encoder and encoder.name
        about |= described["dims"] | {"lora": _lora_of(tensors)} | misfits(tensors, adapter)
        about["holds_base_weights"] = any(name.startswith(BASE_WEIGHTS) for name in tensors)
    about["loads"] &= not (about["missing"] or about["unexpected"] or about["mismatched"])
    about["dtypes"] = dict(Counter(dtype_name(tensor) for tensor in tensors.values()))
    about["parameters"] = sum(tensor.numel() for tensor in tensors.values())
    return about


def _lora_of(tensors: Mapping[str, Tensor]) -> Report | None:
    own = [name for name in tensors if name.startswith("ip_adapter.")]  # not the base weights
    downs = [name for name in own if name.endswith("_lora.down.weight")]
    if not downs:
        return None
    ranks = sorted({tensors[name].shape[0] for name in downs if tensors[name].ndim})
    return {"ranks": ranks, "layers": len({name.split(".")[1] for name in downs})}


def _reads(report: Report) -> str:
    parts = []
    if report["face_dim"] is not None:
        parts.append(f"a face embedding of width {report['face_dim']}")
    if report["clip_dim"] is not None:
        pooled = report["kind"] in ("base", "pooled")
        name = "the pooled image embedding" if pooled else "the image encoder's hidden states"
        encoder = f" ({report['encoder']})" if report["encoder"] else ""
        parts.append(f"{name} of width {report['clip_dim']}{encoder}")
    return " and ".join(parts) or "unknown"
