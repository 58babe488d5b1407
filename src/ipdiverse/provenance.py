"""Write results so that none is ever half there, and let each PNG say how it was made."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from PIL import Image, PngImagePlugin

from ipdiverse.errors import ArgumentError, ImageError, OutputError
from ipdiverse.image_io.files import opened

RECORD_KEY = "ipdiverse"
SUMMARY_KEY = "parameters"
"""The key that other image tools read and show."""
MAX_RECORD_BYTES = 1024 * 1024

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MAX_CHUNKS = 100_000
_MAX_SUMMARY = 2000
_PROBE_BYTES = 64 * 1024
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_IN_THE_WAY = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR)
_NO_FOLDER_SYNC = (errno.EACCES, errno.EINVAL, errno.ENOTSUP)

AnyPath = str | os.PathLike[str]


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


def write_bytes_atomic(
    path: AnyPath, data: bytes, check: Callable[[Path], None] | None = None
) -> None:
    """Write a file completely or not at all.

    Args:
        path: Where to, in a folder that exists; an existing file is replaced.
        data: The whole content.
        check: Called with the written file before it gets its name; what it raises prevents that.

    Raises:
        OutputError: It cannot be written; whatever stood there before still does. Only if the
            disk fails in the very last step, making the name durable, the new file may be there.
    """
    target = Path(path)
    temporary = target.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        _write_synced(temporary, data)
        if check is not None:
            check(temporary)
        temporary.replace(target)
        _sync_folder(target.parent)
    except (OSError, ValueError) as error:
        raise _output_error(target, error) from error
    finally:
        with contextlib.suppress(OSError, ValueError):
            temporary.unlink(missing_ok=True)


def write_text_atomic(path: AnyPath, text: str) -> None:
    """Write a text file, in UTF-8 and with the line ends as given, completely or not at all.

    Args:
        path: Where to, in a folder that exists; an existing file is replaced.
        text: The whole content; a broken character becomes "?" rather than lose the rest.

    Raises:
        OutputError: It cannot be written; whatever stood there before still does.
    """
    write_bytes_atomic(path, text.encode("utf-8", "replace"))


def ensure_writable_folder(path: AnyPath) -> Path:
    """Create a folder if need be and prove, before long work starts, that results can go there.

    Args:
        path: The folder.

    Returns:
        The folder as a `Path`.

    Raises:
        OutputError: It is a file, cannot be created, may not be written to, or has no space.
    """
    folder = Path(path)
    probe = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_synced(probe, bytes(_PROBE_BYTES))
    except (OSError, ValueError) as error:
        raise _output_error(folder, error) from error
    finally:
        with contextlib.suppress(OSError, ValueError):
            probe.unlink(missing_ok=True)
    return folder


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the new name survive a power cut, where the system can do that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def _output_error(path: Path, error: Exception) -> OutputError:
    number = getattr(error, "errno", None)
    if number in _NO_SPACE:
        what, fix = "there is no space left", "Free some space or choose another disk."
    elif number in _FORBIDDEN:
        what, fix = "this place may not be written to", "Choose another folder."
    elif number in _IN_THE_WAY:
        what, fix = "a file or folder of that name is in the way", "Choose another name."
    elif number == errno.ENOENT:
        what, fix = "the folder does not exist", "Create it first."
    else:
        what, fix = "this cannot be written", "Choose another path."
    return OutputError(what, where=path, found=getattr(error, "strerror", None) or error, fix=fix)


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
    printable = "".join(character for character in line if character.isprintable())
    return printable[:_MAX_SUMMARY].encode("utf-8", "replace").decode()


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


def file_hash(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
