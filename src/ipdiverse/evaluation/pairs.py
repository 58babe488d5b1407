"""Pairs of a prompt and a reference that a study asks for, and what critters answer to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ipdiverse.base.bases import CRITTERS_ORACLE
from ipdiverse.config import decoded
from ipdiverse.critters.oracle import (
    PLACEMENT,
    Oracle,
    Reading,
    load_oracle,
    placement_bins,
    placement_of,
)
from ipdiverse.critters.render import render
from ipdiverse.critters.scene import (
    ATTRIBUTES,
    IDENTITY,
    Scene,
    caption,
    conditional,
    edited,
    sample_scene,
)
from ipdiverse.errors import ArgumentError, DataError, ModelError
from ipdiverse.evaluation.sets import Placement, Sets
from ipdiverse.evaluation.study import Study
from ipdiverse.image_io import load_image
from ipdiverse.image_io.files import OTHER_SUFFIXES, SUFFIXES
from ipdiverse.provenance import derived_seed

MAX_PROMPTS_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Pair:
    """A prompt and a reference of critters, whose every attribute is known."""

    reference: Scene
    stated: dict[str, str]
    """Attributes that the prompt states, with their values."""
    prompt: str
    seed: int
    """Renders the reference."""

    def image(self) -> Image.Image:
        """The rendered reference."""
        return Image.fromarray(render(self.reference, self.seed))


@dataclass(frozen=True)
class FolderPair:
    """A prompt, and the file of a reference."""

    file: Path
    prompt: str


def pairs_of(study: Study) -> tuple[list[Any], list[Image.Image]]:
    """The pairs of a study, `Pair` or `FolderPair`, and the reference image of each."""
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
    With `edits` a prompt also gives one attribute of identity another value than the reference's.
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


def shipped_oracle() -> Oracle:
    """The oracle of the package."""
    if not CRITTERS_ORACLE.is_file():
        raise ModelError(
            "the oracle is not trained",
            where=CRITTERS_ORACLE,
            fix="Run `make base` in a checkout, or install a released package.",
        )
    return load_oracle(CRITTERS_ORACLE)


def critters_sets(seen: Reading, pairs: Sequence[Pair]) -> Sets:
    """What pairs asked for and what the oracle read, (pairs, images) of each, to be scored."""
    where = np.array([placement_of(pair.reference, pair.seed) for pair in pairs])
    return Sets(
        seen.attributes,
        seen.invalid,
        references=np.array([pair.reference.indices() for pair in pairs]),
        stated=np.array([[name in pair.stated for name in ATTRIBUTES] for pair in pairs]),
        # where nothing is stated any value will do, as no score reads it
        wanted=np.array(
            [
                [values.index(pair.stated.get(n, values[0])) for n, values in ATTRIBUTES.items()]
                for pair in pairs
            ]
        ),
        identity=np.array([name in IDENTITY for name in ATTRIBUTES]),
        n_values=tuple(len(values) for values in ATTRIBUTES.values()),
        priors=[[conditional(name, pair.stated) for name in ATTRIBUTES] for pair in pairs],
        names=tuple(ATTRIBUTES),
        placement=None
        if seen.placement is None
        else Placement(seen.placement, placement_bins(where), tuple(PLACEMENT.values())),
    )


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
    """Image files of a folder, by name."""
    # those that are not read too: they are refused by name rather than left out in silence
    kinds = SUFFIXES + OTHER_SUFFIXES
    found = [file for file in listed(folder) if file.suffix.lower() in kinds]
    if not found:
        raise DataError("holds no images", where=folder, expected=", ".join(SUFFIXES))
    return found


def listed(folder: Path) -> list[Path]:
    """Everything in a folder, by name."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError("is not a folder", where=folder) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        raise DataError("cannot be read", where=folder, expected="a folder", found=error) from error


def read_prompts(file: Path) -> list[str]:
    """Prompts, one a line, without empty lines and lines that begin with #.

    The text is UTF-8, or UTF-16 with its byte order mark, as Windows editors save it.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_PROMPTS_BYTES + 1)
        if len(data) > MAX_PROMPTS_BYTES:
            raise DataError("is too large", where=file, expected=f"{MAX_PROMPTS_BYTES} bytes")
        text = decoded(data)
    except (OSError, ValueError) as error:
        raise DataError(
            "cannot be read", where=file, expected="a text file in UTF-8", found=error
        ) from error
    # splitlines() would also split at U+2028 and \x0b, which may be part of a prompt
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n")]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise DataError("holds no prompts", where=file, expected="one a line")
    return prompts
