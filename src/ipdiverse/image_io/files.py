"""An image file before it is decoded: opening it, and checking what its first bytes claim.

Nothing here decodes pixels or takes memory for them. Pillow cannot be asked for this: it allocates
the whole canvas of a WebP as soon as the file is opened, and between one and two times its own
limit it warns instead of refusing.
"""

from __future__ import annotations

import re
import stat
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ipdiverse.errors import ImageError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

MAX_FILE_BYTES = 64 * 1024 * 1024
MAX_PIXELS = 40_000_000
MIN_SIDE = 16
MAX_SIDE = 16384
MAX_JPEG_SCANS = 100
"""Ordinary progressive files have about ten."""
GET_AGAIN = "Download or export it again."

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_OTHERS = (
    (rb"GIF8[79]a", "a GIF"),
    (rb"BM.{4}\0\0\0\0", "a BMP"),
    (rb"II\*\0|MM\0\*", "a TIFF"),
    (rb".{4}ftyp(hei|hev|mif1|msf1)", "a HEIC"),
    (rb".{4}ftypavi", "an AVIF"),
    (rb"8BPS", "a Photoshop document"),
    (rb"%PDF", "a PDF"),
    (rb"PK\x03\x04", "a ZIP archive"),
    (rb"(?i:\s*<(!doctype html|html))", "a web page"),
    (rb"(?i:\s*<(\?xml|svg))", "an SVG or other XML"),
)
# Excluded: stuffed and fill bytes, and markers without a segment, mostly restarts.
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])", re.DOTALL)
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_SCAN = 0xDA
_JPEG_END = 0xD9
_MAX_JPEG_SEGMENTS = 2000
_MAX_PNG_CHUNKS = 100_000
_PNG_SIZE_END = 24
_WEBP_SIZE_END = 30


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open an image file for reading; errors while it is read are reported too.

    Args:
        path: The file.

    Yields:
        The open file.

    Raises:
        ImageError: It is missing, unreadable or not an ordinary file.
    """
    try:
        mode = Path(path).stat().st_mode
        if not stat.S_ISREG(mode):  # reading a pipe may block for ever, a device may never end
            raise ImageError(
                "this is not a file",
                where=path,
                expected="one image file",
                found="a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device",
                fix="Name one image.",
            )
        with Path(path).open("rb") as file:
            yield file
    except FileNotFoundError as error:
        raise ImageError(
            "the image file does not exist", where=path, fix="Check the path for a typing error."
        ) from error
    except PermissionError as error:
        raise ImageError(
            "the image file may not be read",
            where=path,
            expected="read permission",
            found=error.strerror,
            fix="Change its permissions or copy it elsewhere.",
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        found = getattr(error, "strerror", None) or error
        raise ImageError(
            "the image file cannot be read", where=path, found=found, fix="Check the path."
        ) from error


def check_file_bytes(count: int, where: object) -> None:
    """Refuse a file that is empty or too large.

    Args:
        count: Its size in bytes.
        where: Its name, for the error.

    Raises:
        ImageError: It is outside the limits.
    """
    if count == 0:
        raise ImageError(
            "the image file is empty",
            where=where,
            expected="a JPEG, PNG or WebP image",
            found="0 bytes",
            fix=GET_AGAIN,
        )
    if count > MAX_FILE_BYTES:
        raise ImageError(
            "the image file is too large",
            where=where,
            expected=f"at most {MAX_FILE_BYTES // 2**20} MiB",
            found=f"{-(-count // 2**20)} MiB",
            fix="Save a smaller copy of it.",
        )


def check_size(size: tuple[int, int], where: object) -> None:
    """Refuse an image that has too few or too many pixels.

    Args:
        size: Width and height in pixels.
        where: The image's name, for the error.

    Raises:
        ImageError: It is outside the limits.
    """
    width, height = size
    found = f"{width}x{height} px"
    if min(size) < MIN_SIDE:
        raise ImageError(
            "the image is too small",
            where=where,
            expected=f"sides of at least {MIN_SIDE} px",
            found=found,
            fix="Use a larger picture.",
        )
    if max(size) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ImageError(
            "the image is too large",
            where=where,
            expected=f"sides up to {MAX_SIDE} px and at most {MAX_PIXELS // 10**6} megapixels",
            found=f"{found} ({width * height / 10**6:.0f} megapixels)",
            fix="Scale it down first.",
        )


def format_of(data: bytes) -> str | None:
    """Tell the format of an image by its content.

    Args:
        data: The file, or at least its first 12 bytes.

    Returns:
        "JPEG", "PNG" or "WEBP"; None for anything else.
    """
    if data.startswith(PNG_SIGNATURE):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return None


def describe(data: bytes) -> str:
    """Name content that is not an accepted image, such as "a GIF" or "plain text", for an error."""
    head = data[:512]
    for pattern, name in _OTHERS:
        if re.match(pattern, head, re.DOTALL):
            return name
    is_text = not re.search(rb"[\x00-\x08\x0e-\x1f\x7f]", head)
    return "plain text" if is_text else "data of an unknown kind"


def claimed_size(data: bytes, image_format: str) -> tuple[int, int] | None:
    """Read width and height in pixels from the header; None where it is broken.

    Args:
        data: The file.
        image_format: As `format_of` returns it.
    """
    return {"PNG": _png_size, "JPEG": _jpeg_size, "WEBP": _webp_size}[image_format](data)


def jpeg_scan_count(data: bytes) -> int:
    """Count the scans of a JPEG's main image: decoding passes over the whole image for each."""
    return sum(marker == _JPEG_SCAN for marker, _ in _jpeg_segments(data))


def png_chunks(file: IO[bytes]) -> Iterator[tuple[bytes, int, int]]:
    """Step through the chunks of a PNG, whatever the caller reads of each.

    Args:
        file: An open PNG that can seek.

    Yields:
        Kind, position of the body, and its length; the file is at the body.
    """
    position = len(PNG_SIGNATURE)
    for _ in range(_MAX_PNG_CHUNKS):
        file.seek(position)
        length, kind = int.from_bytes(file.read(4), "big"), file.read(4)
        if kind in {b"IEND", b""}:
            return
        yield kind, position + 8, length
        position += 12 + length  # length, kind and checksum take four bytes each


def _png_size(data: bytes) -> tuple[int, int] | None:
    if len(data) < _PNG_SIZE_END or data[12:16] != b"IHDR":
        return None
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Source: RFC 9649, sections 2.7 (VP8X) and 3.4 (VP8L); RFC 6386, section 9.1 (VP8)."""
    kind = data[12:16]
    if len(data) < _WEBP_SIZE_END:
        return None
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = data[26:28], data[28:30]
        return int.from_bytes(width, "little") & 0x3FFF, int.from_bytes(height, "little") & 0x3FFF
    return None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """The last frame header counts; a broken file may hold several."""
    size = None
    for marker, position in _jpeg_segments(data):
        if marker in _JPEG_FRAMES:
            frame = data[position + 3 : position + 7]
            size = int.from_bytes(frame[2:], "big"), int.from_bytes(frame[:2], "big")
    return size


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Walk as libjpeg does, so that neither previews nor data after the image count.

    Phones append whole videos after the image; by chance those contain any marker.
    """
    position = 2
    for _ in range(_MAX_JPEG_SEGMENTS):
        match = _JPEG_MARKER.search(data, position)
        if match is None or match[1][0] == _JPEG_END:
            return
        yield match[1][0], match.end()
        position = match.end() + int.from_bytes(data[match.end() : match.end() + 2], "big")
