"""The largest and smallest image that is accepted, and the checks that say so."""

from __future__ import annotations

from ipdiverse.errors import ImageError

MAX_FILE_BYTES = 64 * 1024 * 1024
MAX_PIXELS = 40_000_000
MIN_SIDE = 16
MAX_SIDE = 16384
MAX_JPEG_SCANS = 100
"""Ordinary progressive files have about ten."""


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
            fix="Download or export it again.",
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
