"""Adapters as files: the published IP-Adapter layout in safetensors, with a JSON spec beside.

Keys are `image_proj.*`, `ip_adapter.N.*` and `fusion.*`, and `plain.*` for the weights that it
went on from; stock diffusers loads the same file and leaves out the last two. `layouts` says in
which other layouts adapters are read, `beside` how a file names the plain weights instead.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ipdiverse.adapter.beside import KEY, check_target, completed, named, tensors_hash
from ipdiverse.adapter.files.containers import Contents, open_checkpoint
from ipdiverse.adapter.files.layouts import normalise
from ipdiverse.adapter.files.sources import find_checkpoint
from ipdiverse.adapter.files.structure import DTYPES, describe, misfits, skeleton
from ipdiverse.adapter.mixing import PLAIN, remember_plain
from ipdiverse.adapter.model import ImagePromptAdapter
from ipdiverse.errors import CheckpointError
from ipdiverse.loading import building
from ipdiverse.writing import write_bytes_atomic

_SPEC_KEY = "ipdiverse"
_NAMED_PROBLEMS = 5
_READ_FROM_SPEC = ("fusion", "shortcut")  # what `adapter_from_tensors` asks of it


def save_adapter(
    adapter: ImagePromptAdapter,
    file: Path,
    spec: Mapping[str, Any],
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write an adapter atomically.

    Args:
        adapter: What to save.
        file: Target, `*.safetensors`.
        spec: Provenance, stored as JSON in the file's metadata; kind, family, fusion and sizes are
            added. Its `plain` may name a file beside this one (`beside.naming`), where the adapter
            does not hold those weights itself.
        dtype: Of the stored tensors.

    Raises:
        CheckpointError: `plain` names no such file.
    """
    said = {key: value for key, value in spec.items() if key != KEY or not adapter.plain}
    named(said, file)
    held = {**adapter.state_dict(), **{PLAIN + k: v for k, v in adapter.plain.items()}}
    tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in held.items()}
    write_bytes_atomic(file, as_safetensors(tensors, {**said, **describe(adapter)}))


def as_safetensors(tensors: dict[str, Tensor], spec: Mapping[str, Any]) -> bytes:
    """A whole safetensors file with a spec in its metadata."""
    return save(tensors, {_SPEC_KEY: json.dumps(dict(spec), sort_keys=True), "format": "pt"})


def load_adapter(
    source: str | os.PathLike[str],
    *,
    face_id_plus_v2: bool | None = None,
    weight_name: str | None = None,
    subfolder: str = "",
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> ImagePromptAdapter:
    """Open an adapter in any layout that `layouts` knows, in float32.

    Args:
        source: A file, a folder, or a hub id `owner/repository`.
        face_id_plus_v2: Version 2 (True) or 1 (False) of FaceID-Plus, when the file does not say;
            nothing else has versions.
        weight_name: The file in a folder or repository; a folder with one needs none, and neither
            does a repository that `push_to_hub` made.
        subfolder: Where in the folder or repository.
        revision: Branch, tag or commit of a repository.
        local_files_only: Never connect; the environment's HF_HUB_OFFLINE does the same.
        token: Of the hub, for private repositories; None takes the one that is logged in.
        cache_dir: Where downloads are kept; None is the hub library's own place.

    Returns:
        The adapter; its `spec` is the file's, empty for files that others made.

    Raises:
        CheckpointError: It is missing, broken, of another layout, or for another model.
    """
    file = find_checkpoint(
        source,
        weight_name=weight_name,
        subfolder=subfolder,
        revision=revision,
        local_files_only=local_files_only,
        token=token,
        cache_dir=cache_dir,
    )
    contents = open_checkpoint(file)
    found = normalise(contents.tensors, file)
    tensors, spec = completed(found.tensors, spec_of(contents), file)
    adapter = adapter_from_tensors(tensors, file, spec, face_id_plus_v2)
    for note in found.notes:
        warnings.warn(f"{file.name}: {note}", stacklevel=2)
    return adapter


def read_spec(file: Path) -> dict[str, Any]:
    """The JSON spec in a file's metadata; empty for files that others made.

    Raises:
        CheckpointError: The file or its spec is broken.
    """
    return spec_of(open_checkpoint(file))


def spec_of(contents: Contents) -> dict[str, Any]:
    """The JSON spec of an open file; empty for files that others made.

    Raises:
        CheckpointError: It is no JSON object.
    """
    try:
        spec = json.loads(contents.metadata.get(_SPEC_KEY, "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError("its spec is broken", where=contents.file, found=error) from error
    if not isinstance(spec, dict):
        raise CheckpointError(
            "its spec is broken", where=contents.file, expected="a JSON object", found=spec
        )
    return spec


def weights_hash(file: Path) -> str:
    """SHA-256 of an adapter's weights, with those it only names, and of how they are read.

    When and by which revision they were trained, and their dial, are not in it: equal weights
    trained again, or calibrated anew, have the same.

    Args:
        file: In any layout that `layouts` knows.

    Raises:
        CheckpointError: The file is broken, or what it names is not beside it.
    """
    contents = open_checkpoint(file)
    stored = normalise(contents.tensors, file).tensors
    tensors, spec = completed(stored, spec_of(contents), file)
    read = {name: spec.get(name) for name in _READ_FROM_SPEC}
    told = json.dumps([tensors_hash(tensors), read], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def copy_with_spec(source: Path, target: Path, changes: Mapping[str, Any]) -> None:
    """Write an adapter of ours again, its tensors to the bit, with more in its spec.

    Args:
        source: A file.
        target: Where to write; may be the same file.
        changes: What is added to the spec, or replaced.

    Raises:
        CheckpointError: The file is broken or of another layout.
        OutputError: The target holds the weights that the source names.
    """
    contents = open_checkpoint(source)
    stored, said = normalise(contents.tensors, source).tensors, spec_of(contents)
    check_target(said, source, target)
    tensors, spec = completed(stored, said, source)
    adapter_from_tensors(tensors, source, spec)
    if target.parent.resolve() == source.parent.resolve():  # what it names is beside it there too
        tensors, spec = dict(stored), said
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_bytes_atomic(target, as_safetensors(kept, {**spec, **changes}))


def remember_in_file(source: Path, plain: Path, target: Path) -> None:
    """Write an adapter of ours again, with the weights that it went on from beside its own.

    Args:
        source: The adapter's file; its spec and the type of its weights are kept.
        plain: File of the plain adapter (`mixing.remember_plain`).
        target: Where to write; may be the source.

    Raises:
        CheckpointError: A file is broken or of another layout.
        ModelError: The two are no such pair.
    """
    adapter = load_adapter(source)
    remember_plain(adapter, load_adapter(plain))
    stored = next(iter(open_checkpoint(source).tensors.values())).dtype
    save_adapter(adapter, target, adapter.spec, stored)


def adapter_from_tensors(
    tensors: Mapping[str, Tensor],
    where: object,
    spec: Mapping[str, Any] | None = None,
    face_id_plus_v2: bool | None = None,
) -> ImagePromptAdapter:
    """Build the adapter that these tensors describe; every size is read from their shapes.

    Args:
        tensors: Flat, with our keys; copied to float32.
        where: The source's name, for messages.
        spec: What the file says of itself.
        face_id_plus_v2: Version 2 (True) or 1 (False) of FaceID-Plus, when the spec does not say.

    Raises:
        CheckpointError: Keys are missing, unexpected, disagree about sizes or are not finite, or
            it is not known which FaceID-Plus this is.
    """
    adapter = skeleton(tensors, where, spec or {})
    wrong = misfits(tensors, adapter)
    problems = [f"missing {key}" for key in wrong["missing"]]
    problems += [f"unexpected {key}" for key in wrong["unexpected"]]
    problems += wrong["mismatched"]
    loaded = {
        key: tensors[key].detach().to(torch.float32, copy=True)
        for key in tensors
        if tensors[key].dtype in DTYPES and key not in wrong["unexpected"]
    }
    problems += [f"{key} is not finite" for key in sorted(loaded) if not _finite(loaded[key])]
    if problems:
        more = len(problems) - _NAMED_PROBLEMS
        named = ", ".join(problems[:_NAMED_PROBLEMS]) + (f" and {more} more" if more > 0 else "")
        raise CheckpointError(f"does not fit together: {named}", where=where)
    shortcut = _shortcut(adapter, where, spec or {}, face_id_plus_v2)
    adapter = skeleton(tensors, where, spec or {}, shortcut) if shortcut else adapter
    plain = {key: loaded.pop(key) for key in list(loaded) if key.startswith(PLAIN)}
    with building():
        adapter.load_state_dict(loaded, assign=True)
    adapter.plain = {key.removeprefix(PLAIN): tensor for key, tensor in plain.items()}
    adapter.spec = dict(spec or {})
    return adapter


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _shortcut(
    adapter: ImagePromptAdapter, where: object, spec: Mapping[str, Any], stated: bool | None
) -> bool:
    """Whether this is version 2 of FaceID-Plus; False for every other kind."""
    if adapter.kind != "faceid-plus":
        return False
    stored = spec.get("shortcut")
    known = stored if isinstance(stored, bool) else stated
    if known is None:
        raise CheckpointError(
            "is FaceID-Plus, and nothing in it tells version 1 from 2",
            where=where,
            fix="Say face_id_plus_v2=True (version 2) or False (version 1); published files "
            "have `plusv2` in their names.",
        )
    if stated is not None and stated != known:
        raise CheckpointError(
            "is the other version of FaceID-Plus",
            where=where,
            expected=f"face_id_plus_v2={stated}",
            found=f"{known} in its spec",
            fix="Leave face_id_plus_v2 out.",
        )
    return known
