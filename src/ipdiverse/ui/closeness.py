"""How close images are to the reference and to the prompt, in words and as a small plot.

A cosine tells a reader nothing, and every encoder has its own scale of them. So closeness to the
reference is told in bands, and closeness to the prompt as a rank: how many of other texts fit the
image less well.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from ipdiverse.base.bases import CRITTERS
from ipdiverse.evaluation.features import COPY, FeatureEncoder
from ipdiverse.sampling.selection import joint_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from ipdiverse.adapter.attach.attach import Attachment
    from ipdiverse.sampling.request import Request


@dataclass(frozen=True)
class Bands:
    """Cosines of an encoder from which images are related, close, and copies.

    Args:
        related: The same kind of subject.
        close: Other pictures of the same subject are seldom so close.
        copy: Two drawings of the very same scene.
        narrow: Mean cosine over the pairs of a set above which its images are alike.
    """

    related: float
    close: float
    copy: float
    narrow: float


CRITTER_BANDS = Bands(related=0.25, close=0.66, copy=0.85, narrow=0.66)
"""Measured on 96 rendered pairs: other critters reach 0.40 in 95 of 100 cases; the same critter in
another scene lies between 0.27 and 0.66 in 90; the same scene drawn again is above 0.84 in 95."""
BANDS = Bands(related=0.6, close=0.75, copy=COPY, narrow=0.85)
"""For CLIP image encoders of other bases; rough."""

SHOWN, PARTLY = 0.93, 0.8
"""An image shows the prompt, or part of it, if so many of the other texts fit it less well.
Rendered critters that show a one-attribute prompt reach 0.94 and more, others 0.56 to 0.91."""

_COPY, _CLOSE, _RELATED, _FAR = (
    *("almost a copy of the reference", "close to the reference"),
    *("related to the reference", "unlike the reference"),
)
_OTHER_TEXTS = tuple(
    f"{what} {where}"
    for what in ("a dog", "a portrait of a woman", "a red car", "a house", "flowers", "a city")
    for where in ("in the snow", "at the beach", "at night", "as an oil painting", "on a table")
)


@dataclass(frozen=True)
class Closeness:
    """What an encoder sees in a set.

    Args:
        reference: Each image's cosine to the nearest reference.
        prompt: Share of other texts that fit each image less well; None without a prompt, or
            without an encoder of text.
        alike: Mean cosine over all pairs; None for a single image.
        bands: Of the encoder.
    """

    reference: tuple[float, ...]
    prompt: tuple[float, ...] | None
    alike: float | None
    bands: Bands

    @property
    def narrow(self) -> bool:
        """Whether the images are much alike."""
        return self.alike is not None and self.alike > self.bands.narrow

    def words(self, number: int) -> str:
        """Image `number`, as in `close to the reference; shows the prompt`."""
        said = reference_words(self.reference[number], self.bands)
        return said if self.prompt is None else f"{said}; {prompt_words(self.prompt[number])}"

    def summary(self) -> str:
        """All of them, in two or three sentences."""
        told = [reference_words(value, self.bands) for value in self.reference]
        parts = [_counted(told)]
        if self.prompt is not None:
            parts.append(_counted([prompt_words(value) for value in self.prompt]))
        if self.alike is not None:
            parts.append(f"The images are {'much alike' if self.narrow else 'varied'}.")
        return " ".join(parts)


def reference_words(value: float, bands: Bands) -> str:
    """A cosine to the reference, for people."""
    for least, words in ((bands.copy, _COPY), (bands.close, _CLOSE), (bands.related, _RELATED)):
        if value >= least:
            return words
    return _FAR


def prompt_words(share: float) -> str:
    """A share of other texts, for people."""
    if share >= SHOWN:
        return "shows the prompt"
    return "shows part of the prompt" if share >= PARTLY else "hardly shows the prompt"


def judged(
    attachment: Attachment,
    images: Sequence[Image.Image],
    references: Sequence[Image.Image],
    request: Request,
) -> Closeness | None:
    """Compare images, with the image encoder that the adapter reads.

    Returns:
        None where the adapter reads no images, or its encoder has no projection to compare by.
    """
    encoder = attachment.image_encoder
    if encoder is None or not hasattr(encoder, "visual_projection") or not references:
        return None
    sees = FeatureEncoder("base", encoder, attachment.image_processor)
    seen = sees.images(images)
    near = (seen @ sees.images(references).T).max(1)
    embedded = request.base == CRITTERS
    pairs = (seen @ seen.T)[np.triu_indices(len(seen), 1)]
    return Closeness(
        reference=tuple(map(float, near)),
        prompt=_shares(attachment.pipe, seen, request.prompt[0], embedded),
        alike=float(pairs.mean()) if len(pairs) else None,
        bands=CRITTER_BANDS if embedded else BANDS,
    )


def _shares(pipe: Any, seen: np.ndarray, prompt: str, embedded: bool) -> tuple[float, ...] | None:
    import torch

    if not prompt.strip():
        return None
    others = _captions() if embedded else _OTHER_TEXTS
    with torch.no_grad():
        read = joint_text(pipe, [prompt, *others], seen.shape[1])
    if read is None:
        return None
    texts = torch.nn.functional.normalize(read, dim=1).cpu().numpy()
    fits = seen @ texts.T
    return tuple(map(float, (fits[:, 1:] < fits[:, :1]).mean(1)))


@lru_cache(1)
def _captions() -> tuple[str, ...]:
    """Captions of other pictures of the embedded world."""
    from ipdiverse.critters.make import example

    return tuple(example(index, 0, "train").text for index in range(96))


def _counted(words: Sequence[str]) -> str:
    """As `All 4 show the prompt.` or `3 are close to the reference, 1 is almost a copy of it.`."""
    found = Counter(words).most_common()
    if len(found) == 1:
        return f"{'It' if len(words) == 1 else f'All {len(words)}'} {_said(*found[0])}."
    return ", ".join(f"{count} {_said(text, count)}" for text, count in found) + "."


def _said(text: str, count: int) -> str:
    """With its verb, in singular or plural."""
    if "shows" in text:
        return text if count == 1 else text.replace("shows", "show")
    return f"{'is' if count == 1 else 'are'} {text}"


_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 340, 220, 58, 14, 44


def plot(closeness: Closeness) -> str:
    """An SVG: a numbered dot for each image, reference across and prompt upwards."""
    bands = closeness.bands
    right, floor = _WIDTH - 12, _HEIGHT - _BOTTOM
    words = "; ".join(
        f"image {number + 1} {closeness.words(number)}"
        for number in range(len(closeness.reference))
    )

    def across(value: float) -> float:
        return _LEFT + (right - _LEFT) * min(max(value, 0.0), 1.0)

    def upwards(share: float) -> float:
        return floor - (floor - _TOP - 8) * share

    edges = ((bands.related, "related"), (bands.close, "close"), (bands.copy, "copy"))
    lines = "".join(
        f'<line class="edge" x1="{across(at):.1f}" x2="{across(at):.1f}" y1="{_TOP}" y2="{floor}"/>'
        f'<text x="{across(at) + 2:.1f}" y="{floor + 14}">{name}</text>'
        for at, name in edges
    )
    shares = closeness.prompt or [0.5] * len(closeness.reference)
    dots = "".join(
        f'<circle cx="{across(near):.1f}" cy="{upwards(share):.1f}" r="9"/>'
        f'<text class="number" x="{across(near):.1f}" y="{upwards(share) + 4:.1f}">{n}</text>'
        for n, (near, share) in enumerate(zip(closeness.reference, shares, strict=True), 1)
    )
    if closeness.prompt is not None:
        lines += (
            f'<text class="upwards" x="{-(floor + _TOP) / 2:.0f}" y="16">shows the prompt →</text>'
        )
    return (
        f'<svg class="closeness" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(words)}">'
        f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{floor}" y2="{floor}"/>'
        f'<line class="axis" x1="{_LEFT}" x2="{_LEFT}" y1="{_TOP}" y2="{floor}"/>{lines}{dots}'
        f'<text class="across" x="{(_LEFT + right) / 2:.0f}" y="{_HEIGHT - 8}">'
        "like the reference →</text></svg>"
    )
