"""One test or more for each line of the policy table in `ipdiverse.image_io`."""

from __future__ import annotations

import io
import os
import struct
import threading
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from ipdiverse.errors import ImageError
from ipdiverse.image_io import (
    ImageWarning,
    content_hash,
    files,
    load_image,
    load_image_bytes,
    to_rgb,
)

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def plain(colour: object = RED, size: tuple[int, int] = (32, 24), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, colour)


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


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("name", ["right", "wrong.txt", "wrong.gif"])
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
    assert files.claimed_size(data, "WEBP") == (37, 21)
    assert load_image_bytes(data).size == (37, 21)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}])
def test_every_kind_of_jpeg_says_its_size(options: dict):
    data = encoded(noise((200, 120)), "JPEG", **options)
    assert files.claimed_size(data, "JPEG") == (200, 120)
    assert load_image_bytes(data).size == (200, 120)


def test_path_may_be_text_or_path_and_bytes_give_the_same(tmp_path: Path):
    path = tmp_path / "a.png"
    noise().save(path)
    images = [load_image(path), load_image(str(path)), load_image_bytes(path.read_bytes())]
    assert {image.tobytes() for image in images} == {noise().tobytes()}


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (encoded(plain(), "GIF"), "a GIF"),
        (frames("GIF"), "a GIF"),
        (encoded(plain(), "BMP"), "a BMP"),
        (encoded(plain(), "TIFF"), "a TIFF"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "a HEIC"),
        (b"\0\0\0\x18ftypavif" + bytes(40), "an AVIF"),
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
    assert_explains(caught, path, "JPEG, PNG or WebP", "plain text", "Convert it to PNG")


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
        assert_refused(data, "too large", "40 megapixels", "60000x60000 px", "Scale it down")


@pytest.mark.parametrize("size", [(10000, 9000), (60000, 16), (16, 16385), (6400, 6400)])
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
    data[frame + 5 : frame + 9] = struct.pack(">HH", 9000, 12000)
    assert_refused(bytes(data), "too large", "12000x9000 px")


@pytest.mark.parametrize("size", [(15, 100), (100, 15), (1, 1)])
def test_too_small_image_is_refused(size: tuple[int, int]):
    data = encoded(plain(RED, size), "PNG")
    assert_refused(data, "too small", "at least 16 px", f"found {size[0]}x{size[1]} px", "larger")


def test_the_smallest_and_the_longest_are_accepted():
    assert load_image_bytes(encoded(plain(RED, (16, 16)), "PNG")).size == (16, 16)
    assert load_image_bytes(encoded(plain(RED, (16384, 16)), "PNG")).size == (16384, 16)


def test_jpeg_of_endless_scans_is_refused():
    data = encoded(noise(), "JPEG", progressive=True)
    scan = data.rindex(b"\xff\xda")
    bomb = data[:-2] + data[scan:-2] * files.MAX_JPEG_SCANS + data[-2:]
    assert_refused(bomb, "takes too long", "at most 100 scans", "Save it as a plain JPEG")


def test_video_behind_a_photo_is_not_taken_for_scans():
    data = encoded(noise(), "JPEG") + b"\xff\xda\0\x02" * 200
    assert load_image_bytes(data).size == (64, 48)


# --- damage ----------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_truncated_file_is_refused(image_format: str, share: float):
    data = encoded(noise(), image_format)
    words = (f"the {image_format} image is truncated or corrupt", "a complete image", "again")
    assert_refused(data[: int(len(data) * share)], *words)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_file_cut_in_its_header_is_refused(image_format: str):
    data = encoded(noise(), image_format)[:20]
    assert_refused(data, "truncated or corrupt", "header with the image's size", "found none")


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
    assert_refused(b"\xff\xd8" + b"\xff\xfe\0\x02" * 5_000_000, "truncated or corrupt")
    assert len(looks) == 1 + files._MAX_JPEG_SEGMENTS


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "WEBP"]),
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


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
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


def two_halves(mode: str, left: object, right: object) -> Image.Image:
    image = plain(left, mode=mode)
    image.paste(right, (16, 0, 32, 24))
    return image


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


# --- several pictures in one file ------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_first_frame_of_an_animation_is_used_with_a_warning(tmp_path: Path, image_format: str):
    path = tmp_path / "moving.png"
    path.write_bytes(frames(image_format, duration=50))
    with pytest.warns(ImageWarning) as caught:
        image = load_image(path)
    assert_near(image.getpixel((3, 3)), RED)
    message = str(caught[0].message)
    assert message == f"{path}: the image is animated (3 frames); only the first frame is used"
    assert Path(caught[0].filename) == Path(__file__)


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
