"""Shards: rows of tensors computed once, kept in safetensors files that are whole or absent.

Each shard carries a key of everything that it was computed from. If the key differs it is computed
again, so a shard is never silently stale, and an interrupted run repeats at most one shard.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ipdiverse.errors import DataError
from ipdiverse.writing import write_bytes_atomic

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

    def is_done(self, shard: int) -> bool:
        """Whether a shard exists, is whole, and was computed from these contents and settings."""
        try:
            with safe_open(self.file(shard), "pt") as file:
                return (file.metadata() or {}).get("key") == self.key(shard)
        except (OSError, SafetensorError):
            return False


def compute(
    rows: Rows,
    make: Callable[[range], dict[str, Tensor]],
    progress: Callable[[int], Any] = lambda _: None,
) -> int:
    """Compute the shards that are missing.

    Args:
        rows: What is wanted.
        make: Gives the tensors of a range of rows, stacked along their first dimension.
        progress: Told how many rows each shard has, done before or now.

    Returns:
        How many shards were computed.

    Raises:
        OutputError: A shard cannot be written; the others stay.
    """
    computed = 0
    for shard in range(rows.shards):
        span = rows.span(shard)
        if not rows.is_done(shard):
            tensors = {name: tensor.contiguous() for name, tensor in make(span).items()}
            write_bytes_atomic(rows.file(shard), save(tensors, {"key": rows.key(shard)}))
            computed += 1
        progress(len(span))
    return computed


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
        file = self._file(shard)
        return {name: file.get_slice(name)[row] for name in file.keys()}  # noqa: SIM118

    def _file(self, shard: int) -> Any:
        if shard not in self._open:
            while len(self._open) >= _OPEN_FILES:
                self._open.popitem(last=False)
            self._open[shard] = safe_open(self.rows.file(shard), "pt")
        self._open.move_to_end(shard)
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        # open files cannot be pickled: each worker process opens its own
        return {"rows": self.rows, "_open": OrderedDict()}
