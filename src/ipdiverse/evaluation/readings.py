"""What the oracle read in a study's images, adapter by adapter: small, and enough for every score.

A study that is published with its readings can be scored again, with other intervals or other
scores, without an image being drawn.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from ipdiverse.base.bases import CRITTERS_ORACLE
from ipdiverse.critters.oracle import Oracle, load_oracle, read
from ipdiverse.critters.scene import ATTRIBUTES, IDENTITY, conditional
from ipdiverse.errors import DataError, ModelError
from ipdiverse.evaluation.sets import Sets
from ipdiverse.evaluation.study import RENAMED
from ipdiverse.writing import write_bytes_atomic

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ipdiverse.evaluation.metrics import Bools, Ints
    from ipdiverse.evaluation.pairs import Pair

FOLDER = "readings"


@dataclass(frozen=True)
class Readings:
    """Attributes that were read in the images of one arm with one of its adapters.

    Args:
        attributes: Index of each attribute's value, (pairs, images, attributes).
        invalid: Images that are not valid scenes, (pairs, images).
        about: What decided them: settings, numbers of the study, hashes of base, adapter and
            oracle.
    """

    attributes: Ints
    invalid: Bools
    about: dict[str, Any]

    def save(self, file: Path) -> None:
        """Write atomically; attributes have few values, so one byte holds each."""
        buffer = BytesIO()
        np.savez_compressed(
            buffer,
            attributes=self.attributes.astype(np.uint8),
            invalid=np.packbits(self.invalid),
            about=np.frombuffer(json.dumps(self.about, sort_keys=True).encode(), np.uint8),
        )
        write_bytes_atomic(file, buffer.getvalue())


def shipped_oracle() -> Oracle:
    """The oracle of the package.

    Raises:
        ModelError: It has not been trained.
    """
    if not CRITTERS_ORACLE.is_file():
        raise ModelError(
            "the oracle is not trained",
            where=CRITTERS_ORACLE,
            fix="Run `make base` in a checkout, or install a released package.",
        )
    return load_oracle(CRITTERS_ORACLE)


def read_images(oracle: Oracle, images: np.ndarray) -> Readings:
    """What an oracle sees in (pairs, images, height, width, 3), uint8."""
    seen, shape = read(oracle, images.reshape(-1, *images.shape[2:])), images.shape[:2]
    attributes = seen.attributes.numpy().reshape(*shape, -1)
    return Readings(attributes, seen.invalid.numpy().reshape(shape), {})


def load_readings(file: Path) -> Readings | None:
    """Saved readings, with settings as they are called now; None where there is no file.

    Raises:
        DataError: The file is broken.
    """
    if not file.is_file():
        return None
    try:
        # published readings may come from anybody: no pickles, and no header that exhausts memory
        with np.load(file, allow_pickle=False, max_header_size=4096) as stored:
            attributes = stored["attributes"].astype(int)
            bits, about = stored["invalid"], json.loads(stored["about"].tobytes())
        invalid = np.unpackbits(bits, count=attributes[..., 0].size).astype(bool)
        shaped = invalid.reshape(attributes.shape[:2])
        for kind in ("settings", "levers"):
            if about.get(kind) is not None:
                about[kind] = {RENAMED.get(name, name): v for name, v in about[kind].items()}
    except Exception as error:  # whatever NumPy and zipfile raise on a broken file
        raise DataError("are not readings", where=file, found=error, fix="Remove it.") from error
    return Readings(attributes, shaped, about)


def concatenated(readings: Sequence[Readings], axis: int = 0) -> Readings:
    """Several readings as one, whose `about` is empty.

    Args:
        readings: At least one.
        axis: 0 for consecutive pairs, 1 for more images of the same pairs.
    """
    attributes = np.concatenate([one.attributes for one in readings], axis)
    return Readings(attributes, np.concatenate([one.invalid for one in readings], axis), {})


def find_readings(folder: Path, arm: str, seed: int) -> Readings | None:
    """Readings of an arm, saved under its name or under the name that it had in 0.1.

    Args:
        folder: Of all of them.
        arm: Its name.
        seed: Which of its adapters, from 0.

    Raises:
        DataError: The file is broken.
    """
    former = arm
    for old, new in RENAMED.items():  # a sweep's arm has the setting in its name
        former = former.replace(f"{new} ", f"{old} ")
    for name in dict.fromkeys((arm, former)):
        if (found := load_readings(readings_file(folder, name, seed))) is not None:
            return found
    return None


def readings_file(folder: Path, arm: str, seed: int) -> Path:
    """Where readings of an arm are saved (arguments as `find_readings`).

    The name is cut down to what a file's may hold; a hash tells arms apart whose names differ in
    the rest.
    """
    kept = "".join(c if c.isascii() and c.isalnum() else " " for c in arm.lower()).split()
    told = hashlib.sha256(arm.encode()).hexdigest()[:6]
    return folder / f"{'-'.join(kept)[:60]}-{told}-{seed}.npz"


def critters_sets(outputs: Ints, invalid: Bools, pairs: Sequence[Pair]) -> Sets:
    """What pairs asked for and what the oracle read, to be scored.

    Args:
        outputs: Values that the oracle read, (pairs, images, attributes).
        invalid: Images that are not valid scenes, (pairs, images).
        pairs: What was asked.
    """
    return Sets(
        outputs,
        invalid,
        references=np.array([pair.reference.indices() for pair in pairs]),
        stated=np.array([[name in pair.stated for name in ATTRIBUTES] for pair in pairs]),
        wanted=np.array([_wanted(pair) for pair in pairs]),
        identity=np.array([name in IDENTITY for name in ATTRIBUTES]),
        n_values=tuple(len(values) for values in ATTRIBUTES.values()),
        priors=[[conditional(name, pair.stated) for name in ATTRIBUTES] for pair in pairs],
    )


def _wanted(pair: Pair) -> list[int]:
    """Index of each stated value; 0 where nothing is stated, which no score reads."""
    return [
        values.index(pair.stated[name]) if name in pair.stated else 0
        for name, values in ATTRIBUTES.items()
    ]
