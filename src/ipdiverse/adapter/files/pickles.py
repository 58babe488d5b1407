"""Read the instructions of a pickle without following them, and refuse all but tensors.

This comes before `torch.load(weights_only=True)`, which runs no code either, but allocates what a
file claims, and whose refusal fills a screen.
"""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ipdiverse.errors import CheckpointError
from ipdiverse.loading import unbroken

MAX_PICKLE_BYTES = 4 * 1024 * 1024
"""A whole SDXL UNet takes 0.3 MB."""
MAX_TENSORS = 20_000

_NUMBERS = {"BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4"}
_BY_STACK = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
_STORAGES = ("BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")
_ALLOWED = {
    "collections OrderedDict",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    *map("torch {}Storage".format, _STORAGES),
}


def check_pickle(stream: IO[bytes], file: Path, size: int | None) -> None:
    """Refuse a pickle that holds more than tensors, or claims more than `size` bytes."""
    strings: list[str] = []
    number = claimed = 0
    for name, argument in _instructions(stream, file):
        if name == "GLOBAL" and argument not in _ALLOWED:
            raise _more_than_tensors(file, str(argument).replace(" ", ".", 1))
        if name in _BY_STACK:
            wanted = str(argument or ".".join(strings)).replace(" ", ".", 1)
            raise _more_than_tensors(file, wanted)
        if isinstance(argument, str):
            strings = [*strings[-1:], argument]
        if name in _NUMBERS:
            number = int(argument)
            _check_claim(number, file, size)
        if name == "BINPERSID":  # a storage; its length is the last number before it
            claimed += number
            _check_claim(claimed, file, size)


def _check_claim(number: int, file: Path, size: int | None) -> None:
    if size is not None and not 0 <= number <= max(size, 2**16):
        raise claims_too_much(file, f"numbers from 0 to the file's {size} bytes", number)


def _instructions(stream: IO[bytes], file: Path) -> Iterator[tuple[str, Any]]:
    with unbroken(file, "torch"):
        for code, argument, position in pickletools.genops(stream):
            if (position or 0) > MAX_PICKLE_BYTES:
                raise too_many(file)
            yield code.name, argument


def _more_than_tensors(file: Path, wanted: str) -> CheckpointError:
    return CheckpointError(
        "asks for more than tensors, which is never opened: it could run code",
        where=file,
        found=f"`{wanted}`",
        fix="Get the adapter as safetensors.",
    )


def too_many(file: Path) -> CheckpointError:
    """The error for a file that cannot be an adapter."""
    return CheckpointError(
        "holds too many tensors",
        where=file,
        expected=f"at most {MAX_TENSORS}",
        fix="It is not an adapter.",
    )


def first_of(names: list[str], most: int = 5) -> str:
    """The first names of a list that may be long, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def claims_too_much(file: Path, expected: str, found: object) -> CheckpointError:
    """The error for a file that claims more than it holds."""
    return CheckpointError(
        "claims more than it holds",
        where=file,
        expected=expected,
        found=found,
        fix="It may be cut off. Download it again.",
    )
