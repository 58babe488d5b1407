"""Adapters as files: the published IP-Adapter layout in safetensors, with a JSON spec.

Keys are `image_proj.*`, `ip_adapter.N.*`, `fusion.*` and `base_weights.*`; stock diffusers loads
the same file and ignores the last two. `layouts` says in which other layouts adapters are read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ipdiverse.adapter import model
from ipdiverse.adapter.files.containers import Contents, first_of, open_checkpoint
from ipdiverse.adapter.files.layouts import (
    BASE_WEIGHTS,
    OLD_BASE_WEIGHTS,
    Normalised,
    normalise,
    with_base_weights,
)
from ipdiverse.adapter.files.publishing import (
    CURVE,
    Stated,
    curve_png,
    model_card,
    push_files,
    save_files,
)
from ipdiverse.adapter.files.structure import DTYPES, describe, misfits, skeleton
from ipdiverse.base.adapters import PUBLISHED, find_checkpoint
from ipdiverse.errors import CheckpointError
from ipdiverse.loading import building
from ipdiverse.writing import safetensors_bytes, tensors_hash, write_bytes_atomic

_SPEC_KEY = "ipdiverse"
_HASH_KEY = "ipdiverse.sha256"
_READ_FROM_SPEC = ("fusion", "shortcut")  # all that shapes do not tell


class ImagePromptAdapter(model.ImagePromptAdapter):
    """An image prompt that opens, saves and publishes itself, by the names that diffusers gave it.

    This is `ipdiverse.ImagePromptAdapter`, and what `load_adapter` returns. The methods are here
    and not on the module itself, because that must not import the files that import it.
    """

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], **options: Any) -> ImagePromptAdapter:
        """Open a file, a folder or a hub id; options and errors are those of `load_adapter`."""
        return load_adapter(source, **options)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        dtype: torch.dtype | None = None,
        *,
        license: str | None = None,  # noqa: A002 - as the hub calls it
        base_model: str | None = None,
        repo_id: str | None = None,
    ) -> list[str]:
        """Write the weights, a model card, and the dial's curve if it was measured, into a folder.

        Args:
            folder: Made if need be.
            dtype: Of the stored tensors; None keeps the adapter's.
            license: Its short name on the hub, for example `apache-2.0`; None states none.
            base_model: Hub id of what it prompts; None takes what it was trained on, if known.
            repo_id: Where it will be published, for the card; None is the folder's name.

        Returns:
            The files' names.

        Raises:
            ArgumentError: The license or the base model is not such a name.
            OutputError: The folder cannot be written.
        """
        stated = Stated(license, base_model)
        name = repo_id or Path(folder).resolve().name
        return save_files(Path(folder), self._published(name, stated, dtype))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str | None = None,  # noqa: A002 - as the hub calls it
        base_model: str | None = None,
        private: bool = False,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        dtype: torch.dtype | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes.

        Args:
            repo_id: `owner/name`; made if need be.
            license: As `save_pretrained` takes it, and `base_model` and `dtype` too.
            base_model: Hub id of what it prompts.
            private: Whether a repository that is made is private.
            token: None takes the one that is logged in.
            commit_message: None takes the hub's.
            create_pr: Propose the change instead of making it.
            dtype: Of the stored tensors.

        Returns:
            The page's address.

        Raises:
            ArgumentError: The repository, the license or the base model is not such a name.
            ModelError: There is no token, the hub refused, or it cannot be reached.
        """
        stated = Stated(license, base_model)
        return push_files(
            repo_id,
            lambda: self._published(repo_id, stated, dtype),
            private=private,
            token=token,
            commit_message=commit_message,
            create_pr=create_pr,
        )

    def _published(
        self, repo_id: str, stated: Stated, dtype: torch.dtype | None
    ) -> dict[str, bytes | None]:
        """What a folder or a repository of this adapter holds, by name."""
        weights = adapter_bytes(self, self.spec, dtype or next(self.parameters()).dtype)
        card = model_card(self, repo_id, stated).encode("utf-8", "replace")
        return {PUBLISHED: weights, CURVE: curve_png(self.spec), "README.md": card}


def save_adapter(
    adapter: model.ImagePromptAdapter,
    file: Path,
    spec: Mapping[str, Any],
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write an adapter atomically.

    Args:
        adapter: What to save.
        file: Target, `*.safetensors`.
        spec: Provenance, stored as JSON in the file's metadata; kind, family, fusion and sizes are
            added.
        dtype: Of the stored tensors.
    """
    write_bytes_atomic(file, adapter_bytes(adapter, spec, dtype))


def adapter_bytes(
    adapter: model.ImagePromptAdapter, spec: Mapping[str, Any], dtype: torch.dtype
) -> bytes:
    """What `save_adapter` writes."""
    base = {BASE_WEIGHTS + name: tensor for name, tensor in adapter.base_weights.items()}
    held = {**adapter.state_dict(), **base}
    tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in held.items()}
    return as_safetensors(tensors, {**spec, **describe(adapter)})


def as_safetensors(tensors: dict[str, Tensor], spec: Mapping[str, Any]) -> bytes:
    """A whole safetensors file with a spec, and the weights' hash, in its metadata."""
    told = {_SPEC_KEY: json.dumps(dict(spec), sort_keys=True), _HASH_KEY: tensors_hash(tensors)}
    return safetensors_bytes(tensors, {**told, "format": "pt"})


def read_whole(file: Path) -> tuple[Normalised, dict[str, Any]]:
    """A file in our layout with its base weights, and its spec, once its weights' hash is right."""
    contents = open_checkpoint(file)
    stored = contents.metadata.get(_HASH_KEY)
    if stored is not None and stored != tensors_hash(contents.tensors):
        raise CheckpointError(
            "its weights are not those that were written",
            where=file,
            expected=f"SHA-256 {stored[:12]}…",
            fix="It was damaged or changed. Download or copy it again.",
        )
    found = normalise(contents.tensors, file)
    tensors, spec = with_base_weights(found.tensors, spec_of(contents), file)
    return replace(found, tensors=tensors), spec


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
    found, spec = read_whole(file)
    adapter = adapter_from_tensors(found.tensors, file, spec, face_id_plus_v2)
    for note in found.notes:
        warnings.warn(f"{file.name}: {note}", stacklevel=2)
    return adapter


def read_spec(file: Path) -> dict[str, Any]:
    """The JSON spec in a file's metadata; empty for files that others made."""
    return spec_of(open_checkpoint(file))


def spec_of(contents: Contents) -> dict[str, Any]:
    """The JSON spec of an open file; empty for files that others made."""
    try:
        spec = json.loads(contents.metadata.get(_SPEC_KEY, "{}"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError("its spec is broken", where=contents.file, found=error) from error
    if not isinstance(spec, dict):
        raise CheckpointError(
            "its spec is broken", where=contents.file, expected="a JSON object", found=spec
        )
    return spec


def stored_dtype(file: Path) -> torch.dtype:
    """The type of a file's weights; float32, which loses nothing, where there are several."""
    tensors = open_checkpoint(file).tensors.values()
    found = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return found.pop() if len(found) == 1 else torch.float32


def weights_hash(file: Path) -> str:
    """SHA-256 of an adapter's weights, its base weights included, and of how they are read.

    When and by which revision they were trained, and their dial, are not in it: equal weights
    trained again, or calibrated anew, have the same.
    """
    found, spec = read_whole(file)
    # hashed under the names of version 0.1, by which published readings know their adapters
    old = re.compile(f"^{re.escape(BASE_WEIGHTS)}")
    named = {old.sub(OLD_BASE_WEIGHTS, name): tensor for name, tensor in found.tensors.items()}
    read = {name: spec.get(name) for name in _READ_FROM_SPEC}
    told = json.dumps([tensors_hash(named), read], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def adapter_from_tensors(
    tensors: Mapping[str, Tensor],
    where: object,
    spec: Mapping[str, Any] | None = None,
    face_id_plus_v2: bool | None = None,
) -> ImagePromptAdapter:
    """Build the adapter that these tensors describe; every size is read from their shapes."""
    adapter = skeleton(ImagePromptAdapter, tensors, where, spec or {})
    wrong = misfits(tensors, adapter)
    problems = [f"missing {key}" for key in wrong["missing"]]
    problems += [f"unexpected {key}" for key in wrong["unexpected"]]
    problems += wrong["mismatched"]
    try:
        loaded = {
            key: tensors[key].detach().to(torch.float32, copy=True)
            for key in tensors
            if tensors[key].dtype in DTYPES and key not in wrong["unexpected"]
        }
        infinite = [key for key in sorted(loaded) if not loaded[key].isfinite().all()]
    except (MemoryError, RuntimeError) as error:  # torch says by the latter that memory is out
        raise CheckpointError(
            "cannot be read into memory", where=where, found=str(error) or "MemoryError"
        ) from error
    problems += [f"{key} is not finite" for key in infinite]
    if problems:
        raise CheckpointError(f"does not fit together: {first_of(problems)}", where=where)
    shortcut = _shortcut(adapter, where, spec or {}, face_id_plus_v2)
    if shortcut:
        adapter = skeleton(ImagePromptAdapter, tensors, where, spec or {}, shortcut)
    base = {key: loaded.pop(key) for key in list(loaded) if key.startswith(BASE_WEIGHTS)}
    with building():
        # assign: the skeleton is on `meta` and has no memory to copy into
        adapter.load_state_dict(loaded, assign=True)
    adapter.base_weights = {key.removeprefix(BASE_WEIGHTS): base[key] for key in base}
    adapter.spec = dict(spec or {})
    return adapter


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
