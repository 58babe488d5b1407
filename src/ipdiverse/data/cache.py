"""Shards: rows of tensors computed once, kept in safetensors files that are whole or absent.

Each shard carries a key of everything that it was computed from. If the key differs it is computed
again, so a shard is never silently stale, and an interrupted run repeats at most one shard. It also
carries a hash of its tensors, which `Rows.missing` compares: reading all of a cache once at the
start of a run takes about a second a gigabyte, and finds what a disk has spoilt before it is used.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ipdiverse.errors import DataError
from ipdiverse.parts import WHOLE, Part
from ipdiverse.writing import safetensors_bytes, tensors_hash, write_bytes_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

_OPEN_FILES = 128
"""Shards kept open for reading; each is memory-mapped."""


@dataclass(frozen=True)
class Rows:
    """A set of shards with one row of tensors for each of `contents`.

    Args:
        folder: Where the shards are.
        name: What their names begin with.
        contents: What each row is computed from, as text: a hash of a file, or a caption.
        settings: What all rows depend on: weights of encoders, preprocessing.
        size: Rows in a shard.
    """

    folder: Path
    name: str
    contents: Sequence[str]
    settings: str
    size: int = 256

    def __len__(self) -> int:
        return len(self.contents)

    @property
    def shards(self) -> int:
        """How many files."""
        return -(-len(self) // self.size)

    def file(self, shard: int) -> Path:
        """A shard's file."""
        return self.folder / f"{self.name}-{shard:05d}.safetensors"

    def span(self, shard: int) -> range:
        """The rows of a shard."""
        return range(shard * self.size, min((shard + 1) * self.size, len(self)))

    def key(self, shard: int) -> str:
        """64 hexadecimal digits of everything that a shard depends on."""
        span = self.span(shard)
        content = [self.settings, *self.contents[span.start : span.stop]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def is_done(self, shard: int, whole: bool = False) -> bool:
        """Whether a shard was computed from these contents and settings."""
        try:
            with safe_open(self.file(shard), "pt") as file:
                about = file.metadata() or {}
                if about.get("key") != self.key(shard):
                    return False
                # shards of version 0.1 have no hash
                if not whole or about.keys() == {"key"}:
                    return True
                held = tensors_hash({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
                if held == about.get("sha256"):
                    return True
        except FileNotFoundError:
            return False
        except (OSError, SafetensorError):
            pass
        if whole:
            warnings.warn(f"{self.file(shard)}: is damaged, and is computed again", stacklevel=3)
        return False

    @property
    def done(self) -> bool:
        """Whether every shard was."""
        return all(self.is_done(shard) for shard in range(self.shards))

    def missing(self, part: Part = WHOLE) -> list[int]:
        """Shards to compute: those that are not there, stale, or damaged, which is warned of."""
        own = (shard for shard in range(self.shards) if part.whole or part.takes(self.key(shard)))
        return [shard for shard in own if not self.is_done(shard, whole=True)]


def compute(
    rows: Rows,
    make: Callable[[range], dict[str, Tensor]],
    missing: Sequence[int],
    progress: Callable[[int], Any] = lambda _: None,
) -> None:
    """Compute the shards of these numbers (`Rows.missing`)."""
    for shard in missing:
        span = rows.span(shard)
        tensors = {name: tensor.contiguous() for name, tensor in make(span).items()}
        about = {"key": rows.key(shard), "sha256": tensors_hash(tensors)}
        write_bytes_atomic(rows.file(shard), safetensors_bytes(tensors, about))
        progress(len(span))


class RowReader:
    """Reads single rows of finished shards, memory-mapped.

    Raises:
        DataError: A shard is missing, broken or stale.
    """

    def __init__(self, rows: Rows) -> None:
        for shard in range(rows.shards):
            if not rows.is_done(shard):
                raise DataError(
                    "is missing, broken, or of other data or encoders",
                    where=rows.file(shard),
                    fix="Run `ipdiverse embed` again; finished shards are kept.",
                )
        self.rows = rows
        self._open: OrderedDict[int, Any] = OrderedDict()

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """The tensors of one row."""
        if not 0 <= index < len(self.rows):
            raise IndexError(index)
        shard, row = divmod(index, self.rows.size)
        if shard not in self._open:
            if len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)
            self._open[shard] = safe_open(self.rows.file(shard), "pt")
        self._open.move_to_end(shard)  # the least recently read is the first to be closed
        file = self._open[shard]
        return {name: file.get_slice(name)[row] for name in file.keys()}  # noqa: SIM118

    def __getstate__(self) -> dict[str, Any]:
        # open files cannot be pickled: each worker process opens its own
        return {"rows": self.rows, "_open": OrderedDict()}
