"""The weights that an adapter went on from, named in the file beside its own that holds them.

Two adapters that lie together need no second copy of the plain one's weights: the spec's `plain` is
{"file": NAME, "sha256": HASH}. Whoever reads such a file gets the weights as if they lay in it, and
what is written from them anywhere else holds them itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ipdiverse.adapter.containers import open_checkpoint
from ipdiverse.adapter.layouts import normalise
from ipdiverse.adapter.mixing import PLAIN, mixable
from ipdiverse.errors import CheckpointError
from ipdiverse.provenance import file_hash

_KEY = "plain"
_FIX = (
    "Put it there, or write one file that holds both, where they are together: ipdiverse convert."
)


def naming(plain: Path) -> dict[str, Any]:
    """What a spec says of weights that lie in a file beside it."""
    return {_KEY: {"file": plain.name, "sha256": file_hash(plain)}}


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
    rest = {key: value for key, value in spec.items() if key != _KEY}
    if _KEY not in spec:
        return dict(tensors), rest
    plain = file.parent / _checked(spec[_KEY], file)
    if not plain.is_file():
        raise CheckpointError(
            "the weights that it went on from are not beside it",
            where=file,
            expected=plain.name,
            fix=_FIX,
        )
    if file_hash(plain) != spec[_KEY]["sha256"]:
        raise CheckpointError(
            "beside it are not the weights that it went on from",
            where=file,
            expected=f"{plain.name} with the SHA-256 {spec[_KEY]['sha256'][:12]}…",
            found="a file of this name with another",
            fix=_FIX,
        )
    theirs = mixable(normalise(open_checkpoint(plain).tensors, plain).tensors)
    return {**tensors, **{PLAIN + key: tensor for key, tensor in theirs.items()}}, rest


def _checked(named: Any, file: Path) -> str:
    """The name of a file in the same folder."""
    fits = isinstance(named, dict) and all(
        isinstance(named.get(k), str) for k in ("file", "sha256")
    )
    name = named["file"] if fits else ""
    if Path(name).suffix != ".safetensors" or "/" in name or "\\" in name:
        raise CheckpointError(
            "its spec names the weights that it went on from in a way that cannot be followed",
            where=file,
            expected="a safetensors file of the same folder, and its sha256",
            found=named,
        )
    return name
