"""Safe decoding of images from anywhere, with one stated policy for each oddity.

| in the wild | policy |
|---|---|
| format | JPEG, PNG, WebP, BMP, GIF, TIFF, told by content; others are refused |
| AVIF, HEIC | read where Pillow has AVIF, and where the package pillow-heif is installed |
| any extension (`.JPG`, `.jfif`, a wrong one) | accepted when the content is one of these formats |
| size of the file | at most 64 MiB, checked before reading |
| size of the image | sides 16 to 16384 px, at most 64 megapixels, checked before decoding |
| JPEG of one scan | up to 256 megapixels |
| above 40 megapixels | scaled to a half or a quarter of each side, a JPEG while it is decoded |
| decompression bomb | refused by the lines above, before memory is taken for pixels |
| JPEG of very many scans or segments, PNG of very many chunks | refused: each one costs time |
| EXIF orientation | applied; EXIF that cannot be read is ignored, and no other tag is looked at |
| CMYK | to sRGB by the file's ICC profile; without a usable one, Pillow's conversion |
| ICC profile of an RGB image | ignored, as stock diffusers pipelines do |
| 16-bit grey | divided by 257 and rounded; Pillow's own conversion would clip |
| 16-bit colour | the upper byte, as Pillow reads it |
| palette, grey, 1-bit | converted to RGB |
| transparency of any kind | composited over white; in a mask, refused |
| animated PNG, WebP, GIF or AVIF; TIFF of several pages | the first, with an `ImageWarning` |
| raw file of a camera, TIFF that begins with a preview | refused |
| TIFF of fractions, of Lab colours, or rarely compressed | refused |
| several pictures in one JPEG (MPO) | the first; the others are depth maps, previews and the like |
| text in a PNG, however long | skipped, except where it says the orientation |
| BMP of run lengths | refused: Pillow takes a minute for a large one |
| truncated, corrupt, empty | refused |
| folder, pipe, device, missing, unreadable | refused |
| metadata (EXIF, ICC, text) | never carried over to the decoded image |

A refusal is always one `ImageError` line; the numbers are in `image_io/files.py`. Pillow's
process-wide `LOAD_TRUNCATED_IMAGES`, which is off unless some library turns it on, would let
truncated files through.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import warnings

import numpy as np
from PIL import Image, ImageCms
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ipdiverse.errors import ImageError, quoted
from ipdiverse.image_io.files import (
    GET_AGAIN,
    MAX_DECODED_PIXELS,
    MAX_DRAFT_PIXELS,
    MAX_FILE_BYTES,
    MAX_JPEG_SCANS,
    MAX_PARTS,
    MAX_PIXELS,
    MAX_SCANNED_PIXELS,
    check_count,
    check_file_bytes,
    check_size,
    describe,
    first_of_gif,
    first_of_tiff,
    format_of,
    not_accepted,
    opened,
    orientation,
    png_chunks,
    read_jpeg,
    webp_size,
)

_WIDE_GREY = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_PNG_BIT_DEPTH = 24  # where the header holds it
_WIDE_BITS = 16
_PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt")
_PNG_ORIENTATION = (b"exif\0", b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
"""Keywords of text that may hold the orientation."""
_TURNS = (
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.ROTATE_180,
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)
"""What undoes each orientation, from 2 on."""
_READERS = {
    "PNG": PngImageFile,
    "WEBP": WebPImageFile,
    "BMP": BmpImageFile,
    "GIF": GifImageFile,
    "TIFF": TiffImageFile,
}


class ImageWarning(UserWarning):
    """An image was accepted, but not all of it is used."""


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Decode an image file.

    Args:
        path: A file of an accepted format, whatever its extension.

    Returns:
        The upright image in mode RGB, without metadata.

    Raises:
        ImageError: The file cannot be read, is not an image, is broken, or is outside the limits.
    """
    return _plain(_decode(_read(path), str(path)))


def load_image_bytes(data: bytes, name: str = "image") -> Image.Image:
    """As `load_image`, from memory; errors call it by the name."""
    return _plain(_decode(data, name))


def load_mask(path: str | os.PathLike[str]) -> Image.Image:
    """A file as a mask (`ImageError` as `load_image` and `as_mask` say, or black everywhere)."""
    mask = as_mask(_decode(_read(path), str(path)), path)
    if mask.getextrema()[1] == 0:
        raise ImageError(
            "the mask acts nowhere",
            where=path,
            expected="white where it acts",
            found="black everywhere",
            fix="Draw in white, or invert it if it was meant the other way round.",
        )
    return mask


def as_mask(image: Image.Image, where: object = "mask") -> Image.Image:
    """A picture as a mask: white acts, black does not, grey acts in part.

    What transparency means depends on who drew it: a hole that was erased in white is what to
    repaint, and so are black strokes on an empty layer. It is refused rather than guessed.

    Raises:
        ImageError: It has transparent parts.
    """
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if clear := 0 if alpha is None else float((np.asarray(alpha) < 255).mean()):
        raise ImageError(
            "the mask has transparent parts, which may stand for either",
            where=where,
            expected="white where it acts, black elsewhere, nothing transparent",
            found=f"{clear:.0%} transparent",
            fix="Put it on a black layer, draw in white, and save it without transparency.",
        )
    return to_rgb(image).convert("L")


def upright(image: Image.Image) -> Image.Image:
    """An image that Pillow opened, turned as its metadata says; the same one if that is nothing."""
    return _turned(image, orientation(image.info))


def _turned(image: Image.Image, turn: int) -> Image.Image:
    return image.transpose(_TURNS[turn - 2]) if 2 <= turn <= 8 else image


def content_hash(image: Image.Image) -> str:
    """SHA-256 of an image's size and pixels in RGB, whatever file it came from."""
    digest = hashlib.sha256(f"{image.width}x{image.height}:".encode())
    digest.update(to_rgb(image).tobytes())
    return digest.hexdigest()


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB as stated, without metadata; orientation is left alone."""
    if image.mode == "RGB" and not image.info:
        return image
    if image.mode in _WIDE_GREY:
        result = _narrow(image)
    elif image.mode == "CMYK":
        result = _cmyk_to_rgb(image)
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        result = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    else:
        result = image.convert("RGB")
    result.info = {}
    return result


def _read(path: str | os.PathLike[str]) -> bytes:
    with opened(path) as file:
        check_file_bytes(os.fstat(file.fileno()).st_size, path)
        return file.read(MAX_FILE_BYTES + 1)  # it may grow after its size was taken


def _plain(image: Image.Image) -> Image.Image:
    """RGB, and no longer of the class that decoded it, which holds the file."""
    result = to_rgb(image)
    return result.copy() if result is image else result


def _decode(data: bytes, name: str) -> Image.Image:
    """The upright image in its own mode, at most `MAX_PIXELS` large."""
    check_file_bytes(len(data), name)
    image_format = format_of(data)
    if image_format is None:
        raise not_accepted(name, describe(data))
    try:
        image = _open(data, name, image_format)
        image.load()
        key = image.info.get("transparency")
        if image_format == "PNG" and data[_PNG_BIT_DEPTH] == _WIDE_BITS and isinstance(key, tuple):
            # Pillow narrows the pixels of 16-bit RGB to 8 bits, but not the transparent colour
            image.info["transparency"] = tuple(value >> 8 for value in key)
        if isinstance(image, TiffImageFile) and image.mode == "I;16" and not image.tag_v2.get(262):
            # white is 0 there: Pillow inverts such images of 8 bits, but not of 16
            image = Image.fromarray(65535 - np.asarray(image))
        if image.mode in ("F", "LAB"):
            raise not_accepted(name, "a TIFF of fractions or of Lab colours")
        return upright(_within_budget(image))
    except (ImageError, ImageWarning):
        raise
    except Exception as error:  # on hostile files Pillow's decoders raise nearly anything
        found = str(error) or type(error).__name__
        raise _broken(image_format, name, "a complete image", found) from error


def _broken(image_format: str, name: str, expected: str, found: str) -> ImageError:
    what = f"the {image_format} image is truncated or corrupt"
    return ImageError(what, where=name, expected=expected, found=found, fix=GET_AGAIN)


def _open(data: bytes, name: str, image_format: str) -> Image.Image:
    if image_format == "JPEG":
        return _open_jpeg(data, name)
    if image_format == "AVIF":
        image, frames = _open_avif(data, name)
        _warn_if_several(frames, name)
        return image
    frames = None
    if image_format == "PNG":
        data = _without_text(data, name)
    elif image_format == "WEBP":  # Pillow takes memory for the whole canvas when it opens one
        check_size(_sized(webp_size(data), "WEBP", name), name)
    elif image_format == "GIF":
        data, frames = first_of_gif(data, name)
    elif image_format == "TIFF":
        data, frames = first_of_tiff(data, name)
    # not by `Image.open`, whose own limit of pixels warns before it refuses
    reader = _READERS.get(image_format) or importlib.import_module("pillow_heif").HeifImageFile
    image: Image.Image = reader(io.BytesIO(data))
    check_size(image.size, name)
    _warn_if_several(frames or getattr(image, "n_frames", 1), name, image_format)
    return image


def _open_jpeg(data: bytes, name: str) -> Image.Image:
    jpeg = read_jpeg(data, name)
    size = _sized(jpeg.size, "JPEG", name)
    check_size(size, name, MAX_DECODED_PIXELS if jpeg.scans > 1 else MAX_DRAFT_PIXELS)
    most = min(MAX_JPEG_SCANS, MAX_SCANNED_PIXELS // (size[0] * size[1]))
    check_count(jpeg.scans, most, "scans in a JPEG of this size", name)
    image = JpegImageFile(io.BytesIO(jpeg.bare))
    factor = next(f for f in (1, 2, 4, 8) if size[0] * size[1] <= MAX_PIXELS * f * f)
    image.draft(None, (size[0] // factor, size[1] // factor))
    image.info |= jpeg.about
    return image


def _open_avif(data: bytes, name: str) -> tuple[Image.Image, int]:
    """The image, and how many frames its file has; `Image.open` would also read all EXIF."""
    from PIL import _avif

    decoder = _avif.AvifDecoder(data, "auto", os.cpu_count() or 1)
    size, frames, mode, _, _, turn, _ = decoder.get_info()
    check_size(size, name)
    return _turned(Image.frombytes(mode, size, decoder.get_frame(0)[0]), turn), frames


def _sized(size: tuple[int, int] | None, image_format: str, name: str) -> tuple[int, int]:
    if size is None:
        raise _broken(image_format, name, "a header with the image's size", "none")
    return size


def _without_text(data: bytes, name: str) -> bytes:
    """A PNG without the chunks that are not used and that Pillow may fail on.

    Pillow refuses a sound PNG whose compressed text or ICC profile is over 1 MiB
    (`PngImagePlugin.MAX_TEXT_CHUNK`, one value for the whole process). Image tools keep workflows
    of several MiB in there.
    """
    kept, end = [], 0
    view = memoryview(data)
    for count, (kind, body, length) in enumerate(png_chunks(io.BytesIO(data)), 2):
        check_count(count, MAX_PARTS, "chunks", name)
        is_unused = kind in _PNG_TEXT and not data.startswith(_PNG_ORIENTATION, body)
        if is_unused or kind == b"iCCP":
            kept.append(view[end : body - 8])
            end = body + length + 4
    return b"".join([*kept, view[end:]]) if kept else data


def _warn_if_several(frames: int, name: str, image_format: str = "") -> None:
    if frames > 1:
        text = f"the image is animated ({frames} frames); only the first frame is used"
        if image_format in ("TIFF", "HEIF"):
            text = f"the file holds {frames} pictures; only the first is used"
        warnings.warn(f"{quoted(name)}: {text}", ImageWarning, stacklevel=5)


def _within_budget(image: Image.Image) -> Image.Image:
    if image.width * image.height <= MAX_PIXELS:
        return image
    return (image.convert("RGBA") if image.has_transparency_data else to_rgb(image)).reduce(2)


def _narrow(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bits: 65535 / 257 = 255 exactly."""
    levels = np.asarray(image).clip(0, 65535)
    table = ((np.arange(65536) + 128) // 257).astype(np.uint8)
    grey = table[levels]
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey[levels == key] = 255
    return Image.fromarray(grey).convert("RGB")


def _cmyk_to_rgb(image: Image.Image) -> Image.Image:
    profile = io.BytesIO(image.info.get("icc_profile") or b"")
    try:
        source, target = ImageCms.ImageCmsProfile(profile), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):  # no profile, or not of CMYK
        converted = None
    return converted or image.convert("RGB")
