"""Pictures made to crash, to stall or to fill the memory: one line each, for bounded work."""

from __future__ import annotations

import io
import itertools
import random
import struct
import sys
import warnings
import zlib
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image, PngImagePlugin, features

from ipdiverse.errors import ImageError
from ipdiverse.image_io import load_image_bytes
from ipdiverse.image_io.files import MAX_PIXELS

if TYPE_CHECKING:
    from collections.abc import Callable

FORMATS = [
    "JPEG",
    "PNG",
    "WEBP",
    "BMP",
    "GIF",
    "TIFF",
    *(["AVIF"] if features.check("avif") else []),
]
MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"]
MAX_CALLS = 3_000_000
"""Of Python and C functions: what is read byte by byte takes tens of millions."""
PICTURE = Image.effect_noise((80, 60), 90)


def encoded(image_format: str, mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    PICTURE.convert(mode).save(buffer, image_format, **options)
    return buffer.getvalue()


def segment(marker: int, body: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def in_jpeg(what: bytes, **options: Any) -> bytes:
    data = encoded("JPEG", **options)
    return data[:2] + what + data[2:]


def in_png(what: bytes) -> bytes:
    data = encoded("PNG")
    return data[:33] + what + data[33:]


def claiming(image_format: str, at: int, form: str, *sizes: int) -> bytes:
    data = bytearray(encoded(image_format))
    struct.pack_into(form, data, at, *sizes)
    return bytes(data)


def exif(tags: int, claim: int) -> bytes:
    entries = struct.pack("<HHII", 0x9000, 7, claim, 0) * tags
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", tags) + entries


def scans(count: int, **options: Any) -> bytes:
    data = encoded("JPEG", progressive=True, **options)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * count + data[-2:]


def long_text(kind: str, count: int, packed: bool = True) -> bytes:
    info = PngImagePlugin.PngInfo()
    for index in range(count):
        info.add_itxt(f"{kind}{index or ''}", "x" * 1_500_000, zip=packed)
    return encoded("PNG", pnginfo=info)


def in_gif(what: bytes) -> bytes:
    data = encoded("GIF", "P")
    at = data.index(b",\0\0\0\0")
    return data[:at] + what + data[at:]


def in_tiff(entries: int, claim: int, following: bytes = bytes(4)) -> bytes:
    """A TIFF whose directory is followed by one of tags that nobody needs."""
    data = encoded("TIFF", compression="tiff_lzw")
    at = int.from_bytes(data[4:8], "little")
    count = int.from_bytes(data[at : at + 2], "little")
    own = data[at + 2 : at + 2 + 12 * count]
    more = b"".join(struct.pack("<HHII", 51_000 + n, 7, claim, 8) for n in range(entries))
    place = struct.pack("<I", len(data))
    directory = struct.pack("<H", count + entries) + own + more
    return data[:4] + place + data[8:] + directory + (following or place)


BOMBS: dict[str, Callable[[int], bytes]] = {
    "fill bytes before the header": lambda n: in_jpeg(b"\xff" * n * 1_000_000),
    "fill bytes before the end": lambda n: (
        encoded("JPEG")[:-2] + b"\xff" * n * 1_000_000 + b"\xff\xd9"
    ),
    "stuffed bytes": lambda n: encoded("JPEG")[:-2] + b"\xff\0" * n * 100_000 + b"\xff\xd9",
    "restarts": lambda n: encoded("JPEG")[:-2] + b"\xff\xd0" * n * 100_000 + b"\xff\xd9",
    "nothing but fill bytes": lambda n: b"\xff\xd8" + b"\xff" * n * 1_000_000,
    "repeated EXIF": lambda n: in_jpeg(segment(0xE1, exif(1, 4)) * n * 500),
    "repeated large EXIF": lambda n: in_jpeg(segment(0xE1, exif(5000, 4)) * n * 5),
    "EXIF that claims much": lambda n: in_jpeg(segment(0xE1, exif(5000, 60_000))) + b"x" * n,
    "comments": lambda n: in_jpeg(segment(0xFE, b"x") * n * 1000),
    "tables": lambda n: in_jpeg(segment(0xDB, b"\0" + b"\1" * 64) * n * 500),
    "profiles": lambda n: in_jpeg(segment(0xE2, b"ICC_PROFILE\0\1\1" + b"x" * 60_000) * n * 5),
    "previews": lambda n: in_jpeg(segment(0xE2, b"MPF\0" + b"\xff" * 1000) * n * 500),
    "frames": lambda n: in_jpeg(segment(0xC0, b"\x08\xff\xff\xff\xff\1\1\x11\0") * n * 100),
    "scans": lambda n: scans(n * 10),
    "scans of noise": lambda n: scans(n * 10, quality=100, subsampling=0),
    "chunks": lambda n: in_png(chunk(b"abCd") * n * 2000),
    "empty pixels": lambda n: in_png(chunk(b"IDAT") * n * 2000),
    "EXIF in a PNG that claims much": lambda n: in_png(
        chunk(b"eXIf", exif(60_000, n * 1000)[6:] + b"x" * n * 1000)
    ),
    "long texts": lambda n: long_text("workflow", n),
    "long texts with the orientation": lambda n: long_text("XML:com.adobe.xmp", n),
    "a chunk beyond the end": lambda n: in_png(struct.pack(">I", n * 10**7) + b"tEXt"),
    "comments of a GIF": lambda n: in_gif(b"!\xfe" + b"\1x" * n * 20_000 + b"\0"),
    "frames of a GIF": lambda n: in_gif(encoded("GIF", "P")[13 + 768 : -1] * n * 20),
    "tags of a TIFF that claim much": lambda n: in_tiff(n * 90, 8000),
    "pages of a TIFF that go round": lambda n: in_tiff(n, 1, b""),
    "a palette of nothing": lambda n: in_png(chunk(b"PLTE", b"x" * n)),
}
CLAIMS = {
    f"{image_format} of {width}x{height}": claiming(image_format, at, form, *order(width, height))
    for width, height in [(0, 0), (1, 1), (60_000, 60_000), (16_384, 16_384), (8000, 8001)]
    for image_format, at, form, order in [
        ("PNG", 16, ">II", lambda w, h: (w, h)),
        ("BMP", 18, "<ii", lambda w, h: (w, -h)),
        ("JPEG", encoded("JPEG").index(b"\xff\xc0") + 5, ">HH", lambda w, h: (h, w)),
    ]
}


def read(data: bytes) -> None:
    """Decode it for a bounded number of calls, to a sound picture or to one line."""
    calls = 0

    def count(_: Any, event: str, __: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    image, line, before = None, "", sys.getprofile()
    sys.setprofile(count)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = load_image_bytes(data, "upload\x1b.png")
    except ImageError as error:
        line = str(error)
    finally:
        sys.setprofile(before)
    assert calls < MAX_CALLS
    if image is None:
        assert line.startswith(r"upload\x1b.png: ")
        assert line.isprintable()
        assert len(line) < 1000
    else:
        assert (image.mode, image.info) == ("RGB", {})
        assert image.width * image.height <= MAX_PIXELS


@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_bomb(kind: str):
    read(BOMBS[kind](2))


TOLD: dict[str, Callable[[], bytes]] = {
    "PNG, a text that is not packed": lambda: long_text("workflow", 1, packed=False),
    "PNG, many texts": lambda: long_text("prompt", 8),
    "PNG, a large profile": lambda: encoded("PNG", icc_profile=bytes(3_000_000)),
    "JPEG, a comment": lambda: encoded("JPEG", comment=b"c" * 60_000),
    "JPEG, EXIF": lambda: in_jpeg(segment(0xE1, exif(1, 4) + bytes(60_000))),
    "WEBP, EXIF": lambda: encoded("WEBP", exif=b"Exif\0\0" + bytes(5_000_000)),
    "WEBP, XMP": lambda: encoded("WEBP", xmp=b"x" * 5_000_000),
    "TIFF, a description": lambda: encoded("TIFF", description="d" * 5_000_000),
    "GIF, a comment": lambda: encoded("GIF", "P", comment=b"z" * 3_000_000),
}


@pytest.mark.parametrize("kind", TOLD)
def test_a_sound_picture_with_much_beside_its_pixels_is_read(kind: str):
    assert load_image_bytes(TOLD[kind](), "a").size == PICTURE.size


@pytest.mark.slow
@pytest.mark.parametrize("amount", [10, 40, 150])
@pytest.mark.parametrize("kind", BOMBS)
def test_a_large_bomb(kind: str, amount: int):
    read(BOMBS[kind](amount))


@pytest.mark.parametrize("kind", CLAIMS)
def test_a_claim_takes_no_memory_for_pixels_that_are_not_there(kind: str):
    read(CLAIMS[kind])


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 8))]
)
@pytest.mark.parametrize(("image_format", "mode"), list(itertools.product(FORMATS, MODES)))
def test_damage_anywhere(image_format: str, mode: str, seed: int):
    try:
        data = bytearray(encoded(image_format, mode))
    except (OSError, KeyError, ValueError):
        pytest.skip("Pillow does not write this")
    chance = random.Random(seed)
    for _ in range(10):
        at = chance.randrange(len(data))
        damage = chance.choice(["flip", "cut", "repeat", "drop", "fill"])
        if damage == "flip":
            data[at] ^= 1 << chance.randrange(8)
        elif damage == "fill":
            data[at : at + 4] = chance.choice([b"\xff\xff\xff\xff", bytes(4), b"\x7f\xff\xff\xff"])
        elif damage == "cut" and seed % 2:
            del data[max(at, 64) :]
        else:
            data[at : at + 8] = b"" if damage == "drop" else data[at : at + 8] * 2
        read(bytes(data))
