"""Typed settings: a dataclass from TOML, JSON or keywords, with every problem named at once.

A field's type says what is allowed: `Literal` lists choices, `Annotated[int, Range(1, 64)]` bounds
a number. `problems` finds what does not fit, `read` builds the dataclass, and `check` does the same
from a `__post_init__`, so that files, flags and Python callers are held to one rule.
"""

from __future__ import annotations

import codecs
import tomllib
import warnings
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from functools import lru_cache
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from ipdiverse.errors import ArgumentError, IpdiverseError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

T = TypeVar("T")
MARKS = {  # the longer mark of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
"""The encoding that each byte order mark tells; Windows editors write them."""
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


@dataclass(frozen=True)
class Range:
    """The smallest and the largest value of a number, both allowed."""

    low: float
    high: float


def decoded(data: bytes, encoding: str = "utf-8") -> str:
    """The text of a file: by its byte order mark, or else in one encoding; nothing is guessed."""
    mark = next((mark for mark in MARKS if data.startswith(mark)), b"")
    codec = MARKS.get(mark, encoding)
    try:
        text = data[len(mark) :].decode(codec)
    except UnicodeDecodeError as error:
        byte = f"0x{error.object[error.start]:02x}"
        raise ValueError(f"byte {byte} at position {error.start} is not {codec}") from error
    if "\0" in text:
        raise ValueError("it holds NUL characters, as UTF-16 without a byte order mark does")
    return text


def read_toml(file: Path) -> dict[str, Any]:
    """The content of a TOML file."""
    try:
        return tomllib.loads(decoded(file.read_bytes()))
    except (OSError, ValueError, RecursionError) as error:
        raise ArgumentError("cannot be read", where=file, expected="TOML", found=error) from error


def renamed(content: Mapping[str, Any], names: Mapping[str, str], where: object) -> dict[str, Any]:
    """The same content under today's keys, with one note that names the new words."""
    old = [key for key in content if key in names]
    if twice := [key for key in old if names[key] in content]:
        pairs = ", ".join(f"{key} and {names[key]}" for key in twice)
        raise ArgumentError(
            "the same setting is given twice", where=where, found=pairs, fix="Keep the second name."
        )
    if old:
        pairs = ", ".join(f"{key} → {names[key]}" for key in old)
        warnings.warn(f"{where}: renamed {pairs}", stacklevel=2)
    return {names.get(key, key): value for key, value in content.items()}


def problems(kind: type, content: Mapping[str, Any]) -> list[str]:
    """What does not fit the fields of a dataclass: unknown keys, wrong types, choices, ranges."""
    hints, found = _hints(kind), []
    for key, value in content.items():
        if key not in hints:
            close = [f", did you mean {name!r}?" for name in get_close_matches(key, hints, 1)]
            found.append("".join([f"unknown key {key!r}", *close]))
        elif not _fits(value, hints[key]):
            found.append(f"{key} is {value!r}, expected {_expected(hints[key])}")
    return found


def read(kind: type[T], content: Mapping[str, Any], where: object = None) -> T:
    """Build a dataclass from a mapping."""
    found = problems(kind, content)
    required = [
        f.name
        for f in fields(kind)  # type: ignore[arg-type]
        if f.init and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing := [name for name in required if name not in content]:
        found.append("missing " + ", ".join(missing))
    if found:
        raise ArgumentError("; ".join(found), where=where)
    # TOML and JSON have lists where the fields are tuples
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
    try:
        return kind(**values)
    except IpdiverseError as error:  # of several fields together
        raise ArgumentError(str(error), where=where) from error


def check(settings: Any) -> None:
    """Refuse a dataclass whose values do not fit its fields; for its `__post_init__`."""
    values = {f.name: getattr(settings, f.name) for f in fields(settings)}
    if found := problems(type(settings), values):
        raise ArgumentError("; ".join(found))


@lru_cache(maxsize=64)
def _hints(kind: type) -> dict[str, Any]:
    """Cached: a manifest asks for each of its lines, and hints are evaluated from text."""
    return get_type_hints(kind, include_extras=True)


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        ranges = [mark for mark in inner[1:] if isinstance(mark, Range)]
        of_type = _fits(value, inner[0])
        return of_type and all(value is None or r.low <= value <= r.high for r in ranges)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in inner)
    if origin is tuple:
        given = value if isinstance(value, (list, tuple)) else ()
        each = inner[:1] * len(given) if inner[-1] is Ellipsis else inner
        return given is value and len(each) == len(given) and all(map(_fits, given, each))
    if hint in (bool, int, float, str, NoneType):  # True is an int to Python, but not to a reader
        kinds = (int, float) if hint is float else hint
        return isinstance(value, kinds) and isinstance(value, bool) == (hint is bool)
    return True  # other types do not come from files; their own class checks them


def _expected(hint: Any) -> str:
    """What a field takes, in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        ranges = [f" from {m.low} to {m.high}" for m in inner[1:] if isinstance(m, Range)]
        return _expected(inner[0]) + "".join(ranges)
    if origin in (Union, UnionType):
        return " or ".join(_expected(one) for one in inner if one is not NoneType)
    if origin is Literal:
        return " or ".join(map(str, inner))
    if origin is tuple:
        return "a list, each " + _expected(inner[0])
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))
