"""Put trained weights into the package, and take them out again to train further."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ipdiverse.base.bases import CRITTERS_BASE, CRITTERS_ORACLE, CRITTERS_PROVENANCE
from ipdiverse.writing import write_text_atomic
from workshop.base.pipeline import (
    assemble,
    continue_from,
    provenance,
    ship_oracle,
    stage_history,
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
    write_text_atomic(CRITTERS_PROVENANCE, json.dumps(made, indent=2) + "\n")
    return CRITTERS_BASE


def record_gates(report: dict[str, Any]) -> None:
    """Write what `check` measured beside the weights that it was measured on."""
    made = json.loads(CRITTERS_PROVENANCE.read_text())
    made["gates"] = {
        key: report[key] for key in ("images", "steps", "guidance", "figures", "gates")
    }
    write_text_atomic(CRITTERS_PROVENANCE, json.dumps(made, indent=2) + "\n")


def start_from_shipped(folder: Path) -> None:
    """Lay out the shipped base as a working folder (`pipeline.continue_from`)."""
    made = json.loads(CRITTERS_PROVENANCE.read_text()) if CRITTERS_PROVENANCE.is_file() else {}
    continue_from(CRITTERS_BASE, CRITTERS_ORACLE, folder, made.get("stages", {}))
