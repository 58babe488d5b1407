"""An image file before it is decoded: opening it, and checking what its first bytes claim.

Nothing here decodes pixels or takes memory for them. Pillow cannot be asked for this: it allocates
the whole canvas of a WebP as soon as the file is opened, and between one and two times its own
limit it warns instead of refusing.
"""

from __future__ import annotations

import importlib.util
import os
import re
import stat
import struct
import unicodedata
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from PIL import features

from ipdiverse.errors import ImageError

if TYPE_CHECKING:
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
MAX_PARTS = 100_000
"""Chunks of a PNG, whose smallest hold 8 kB of pixels each; strips and values of a TIFF's tag."""
MAX_BLOCKS = 1_000_000
"""Of a GIF; a block holds up to 255 bytes, so 64 MiB are a quarter of that."""
MAX_PAGES = 10_000
"""Pictures in one TIFF."""

GET_AGAIN = "Download or export it again."
_HAS_HEIF = importlib.util.find_spec("pillow_heif") is not None
_HEIF = (".heic", ".heif")
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif"),
    *(_HEIF if _HAS_HEIF else ()),
)
"""Of pictures that are read, in folders, archives and uploads; the content decides in the end."""
OTHER_SUFFIXES = (*(() if _HAS_HEIF else _HEIF), ".jxl", ".jp2", ".psd", ".dng", ".cr2", ".nef")
"""Of pictures that are not: they are counted and named rather than left out in silence."""

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_FORMATS = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (rb"\xff\xd8\xff", "JPEG"),
    (rb"RIFF.{4}WEBP", "WEBP"),
    (rb"GIF8[79]a", "GIF"),
    (rb"II\*\0(?!.{4}CR)|MM\0\*", "TIFF"),
    (rb".{4}ftypavi[fs]", "AVIF"),
    (rb".{4}ftyp(hei|hev|mif1|msf1)", "HEIF"),
    # not of run lengths: Pillow expands them in Python, which takes a minute for a large file
    (rb"BM.{4}\0{4}(?!.{4}[^\x0c].{15}[\1\2])", "BMP"),
)
_OTHERS = (
    (rb".{4}ftyp(hei|hev|mif1|msf1)", "a HEIC"),
    (rb".{4}ftypavi", "an AVIF, which this build of Pillow cannot read"),
    (rb"II\*\0.{4}CR", "a camera's raw file"),
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
_WEBP_SIZE_END = 30
_GIF_HEAD, _GIF_FRAME = 13, 10
_GIF_CONTROL = 0xF9
_TIFF_NUMBERS = {3: "H", 4: "I"}
_WIDTH, _HEIGHT, _COMPRESSION, _ROWS, _TILE_WIDTH, _TILE_HEIGHT = 256, 257, 259, 278, 322, 323
_TIFF_ONE = frozenset(
    {_WIDTH, _HEIGHT, _COMPRESSION, _ROWS, _TILE_WIDTH, _TILE_HEIGHT}
    | {262, 266, _ORIENTATION, 277, 284, 292, 293, 317}
)
"""Tags of one whole number that tell how to decode a TIFF."""
_TIFF_OFFSETS = (273, 324)
_TIFF_MANY = frozenset({258, *_TIFF_OFFSETS, 279, 320, 325, 338, 339, 530})
"""The same, of several."""
_TIFF_BYTES = frozenset({347, 34675})
"""Tables of its JPEGs, and its ICC profile."""
_TIFF_JPEG = 7
_TIFF_COMPRESSIONS = (1, 2, 3, 4, 5, _TIFF_JPEG, 8, 32773, 32946)
"""None, fax, LZW, JPEG, Deflate and run lengths; the others are rare, and no budget bounds them."""
_RAW = 50706
_SUBFILE = 254


def as_on_disk(name: str, root: Path | str = "") -> str:
    """A file's name in the Unicode form that the disk has.

    macOS decomposes accents (NFD) where most lists compose them (NFC), and Linux tells the two
    apart, so that a list that was made on one system names no file on the other.
    """
    forms = (name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")))
    there = (one for one in forms if os.path.lexists(Path(root, one)))
    return name if name.isascii() else next(there, name)  # most names: not looked for


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open an ordinary file; errors while it is open are `ImageError`s too."""
    path = as_on_disk(os.fspath(path))
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
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        found = getattr(error, "strerror", None) or error
        what, expected, fix = "cannot be read", None, "Check the path."
        if isinstance(error, FileNotFoundError):
            what, fix = "does not exist", "Check the path for a typing error."
        elif isinstance(error, PermissionError):
            what, expected = "may not be read", "read permission"
            fix = "Change its permissions or copy it elsewhere."
        raise ImageError(
            f"the image file {what}", where=path, expected=expected, found=found, fix=fix
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
    """A format that is read, by the first bytes, as Pillow names it; None if it is another."""
    found = next((n for pattern, n in _FORMATS if re.match(pattern, data[:34], re.DOTALL)), None)
    is_read = {"AVIF": features.check("avif"), "HEIF": _HAS_HEIF}
    return found if is_read.get(found or "", True) else None


def not_accepted(where: object, found: str) -> ImageError:
    """The refusal of content that is not read."""
    plugin = ", or pip install pillow-heif, which reads it" if found == "a HEIC" else ""
    return ImageError(
        "this is not an image of an accepted format",
        where=where,
        expected="JPEG, PNG, WebP, BMP, GIF, TIFF or AVIF content",
        found=found,
        fix=f"Convert it to PNG{plugin}.",
    )


def describe(data: bytes) -> str:
    """Name content that is not accepted, such as "a PDF" or "plain text", for an error."""
    head = data[:512]
    for pattern, name in _OTHERS:
        if re.match(pattern, head, re.DOTALL):
            return name
    is_text = not re.search(rb"[\x00-\x08\x0e-\x1f\x7f]", head)
    return "plain text" if is_text else "data of an unknown kind"


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
    for _ in range(MAX_PARTS):
        file.seek(position)
        length, kind = int.from_bytes(file.read(4), "big"), file.read(4)
        if kind in {b"IEND", b""}:
            return
        yield kind, position + 8, length
        position += 12 + length  # length, kind and checksum take four bytes each


def first_of_gif(data: bytes, where: object) -> tuple[bytes, int]:
    """A GIF of its first frame alone, and how many frames it had.

    Pillow reads all blocks to count frames, and copies a comment again for each block of it.
    Source: GIF 89a, sections 17 to 27.
    """
    kept, frames, blocks, control = b"", 0, 0, b""
    with suppress(IndexError):  # it breaks off: Pillow says so, if it is in the first frame
        at = _GIF_HEAD + _gif_table(data[10])
        head = data[:at]
        while data[at : at + 1] in (b"!", b","):
            start, is_frame = at, data[at] == ord(",")
            if is_frame:
                frames += 1
                left, top, width, height = struct.unpack_from("<4H", data, at + 1)
                screen = struct.unpack_from("<2H", data, 6)
                if frames == 1:  # a frame may be larger than its screen, which Pillow then enlarges
                    size = max(screen[0], left + width), max(screen[1], top + height)
                    check_size(size, where)
                kept = kept or head + control + data[start:]
                at += _GIF_FRAME + _gif_table(data[at + 9]) + 1
            else:
                at += 2
            while data[at]:
                at += data[at] + 1
                blocks += 1
                if blocks > MAX_BLOCKS:
                    check_count(blocks, MAX_BLOCKS, "blocks in a GIF", where)
            at += 1
            if is_frame and frames == 1:
                kept = head + control + data[start:at] + b";"
            elif not is_frame and data[start + 1] == _GIF_CONTROL:
                control = data[start:at]
    return kept or data[:_GIF_HEAD], frames


def _gif_table(flags: int) -> int:
    """Bytes of a table of colours."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def first_of_tiff(data: bytes, where: object) -> tuple[bytes, int]:
    """A TIFF of the tags that decode its first picture alone, and how many pictures it had.

    Pillow copies what every tag claims, at worst 65,535 times the whole file, and does so for
    every picture to count them. Source: TIFF 6.0, section 2.
    """
    order = ">" if data.startswith(b"MM") else "<"
    starts: list[int] = []
    kept, numbers = {}, {}
    with suppress(struct.error):  # it breaks off: what is missing is told below or by Pillow
        at = struct.unpack_from(f"{order}I", data, 4)[0]
        while at:
            starts.append(at)
            check_count(len(starts), MAX_PAGES, "pictures in a TIFF", where)
            count = struct.unpack_from(f"{order}H", data, at)[0]
            if len(starts) == 1:
                kept, numbers = _tiff_tags(data[at + 2 : at + 2 + 12 * count], order, where)
            at = struct.unpack_from(f"{order}I", data, at + 2 + 12 * count)[0]
    _check_tiff(data, numbers, where)
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept[tag] for tag in sorted(kept))
    data += bytes(len(data) % 2)  # a directory begins at an even place
    bare = data[:4] + struct.pack(f"{order}I", len(data)) + data[8:] + directory + bytes(4)
    return bare, len(starts)


def _tiff_tags(
    entries: bytes, order: str, where: object
) -> tuple[dict[int, bytes], dict[int, int]]:
    """Entries that decoding needs; the number that each holds, or how many."""
    kept: dict[int, bytes] = {}
    numbers: dict[int, int] = {}
    for at in range(0, len(entries) - 11, 12):
        tag, kind, count = struct.unpack_from(f"{order}HHI", entries, at)
        code = _TIFF_NUMBERS.get(kind)
        number = struct.unpack_from(order + code, entries, at + 8)[0] if code else None
        # bit 0 says that it is a smaller copy: the first picture of raw files is a preview
        if tag == _RAW or (tag == _SUBFILE and (number or 0) & 1):
            raise not_accepted(where, "a camera's raw file, or a TIFF that begins with a preview")
        if tag in kept:  # the first counts, for libtiff; for Pillow it would be the last
            continue
        if number is not None and tag in _TIFF_ONE and count == 1:
            numbers[tag] = number
        elif number is not None and tag in _TIFF_MANY:
            check_count(count, MAX_PARTS, "values of a tag", where)
            numbers[tag] = count
        elif number is not None or tag not in _TIFF_BYTES:
            continue
        kept[tag] = entries[at : at + 12]
    return kept, numbers


def _check_tiff(data: bytes, numbers: Mapping[int, int], where: object) -> None:
    """Check what a TIFF claims before a decoder takes memory for it."""
    compression, width, height = (
        numbers.get(tag, default) for tag, default in ((_COMPRESSION, 1), (_WIDTH, 0), (_HEIGHT, 0))
    )
    if compression not in _TIFF_COMPRESSIONS:
        raise not_accepted(where, f"a TIFF of compression {compression}")
    if not width * height:
        raise ValueError("no size of the image")
    check_size((width, height), where)
    rows = min(numbers.get(_ROWS, height), height)
    across, down = numbers.get(_TILE_WIDTH, width), numbers.get(_TILE_HEIGHT, rows)
    if not across * down:
        raise ValueError("a strip or tile without a size")
    check_count(across * down, MAX_DECODED_PIXELS, "pixels in a tile", where)
    tiles = -(-width // across) * -(-height // down)
    check_count(tiles, MAX_PARTS, "tiles", where)
    for tag in _TIFF_OFFSETS:
        # one for each of six channels at most; Pillow would decode any others too
        check_count(numbers.get(tag, 0), 6 * tiles, "tiles in a TIFF of this size", where)
    if compression == _TIFF_JPEG:
        scans, most = data.count(bytes([0xFF, _JPEG_SCAN])), MAX_SCANNED_PIXELS // (across * down)
        check_count(scans, most, "scans in a TIFF of this size", where)


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height by the header; None where it is broken.

    Source: RFC 9649, sections 2.7 (VP8X) and 3.4 (VP8L); RFC 6386, section 9.1 (VP8).
    """
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
