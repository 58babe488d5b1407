"""Adapters as files: the published IP-Adapter layout in safetensors, with a JSON spec beside.

Keys are `image_proj.*` and `ip_adapter.N.to_{k,v}_ip.weight`; stock diffusers loads the same file.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ipdiverse.adapter.model import ImagePromptAdapter
from ipdiverse.adapter.projection import LinearProjection, ResamplerProjection
from ipdiverse.errors import CheckpointError
from ipdiverse.provenance import write_bytes_atomic

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

_SPEC_KEY = "ipdiverse"


def save_adapter(
    adapter: ImagePromptAdapter,
    file: Path,
    spec: dict[str, Any],
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write an adapter atomically.

    Args:
        adapter: What to save.
        file: Target, `*.safetensors`.
        spec: Provenance, stored as JSON in the file's metadata.
        dtype: Of the stored tensors.
    """
    tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in adapter.state_dict().items()}
    metadata = {
        _SPEC_KEY: json.dumps({"kind": adapter.kind, **spec}, sort_keys=True),
        "format": "pt",
    }
    write_bytes_atomic(file, save(tensors, metadata))


def load_adapter(file: Path) -> ImagePromptAdapter:
    """Open an adapter in the published layout, in float32.

    Raises:
        CheckpointError: The file is missing, broken, or of another layout.
    """
    return adapter_from_tensors(_read(file), file)


def read_spec(file: Path) -> dict[str, Any]:
    """The JSON spec in a file's metadata; empty for files that others made."""
    with safe_open(file, framework="pt") as opened:
        return json.loads((opened.metadata() or {}).get(_SPEC_KEY, "{}"))


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise CheckpointError("no such file", where=file, fix="Check the path.")
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_tensor(key).float() for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(
            "is not a safetensors file", where=file, found=str(error), fix="Download it again."
        ) from error


def adapter_from_tensors(tensors: dict[str, Tensor], where: object) -> ImagePromptAdapter:
    """Build the adapter that these tensors describe; every size is read from their shapes.

    Args:
        tensors: Flat, keys `image_proj.*` and `ip_adapter.*`.
        where: The source's name, for messages.

    Raises:
        CheckpointError: Keys are missing, unexpected, or disagree about sizes.
    """
    try:
        with torch.device("meta"):  # a file's claims cost no memory before they are checked
            adapter = ImagePromptAdapter(_projection(tensors, where), _widths(tensors))
    except (ValueError, IndexError, KeyError, ZeroDivisionError, RuntimeError) as error:
        raise CheckpointError(
            "its tensors do not describe an adapter", where=where, found=f"{error}"
        ) from error
    if not len(adapter.ip_adapter):
        raise CheckpointError("has no `ip_adapter.N.to_k_ip.weight`", where=where)
    _check_keys(tensors, adapter.state_dict(), where)
    adapter.load_state_dict(tensors, assign=True)
    return adapter


def _widths(tensors: dict[str, Tensor]) -> dict[int, tuple[int, int]]:
    return {
        int(key.split(".")[1]): (tensor.shape[1], tensor.shape[0])
        for key, tensor in tensors.items()
        if key.startswith("ip_adapter.") and key.endswith(".to_k_ip.weight")
    }


def _check_keys(tensors: dict[str, Tensor], expected: dict[str, Tensor], where: object) -> None:
    found = set(tensors)
    wrong = [f"missing {key}" for key in sorted(expected.keys() - found)]
    wrong += [f"unexpected {key}" for key in sorted(found - expected.keys())]
    wrong += [
        f"{key} is {tuple(tensors[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in sorted(expected.keys() & found)
        if tensors[key].shape != expected[key].shape
    ]
    wrong += [f"{key} is not finite" for key in sorted(found) if not tensors[key].isfinite().all()]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError("does not fit together: " + ", ".join(wrong[:5]) + more, where=where)


def _projection(
    tensors: dict[str, Tensor], where: object
) -> LinearProjection | ResamplerProjection:
    if "image_proj.proj.weight" in tensors and "image_proj.norm.weight" in tensors:
        rows, clip_dim = tensors["image_proj.proj.weight"].shape
        token_width = tensors["image_proj.norm.weight"].shape[0]
        return LinearProjection(clip_dim, token_width, rows // token_width)
    if "image_proj.latents" in tensors and "image_proj.proj_in.weight" in tensors:
        _, num_tokens, width = tensors["image_proj.latents"].shape
        clip_dim = tensors["image_proj.proj_in.weight"].shape[1]
        token_width = tensors["image_proj.proj_out.weight"].shape[0]
        depth = len([k for k in tensors if k.endswith(".0.to_q.weight")])
        return ResamplerProjection(clip_dim, token_width, num_tokens, width, depth)
    raise CheckpointError(
        "holds no known image projection",
        where=where,
        expected="`image_proj.proj.*` (base) or `image_proj.latents` (plus)",
        found=", ".join(sorted(tensors)[:3]) or "nothing",
    )
