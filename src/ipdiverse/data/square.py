"""Make an image square, with or without cutting what is at its edges."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image, ImageFilter

if TYPE_CHECKING:
    from ipdiverse.data.options import Square


def to_square(image: Image.Image, how: Square) -> Image.Image:
    """Make an image square.

    Args:
        image: RGB.
        how: `keep` leaves it alone; `pad` shows all of it, on a blurred copy of itself, so that no
            subject is cut and no hard bar is learnt; `crop` takes the centre.
    """
    width, height = image.size
    if how == "keep" or width == height:
        return image
    if how == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return image.crop((left, top, left + side, top + side))
    side = max(width, height)
    backdrop = image.resize((side, side), Image.Resampling.BICUBIC)
    backdrop = backdrop.filter(ImageFilter.GaussianBlur(side / 16))
    backdrop.paste(image, ((side - width) // 2, (side - height) // 2))
    return backdrop
