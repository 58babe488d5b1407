"""One test or more for each line of the policy table in `ipdiverse.image_io`."""

from __future__ import annotations

import io
import os
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, features

from ipdiverse import image_io
from ipdiverse.errors import ImageError
from ipdiverse.image_io import (
    ImageWarning,
    content_hash,
    files,
    load_image,
    load_image_bytes,
    load_mask,
    to_rgb,
    upright,
)

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
FORMATS = [
    "JPEG",
    "PNG",
    "WEBP",
    "BMP",
    "GIF",
    "TIFF",
    *(["AVIF"] if features.check("avif") else []),
]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def plain(colour: object = RED, size: tuple[int, int] = (32, 24), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, colour)


def two_halves(
    mode: str, left: object, right: object, size: tuple[int, int] = (32, 24)
) -> Image.Image:
    image = plain(left, size, mode)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def noise(size: tuple[int, int] = (64, 48)) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def frames(image_format: str, **options: object) -> bytes:
    rest = [plain(GREEN), plain(BLUE)]
    return encoded(plain(RED), image_format, save_all=True, append_images=rest, **options)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour_type: int, rows: bytes, *more: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"".join([PNG_SIGNATURE, chunk(b"IHDR", header), *more, data, chunk(b"IEND", b"")])


def webp_header(kind: bytes, body: bytes) -> bytes:
    data = b"WEBP" + kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(data)) + data


def assert_refused(data: bytes, *words: object) -> None:
    with pytest.raises(ImageError) as caught:
        load_image_bytes(data, "upload.png")
    assert_explains(caught, "upload.png: ", *words)


def assert_explains(caught: pytest.ExceptionInfo, *words: object) -> None:
    line = str(caught.value)
    assert "\n" not in line
    assert all(str(word) in line for word in words), line


def assert_near(pixel: object, expected: tuple[int, ...], tolerance: int = 6) -> None:
    assert np.abs(np.subtract(pixel, expected)).max() <= tolerance, (pixel, expected)


# --- formats ---------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("name", ["right", "wrong.txt", "wrong.gif", "phone.JPG", "saved.jfif"])
def test_accepted_formats_are_told_by_content(tmp_path: Path, image_format: str, name: str):
    path = tmp_path / name
    path.write_bytes(encoded(plain(RED), image_format))
    image = load_image(path)
    assert (image.mode, image.size) == ("RGB", (32, 24))
    assert_near(image.getpixel((5, 5)), RED)


@pytest.mark.parametrize(
    "options", [{"lossless": True}, {"lossless": False}, {"exif": b"Exif\0\0"}]
)
def test_every_kind_of_webp_says_its_size(options: dict):
    data = encoded(plain(RED, (37, 21)), "WEBP", **options)
    assert files.webp_size(data) == (37, 21)
    assert load_image_bytes(data).size == (37, 21)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}])
def test_every_kind_of_jpeg_says_its_size(options: dict):
    data = encoded(noise((200, 120)), "JPEG", **options)
    assert files.read_jpeg(data, "a.jpg").size == (200, 120)
    assert load_image_bytes(data).size == (200, 120)


def test_path_may_be_text_or_path_and_bytes_give_the_same(tmp_path: Path):
    path = tmp_path / "a.png"
    noise().save(path)
    images = [load_image(path), load_image(str(path)), load_image_bytes(path.read_bytes())]
    assert {image.tobytes() for image in images} == {noise().tobytes()}


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"BM" + bytes(12) + b"\x28" + bytes(15) + b"\x01" + bytes(40), "a compressed BMP"),
        (b"II*\0\x10\0\0\0CR\2\0" + bytes(40), "a camera's raw file"),
        (b"8BPS" + bytes(40), "a Photoshop document"),
        (b"%PDF-1.7", "a PDF"),
        (b"PK\x03\x04" + bytes(40), "a ZIP archive"),
        (b"\n<!DOCTYPE html><p>", "a web page"),
        (b"<svg xmlns=''>", "an SVG or other XML"),
        (b"just words", "plain text"),
        (b"\x80\x04\x95" + bytes(40), "data of an unknown kind"),
        (b"RIFF\0\0\0\0WAVEfmt " + bytes(40), "data of an unknown kind"),
    ],
)
def test_other_content_is_refused_by_name(data: bytes, found: str):
    assert_refused(data, "not an image of an accepted format", f"found {found}.", "Convert it")


# --- files -----------------------------------------------------------------------------------


def test_text_named_png_is_refused(tmp_path: Path):
    path = tmp_path / "text.png"
    path.write_text("not an image")
    with pytest.raises(ImageError) as caught:
        load_image(path)
    assert_explains(caught, path, "JPEG, PNG, WebP", "plain text", "Convert it to PNG")


def test_empty_file_is_refused(tmp_path: Path):
    (tmp_path / "a.png").touch()
    with pytest.raises(ImageError) as caught:
        load_image(tmp_path / "a.png")
    assert_explains(caught, tmp_path / "a.png", "is empty", "found 0 bytes", "again")


def test_no_bytes_are_refused():
    assert_refused(b"", "is empty")


def test_folder_is_refused(tmp_path: Path):
    with pytest.raises(ImageError) as caught:
        load_image(tmp_path)
    assert_explains(caught, tmp_path, "not a file", "found a folder", "Name one image")


def test_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(ImageError) as caught:
        load_image(tmp_path / "absent.png")
    assert_explains(caught, tmp_path / "absent.png", "does not exist", "typing error")


@pytest.mark.parametrize("name", ["a\0b.png", "x" * 5000, "file/below.png"])
def test_impossible_path_is_refused(tmp_path: Path, name: str):
    (tmp_path / "file").touch()
    with pytest.raises(ImageError) as caught:
        load_image(tmp_path / name)
    assert_explains(caught, "cannot be read", "Check the path")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX pipes")
def test_pipe_is_refused_rather_than_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError) as caught:
        load_image(tmp_path / "pipe.png")
    assert_explains(caught, "not a file", "a pipe, socket or device")


@pytest.mark.skipif(
    os.name == "nt" or os.geteuid() == 0, reason="the administrator may read everything"
)
def test_unreadable_file_is_refused(tmp_path: Path):
    path = tmp_path / "a.png"
    plain().save(path)
    path.chmod(0)
    with pytest.raises(ImageError) as caught:
        load_image(path)
    assert_explains(caught, path, "may not be read", "read permission", "Change its permissions")


def test_forbidden_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def forbid(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    plain().save(tmp_path / "a.png")
    monkeypatch.setattr(Path, "open", forbid)
    with pytest.raises(ImageError) as caught:
        load_image(tmp_path / "a.png")
    assert_explains(caught, tmp_path / "a.png", "may not be read", "found Permission denied")


def test_too_large_file_is_refused_unread(tmp_path: Path):
    path = tmp_path / "a.png"
    with path.open("wb") as file:
        file.truncate(files.MAX_FILE_BYTES + 1)
    with pytest.raises(ImageError) as caught:
        load_image(path)
    assert_explains(caught, path, "file is too large", "at most 64 MiB", "found 65 MiB", "smaller")


# --- sizes -----------------------------------------------------------------------------------


def test_bomb_is_refused_by_its_header_and_without_a_warning(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "open", None)  # nothing is decoded, so nothing takes long
    data = png(60000, 60000, 8, 2, b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_refused(data, "too large", "64 megapixels", "60000x60000 px", "Scale it down")


@pytest.mark.parametrize("size", [(10000, 9000), (60000, 16), (16, 16385), (8000, 8001)])
def test_too_many_pixels_are_refused_without_a_warning(size: tuple[int, int]):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_refused(png(*size, 8, 2, b""), "too large", f"{size[0]}x{size[1]} px")


@pytest.mark.parametrize(
    "data",
    [
        webp_header(b"VP8X", bytes(4) + b"\xff\x3f\x00\xff\x3f\x00" + bytes(20)),
        webp_header(b"VP8L", b"\x2f" + (0x3FFE | 0x3FFE << 14).to_bytes(4, "little") + bytes(20)),
        webp_header(b"VP8 ", bytes(6) + b"\xff\x3f\xff\x3f" + bytes(20)),
    ],
)
def test_large_webp_is_refused_before_its_canvas_is_taken(data: bytes):
    assert_refused(data, "too large", "1638")


def test_large_jpeg_is_refused_by_its_header():
    data = bytearray(encoded(plain(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 16000, 16001)
    assert_refused(bytes(data), "too large", "16001x16000 px", "at most 256 megapixels")


@pytest.mark.parametrize("size", [(15, 100), (100, 15), (1, 1)])
def test_too_small_image_is_refused(size: tuple[int, int]):
    data = encoded(plain(RED, size), "PNG")
    assert_refused(data, "too small", "at least 16 px", f"found {size[0]}x{size[1]} px", "larger")


def test_the_smallest_and_the_longest_are_accepted():
    assert load_image_bytes(encoded(plain(RED, (16, 16)), "PNG")).size == (16, 16)
    assert load_image_bytes(encoded(plain(RED, (16384, 16)), "PNG")).size == (16384, 16)


@pytest.mark.parametrize(("most", "pixels"), [(100, files.MAX_SCANNED_PIXELS), (20, 20 * 64 * 48)])
def test_jpeg_of_endless_scans_is_refused(most: int, pixels: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(image_io, "MAX_SCANNED_PIXELS", pixels)
    data = encoded(noise(), "JPEG", progressive=True)
    before, scan = data.count(b"\xff\xda"), data[data.rindex(b"\xff\xda") : -2]
    allowed = data[:-2] + scan * (most - before) + data[-2:]
    assert load_image_bytes(allowed).size == (64, 48)
    monkeypatch.setattr(image_io, "JpegImageFile", None)  # nothing is decoded
    bomb = allowed[:-2] + scan + data[-2:]
    assert_refused(bomb, "takes too long", f"at most {most} scans", "Save it as a plain JPEG")


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize(("most", "size"), [(3072, (64, 48)), (3071, (32, 24)), (200, (16, 12))])
def test_large_pictures_are_scaled_down(
    image_format: str, most: int, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    if most == 200 and image_format != "JPEG":
        size = (32, 24)  # others are only a little over the limit
    monkeypatch.setattr(image_io, "MAX_PIXELS", most)
    stored = two_halves("RGB", RED, BLUE, (64, 48))
    image = load_image_bytes(encoded(stored, image_format))
    assert (image.mode, image.size) == ("RGB", size)
    assert_near(image.getpixel((2, 2)), RED, 20)
    assert_near(image.getpixel((size[0] - 2, 2)), BLUE, 20)


@pytest.mark.parametrize("mode", ["P", "LA", "RGBA", "I;16"])
def test_large_pictures_of_any_mode_are_scaled_down(mode: str, monkeypatch: pytest.MonkeyPatch):
    grey = Image.fromarray(np.full((48, 64), 65535, np.uint16)) if mode == "I;16" else None
    data = encoded(grey or plain(size=(64, 48)).convert(mode), "PNG")
    small = load_image_bytes(data).resize((32, 24))
    monkeypatch.setattr(image_io, "MAX_PIXELS", 2000)
    assert load_image_bytes(data).tobytes() == small.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("image_format", "size", "read"),
    [
        ("JPEG", (8064, 6048), (4032, 3024)),
        ("JPEG", (16320, 12240), (4080, 3060)),
        ("PNG", (8160, 6120), (4080, 3060)),
        ("WEBP", (8064, 6048), (4032, 3024)),
    ],
)
def test_pictures_of_phones_are_read(image_format: str, size: tuple, read: tuple):
    data = encoded(plain(90, size, "L"), image_format)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image_bytes(data).size == read


def test_a_jpeg_of_several_scans_has_the_budget_of_other_formats():
    data = bytearray(encoded(plain(), "JPEG", progressive=True))
    frame = data.index(b"\xff\xc2")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 8000, 8001)
    assert_refused(bytes(data), "too large", "8001x8000 px", "at most 64 megapixels")


@pytest.mark.parametrize("height", [48, -48])
def test_a_bmp_from_either_end(height: int):
    data = bytearray(encoded(two_halves("RGB", RED, BLUE, (64, 48)), "BMP"))
    data[22:26] = struct.pack("<i", height)
    image = load_image_bytes(bytes(data))
    assert (image.size, image.getpixel((2, 2))) == ((64, 48), RED)


def test_an_avif_is_refused_by_name_where_pillow_cannot_read_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files.features, "check", lambda _: False)
    assert_refused(b"\0\0\0\x18ftypavif" + bytes(40), "found an AVIF, which this build of Pillow")


def test_video_behind_a_photo_is_not_taken_for_scans():
    data = encoded(noise(), "JPEG") + b"\xff\xda\0\x02" * 200
    assert load_image_bytes(data).size == (64, 48)


# --- GIF, TIFF and HEIC ----------------------------------------------------------------------


def tiff(order: str = "<", data: bytes = b"", **tags: tuple[int, int, int]) -> bytes:
    """A grey TIFF of 16x16 pixels; each tag is its type, count, and value or place."""
    of = {"width": 256, "height": 257, "bits": 258, "kind": 259, "photo": 262, "strips": 273}
    of |= {"turn": 274, "rows": 278, "sizes": 279, "tile_w": 322, "tile_h": 323, "subfile": 254}
    base = {"width": (4, 1, 16), "height": (4, 1, 16), "bits": (4, 1, 8), "photo": (4, 1, 1)}
    every = {**base, "strips": (4, 1, 8), "rows": (4, 1, 16), "sizes": (4, 1, 256), **tags}
    body = (data or bytes(range(256))).ljust(256, b"\0")
    entries = [struct.pack(f"{order}HHII", of.get(n) or int(n[1:]), *t) for n, t in every.items()]
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(body))
    count = struct.pack(f"{order}H", len(entries))
    return head + body + count + b"".join(sorted(entries)) + bytes(4)


@pytest.mark.parametrize("order", "<>")
def test_a_tiff_of_either_byte_order(order: str):
    image = load_image_bytes(tiff(order))
    assert np.asarray(image)[..., 0].ravel().tolist() == list(range(256))
    turned = load_image_bytes(tiff(order, turn=(4, 1, 6)))
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize(
    ("mode", "compression"),
    [
        *[(mode, kind) for mode in ("RGB", "RGBA", "L") for kind in ("raw", "tiff_lzw")],
        *[("CMYK", "tiff_adobe_deflate"), ("P", "packbits"), ("1", "group4"), ("RGB", "jpeg")],
    ],
)
def test_tiffs_of_every_usual_kind(mode: str, compression: str):
    stored = two_halves("RGB", RED, BLUE, (64, 48)).convert(mode)
    quality = {"quality": 95} if compression == "jpeg" else {}
    read = load_image_bytes(encoded(stored, "TIFF", compression=compression, **quality))
    assert np.abs(np.asarray(read).astype(int) - np.asarray(to_rgb(stored))).max() < 4


def test_16_bit_grey_whose_white_is_zero_is_no_negative():
    levels = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    usual, other = (
        load_image_bytes(encoded(Image.fromarray(values), "TIFF", tiffinfo={262: photo}))
        for values, photo in ((levels, 1), (65535 - levels, 0))
    )
    assert usual.tobytes() == other.tobytes()


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"width": (4, 1, 60_000)}, ["too large", "60000x16 px"]),
        ({"width": (4, 1, 8000), "height": (4, 1, 8001)}, ["too large", "64 megapixels"]),
        ({"strips": (4, 7, 8)}, ["at most 6 tiles in a TIFF of this size", "found 7"]),
        ({"strips": (4, 1 << 30, 8)}, ["at most 100000 values of a tag"]),
        ({"tile_w": (4, 1, 1 << 16), "tile_h": (4, 1, 1 << 16)}, ["64000000 pixels in a tile"]),
        ({"tile_w": (4, 1, 0)}, ["a strip or tile without a size"]),
        ({"kind": (4, 1, 50000)}, ["found a TIFF of compression 50000", "Convert it"]),
        ({"subfile": (4, 1, 1)}, ["found a camera's raw file"]),
        ({"x50706": (1, 4, 1)}, ["found a camera's raw file"]),
        ({"width": (2, 1, 16)}, ["truncated or corrupt", "no size of the image"]),
    ],
)
def test_a_tiff_is_checked_before_it_is_decoded(
    tags: dict, words: list, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(image_io.TiffImageFile, "load", None)
    assert_refused(tiff(**tags), *words)


def test_what_tags_of_a_tiff_claim_is_not_copied():
    data = tiff(**{f"x{40_000 + n}": (7, 250, 8) for n in range(9000)})
    bare, pictures = files.first_of_tiff(data, "a.tif")
    assert (len(bare) - len(data), pictures) == (2 + 7 * 12 + 4, 1)
    assert load_image_bytes(data).tobytes() == load_image_bytes(tiff()).tobytes()


def test_pages_that_go_round_are_not_counted_for_ever():
    data = bytearray(tiff())
    data[-4:] = struct.pack("<I", 8 + 256)
    assert_refused(bytes(data), "takes too long", "at most 10000 pictures in a TIFF")


def test_scans_of_a_jpeg_in_a_tiff_are_bounded(monkeypatch: pytest.MonkeyPatch):
    data = encoded(noise(), "TIFF", compression="jpeg")
    assert load_image_bytes(data).size == (64, 48)
    monkeypatch.setattr(files, "MAX_SCANNED_PIXELS", 64 * 48 - 1)
    assert_refused(data, "takes too long", "scans in a TIFF")


def test_colours_of_a_tiff_that_have_no_rgb_are_refused():
    data = encoded(Image.new("F", (32, 24)), "TIFF")
    assert_refused(data, "found a TIFF of fractions or of Lab colours", "Convert it")
    assert_refused(encoded(Image.new("LAB", (32, 24)), "TIFF"), "Lab colours")


def test_frames_of_a_gif_are_counted_without_reading_comments():
    data = frames("GIF", duration=20, comment=b"x" * 1000)
    bare, count = files.first_of_gif(data, "a.gif")
    assert count == 3
    assert b"xxx" not in bare
    assert Image.open(io.BytesIO(bare)).convert("RGB").getpixel((3, 3)) == RED
    blocks = b"!\xfe" + b"\x01x" * 1_000_001 + b"\0"
    at = data.index(b"!\xf9")
    assert_refused(data[:at] + blocks + data[at:], "takes too long", "1000000 blocks")


def test_a_transparent_gif_is_put_on_white():
    image = two_halves("P", 0, 1)
    image.putpalette([*BLUE, *RED])
    decoded = load_image_bytes(encoded(image, "GIF", transparency=0))
    assert (decoded.getpixel((3, 3)), decoded.getpixel((20, 3))) == (WHITE, RED)


def test_a_frame_larger_than_its_screen_has_the_same_budget():
    data = bytearray(encoded(plain(), "GIF"))
    frame = data.index(b",\0\0\0\0")
    data[frame + 5 : frame + 9] = struct.pack("<2H", 12_000, 9_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_refused(bytes(data), "too large", "12000x9000 px")


def test_a_heic_names_the_plugin_or_is_read_by_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "_HAS_HEIF", False)
    data = b"\0\0\0\x18ftypheic" + bytes(40)
    assert_refused(data, "found a HEIC", "Convert it to PNG, or pip install pillow-heif")
    monkeypatch.setattr(files, "_HAS_HEIF", True)

    def opened(_: object) -> Image.Image:
        return plain(BLUE, (9000, 9000) if large else (32, 24))

    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(HeifImageFile=opened))
    large = False
    assert load_image_bytes(data).getpixel((3, 3)) == BLUE
    large = True
    assert_refused(data, "too large", "9000x9000 px")


# --- damage ----------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated_file_is_refused(image_format: str, share: float):
    data = encoded(noise(), image_format)
    words = (f"the {image_format} image is truncated or corrupt", "a complete image", "again")
    assert_refused(data[: int(len(data) * share)], *words)


@pytest.mark.parametrize("image_format", FORMATS)
def test_file_cut_in_its_header_is_refused(image_format: str):
    data = encoded(noise(), image_format)[:20]
    words = ["header with the image's size", "found none"] * (image_format in ("JPEG", "WEBP"))
    assert_refused(data, f"the {image_format} image is truncated or corrupt", *words)


def test_webp_of_an_unknown_first_chunk_is_refused():
    assert_refused(webp_header(b"JUNK", bytes(40)), "header with the image's size")


def test_wrong_checksum_is_refused():
    data = bytearray(encoded(noise(), "PNG"))
    data[data.index(b"IDAT") + 40] ^= 1
    assert_refused(bytes(data), "the PNG image is truncated or corrupt")


def test_markers_without_end_are_not_all_looked_at(monkeypatch: pytest.MonkeyPatch):
    pattern, looks = files._JPEG_MARKER, []

    def search(data: bytes, position: int) -> object:
        looks.append(position)
        return pattern.search(data, position)

    monkeypatch.setattr(files, "_JPEG_MARKER", SimpleNamespace(search=search))
    assert_refused(b"\xff\xd8\xff" + b"\xff" * 20_000_000, "truncated or corrupt")
    assert looks == [2]
    assert_refused(b"\xff\xd8" + b"\xff\xfe\0\x02" * 5_000_000, "too long", "10000 segments")
    assert len(looks) == 1 + files.MAX_SEGMENTS + 1


def jpeg_segment(kind: int, body: bytes) -> bytes:
    return b"\xff" + bytes([kind]) + struct.pack(">H", len(body) + 2) + body


@pytest.mark.parametrize("where", ["before", "in the pixels", "behind"])
def test_fill_bytes_do_not_reach_a_decoder_that_reads_them_one_by_one(where: str):
    data = encoded(noise(), "JPEG")
    place = {
        "before": 2,
        "in the pixels": data.index(b"\xff\0", data.index(b"\xff\xda")),
        "behind": len(data) - 2,
    }
    filled = data[: place[where]] + b"\xff" * 5_000_000 + data[place[where] :]
    assert len(files.read_jpeg(filled, "a.jpg").bare) <= len(data) + 1
    assert load_image_bytes(filled).tobytes() == load_image_bytes(data).tobytes()


def test_of_repeated_exif_the_first_counts_and_none_reaches_pillow():
    blocks = [exif_of(6), *[exif_of(3)] * (files.MAX_SEGMENTS - 20)]
    data = encoded(plain(size=(64, 32)), "JPEG")
    more = b"".join(jpeg_segment(0xE1, block) for block in blocks)
    more += jpeg_segment(0xFE, b"a comment") + jpeg_segment(0xE2, b"MPF\0" + bytes(60))
    jpeg = files.read_jpeg(data[:2] + more + data[2:], "a.jpg")
    assert jpeg.bare == data
    assert jpeg.about == {"exif": exif_of(6)[6:]}
    assert load_image_bytes(data[:2] + more + data[2:]).size == (32, 64)


@pytest.mark.parametrize("image_format", [one for one in FORMATS if one not in ("BMP", "GIF")])
def test_exif_that_claims_more_than_it_is_is_not_copied(
    image_format: str, monkeypatch: pytest.MonkeyPatch
):
    tags = struct.pack("<HHII", 0x9000, 7, 60_000, 0) * 4000
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 4001) + tags
    exif += struct.pack("<HHII", 0x0112, 3, 1, 6)
    size = (64, 32)
    if image_format in ("AVIF", "TIFF"):  # whose orientation is not in the EXIF
        exif, size = exif[:-12] + bytes(12), (32, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Pillow, about what it writes
        data = encoded(plain(size=size), image_format, exif=exif)
    monkeypatch.setattr(Image.Exif, "load", None)
    assert load_image_bytes(data).size == (32, 64)


def test_png_of_very_many_chunks_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Image, "open", None)
    data = encoded(plain(), "PNG")
    bomb = data[:33] + chunk(b"abCd", b"") * files.MAX_PARTS + data[33:]
    assert_refused(bomb, "takes too long", f"at most {files.MAX_PARTS} chunks")


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8),
    st.floats(0, 1),
)
def test_damage_is_refused_or_survived_but_never_crashes(image_format, changes, share):
    data = bytearray(encoded(noise((20, 17)), image_format))
    for position, value in changes:
        data[position % len(data)] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = load_image_bytes(bytes(data[: max(1, int(len(data) * share))]))
        except ImageError:
            return
    assert image.mode == "RGB"


# --- text in a PNG ---------------------------------------------------------------------------


def long_text(kind: str) -> bytes:
    """A PNG with more text or ICC profile than Pillow inflates."""
    text, info, more = "x" * 2_000_000, PngImagePlugin.PngInfo(), {}
    if kind == "iCCP":
        more["icc_profile"] = text.encode()
    elif kind == "zTXt":
        info.add_text("workflow", text, zip=True)
    else:
        info.add_itxt("workflow", text, zip=True)
    return encoded(noise(), "PNG", pnginfo=info, **more)


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP"])
def test_text_or_profile_of_any_length_costs_no_picture(kind: str):
    data = long_text(kind)
    assert kind.encode() in data
    with pytest.raises(ValueError, match="MAX_TEXT_CHUNK"):
        Image.open(io.BytesIO(data), formats=["PNG"])
    assert load_image_bytes(data).tobytes() == noise().tobytes()


def test_text_behind_the_pixels_is_skipped_too():
    data = encoded(noise(), "PNG")
    text = chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 2_000_000))
    assert load_image_bytes(data[:-12] + text + data[-12:]).tobytes() == noise().tobytes()


@pytest.mark.parametrize(
    ("keyword", "text"),
    [
        # as ImageMagick writes EXIF: a line with the name, one with the length, then digits
        ("Raw profile type exif", "\nexif\n      26\n{exif}\n"),
        ("XML:com.adobe.xmp", '<rdf:Description tiff:Orientation="6"/>'),
    ],
)
def test_orientation_that_a_png_keeps_in_text_is_applied(keyword: str, text: str):
    exif = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    info = PngImagePlugin.PngInfo()
    text = text.format(exif=(b"Exif\0\0" + exif).hex())
    if keyword.startswith("XML"):
        info.add_itxt(keyword, text)
    else:
        info.add_text(keyword, text, zip=True)
    info.add_text("workflow", "x" * 2_000_000, zip=True)
    assert load_image_bytes(encoded(plain(size=(64, 32)), "PNG", pnginfo=info)).size == (32, 64)


# --- orientation -----------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", [one for one in FORMATS if one not in ("BMP", "GIF")])
@pytest.mark.parametrize(
    ("orientation", "size", "corner"),
    [
        (1, (64, 32), (0, 0)),
        (2, (64, 32), (1, 0)),
        (3, (64, 32), (1, 1)),
        (4, (64, 32), (0, 1)),
        (5, (32, 64), (0, 0)),
        (6, (32, 64), (1, 0)),
        (7, (32, 64), (1, 1)),
        (8, (32, 64), (0, 1)),
    ],
)
def test_orientation_is_applied(image_format: str, orientation: int, size: tuple, corner: tuple):
    """`corner` is where the stored image's top left red square must be seen."""
    stored = plain(BLUE, (64, 32))
    stored.paste(RED, (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = load_image_bytes(encoded(stored, image_format, exif=exif))
    assert image.size == size
    place = tuple(8 if end == 0 else side - 8 for end, side in zip(corner, size, strict=True))
    assert_near(image.getpixel(place), RED, 40)
    opposite = tuple(side - coordinate for side, coordinate in zip(size, place, strict=True))
    assert_near(image.getpixel(opposite), BLUE, 40)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0" + b"\xff" * 30,
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0",
    ],
)
def test_broken_exif_is_ignored(exif: bytes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = load_image_bytes(encoded(plain(RED), "JPEG", exif=exif))
    assert image.size == (32, 24)


def exif_of(orientation: int) -> bytes:
    entry = struct.pack("<HHHII", 1, 0x0112, 3, 1, orientation)
    return b"Exif\0\0II*\0\x08\0\0\0" + entry + bytes(4)


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_picture_that_pillow_opened_is_turned_alike(turn: int):
    data = encoded(noise(), "JPEG", exif=exif_of(turn))
    with Image.open(io.BytesIO(data)) as image:
        assert upright(image).tobytes() == load_image_bytes(data).tobytes()
        already = ImageOps.exif_transpose(image)
    assert upright(already) is already
    assert upright(noise()).tobytes() == noise().tobytes()


def test_orientation_is_applied_though_another_tag_is_broken():
    """Pillow reads this EXIF, but cannot write it back."""
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2)
    exif += struct.pack("<HHI4s", 0x0100, 2, 4, b"abc")  # a width is a number, not text
    exif += struct.pack("<HHII", 0x0112, 3, 1, 6) + bytes(4)
    data = encoded(plain(size=(64, 32)), "JPEG", exif=exif)
    with pytest.raises(struct.error), Image.open(io.BytesIO(data)) as image:
        ImageOps.exif_transpose(image)
    assert load_image_bytes(data).size == (32, 64)


def test_metadata_is_not_carried_over():
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = load_image_bytes(encoded(plain(), "JPEG", exif=exif, icc_profile=profile, dpi=(9, 9)))
    assert image.info == {}
    assert not image.getexif()


# --- colours ---------------------------------------------------------------------------------


def cmyk_profile() -> bytes:
    """A minimal printer profile whose cyan is a middle grey (ICC.1:2001-04, 6.5.8 lut8Type)."""
    lightness = [255, 0, 0, 0, 0, 0, 0, 0, 137, 0, 0, 0, 0, 0, 0, 0]  # by bits of CMYK
    table = struct.pack(">4sIBBBB", b"mft1", 0, 4, 3, 2, 0)
    table += struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    table += (
        bytes(range(256)) * 4
        + b"".join(bytes([value, 128, 128]) for value in lightness)
        + bytes(range(256)) * 3
    )
    tags = struct.pack(">I4sII", 1, b"A2B0", 144, len(table))
    head = struct.pack(
        ">I4sI4s4s4s12s4s",
        144 + len(table),
        b"",
        0x02100000,
        b"prtr",
        b"CMYK",
        b"Lab ",
        b"",
        b"acsp",
    )
    white_point = struct.pack(">3I", 0xF6D6, 0x10000, 0xD32D)
    return head.ljust(68, b"\0") + white_point.ljust(60, b"\0") + tags + table


@pytest.mark.parametrize(
    ("ink", "colour"),
    [
        ((0, 0, 0, 0), WHITE),
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 255, 255, 0), RED),
        ((0, 0, 0, 255), (0, 0, 0)),
    ],
)
def test_cmyk_without_a_profile_takes_pillows_conversion(ink: tuple, colour: tuple):
    image = load_image_bytes(encoded(plain(ink, mode="CMYK"), "JPEG", quality=95))
    assert_near(image.getpixel((5, 5)), colour)


def test_cmyk_follows_its_profile():
    cyan = plain((255, 0, 0, 0), mode="CMYK")
    data = encoded(cyan, "JPEG", quality=95, icc_profile=cmyk_profile())
    image = load_image_bytes(data)
    assert_near(image.getpixel((5, 5)), (128, 128, 128))
    assert image.info == {}


@pytest.mark.parametrize(
    "profile",
    [b"no profile", ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()],
)
def test_cmyk_with_an_unusable_profile_takes_pillows_conversion(profile: bytes):
    data = encoded(plain((0, 255, 255, 0), mode="CMYK"), "JPEG", quality=95, icc_profile=profile)
    assert_near(load_image_bytes(data).getpixel((5, 5)), RED)


def test_16_bit_grey_keeps_its_range():
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    data = encoded(Image.fromarray(levels), "PNG")
    with Image.open(io.BytesIO(data)) as stored:
        clipped = np.asarray(stored.convert("RGB"))
    assert (clipped == 255).mean() > 0.99, "Pillow no longer clips: use its conversion"
    image = np.asarray(load_image_bytes(data))
    assert (image.min(), image.max()) == (0, 255)
    assert np.abs(image[..., 0] - levels / 257).max() <= 0.5
    assert (image[..., 0] == image[..., 1]).all()


def test_32_bit_grey_in_memory_is_narrowed_alike():
    image = Image.fromarray(np.array([[0, 257 * 7], [65535, 99999]], dtype=np.int32))
    assert image.mode == "I"
    assert np.asarray(to_rgb(image))[..., 0].tolist() == [[0, 7], [255, 255]]


def test_16_bit_grey_with_a_transparent_level_is_put_on_white():
    row = b"\0" + struct.pack(">16H", *[5000] * 8, *[5001] * 8)
    data = png(16, 16, 16, 0, row * 16, chunk(b"tRNS", struct.pack(">H", 5000)))
    image = load_image_bytes(data)
    assert image.getpixel((0, 0)) == WHITE
    assert image.getpixel((15, 0)) == (19, 19, 19)


@pytest.mark.parametrize("key", [None, (0x1234, 0x5678, 0x9ABC)])
def test_16_bit_colour_takes_the_upper_byte(key: tuple | None):
    pixels = [(0x1234, 0x5678, 0x9ABC)] * 8 + [(0xFFFF, 0, 0x8000)] * 8
    row = b"\0" + b"".join(struct.pack(">3H", *pixel) for pixel in pixels)
    more = [chunk(b"tRNS", struct.pack(">3H", *key))] if key else []
    image = load_image_bytes(png(16, 16, 16, 2, row * 16, *more))
    assert image.getpixel((0, 0)) == (WHITE if key else (0x12, 0x56, 0x9A))
    assert image.getpixel((15, 0)) == (0xFF, 0, 0x80)


@pytest.mark.parametrize(
    ("mode", "colour", "seen"),
    [("L", 90, (90, 90, 90)), ("1", 1, WHITE), ("1", 0, (0, 0, 0)), ("P", 0, (0, 0, 0))],
)
def test_grey_and_bits_become_rgb(mode: str, colour: int, seen: tuple):
    image = load_image_bytes(encoded(plain(colour, mode=mode), "PNG"))
    assert (image.mode, image.getpixel((3, 3))) == ("RGB", seen)


def test_palette_becomes_rgb():
    image = plain(RED).quantize(8)
    assert image.mode == "P"
    assert load_image_bytes(encoded(image, "PNG")).getpixel((3, 3)) == RED


# --- transparency ----------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
@pytest.mark.parametrize(
    ("colour", "seen"),
    [((0, 0, 0, 0), WHITE), ((255, 0, 0, 128), (255, 127, 127)), ((255, 0, 0, 255), RED)],
)
def test_transparency_is_put_on_white(image_format: str, colour: tuple, seen: tuple):
    options = {"lossless": True, "exact": True} if image_format == "WEBP" else {}
    data = encoded(plain(colour, mode="RGBA"), image_format, **options)
    assert_near(load_image_bytes(data).getpixel((3, 3)), seen, 1)


def test_grey_with_alpha_is_put_on_white():
    data = encoded(plain((0, 0), mode="LA"), "PNG")
    assert load_image_bytes(data).getpixel((3, 3)) == WHITE


@pytest.mark.parametrize("transparency", [0, b"\x00\xff"])
def test_transparent_palette_entry_is_put_on_white(transparency: int | bytes):
    image = two_halves("P", 0, 1)
    image.putpalette([*BLUE, *RED])
    decoded = load_image_bytes(encoded(image, "PNG", transparency=transparency))
    assert (decoded.getpixel((3, 3)), decoded.getpixel((20, 3))) == (WHITE, RED)


@pytest.mark.parametrize(
    ("mode", "clear", "solid", "seen"), [("RGB", BLUE, RED, RED), ("L", 7, 9, (9, 9, 9))]
)
def test_transparent_colour_key_is_put_on_white(
    mode: str, clear: object, solid: object, seen: tuple
):
    image = two_halves(mode, clear, solid)
    decoded = load_image_bytes(encoded(image, "PNG", transparency=clear))
    assert (decoded.getpixel((3, 3)), decoded.getpixel((20, 3))) == (WHITE, seen)


# --- masks -----------------------------------------------------------------------------------


def hole(colour: object, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """A picture of one colour with a transparent middle."""
    image = plain(colour, size, "RGBA")
    image.paste((0, 0, 0, 0), (8, 8, 24, 24))
    return image


def strokes(colour: object) -> Image.Image:
    """An empty layer with something drawn in its middle."""
    image = plain((0, 0, 0, 0), (32, 32), "RGBA")
    image.paste(colour, (8, 8, 24, 24))
    return image


@pytest.mark.parametrize("draw", [hole, strokes])
@pytest.mark.parametrize("colour", ["white", "black", (128, 128, 128, 255), (255, 255, 255, 254)])
def test_what_transparency_in_a_mask_means_is_not_guessed(
    draw: Callable[[object], Image.Image], colour: object, tmp_path: Path
):
    for image in (draw(colour), draw(colour).quantize(8)):
        image.save(tmp_path / "mask.png")
        with pytest.raises(ImageError) as caught:
            load_mask(tmp_path / "mask.png")
        share = f"found {float((np.asarray(draw(colour))[..., 3] < 255).mean()):.0%} transparent"
        words = ("either", "white where it acts", share, "Put it on a black layer")
        assert_explains(caught, tmp_path, *words)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "LA", "P", "I;16"])
def test_a_mask_is_read_whatever_holds_it(mode: str, tmp_path: Path):
    drawn = two_halves("L", 0, 255)
    wide = Image.fromarray(np.asarray(drawn).astype(np.uint16) * 257)
    (wide if mode == "I;16" else drawn.convert(mode)).save(tmp_path / "mask.png")
    mask = load_mask(tmp_path / "mask.png")
    assert (mask.mode, mask.tobytes()) == ("L", drawn.tobytes())


def test_a_grey_mask_stays_grey(tmp_path: Path):
    Image.linear_gradient("L").save(tmp_path / "mask.png")
    assert load_mask(tmp_path / "mask.png").tobytes() == Image.linear_gradient("L").tobytes()


def test_a_mask_that_acts_nowhere_is_refused(tmp_path: Path):
    plain(0, mode="L").save(tmp_path / "mask.png")
    with pytest.raises(ImageError) as caught:
        load_mask(tmp_path / "mask.png")
    assert_explains(caught, tmp_path, "acts nowhere", "black everywhere", "Draw in white")


# --- several pictures in one file ------------------------------------------------------------


@pytest.mark.parametrize("image_format", [f for f in FORMATS if f not in ("JPEG", "BMP", "TIFF")])
def test_first_frame_of_an_animation_is_used_with_a_warning(tmp_path: Path, image_format: str):
    path = tmp_path / "moving.png"
    path.write_bytes(frames(image_format, duration=50))
    with pytest.warns(ImageWarning) as caught:
        image = load_image(path)
    assert_near(image.getpixel((3, 3)), RED)
    message = str(caught[0].message)
    assert message == f"{path}: the image is animated (3 frames); only the first frame is used"
    assert Path(caught[0].filename) == Path(__file__)


def test_first_page_of_a_tiff_is_used_with_a_warning():
    with pytest.warns(ImageWarning, match=r"a\.tif: the file holds 3 pictures; only the first is"):
        image = load_image_bytes(frames("TIFF"), "a.tif")
    assert image.getpixel((3, 3)) == RED


def test_a_warning_made_an_error_stays_what_it_is():
    with warnings.catch_warnings():
        warnings.simplefilter("error", ImageWarning)
        with pytest.raises(ImageWarning, match="animated"):
            load_image_bytes(frames("PNG"))


def test_first_picture_of_a_phone_photo_is_used_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = load_image_bytes(frames("MPO"))
    assert_near(image.getpixel((3, 3)), RED)


# --- results ---------------------------------------------------------------------------------


def test_plain_rgb_is_returned_as_it_is_and_anything_else_left_alone():
    image = noise()
    assert to_rgb(image) is image
    clear = plain((0, 0, 0, 0), mode="RGBA")
    to_rgb(clear)
    assert (clear.mode, clear.getpixel((0, 0))) == ("RGBA", (0, 0, 0, 0))


def test_the_image_outlives_its_file(tmp_path: Path):
    path = tmp_path / "a.png"
    noise().save(path)
    image = load_image(path)
    path.unlink()
    assert image.tobytes() == noise().tobytes()
    image.putpixel((0, 0), RED)


def test_same_pixels_have_the_same_hash_whatever_the_file():
    image = noise()
    hashes = {content_hash(load_image_bytes(encoded(image, "PNG", dpi=(7, 7))))}
    hashes.add(content_hash(load_image_bytes(encoded(image, "WEBP", lossless=True))))
    hashes.add(content_hash(image.convert("RGBA")))
    assert hashes == {content_hash(image)}
    assert len(hashes.pop()) == 64


def test_other_pixels_or_another_shape_have_another_hash():
    changed = noise()
    changed.putpixel((0, 0), RED)
    images = [noise(), changed, plain(RED, (32, 24)), plain(RED, (24, 32))]
    assert len({content_hash(image) for image in images}) == 4


def test_hash_is_stable_over_versions():
    known = "a98ab37ec08bbbb49ae884df3cd8aa167bc79397f20e7f3e7646ba16d11fbf33"
    assert content_hash(plain(RED, (16, 16))) == known


def test_threads_decode_without_disturbing_each_other(tmp_path: Path):
    path = tmp_path / "a.png"
    noise().save(path)
    hashes: list[str] = []
    work = [
        threading.Thread(target=lambda: hashes.append(content_hash(load_image(path))))
        for _ in range(8)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert hashes == [content_hash(noise())] * 8
