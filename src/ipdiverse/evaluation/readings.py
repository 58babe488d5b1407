"""What the oracle read in a study's images, adapter by adapter: small, and enough for every number.

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

from ipdiverse.critters.oracle import read
from ipdiverse.errors import DataError
from ipdiverse.writing import write_bytes_atomic

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ipdiverse.critters.oracle import Oracle
    from ipdiverse.evaluation.metrics import Bools, Ints

FOLDER = "readings"


@dataclass(frozen=True)
class Readings:
    """Of one arm with one of its adapters.

    Args:
        attributes: Index of each attribute's value, (pairs, images, attributes).
        invalid: Images that are no valid scene, (pairs, images).
        about: What decided them: settings, numbers of the study, hashes of base, adapter, oracle.
    """

    attributes: Ints
    invalid: Bools
    about: dict[str, Any]

    def save(self, file: Path) -> None:
        """Write atomically; attributes have few values, so a byte holds one."""
        buffer = BytesIO()
        np.savez_compressed(
            buffer,
            attributes=self.attributes.astype(np.uint8),
            invalid=np.packbits(self.invalid),
            about=np.frombuffer(json.dumps(self.about, sort_keys=True).encode(), np.uint8),
        )
        write_bytes_atomic(file, buffer.getvalue())


def read_sets(oracle: Oracle, sets: np.ndarray) -> Readings:
    """What is seen in (pairs, images, height, width, 3), uint8."""
    seen, shape = read(oracle, sets.reshape(-1, *sets.shape[2:])), sets.shape[:2]
    attributes = seen.attributes.numpy().reshape(*shape, -1)
    return Readings(attributes, seen.invalid.numpy().reshape(shape), {})


def load_readings(file: Path) -> Readings | None:
    """Readings that were saved; None where there are none.

    Raises:
        DataError: The file is broken.
    """
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False, max_header_size=4096) as stored:
            attributes = stored["attributes"].astype(int)
            bits, about = stored["invalid"], stored["about"]
        invalid = np.unpackbits(bits, count=attributes[..., 0].size).astype(bool)
        shaped = invalid.reshape(attributes.shape[:2])
        return Readings(attributes, shaped, json.loads(about.tobytes()))
    except Exception as error:  # whatever NumPy and zipfile raise on a broken file
        raise DataError("are no readings", where=file, found=error, fix="Remove it.") from error


def together(read: Sequence[Readings], axis: int = 0) -> Readings:
    """Several as one, which says nothing of what decided them.

    Args:
        read: At least one.
        axis: 0 for pairs that follow each other, 1 for more images of the same pairs.
    """
    attributes = np.concatenate([one.attributes for one in read], axis)
    return Readings(attributes, np.concatenate([one.invalid for one in read], axis), {})


def file_of(folder: Path, arm: str, seed: int) -> Path:
    """Where readings are kept: the arm's name, made fit for a file and told from its likes.

    Args:
        folder: Of all of them.
        arm: Its name.
        seed: Which of its adapters, from 0.
    """
    kept = "".join(c if c.isascii() and c.isalnum() else " " for c in arm.lower()).split()
    told = hashlib.sha256(arm.encode()).hexdigest()[:6]
    return folder / f"{'-'.join(kept)[:60]}-{told}-{seed}.npz"
