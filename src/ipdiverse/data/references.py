"""References that are not the target: which image prompts which target, and how it is changed.

With reference = target, reproducing the reference is the optimum, and the adapter learns to copy.
The remedy is a reference that shows the same subject differently: another image of it (`paired`),
or the image itself, changed (`augmented`), if it is the only one.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from ipdiverse.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ipdiverse.data.manifest import Record

Kind = Literal["self", "augmented", "paired"]
KINDS: tuple[Kind, ...] = ("self", "augmented", "paired")


@dataclass(frozen=True)
class Choice:
    """The image prompt of one target."""

    file_name: str
    augment: bool


class References:
    """Chooses a reference for each target."""

    def __init__(self, records: Sequence[Record], weights: Mapping[str, float]) -> None:
        self.records = records
        self.weights = _checked(weights)
        self._partners = _partners(records)
        if set(self.weights) == {"paired"} and not any(self._partners):
            raise DataError(
                "no image has a reference, or another image of its subject",
                where="references",
                expected="subjects with several images for `paired`",
                fix="Take `augmented`, or prepare a folder of subjects.",
            )

    def choose(self, index: int, rng: np.random.Generator) -> Choice:
        """The reference of one target; without a partner, `paired` falls back to `augmented`."""
        kinds = list(self.weights)
        odds = np.array(list(self.weights.values()))
        # by index, as a choice among names would give NumPy's own kind of text
        kind = kinds[int(rng.choice(len(kinds), p=odds / odds.sum()))]
        record = self.records[index]
        if kind == "self":
            return Choice(record.file_name, augment=False)
        partners = self._partners[index]
        if kind == "paired" and partners:
            return Choice(partners[int(rng.integers(len(partners)))], augment=False)
        return Choice(record.file_name, augment=True)

    @property
    def may_augment(self) -> bool:
        """Whether a choice may ask for a changed reference."""
        lonely = "paired" in self.weights and not all(self._partners)
        return "augmented" in self.weights or lonely

    @property
    def paired_share(self) -> float:
        """Share of the images that have a partner."""
        return float(np.mean([bool(partners) for partners in self._partners]))


def parse_references(text: str) -> dict[str, float]:
    """`paired`, or `mixed:paired=0.7,augmented=0.3`, as weights."""
    if text in KINDS:
        return {text: 1.0}
    name, _, parts = text.partition(":")
    pairs = [part.partition("=") for part in parts.split(",")]
    with suppress(ValueError):
        weights = {kind.strip(): float(weight) for kind, _, weight in pairs}
        if name == "mixed":
            return {str(kind): weight for kind, weight in _checked(weights).items()}
    raise ArgumentError(
        "is not a kind of reference",
        where="reference",
        expected="self, augmented, paired or mixed:paired=0.7,augmented=0.3",
        found=repr(text),
    )


def _checked(weights: Mapping[str, float]) -> dict[Kind, float]:
    if unknown := sorted(set(weights) - set(KINDS)):
        raise ArgumentError(
            "is not a kind of reference",
            where="reference",
            expected=", ".join(KINDS),
            found=", ".join(unknown),
        )
    bad = [kind for kind, weight in weights.items() if not 0 <= weight < np.inf]
    if bad or not any(weights.values()):
        what = "needs weights of 0 or more, one of them positive"
        raise ArgumentError(what, where="reference", found=dict(weights))
    return {kind: float(weights[kind]) for kind in KINDS if weights.get(kind)}


def _partners(records: Sequence[Record]) -> list[list[str]]:
    """For each image: its own reference, or else the other images of its subject.

    Pixel copies of the image are left out: copying them is what pairing must not teach.
    """
    by_subject: dict[str, dict[str, str]] = defaultdict(dict)
    for record in records:
        if record.subject is not None:
            by_subject[record.subject].setdefault(record.sha256, record.file_name)
    partners = []
    for record in records:
        others = by_subject.get(record.subject or "", {}).items()
        alike = [file for sha256, file in others if sha256 != record.sha256]
        partners.append(alike if record.reference is None else [record.reference])
    return partners


def augment(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Change an image so that it still shows its subject, but is a poor copy of the target.

    It is cropped, and mirrored in half of the cases; colour, cut-out and background change in half
    of the cases each, and at least one of them always does.
    """
    image = _crop(image, rng)
    image = ImageOps.mirror(image) if rng.random() < 0.5 else image
    changes = (_background, _colour, _cut_out)
    chosen = rng.random(len(changes)) < 0.5
    # an unchanged reference would teach copying
    chosen[rng.integers(len(changes))] = True
    for change, wanted in zip(changes, chosen, strict=True):
        if wanted:
            image = change(image, rng)
    return image


def _crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """70 to 100 % of each side, more often about the middle, scaled back to the full size."""
    width, height = image.size
    share = rng.uniform(0.7, 1.0)
    w, h = max(1, round(share * width)), max(1, round(share * height))
    x, y = (round((full - part) * rng.beta(2, 2)) for full, part in ((width, w), (height, h)))
    return image.resize(image.size, Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))


def _colour(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation; the hue says what a subject is, and stays."""
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(float(rng.uniform(0.75, 1.25)))
    return image


def _cut_out(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """One rectangle of 15 to 35 % of each side becomes grey (arXiv:1708.04552)."""
    width, height = image.size
    w, h = (max(1, round(full * rng.uniform(0.15, 0.35))) for full in image.size)
    x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    changed = image.copy()
    changed.paste((128, 128, 128), (x, y, x + w, y + h))
    return changed


def _background(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Outside an ellipse about the middle: blurred, flat in a random colour, or another crop."""
    width, height = image.size
    ys, xs = np.mgrid[0:height, 0:width]
    distance = ((xs / width - 0.5) / 0.4) ** 2 + ((ys / height - 0.5) / 0.45) ** 2
    # 1 inside the ellipse, 0 outside, with a soft edge that is not a contour to copy
    inner = np.clip((1.15 - distance) / 0.3, 0, 1)
    kind = rng.integers(3)
    if kind == 0:
        behind = image.filter(ImageFilter.GaussianBlur(max(width, height) / 12))
    elif kind == 1:
        behind = Image.new("RGB", image.size, tuple(int(v) for v in rng.integers(0, 256, 3)))
    else:
        behind = ImageOps.flip(_crop(image, rng)).filter(ImageFilter.GaussianBlur(width / 32))
    mask = Image.fromarray((inner * 255).astype(np.uint8))
    return Image.composite(image, behind, mask)
