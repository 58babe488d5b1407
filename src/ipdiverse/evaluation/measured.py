"""What a study found: arms with their scores, the areas of families, and how straight dials are."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ipdiverse.evaluation import bootstrap
from ipdiverse.evaluation.sets import RETENTION_OF, PairSums, Sets, placement_leaked
from ipdiverse.evaluation.study import Arm, Study

SHOWN_PAIRS, SHOWN_IMAGES = 3, 8
"""How many pairs of an arm a report shows, and how many images of each."""
LABELS: dict[str, str] = tomllib.loads(Path(__file__).with_name("labels.toml").read_text("utf-8"))
WORST = "retention_worst"
NOT_SUMS = ("leak", "placement_leak", "js")
"""Scores that `Measured` computes from all pairs at once."""


@dataclass(frozen=True)
class Measured:
    """An arm with its scores.

    Args:
        arm: What was measured.
        runs: For each training seed the sums of every score.
        images: For the report, (`SHOWN_PAIRS`, `SHOWN_IMAGES`, height, width, 3) or fewer; None
            where only readings are known.
        sets: What was asked and read, with the images of all seeds of a pair together; None for
            references that are not critters.
    """

    arm: Arm
    runs: list[dict[str, PairSums]]
    images: np.ndarray | None
    sets: Sets | None = None

    @cached_property
    def leak(self) -> tuple[float, float, float] | None:
        """In nats with its interval, on critters."""
        return None if self.sets is None else bootstrap.leak_interval(self.sets)

    @cached_property
    def js(self) -> tuple[float, float, float] | None:
        """Distance from the world's own scenes with its interval, on critters."""
        return None if self.sets is None else bootstrap.js_interval(self.sets)

    @cached_property
    def placement_leak(self) -> tuple[float, float, float] | None:
        """In nats with its interval, where placement was read."""
        if self.sets is None or self.sets.placement is None:
            return None
        return bootstrap.leak_interval(self.sets, of=placement_leaked)

    @cached_property
    def worst(self) -> str | None:
        """The score of the identity attribute that is kept least, if attributes are known."""
        names = [name for name in self.runs[0] if name.startswith(RETENTION_OF)]
        return min(names, key=lambda name: bootstrap.estimate(self.sums(name)), default=None)

    @property
    def names(self) -> list[str]:
        """Scores for tables: with the worst attribute of identity, and not with each."""
        shown = [name for name in self.runs[0] if not name.startswith(RETENTION_OF)]
        if self.worst is not None:
            shown.insert(shown.index("retention") + 1, WORST)
        return shown

    def sums(self, name: str) -> list[PairSums]:
        """One score of every training seed."""
        name = self.worst or name if name == WORST else name
        return [run[name] for run in self.runs]

    def row(self) -> dict[str, Any]:
        """For JSON: each score with its interval."""
        scores: dict[str, Any] = {n: bootstrap.interval(self.sums(n)) for n in self.runs[0]}
        whole = {name: getattr(self, name) for name in NOT_SUMS}
        scores |= {name: found for name, found in whole.items() if found is not None}
        if self.worst is not None:
            scores[WORST] = scores[self.worst]
        about = {name: getattr(self.arm, name) for name in ("name", "family", "at", "settings")}
        return about | {"seeds": len(self.runs), "scores": rounded(scores)}


@dataclass(frozen=True)
class Done:
    """A finished study."""

    measured: list[Measured]
    """Anchors last."""
    references: list[Image.Image]
    hypervolumes: list[dict[str, Any]]
    left_out: list[str]
    """Arms that were neither drawn nor read."""


@dataclass(frozen=True)
class DialCheck:
    """Whether a dial does what it promises.

    Args:
        family: Its arms.
        settings: Of the dial, rising from 0.
        variety: Achieved at each of them.
        r_squared: Share of variety's variance over the settings that a straight line explains.
        r_squared_low: The lower end of its 95 % interval over pairs.
        kept: The least share of the retention at 0 that any setting keeps.
        accuracy_change: The worst change of prompt accuracy against 0, with its 95 % interval.
    """

    family: str
    settings: tuple[float, ...]
    variety: tuple[float, ...]
    r_squared: float
    r_squared_low: float
    kept: float
    accuracy_change: tuple[float, float, float] | None


def axes_of(measured: Sequence[Measured]) -> list[tuple[str, str]]:
    """Which scores are set against each other: (variety, fidelity), the main pair first."""
    names = [name for name in measured[0].names if all(name in one.names for one in measured)]
    if "entropy" in names:
        against = ("retention", WORST, "prompt_accuracy", "asked_for")
        return [("entropy", name) for name in against if name in names]
    pairs = []  # each encoder's own variety and fidelity, as encoders disagree on scale
    for name in names:
        kind, _, encoder = name.partition(" ")
        if kind in ("image", "text"):
            pairs.append((f"vendi {encoder}", name))
    return pairs


def by_family(measured: Iterable[Measured]) -> dict[str, list[Measured]]:
    """Arms of each family, in their order."""
    families: dict[str, list[Measured]] = {}
    for one in measured:
        families.setdefault(one.arm.family, []).append(one)
    return families


def hypervolumes(study: Study, measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Hypervolume of each family over each pair of axes, and its excess over the baseline's family.

    The corner is fixed, so that areas can be compared between studies: 0 on every axis, and 1 for a
    Vendi score, which is that of equal images.
    """
    families = by_family(one for one in measured if one.arm.family != "anchor")
    found = []
    for across, up in axes_of(measured):
        corner = (1.0 if across.startswith("vendi") else 0.0, 0.0)
        areas = {
            name: bootstrap.hypervolume(
                [(one.sums(across), one.sums(up)) for one in members], corner
            )
            for name, members in families.items()
        }
        base, base_drawn = areas[study.baseline_arm.family]
        # areas of one draw of pairs are compared, as `difference` does with scores
        for name, (area, drawn) in areas.items():
            low, high = np.quantile(drawn - base_drawn, [0.025, 0.975])
            row = {"axes": [across, up], "family": name, "area": area, "more": area - base}
            found.append(row | {"more_low": float(low), "more_high": float(high)})
    return rounded(found)


def check_dials(measured: Sequence[Measured]) -> list[DialCheck]:
    """Check every family whose arms set only `diversity`: 0 and at least two other settings."""
    turned = (one for one in measured if "diversity" in one.arm.settings)
    alone = (one for one in turned if set(one.arm.settings) <= {"adapter", "diversity"})
    found = []
    for family, arms in by_family(alone).items():
        arms.sort(key=lambda one: one.arm.settings["diversity"])
        settings = np.array([one.arm.settings["diversity"] for one in arms], float)
        if len(arms) < 3 or settings[0] != 0:
            continue
        variety, fidelity = axes_of(arms)[0]
        reached = np.array([bootstrap.estimate(one.sums(variety)) for one in arms])
        # one draw of pairs for all settings: what pairs have in common does not bend the line
        drawn = np.stack([bootstrap.resampled(one.sums(variety)) for one in arms])
        low = np.quantile([straightness(settings, draw) for draw in drawn.T], 0.025)
        kept = [bootstrap.estimate(one.sums(fidelity)) for one in arms]
        points = tuple(settings.tolist()), tuple(reached.tolist())
        least, change = min(kept) / kept[0], _worst_change(arms)
        found.append(
            DialCheck(family, *points, straightness(settings, reached), float(low), least, change)
        )
    return found


def straightness(settings: np.ndarray, reached: np.ndarray) -> float:
    """R² of a straight line through the variety reached at settings; 0 where it does not change."""
    if np.ptp(reached) < 1e-9:
        return 0.0
    return float(np.corrcoef(settings, reached)[0, 1] ** 2)


def _worst_change(arms: Sequence[Measured]) -> tuple[float, float, float] | None:
    """Of prompt accuracy, from the first arm to another; None where no score reads the prompt."""
    names = arms[0].runs[0]
    obeyed = next((n for n in names if n == "prompt_accuracy" or n.startswith("text ")), None)
    if obeyed is None:
        return None
    changes = [bootstrap.difference(one.sums(obeyed), arms[0].sums(obeyed)) for one in arms[1:]]
    least = min(changes, key=lambda change: change.estimate)
    return (least.estimate, least.low, least.high)


def rounded(value: Any) -> Any:
    """Numbers to four digits, for JSON; None, which it knows, in place of NaN."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(one) for one in value]
    if not isinstance(value, float):
        return value
    return None if np.isnan(value) else round(float(value), 4)
