"""From a file or bytes to an RGB image. The policies stand in the package's docstring."""

from __future__ import annotations

import hashlib
import io
import os
import warnings

import numpy as np
from PIL import Image, ImageCms

from ipdiverse.errors import ImageError
from ipdiverse.image_io import headers
from ipdiverse.image_io.files import opened
from ipdiverse.image_io.limits import (
    MAX_FILE_BYTES,
    MAX_JPEG_SCANS,
    check_file_bytes,
    check_size,
)

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WIDE_GREY = ("I", "I;16", "I;16B", "I;16L", "I;16N")
_PNG_BIT_DEPTH = 24  # where the header holds it
_WIDE_BITS = 16
_GET_AGAIN = "Download or export it again."


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
        data = file.read(MAX_FILE_BYTES + 1)
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
    """Identify an image by what it shows, whatever file it came from.

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
            fix=_GET_AGAIN,
        ) from error


def _check_header(data: bytes, name: str) -> str:
    check_file_bytes(len(data), name)
    image_format = headers.format_of(data)
    if image_format is None:
        raise ImageError(
            "this is not an image of an accepted format",
            where=name,
            expected="JPEG, PNG or WebP content",
            found=headers.describe(data),
            fix="Convert it to PNG.",
        )
    size = headers.claimed_size(data, image_format)
    if size is None:
        raise ImageError(
            f"the {image_format} image is truncated or corrupt",
            where=name,
            expected="a header with the image's size",
            found="none",
            fix=_GET_AGAIN,
        )
    check_size(size, name)
    _check_scans(data, image_format, name)
    return image_format


def _check_scans(data: bytes, image_format: str, name: str) -> None:
    if image_format != "JPEG" or (scans := headers.jpeg_scan_count(data)) <= MAX_JPEG_SCANS:
        return
    raise ImageError(
        "the JPEG image takes too long to decode",
        where=name,
        expected=f"at most {MAX_JPEG_SCANS} scans",
        found=scans,
        fix="Save it as a plain JPEG or PNG.",
    )


def _warn_if_animated(image: Image.Image, name: str) -> None:
    frames = getattr(image, "n_frames", 1)
    if image.format in {"PNG", "WEBP"} and frames > 1:
        text = f"{name}: the image is animated ({frames} frames); only the first frame is used"
        warnings.warn(text, ImageWarning, stacklevel=4)


def _upright_rgb(image: Image.Image, data: bytes) -> Image.Image:
    image.load()
    orientation = _orientation(image)
    if image.format == "PNG" and data[_PNG_BIT_DEPTH] == _WIDE_BITS:
        _narrow_colour_key(image)
    result = to_rgb(image)
    if orientation in _UPRIGHT:
        result = result.transpose(_UPRIGHT[orientation])
    # `to_rgb` gives back its argument when nothing is to be done; that one closes with the file.
    return result.copy() if result is image else result


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # a broken EXIF block must not cost a good picture
        return 1


def _narrow_colour_key(image: Image.Image) -> None:
    """Pillow narrows the pixels of a 16-bit RGB image but not the colour that is transparent."""
    key = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in key)


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
    profile = image.info.get("icc_profile")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            target = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            converted = None
        if converted is not None:
            return converted
    return image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
