"""Folders of references, prompts and images that any tool made, as pairs to measure on."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING

from ipdiverse.errors import ArgumentError, DataError
from ipdiverse.evaluation.features import FeatureEncoder, feature_parts
from ipdiverse.image_io import load_image

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from ipdiverse.evaluation.sets import Parts

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class FolderPair:
    """A reference and a prompt.

    Args:
        file: The reference.
        prompt: The text.
    """

    file: Path
    prompt: str

    def image(self) -> Image.Image:
        """The reference, opened."""
        return load_image(self.file)


def pictures(folder: Path) -> list[Path]:
    """Image files of a folder, by name.

    Raises:
        DataError: There is no such folder, or nothing in it.
    """
    if not folder.is_dir():
        raise DataError("is no folder", where=folder)
    found = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if not found:
        raise DataError("holds no images", where=folder, expected=", ".join(SUFFIXES))
    return found


def read_prompts(file: Path) -> list[str]:
    """Prompts, one a line; empty lines and those that begin with # are left out.

    Raises:
        DataError: The file cannot be read or has none.
    """
    try:
        lines = [line.strip() for line in file.read_text("utf-8").split("\n")]
    except (OSError, UnicodeError) as error:
        raise DataError("cannot be read", where=file, expected="a text file") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise DataError("holds no prompts", where=file, expected="one a line")
    return prompts


def folder_pairs(references: Path, prompts: Path | None, count: int) -> list[FolderPair]:
    """Every reference with every prompt, references first, at most `count`."""
    texts = read_prompts(prompts) if prompts else [""]
    crossed = ((file, text) for text, file in product(texts, pictures(references)))
    return [FolderPair(file, text) for file, text in islice(crossed, count)]


def opened(pairs: Sequence[FolderPair]) -> list[Image.Image]:
    """The reference of each pair; a file that several share is opened once."""
    known = {pair.file: pair for pair in pairs}
    images = {file: pair.image() for file, pair in known.items()}
    return [images[pair.file] for pair in pairs]


@dataclass(frozen=True)
class MadeSet:
    """Images that a tool made from one reference and prompt."""

    pair: FolderPair
    files: tuple[Path, ...]


def made_sets(images: Path, references: Path, prompts: Path | None) -> list[MadeSet]:
    """Match images to references and prompts by the names of folders.

    `IMAGES/STEM/*.png` are made from the reference STEM; `IMAGES/STEM--2/*.png` with the second
    prompt. With one prompt for all, or one for each reference in order, no number is needed.

    Raises:
        DataError: A folder names no reference or prompt, or holds fewer than two images.
    """
    known = {file.stem: file for file in pictures(references)}
    texts = read_prompts(prompts) if prompts else [""]
    if not images.is_dir():
        raise DataError("is no folder", where=images)
    sets = []
    for folder in sorted(path for path in images.iterdir() if path.is_dir()):
        stem, dashes, number = folder.name.rpartition("--")
        if not dashes or not number.isdigit():
            stem, number = folder.name, ""
        if stem not in known:
            raise DataError(
                "names no reference",
                where=folder,
                expected=f"STEM or STEM--NUMBER, STEM a file of {references.name}",
            )
        files = tuple(pictures(folder))
        if len(files) < 2:
            raise DataError("holds too few images", where=folder, expected="2 or more", found=1)
        sets.append(MadeSet(FolderPair(known[stem], _text(texts, number, stem, known)), files))
    if not sets:
        raise DataError("holds no sets", where=images, expected="a folder for each reference")
    return sets


def _text(texts: list[str], number: str, stem: str, known: dict[str, Path]) -> str:
    if number:
        if not 1 <= int(number) <= len(texts):
            raise DataError(
                "names no prompt", where=f"{stem}--{number}", expected=f"1 to {len(texts)}"
            )
        return texts[int(number) - 1]
    if len(texts) == 1:
        return texts[0]
    if len(texts) == len(known):
        return texts[sorted(known).index(stem)]
    raise DataError(
        "has several prompts to choose from",
        where=stem,
        fix=f"Call the folder {stem}--1 to {stem}--{len(texts)}.",
    )


def score_made(sets: Sequence[MadeSet], encoders: Sequence[FeatureEncoder]) -> dict[str, Parts]:
    """Every encoder's scores of sets that a tool made.

    Raises:
        ImageError: An image cannot be read.
        ArgumentError: There are no encoders.
    """
    if not encoders:
        raise ArgumentError("are missing", where="features", fix="Name one: --features dino.")
    references = opened([one.pair for one in sets])
    prompts = [one.pair.prompt for one in sets]
    parts: dict[str, Parts] = {}
    for encoder in encoders:  # one set is held at a time
        images = ([load_image(file) for file in one.files] for one in sets)
        parts |= feature_parts(encoder, images, references, prompts)
    return parts
