"""What a study asks for: pairs of a prompt and a reference, drawn from critters or from folders."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ipdiverse.critters.caption import caption
from ipdiverse.critters.render import render
from ipdiverse.critters.scene import ATTRIBUTES, IDENTITY, Scene, edited, sample_scene
from ipdiverse.errors import ArgumentError, DataError
from ipdiverse.image_io import load_image
from ipdiverse.seeding import derived_seed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ipdiverse.evaluation.study import Study

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Pair:
    """A prompt and a reference of critters, whose every attribute is known.

    Args:
        reference: The reference's scene.
        stated: The attributes that the prompt states, with their values.
        prompt: The same in words.
        seed: Seed that renders the reference.
    """

    reference: Scene
    stated: dict[str, str]
    prompt: str
    seed: int

    def image(self) -> Image.Image:
        """The rendered reference."""
        return Image.fromarray(render(self.reference, self.seed))


@dataclass(frozen=True)
class FolderPair:
    """A prompt and a reference of the user's.

    Args:
        file: The reference.
        prompt: The text.
    """

    file: Path
    prompt: str


def pairs_of(study: Study) -> tuple[list[Any], list[Image.Image]]:
    """The pairs of a study, `Pair` or `FolderPair`, and the reference image of each.

    Raises:
        DataError: A folder, or a file of prompts, cannot be used.
        ImageError: A reference cannot be read.
        ArgumentError: There are fewer than two pairs.
    """
    if study.references is None:
        drawn = study_pairs(study.pairs, study.seed, study.split, study.edits)
        return drawn, [pair.image() for pair in drawn]
    prompts = Path(study.prompts) if study.prompts else None
    found = folder_pairs(Path(study.references), prompts, study.pairs)
    if len(found) < 2:
        raise ArgumentError(
            "gives too few pairs of a prompt and a reference",
            where="study",
            expected="2 or more",
            found=len(found),
        )
    return found, open_references(found)


def study_pairs(count: int, seed: int, split: str = "test", edits: bool = False) -> list[Pair]:
    """Pairs on critters: the prompt states one or two scene attributes.

    Prompts are drawn from the prior, independently of the reference, so some agree with it and most
    contradict it. Identity is left to the reference, and at least two scene attributes stay open.

    Args:
        count: How many.
        seed: Of the draw.
        split: Which identities to take: `train`, `validation` or `test`.
        edits: The prompt also states one attribute of identity, with another value than the
            reference's.
    """
    rng = np.random.default_rng(derived_seed("pairs", seed))
    pairs = []
    for _ in range(count):
        reference, wanted = sample_scene(rng, split=split), sample_scene(rng).as_dict()
        names = rng.choice([n for n in ATTRIBUTES if n not in IDENTITY], rng.integers(1, 3), False)
        stated = {str(name): wanted[str(name)] for name in names}
        if edits:
            name, changed = edited(reference, rng)
            stated |= {name: getattr(changed, name)}
        words = caption(stated, int(rng.integers(2**31)))
        pairs.append(Pair(reference, stated, words, int(rng.integers(2**31))))
    return pairs


def held_out_scenes(count: int, seed: int) -> list[tuple[Scene, int]]:
    """Scenes of the test split, and the seeds that render them."""
    rng = np.random.default_rng(derived_seed("held out", seed))
    return [(sample_scene(rng, split="test"), int(rng.integers(2**31))) for _ in range(count)]


def folder_pairs(references: Path, prompts: Path | None, count: int) -> list[FolderPair]:
    """Every reference with every prompt, all references of a prompt first, at most `count`."""
    texts = read_prompts(prompts) if prompts else [""]
    crossed = ((file, text) for text, file in product(texts, pictures(references)))
    return [FolderPair(file, text) for file, text in islice(crossed, count)]


def open_references(pairs: Sequence[FolderPair]) -> list[Image.Image]:
    """The reference of each pair; a file that several pairs share is opened once."""
    images = {file: load_image(file) for file in dict.fromkeys(pair.file for pair in pairs)}
    return [images[pair.file] for pair in pairs]


def pictures(folder: Path) -> list[Path]:
    """Image files of a folder, by name.

    Raises:
        DataError: The folder does not exist, or has no image in it.
    """
    if not folder.is_dir():
        raise DataError("is not a folder", where=folder)
    found = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if not found:
        raise DataError("holds no images", where=folder, expected=", ".join(SUFFIXES))
    return found


def read_prompts(file: Path) -> list[str]:
    """Prompts, one a line, without empty lines and lines that begin with #.

    Raises:
        DataError: The file cannot be read, or holds no prompts.
    """
    try:
        # splitlines() would also split at U+2028 and \x0b, which may be part of a prompt
        lines = [line.strip() for line in file.read_text("utf-8").split("\n")]
    except (OSError, UnicodeError) as error:
        raise DataError("cannot be read", where=file, expected="a text file") from error
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise DataError("holds no prompts", where=file, expected="one a line")
    return prompts
