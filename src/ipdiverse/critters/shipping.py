"""Put trained weights into the package, and take them out again to train further."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipdiverse.bases import CRITTERS_BASE, CRITTERS_ORACLE, CRITTERS_PROVENANCE
from ipdiverse.critters.pipeline import (
    assemble,
    continue_from,
    provenance,
    ship_oracle,
    stage_history,
    write_json,
)

if TYPE_CHECKING:
    from pathlib import Path


def ship_base(folder: Path, command: str) -> Path:
    """Write every finished stage of a working folder, and how they were made.

    Args:
        folder: Working folder of `train-base`.
        command: What was typed.

    Returns:
        The diffusers folder in the package.
    """
    CRITTERS_BASE.parent.mkdir(parents=True, exist_ok=True)
    assemble(folder, CRITTERS_BASE)
    ship_oracle(folder, CRITTERS_ORACLE)
    made = {**provenance(command), "stages": stage_history(folder)}
    write_json(CRITTERS_PROVENANCE, made)
    return CRITTERS_BASE


def start_from_shipped(folder: Path) -> None:
    """Lay out the shipped base as a working folder (`pipeline.continue_from`)."""
    continue_from(CRITTERS_BASE, CRITTERS_ORACLE, folder)
