"""An image file before it is decoded: opening it, and checking what its first bytes claim.

Nothing here decodes pixels or takes memory for them. Pillow cannot be asked for this: it allocates
the whole canvas of a WebP as soon as the file is opened, and between one and two times its own
limit it warns instead of refusing.
"""

from __future__ import annotations

import re
import stat
import struct
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from PIL import features

from ipdiverse.errors import ImageError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping

# Budgets of one picture: all are checked before its pixels are decoded.
MAX_FILE_BYTES = 64 * 1024 * 1024
MAX_PIXELS = 40_000_000
"""Of the result: what has more is scaled down while it is decoded, or right after."""
MAX_DECODED_PIXELS = 64_000_000
"""What decoders take memory for: phones make 50 megapixels."""
MAX_DRAFT_PIXELS = 256_000_000
"""Of a JPEG of one scan, which libjpeg scales down as it reads: phones make 200 megapixels."""
MIN_SIDE = 16
MAX_SIDE = 16384
MAX_JPEG_SCANS = 100
"""Ordinary progressive files have about ten."""
MAX_SCANNED_PIXELS = 1_000_000_000
"""Scans times pixels: each scan is a pass over the whole image, 2 ms for a megapixel."""
MAX_SEGMENTS = 10_000
"""Of a JPEG; cameras write up to some hundreds."""
MAX_CHUNKS = 100_000
"""Of a PNG; the smallest that tools write hold 8 kB of pixels each."""

GET_AGAIN = "Download or export it again."

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_OTHERS = (
    (rb"GIF8[79]a", "a GIF"),
    (rb"II\*\0|MM\0\*", "a TIFF"),
    (rb".{4}ftyp(hei|hev|mif1|msf1)", "a HEIC"),
    (rb".{4}ftypavi", "an AVIF, which this build of Pillow cannot read"),
    (rb"BM.{4}\0\0\0\0", "a compressed BMP"),
    (rb"8BPS", "a Photoshop document"),
    (rb"%PDF", "a PDF"),
    (rb"PK\x03\x04", "a ZIP archive"),
    (rb"(?i:\s*<(!doctype html|html))", "a web page"),
    (rb"(?i:\s*<(\?xml|svg))", "an SVG or other XML"),
)
# Excluded: stuffed and fill bytes, and markers without a segment, mostly restarts.
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])", re.DOTALL)
_FILLED = b"\xff" * 64
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_SCAN = 0xDA
_JPEG_END = 0xD9
_JPEG_ABOUT = frozenset([*range(0xE1, 0xF0), 0xFE]) - {0xEE}
"""APP1 to APP15 and comments: none of them matters for decoding, but Adobe's and ICC profiles."""
_JPEG_PROFILE = b"ICC_PROFILE\0"
_JPEG_NAMES = {"exif": b"Exif\0\0", "xmp": b"http://ns.adobe.com/xap/1.0/\0"}
_ORIENTATION = 0x0112
_EXIF_NUMBERS = {1: "B", 3: "H", 4: "I"}
"""Types of EXIF values that can be whole numbers."""
_PNG_SIZE_END = 24
_BMP_SIZE_END = 26
_WEBP_SIZE_END = 30


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open an ordinary file; errors while it is open are `ImageError`s too."""
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
    """Refuse a file that is empty or too large (`ImageError`)."""
    if count == 0:
        raise ImageError(
            "the image file is empty",
            where=where,
            expected="an image",
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


def check_size(size: tuple[int, int], where: object, most: int = MAX_DECODED_PIXELS) -> None:
    """Refuse an image, width and height, of too few or too many pixels (`ImageError`)."""
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
    if max(size) > MAX_SIDE or width * height > most:
        raise ImageError(
            "the image is too large",
            where=where,
            expected=f"sides up to {MAX_SIDE} px and at most {most // 10**6} megapixels",
            found=f"{found} ({width * height / 10**6:.0f} megapixels)",
            fix="Scale it down first.",
        )


def check_count(count: int, most: int, what: str, where: object) -> None:
    """Refuse an image of more parts, such as scans, than pictures have (`ImageError`)."""
    if count > most:
        raise ImageError(
            "the image takes too long to decode",
            where=where,
            expected=f"at most {most} {what}",
            found=count,
            fix="Save it as a plain JPEG or PNG.",
        )


def format_of(data: bytes) -> str | None:
    """By the first 34 bytes: "JPEG", "PNG", "WEBP", "BMP", "AVIF" or None."""
    if data.startswith(PNG_SIGNATURE):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:12] in (b"ftypavif", b"ftypavis") and features.check("avif"):
        return "AVIF"
    # Pillow expands run lengths in Python, which takes a minute for a large file
    is_packed = data[14:15] != b"\x0c" and data[30:31] in (b"\1", b"\2")
    return "BMP" if data[:2] == b"BM" and data[6:10] == bytes(4) and not is_packed else None


def describe(data: bytes) -> str:
    """Name content that is not accepted, such as "a GIF" or "plain text", for an error."""
    head = data[:512]
    for pattern, name in _OTHERS:
        if re.match(pattern, head, re.DOTALL):
            return name
    is_text = not re.search(rb"[\x00-\x08\x0e-\x1f\x7f]", head)
    return "plain text" if is_text else "data of an unknown kind"


def claimed_size(data: bytes, image_format: str) -> tuple[int, int] | None:
    """Width and height in pixels by the header of a PNG, WebP or BMP; None where it is broken."""
    return {"PNG": _png_size, "WEBP": _webp_size, "BMP": _bmp_size}[image_format](data)


def orientation(about: Mapping[Any, Any]) -> int:
    """How to turn an image, 1 to 8 as EXIF numbers it; 1 where nothing says.

    Not by Pillow: it first copies what every tag claims, at worst 65,535 times the whole file.
    """
    exif, raw = about.get("exif"), about.get("Raw profile type exif")
    if exif is None and raw:  # ImageMagick writes it into a PNG as three lines, then digits
        with suppress(ValueError):
            exif = bytes.fromhex("".join(str(raw).split("\n")[3:]))
    found = _exif_orientation(exif or b"")
    if found is None:
        xmp = about.get("XML:com.adobe.xmp") or about.get("xmp") or b""
        xmp = xmp.encode("utf-8", "replace") if isinstance(xmp, str) else xmp
        match = re.search(rb'tiff:Orientation(?:="|>)([1-8])', xmp)
        found = int(match[1]) if match else 1
    return found


def _exif_orientation(exif: bytes) -> int | None:
    """Source: TIFF 6.0, section 2: byte order, 42, offset of a directory of 12-byte entries."""
    exif = exif.removeprefix(_JPEG_NAMES["exif"])
    order = ">" if exif.startswith(b"MM") else "<"
    with suppress(struct.error):  # broken metadata must not cost a good picture
        start = struct.unpack_from(f"{order}I", exif, 4)[0]
        count = struct.unpack_from(f"{order}H", exif, start)[0]
        for at in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", exif, at)
            if tag == _ORIENTATION and kind in _EXIF_NUMBERS:
                return struct.unpack_from(order + _EXIF_NUMBERS[kind], exif, at + 8)[0]
    return None


@dataclass
class Jpeg:
    """What a JPEG's markers say of its main image."""

    size: tuple[int, int] | None = None  # by the last frame header: a broken file may hold several
    scans: int = 0
    about: dict[str, bytes] = field(default_factory=dict)  # EXIF and XMP, as in `Image.info`
    # The file without those, comments, previews and fill bytes: Pillow would read fill bytes one by
    # one, and copy all EXIF again for each further part of it.
    bare: bytes = b""


def read_jpeg(data: bytes, where: object) -> Jpeg:
    """Step through a JPEG, each byte once (`ImageError` where it has too many segments)."""
    found, kept = Jpeg(), [data[:2]]
    for count, (marker, start) in enumerate(_jpeg_segments(data), 1):
        check_count(count, MAX_SEGMENTS, "segments", where)
        end = start + int.from_bytes(data[start : start + 2], "big")
        if marker in _JPEG_FRAMES:
            frame = data[start + 3 : start + 7]
            found.size = int.from_bytes(frame[2:], "big"), int.from_bytes(frame[:2], "big")
        if marker in _JPEG_ABOUT and not data.startswith(_JPEG_PROFILE, start + 2):
            for name, prefix in _JPEG_NAMES.items():
                if data.startswith(prefix, start + 2):
                    found.about.setdefault(name, data[start + 2 + len(prefix) : end])
        elif not found.scans:
            kept.append(data[start - 2 : None if marker == _JPEG_SCAN else end])
        found.scans += marker == _JPEG_SCAN
    found.bare = b"".join(kept)
    if _FILLED in found.bare:  # a decoder that is fed in blocks starts such a run again for each
        found.bare = re.sub(rb"\xff{2,}", b"\xff", found.bare)
    return found


def png_chunks(file: IO[bytes]) -> Iterator[tuple[bytes, int, int]]:
    """Each chunk's kind, position of its body, where the file then is, and length."""
    position = len(PNG_SIGNATURE)
    for _ in range(MAX_CHUNKS):
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


def _bmp_size(data: bytes) -> tuple[int, int] | None:
    """A height below 0 says that the first row is the top one."""
    kind = "<HH" if data[14:15] == b"\x0c" else "<ii"  # the header of OS/2 is 12 bytes long
    if len(data) < _BMP_SIZE_END:
        return None
    width, height = struct.unpack_from(kind, data, 18)
    return width, abs(height)


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


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Walk as libjpeg does, so that neither previews nor data after the image count.

    Phones append whole videos after the image; by chance those contain any marker.
    """
    position = 2
    while (match := _JPEG_MARKER.search(data, position)) and match[1][0] != _JPEG_END:
        yield match[1][0], match.end()
        position = match.end() + int.from_bytes(data[match.end() : match.end() + 2], "big")
