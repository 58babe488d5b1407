"""Safe decoding of images from anywhere, with one stated policy for each oddity.

| in the wild | policy |
|---|---|
| format | JPEG, PNG and WebP, told by content; all others are refused |
| wrong extension | accepted when the content is one of these formats |
| size of the file | at most 64 MiB, checked before reading |
| size of the image | sides 16 to 16384 px, at most 40 megapixels, checked before decoding |
| decompression bomb | refused by the line above, before memory is taken for pixels |
| JPEG of very many scans | refused: each one costs a pass over the whole image |
| EXIF orientation | applied; EXIF that cannot be read is ignored |
| CMYK | to sRGB by the file's ICC profile; without a usable one, Pillow's conversion |
| ICC profile of an RGB image | ignored, as stock diffusers pipelines do |
| 16-bit grey | divided by 257 and rounded; Pillow's own conversion would clip |
| 16-bit colour | the upper byte, as Pillow reads it |
| palette, grey, 1-bit | converted to RGB |
| transparency of any kind | composited over white |
| animated PNG or WebP | the first frame, with an `ImageWarning` |
| several pictures in one JPEG (MPO) | the first; the others are depth maps, previews and the like |
| text in a PNG, however long | skipped, except where it says the orientation |
| truncated, corrupt, empty | refused |
| folder, pipe, device, missing, unreadable | refused |
| metadata (EXIF, ICC, text) | never carried over to the decoded image |

A refusal is always one `ImageError` line. Pillow's process-wide `LOAD_TRUNCATED_IMAGES`, which is
off unless some library turns it on, would let truncated files through.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

from ipdiverse.errors import ImageError, quoted
from ipdiverse.image_io.files import (
    GET_AGAIN,
    MAX_FILE_BYTES,
    MAX_JPEG_SCANS,
    check_file_bytes,
    check_size,
    claimed_size,
    describe,
    format_of,
    jpeg_scan_count,
    opened,
    png_chunks,
)

_WIDE_GREY = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_PNG_BIT_DEPTH = 24  # where the header holds it
_WIDE_BITS = 16
_PNG_TEXT = (b"tEXt", b"zTXt", b"iTXt")
_PNG_ORIENTATION = (b"exif\0", b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
"""Keywords of text in which Pillow looks for the orientation."""


class ImageWarning(UserWarning):
    """An image was accepted, but not all of it is used."""


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Decode an image file.

    Args:
        path: A JPEG, PNG or WebP file, whatever its extension.

    Returns:
        The upright image in mode RGB, without metadata.

    Raises:
        ImageError: The file cannot be read, is not an image, is broken, or is outside the limits.
    """
    with opened(path) as file:
        check_file_bytes(os.fstat(file.fileno()).st_size, path)
        data = file.read(MAX_FILE_BYTES + 1)  # the file may grow after its size was taken
    return _decode(data, str(path))


def load_image_bytes(data: bytes, name: str = "image") -> Image.Image:
    """Decode an image that is already in memory, such as an upload.

    Args:
        data: The content of a JPEG, PNG or WebP file.
        name: What to call it in errors.

    Returns:
        The upright image in mode RGB, without metadata.

    Raises:
        ImageError: The bytes are not an image, are broken, or are outside the limits.
    """
    return _decode(data, name)


def content_hash(image: Image.Image) -> str:
    """Identify an image by its pixels, whatever file it came from.

    Args:
        image: The image; modes other than RGB are converted as when loading.

    Returns:
        The SHA-256 of its size and RGB pixels, 64 hexadecimal digits.
    """
    digest = hashlib.sha256(f"{image.width}x{image.height}:".encode())
    digest.update(to_rgb(image).tobytes())
    return digest.hexdigest()


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB by the stated policies; orientation is left alone.

    Args:
        image: An image of any mode that Pillow decodes.

    Returns:
        An RGB image without metadata; a copy unless it was one already.
    """
    if image.mode == "RGB" and not image.info:
        return image
    if image.mode in _WIDE_GREY:
        result = _narrow(image)
    elif image.mode == "CMYK":
        result = _cmyk_to_rgb(image)
    elif image.has_transparency_data:
        result = _over_white(image.convert("RGBA"))
    else:
        result = image.convert("RGB")
    result.info = {}
    return result


def _decode(data: bytes, name: str) -> Image.Image:
    image_format = _check_header(data, name)
    try:
        if image_format == "PNG":
            data = _without_text(data)
        with Image.open(io.BytesIO(data), formats=[image_format]) as image:
            check_size(image.size, name)
            _warn_if_animated(image, name)
            return _upright_rgb(image, data)
    except (ImageError, ImageWarning):
        raise
    except Exception as error:  # on hostile files Pillow's decoders raise nearly anything
        raise ImageError(
            f"the {image_format} image is truncated or corrupt",
            where=name,
            expected="a complete image",
            found=str(error) or type(error).__name__,
            fix=GET_AGAIN,
        ) from error


def _check_header(data: bytes, name: str) -> str:
    """Refuse what its header alone rules out, and return the format."""
    check_file_bytes(len(data), name)
    image_format = format_of(data)
    if image_format is None:
        raise ImageError(
            "this is not an image of an accepted format",
            where=name,
            expected="JPEG, PNG or WebP content",
            found=describe(data),
            fix="Convert it to PNG.",
        )
    size = claimed_size(data, image_format)
    if size is None:
        raise ImageError(
            f"the {image_format} image is truncated or corrupt",
            where=name,
            expected="a header with the image's size",
            found="none",
            fix=GET_AGAIN,
        )
    check_size(size, name)
    if image_format == "JPEG" and (scans := jpeg_scan_count(data)) > MAX_JPEG_SCANS:
        raise ImageError(
            "the JPEG image takes too long to decode",
            where=name,
            expected=f"at most {MAX_JPEG_SCANS} scans",
            found=scans,
            fix="Save it as a plain JPEG or PNG.",
        )
    return image_format


def _without_text(data: bytes) -> bytes:
    """A PNG without the chunks that are not used and that Pillow may fail on.

    Pillow refuses a sound PNG whose compressed text or ICC profile is over 1 MiB
    (`PngImagePlugin.MAX_TEXT_CHUNK`, one value for the whole process). Image tools keep workflows
    of several MiB in there.
    """
    kept, end = [], 0
    view = memoryview(data)
    for kind, body, length in png_chunks(io.BytesIO(data)):
        is_unused = kind in _PNG_TEXT and not data.startswith(_PNG_ORIENTATION, body)
        if is_unused or kind == b"iCCP":
            kept.append(view[end : body - 8])
            end = body + length + 4
    return b"".join([*kept, view[end:]]) if kept else data


def _warn_if_animated(image: Image.Image, name: str) -> None:
    frames = getattr(image, "n_frames", 1)
    if image.format in {"PNG", "WEBP"} and frames > 1:
        text = (
            f"{quoted(name)}: the image is animated ({frames} frames); only the first frame is used"
        )
        warnings.warn(text, ImageWarning, stacklevel=4)


def _upright_rgb(image: Image.Image, data: bytes) -> Image.Image:
    image.load()
    orientation = _orientation(image)
    key = image.info.get("transparency")
    if image.format == "PNG" and data[_PNG_BIT_DEPTH] == _WIDE_BITS and isinstance(key, tuple):
        # Pillow narrows the pixels of 16-bit RGB to 8 bits, but not the transparent colour
        image.info["transparency"] = tuple(value >> 8 for value in key)
    result = to_rgb(image)
    # `exif_transpose` on the file's own EXIF would write all of it back, which fails where any
    # other tag of it is broken; so it gets the one tag, on an image without metadata.
    result.getexif()[ExifTags.Base.Orientation] = orientation
    return ImageOps.exif_transpose(result)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a broken EXIF block must not cost a good picture
        return 1


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


def _over_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
