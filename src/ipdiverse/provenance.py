"""Let each PNG say how it was made."""

from __future__ import annotations

import io
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from PIL import Image, PngImagePlugin

from ipdiverse.errors import ArgumentError, ImageError, OutputError
from ipdiverse.image_io.files import opened
from ipdiverse.writing import AnyPath, write_bytes_atomic

RECORD_KEY = "ipdiverse"
SUMMARY_KEY = "parameters"
"""The key that other image tools read and show."""
MAX_RECORD_BYTES = 1024 * 1024

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MAX_CHUNKS = 100_000
_MAX_SUMMARY = 2000


def save_png(image: Image.Image, path: AnyPath, record: Mapping[str, Any]) -> None:
    """Write a PNG that carries the record of how it was made.

    Args:
        image: The image.
        path: Where to; an existing file is replaced, an interrupted call leaves it as it was.
        record: What JSON can hold; "prompt" leads the one-line summary.

    Raises:
        ArgumentError: The record does not fit into JSON or is too large.
        OutputError: The name is not that of a PNG, or the file cannot be written.
    """
    if Path(path).suffix.lower() != ".png":
        raise OutputError(
            "the image is written as PNG only",
            where=path,
            expected="a name that ends in .png",
            found=Path(path).suffix or "no extension",
            fix="Change the extension.",
        )
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt(RECORD_KEY, _as_json(record))
    chunks.add_itxt(SUMMARY_KEY, _summary(record))
    buffer = io.BytesIO()
    try:
        image.save(buffer, "PNG", pnginfo=chunks)
    except (OSError, ValueError) as error:
        raise OutputError("the image cannot be stored as PNG", where=path, found=error) from error
    write_bytes_atomic(path, buffer.getvalue())


def read_provenance(path: AnyPath) -> dict[str, Any]:
    """Read back the record that `save_png` wrote, without decoding the image.

    Args:
        path: A PNG file.

    Returns:
        The record.

    Raises:
        ImageError: The file cannot be read, is not a PNG, is broken, or has no valid record.
    """
    with opened(path) as file:
        text = _find_record(file, path)
    if text is None:
        raise ImageError(
            "the image has no record of how it was made",
            where=path,
            expected=f'a PNG text chunk "{RECORD_KEY}"',
            found="none",
            fix="Only PNG files that ipdiverse wrote have one; editing or uploading may remove it.",
        )
    return _parse(text, path)


def as_text(record: Mapping[str, Any]) -> str:
    """A record for people: a line for every field that holds something, the request's too."""
    rows: dict[str, Any] = {}
    for name, value in record.items():
        rows |= value if name == "request" and isinstance(value, dict) else {name: value}
    told = {name: _told(value) for name, value in rows.items() if value not in (None, "", [], {})}
    width = max(map(len, told), default=0)
    return "\n".join(f"  {_printable(name):<{width}}  {text}" for name, text in told.items())


def _as_json(record: Mapping[str, Any]) -> str:
    """ASCII, so that even broken Unicode from a command line survives the way back."""
    try:
        text = json.dumps(dict(record), ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(
            "the record cannot be stored as JSON", where="record", found=error
        ) from error
    if len(text) > MAX_RECORD_BYTES:
        raise ArgumentError(
            "the record is too large",
            where="record",
            expected=f"at most {MAX_RECORD_BYTES} bytes of JSON",
            found=len(text),
        )
    return text


def _summary(record: Mapping[str, Any]) -> str:
    """The prompt, then every plain value, on one line."""
    plain = {key: value for key, value in record.items() if isinstance(value, str | int | float)}
    prompt = str(plain.pop("prompt", ""))
    settings = ", ".join(f"{key}: {value}" for key, value in plain.items())
    line = " ".join(" | ".join(part for part in (prompt, settings) if part).split())
    return _printable(line)[:_MAX_SUMMARY].encode("utf-8", "replace").decode()


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{_printable(name)} {_told(part)}" for name, part in value.items())
    if isinstance(value, list):
        return ", ".join(_told(part) for part in value)
    return _printable(str(value))


def _printable(text: str) -> str:
    """Without what could steer a terminal: a record may come from anybody."""
    return "".join(character for character in text if character.isprintable())


def _find_record(file: IO[bytes], path: AnyPath) -> bytes | None:
    if file.read(len(_SIGNATURE)) != _SIGNATURE:
        raise ImageError(
            "this is not a PNG file",
            where=path,
            expected="a PNG that ipdiverse wrote",
            fix="Only PNG files carry a record.",
        )
    prefix = RECORD_KEY.encode() + b"\0"
    for body in _international_text(file, path):
        if body.startswith(prefix):
            return _text_of(body.removeprefix(prefix), path)
    return None


def _international_text(file: IO[bytes], path: AnyPath) -> Iterator[bytes]:
    """Yield the iTXt chunks and step over all others, pixels included."""
    for _ in range(_MAX_CHUNKS):
        length, kind = int.from_bytes(file.read(4), "big"), file.read(4)
        if kind in {b"IEND", b""}:
            return
        if kind != b"iTXt":
            file.seek(length + 4, os.SEEK_CUR)
            continue
        if length > MAX_RECORD_BYTES + 256:
            raise _broken("too large", f"at most {MAX_RECORD_BYTES} bytes", length, path)
        body = file.read(length)
        if zlib.crc32(kind + body).to_bytes(4, "big") != file.read(4):
            raise _broken("damaged", "a matching checksum", None, path)
        yield body


def _text_of(body: bytes, path: AnyPath) -> bytes:
    """Source: PNG specification, third edition, 11.3.3.4: flag, method, language, keyword, text."""
    compressed, rest = body[:1] == b"\x01", body[2:]
    text = rest.split(b"\0", 2)[-1]
    if not compressed:
        return text
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(text, MAX_RECORD_BYTES)
    except zlib.error as error:
        raise _broken("damaged", "compressed text", error, path) from error
    if inflater.unconsumed_tail:
        raise _broken("too large", f"at most {MAX_RECORD_BYTES} bytes", "more", path)
    return text


def _parse(text: bytes, path: AnyPath) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken("damaged", "JSON", error, path) from error
    if not isinstance(record, dict):
        raise _broken("damaged", "a JSON object", type(record).__name__, path)
    return record


def _broken(how: str, expected: str, found: object, path: AnyPath) -> ImageError:
    return ImageError(
        f"the record of how the image was made is {how}",
        where=path,
        expected=expected,
        found=found,
        fix="Use the original file.",
    )
