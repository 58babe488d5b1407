"""One picture of a reference and everything made from it, and labels for plots."""

from __future__ import annotations

import math
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from ipdiverse.errors import ArgumentError, check_range
from ipdiverse.image_io import to_rgb
from ipdiverse.image_io.files import MAX_PIXELS, MAX_SIDE

if TYPE_CHECKING:
    from collections.abc import Sequence

MARGIN = 16
GAP = 12
FRAME = 3
CAPTION_SIZE = 13
TITLE_SIZE = 20
MAX_CAPTION_LINES = 6
MIN_CELL = 48
WELL_FILLED = 0.75
PIXEL_ART_SIDE = 96
"""Smaller images are shown with hard pixels: smoothing would hide details of the model's output."""
LABEL_GAP = 0.045
"""Distance between two labels of a curve, as a fraction of the axis."""

_PAPER, _INK, _MUTED, _ACCENT = "#ffffff", "#1c1c1e", "#55555c", "#c2410c"
_RULE, _MAT = "#d9d9de", "#f2f2f4"
_SUBSTITUTES = {
    0x2013: "-",  # en dash
    0x2014: "-",  # em dash
    0x2018: "'",
    0x201C: '"',
    0x201D: '"',
    0x2212: "-",  # minus
    0x00D7: "x",  # times
}


@dataclass(frozen=True)
class _Block:
    """A picture and the lines of text under it."""

    picture: Image.Image
    lines: list[str]
    is_reference: bool = False

    @property
    def text_height(self) -> int:
        return GAP // 2 + len(self.lines) * _line_height(CAPTION_SIZE) if self.lines else 0


def contact_sheet(
    reference: Image.Image,
    images: Sequence[Image.Image],
    captions: Sequence[str],
    title: str | None = None,
    columns: int | None = None,
    cell: int = 192,
) -> Image.Image:
    """Draw the reference in a frame on the left, and a grid of the outputs on the right.

    Args:
        captions: One for each image; "" for none. Long ones are wrapped, and cut with an ellipsis.
        columns: In the grid; None makes it as square as possible.
    """
    if not images:
        raise ArgumentError("a contact sheet needs at least one image", where="images", found=0)
    if len(images) != len(captions):
        raise ArgumentError(
            "images and captions differ in number",
            where="captions",
            expected=len(images),
            found=len(captions),
            fix='Give "" for an image without a caption.',
        )
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    check_range("columns", columns, 1, MAX_SIDE)
    check_range("cell", cell, MIN_CELL, MAX_SIDE)
    columns = min(columns, len(images))
    width = 2 * MARGIN + cell + 2 * GAP + columns * (cell + GAP)
    pixels = width * math.ceil(len(images) / columns) * (cell + GAP)
    if pixels > MAX_PIXELS:
        raise ArgumentError(
            "the contact sheet would be too large",
            where="cell",
            expected=f"at most {MAX_PIXELS // 10**6} megapixels",
            found=f"{pixels / 10**6:.0f}",
            fix="Use a smaller cell or fewer images.",
        )
    blocks = [
        _Block(_fit(image, cell), _wrap(caption, CAPTION_SIZE, cell, MAX_CAPTION_LINES))
        for image, caption in zip(images, captions, strict=True)
    ]
    rows = [blocks[start : start + columns] for start in range(0, len(blocks), columns)]
    heading = _wrap(title or "", TITLE_SIZE, width - 2 * MARGIN, MAX_CAPTION_LINES)
    return _draw(_Block(_fit(reference, cell), ["reference"], True), rows, heading, width, cell)


def _draw(
    reference: _Block, rows: list[list[_Block]], heading: list[str], width: int, cell: int
) -> Image.Image:
    top = MARGIN + (len(heading) * _line_height(TITLE_SIZE) + GAP if heading else 0)
    heights = [cell + max(block.text_height for block in row) for row in rows]
    body = max(sum(heights) + GAP * (len(rows) - 1), cell + reference.text_height)
    sheet = Image.new("RGB", (width, top + body + MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, heading, (MARGIN, MARGIN), TITLE_SIZE, _INK)
    _place(sheet, draw, reference, (MARGIN, top), cell)
    rule = MARGIN + cell + GAP + GAP // 2
    draw.line([(rule, top), (rule, top + body - 1)], fill=_RULE)
    for row, height in zip(rows, heights, strict=True):
        for column, block in enumerate(row):
            left = MARGIN + cell + 3 * GAP + column * (cell + GAP)
            _place(sheet, draw, block, (left, top), cell)
        top += height + GAP
    return sheet


def _place(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, block: _Block, corner: tuple[int, int], cell: int
) -> None:
    left, top = corner
    right, bottom = left + cell - 1, top + cell - 1
    draw.rectangle((left, top, right, bottom), fill=_MAT)
    picture = block.picture
    sheet.paste(picture, (left + (cell - picture.width) // 2, top + (cell - picture.height) // 2))
    if block.is_reference:
        box = (left - FRAME, top - FRAME, right + FRAME, bottom + FRAME)
        draw.rectangle(box, outline=_ACCENT, width=FRAME)
    colour = _ACCENT if block.is_reference else _MUTED
    _write(draw, block.lines, (left, top + cell + GAP // 2), CAPTION_SIZE, colour)


def _write(
    draw: ImageDraw.ImageDraw, lines: list[str], corner: tuple[int, int], size: int, colour: str
) -> None:
    for number, line in enumerate(lines):
        position = (corner[0], corner[1] + number * _line_height(size))
        draw.text(position, line, font=_font(size), fill=colour)


def _fit(image: Image.Image, cell: int) -> Image.Image:
    """Scale to fit the cell, keeping proportions; small ones by whole pixels if that fills it."""
    longest = max(image.size)
    factor = cell // longest
    if longest < PIXEL_ART_SIDE and factor * longest >= WELL_FILLED * cell:
        size = (image.width * factor, image.height * factor)
        return to_rgb(image).resize(size, Image.Resampling.NEAREST)
    # at least a pixel: a picture may be a thousand times as long as it is high
    width, height = (max(1, round(side * cell / longest)) for side in image.size)
    return to_rgb(image).resize((width, height), Image.Resampling.LANCZOS)


def _wrap(text: str, size: int, width: int, limit: int) -> list[str]:
    """Break text into at most `limit` lines that fit; a word longer than a line is broken too.

    Not Pillow's `ImageText.wrap`: it needs Pillow 12 and refuses words longer than a line.
    """
    lines: list[str] = []
    # No character is narrower than a pixel, so this much text fills the lines that are kept.
    for paragraph in _drawable(text[: limit * width]).splitlines():
        lines.append("")
        for word in paragraph.split():
            joined = f"{lines[-1]} {word}".strip()
            if _font(size).getlength(joined) <= width:
                lines[-1] = joined
                continue
            lines += [""] if lines[-1] else []
            for character in word:  # a word longer than a line is cut where it is full
                if lines[-1] and _font(size).getlength(lines[-1] + character) > width:
                    lines.append("")
                lines[-1] += character
    while lines and not lines[-1]:
        lines.pop()
    if len(lines) <= limit:
        return lines
    last = lines[limit - 1]
    while last and _font(size).getlength(f"{last}…") > width:
        last = last[:-1]
    return [*lines[: limit - 1], f"{last.rstrip()}…"]


def _drawable(text: str) -> str:
    """Replace characters that Pillow's font lacks by ASCII; other scripts are drawn as boxes."""
    text = unicodedata.normalize("NFKD", text.translate(_SUBSTITUTES))
    return "".join(character for character in text if not unicodedata.combining(character))


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _line_height(size: int) -> int:
    return round(size * 1.3)


def labelled_points(values: Sequence[float]) -> list[int]:
    """Indices of rising values whose labels do not touch, the first and the last among them."""
    if len(values) < 2:
        return list(range(len(values)))
    gap, kept = LABEL_GAP * (values[-1] - values[0]), [0]
    for index, value in enumerate(values[:-1]):
        if value - values[kept[-1]] >= gap and values[-1] - value >= gap:
            kept.append(index)
    return [*kept, len(values) - 1]
