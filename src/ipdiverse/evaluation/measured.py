"""What a study found: arms with their scores, and the whole."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ipdiverse.evaluation.bootstrap import interval, js_interval, leak_interval

if TYPE_CHECKING:
    from PIL import Image

    from ipdiverse.evaluation.sets import Parts, Sets
    from ipdiverse.evaluation.study import Arm


SHOWN_PAIRS, SHOWN_IMAGES = 3, 8
"""How many images of an arm a report shows, and how many are held for it."""


@dataclass(frozen=True)
class Measured:
    """An arm with its scores.

    Args:
        arm: What was measured.
        runs: For each training seed the parts of every score.
        images: For the report, (`SHOWN_PAIRS`, `SHOWN_IMAGES`, height, width, 3) or fewer; None
            where only what was read in them is known.
        sets: What was asked and read, the images of all seeds of a pair together; None where the
            world is not known.
    """

    arm: Arm
    runs: list[dict[str, Parts]]
    images: np.ndarray | None
    sets: Sets | None = None

    @cached_property
    def leak(self) -> tuple[float, float, float] | None:
        """In nats with its interval, where the world is known."""
        return None if self.sets is None else leak_interval(self.sets)

    @cached_property
    def js(self) -> tuple[float, float, float] | None:
        """Distance from the world's own scenes with its interval, where the world is known."""
        return None if self.sets is None else js_interval(self.sets)

    def parts(self, name: str) -> list[Parts]:
        """One score of every training seed."""
        return [run[name] for run in self.runs]

    def row(self) -> dict[str, Any]:
        """For JSON: each score with its interval."""
        scores = {name: _rounded(interval(self.parts(name))) for name in self.runs[0]}
        for name, found in (("leak", self.leak), ("js", self.js)):
            if found is not None:
                scores[name] = _rounded(found)
        about = {"name": self.arm.name, "family": self.arm.family, "at": self.arm.at}
        return {**about, "settings": self.arm.settings, "seeds": len(self.runs), "scores": scores}


@dataclass(frozen=True)
class Done:
    """A finished study.

    Args:
        measured: Every arm, anchors last.
        references: Of every pair.
        hypervolumes: As `report.volumes` gives them.
        left_out: Arms that were neither drawn nor read.
    """

    measured: list[Measured]
    references: list[Image.Image]
    hypervolumes: list[dict[str, Any]]
    left_out: list[str]


def _rounded(found: tuple[float, float, float]) -> list[float | None]:
    """Estimate, low and high with four digits; None, which JSON knows, for what is not known."""
    return [None if np.isnan(value) else round(float(value), 4) for value in found]
