"""The weights that an adapter went on from, named in the file beside its own that holds them.

Two adapters that lie together need no second copy of the plain one's weights: the spec's `plain` is
{"file": NAME, "sha256": HASH of its weights}. Whoever reads such a file gets the weights as if they
lay in it, and what is written from them anywhere else holds them itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from ipdiverse.adapter.files.containers import open_checkpoint
from ipdiverse.adapter.files.layouts import normalise
from ipdiverse.adapter.mixing import PLAIN, mixable
from ipdiverse.errors import CheckpointError, OutputError

KEY = "plain"
"""Of a spec."""
_LONGEST = 255
_FIX = (
    "Put it there, or write one file that holds both, where they are together: ipdiverse convert."
)


def naming(plain: Path) -> dict[str, Any]:
    """What a spec says of weights that lie in a file beside it.

    Raises:
        CheckpointError: They are no plain adapter's in safetensors.
    """
    return {KEY: {"file": plain.name, "sha256": tensors_hash(_weights(plain))}}


def named(spec: Mapping[str, Any], file: Path) -> Path | None:
    """The file beside it that an adapter's file names; None where it names none.

    Args:
        spec: The adapter's.
        file: Where it is from; what is named is in the same folder.

    Raises:
        CheckpointError: The name leads elsewhere, or is none.
    """
    if KEY not in spec:
        return None
    given = spec[KEY]
    fits = isinstance(given, dict) and all(
        isinstance(given.get(k), str) for k in ("file", "sha256")
    )
    name = given["file"] if fits else ""
    alone = PureWindowsPath(name).name == name and ":" not in name and "/" not in name
    if not (
        alone and name.endswith(".safetensors") and name.isprintable() and len(name) < _LONGEST
    ):
        raise CheckpointError(
            "its spec names the weights that it went on from in a way that cannot be followed",
            where=file,
            expected="a safetensors file of the same folder, and its weights' sha256",
            found=ascii(given)[:200],
        )
    return file.parent / name


def completed(
    tensors: Mapping[str, Tensor], spec: Mapping[str, Any], file: Path
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An adapter's tensors and spec, with the weights that it only names among the tensors.

    Args:
        tensors: Of the file, with our keys.
        spec: Of the file.
        file: Where both are from; only a file of the same folder is ever read.

    Raises:
        CheckpointError: What is named is not there, is another file, or its name leads elsewhere.
    """
    rest = {key: value for key, value in spec.items() if key != KEY}
    plain = named(spec, file)
    if plain is None:
        return dict(tensors), rest
    if not plain.is_file():
        raise CheckpointError(
            "the weights that it went on from are not beside it",
            where=file,
            expected=plain.name,
            fix=_FIX,
        )
    theirs, wanted = _weights(plain), spec[KEY]["sha256"]
    if tensors_hash(theirs) != wanted:
        raise CheckpointError(
            "beside it are not the weights that it went on from",
            where=file,
            expected=f"{plain.name} with weights of SHA-256 {ascii(wanted)[1:13]}…",
            found="a file of this name with others",
            fix=_FIX,
        )
    return {**tensors, **{PLAIN + key: tensor for key, tensor in theirs.items()}}, rest


def check_target(spec: Mapping[str, Any], source: Path, target: Path) -> None:
    """Refuse to write over the file that a source names.

    Raises:
        OutputError: The target is that file.
    """
    plain = named(spec, source)
    if plain is not None and target.exists() and plain.exists() and target.samefile(plain):
        raise OutputError(
            f"holds the weights that {source.name} went on from",
            where=target,
            fix="Choose another name.",
        )


def _weights(plain: Path) -> dict[str, Tensor]:
    """Of a file that holds a plain adapter and nothing else."""
    contents = open_checkpoint(plain)
    tensors = normalise(contents.tensors, plain).tensors
    theirs = mixable(tensors)
    if contents.container != "safetensors" or theirs.keys() != tensors.keys():
        raise CheckpointError(
            "cannot be named as what an adapter went on from",
            where=plain,
            expected="safetensors of a plain adapter, without fusion or noise-conditioning",
            found=contents.container,
        )
    return theirs


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and every bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
