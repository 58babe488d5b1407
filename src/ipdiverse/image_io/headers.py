"""What the first bytes of an image file claim, read without decoding or allocating anything.

Pillow cannot be asked for this alone: it takes memory for the whole canvas of a WebP as soon as the
file is opened, and warns instead of refusing between one and two times its own limit.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_PNG = b"\x89PNG\r\n\x1a\n"
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
# Left out: stuffed and fill bytes, and the markers that stand alone, restarts above all.
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])", re.DOTALL)
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_SCAN = 0xDA
_JPEG_END = 0xD9
_MAX_JPEG_SEGMENTS = 2000
_PNG_SIZE_END = 24
_WEBP_SIZE_END = 30


def format_of(data: bytes) -> str | None:
    """Tell the format of an image by its content.

    Args:
        data: The file, or at least its first 12 bytes.

    Returns:
        "JPEG", "PNG" or "WEBP"; None for anything else.
    """
    if data.startswith(_PNG):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return None


def describe(data: bytes) -> str:
    """Name content that is not an accepted image, for an error message.

    Args:
        data: The file, or its beginning.

    Returns:
        A few words such as "a GIF" or "plain text".
    """
    head = data[:512]
    for pattern, name in _OTHERS:
        if re.match(pattern, head, re.DOTALL):
            return name
    is_text = not re.search(rb"[\x00-\x08\x0e-\x1f\x7f]", head)
    return "plain text" if is_text else "data of an unknown kind"


def claimed_size(data: bytes, image_format: str) -> tuple[int, int] | None:
    """Read width and height from the header.

    Args:
        data: The file.
        image_format: What `format_of` said.

    Returns:
        Width and height in pixels; None when the header is broken.
    """
    return {"PNG": _png_size, "JPEG": _jpeg_size, "WEBP": _webp_size}[image_format](data)


def jpeg_scan_count(data: bytes) -> int:
    """Count the passes over the whole image that decoding a JPEG takes.

    Args:
        data: The file.

    Returns:
        The number of scans of the main image.
    """
    return sum(marker == _JPEG_SCAN for marker, _ in _jpeg_segments(data))


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
    """Walk as libjpeg does, so that neither previews nor what follows the image count.

    Phones append whole videos after the image; by chance those contain any marker.
    """
    position = 2
    for _ in range(_MAX_JPEG_SEGMENTS):
        match = _JPEG_MARKER.search(data, position)
        if match is None or match[1][0] == _JPEG_END:
            return
        yield match[1][0], match.end()
        position = match.end() + int.from_bytes(data[match.end() : match.end() + 2], "big")
