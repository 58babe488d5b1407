"""Whether a dial does what it promises: what was achieved at each setting of a family of arms."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from ipdiverse.evaluation.bootstrap import difference, estimate, resampled
from ipdiverse.evaluation.sets import Parts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ipdiverse.evaluation.measured import Measured


@dataclass(frozen=True)
class DialCheck:
    """Of one dial.

    Args:
        family: Its arms.
        settings: Of the dial, rising from 0.
        variety: Achieved at each of them.
        r_squared: Share of variety's spread over the settings that a straight line explains.
        r_squared_low: The lower end of its 95 % interval over pairs.
        kept: Of the retention at 0, the least share that any setting keeps.
        accuracy_change: Of prompt accuracy against 0, the worst over the settings, with the 95 %
            interval of that setting's difference.
    """

    family: str
    settings: tuple[float, ...]
    variety: tuple[float, ...]
    r_squared: float
    r_squared_low: float
    kept: float
    accuracy_change: tuple[float, float, float] | None

    def as_json(self) -> dict[str, Any]:
        """Rounded, for results."""
        worst = self.accuracy_change
        return {
            "family": self.family,
            "settings": list(self.settings),
            "variety": [round(v, 4) for v in self.variety],
            "r_squared": round(self.r_squared, 4),
            "r_squared_low": round(self.r_squared_low, 4),
            "kept": round(self.kept, 4),
            "accuracy_change": None if worst is None else [round(v, 4) for v in worst],
        }


def check_dials(measured: Sequence[Measured]) -> list[DialCheck]:
    """Every family whose arms turn `diversity` alone, from 0 and over three settings or more.

    Args:
        measured: Of one study.
    """
    families: dict[str, list[Measured]] = {}
    for one in measured:
        if set(one.arm.settings) <= {"adapter", "diversity"} and "diversity" in one.arm.settings:
            families.setdefault(one.arm.family, []).append(one)
    found = []
    for family, arms in families.items():
        arms.sort(key=lambda one: one.arm.settings["diversity"])
        if len(arms) > 2 and arms[0].arm.settings["diversity"] == 0:
            found.append(_check(family, arms))
    return found


def _check(family: str, arms: Sequence[Measured]) -> DialCheck:
    names = arms[0].runs[0]
    variety, fidelity = _axes(names)
    settings = np.array([one.arm.settings["diversity"] for one in arms], float)
    reached = np.array([estimate(one.parts(variety)) for one in arms])
    drawn = np.stack([resampled(one.parts(variety)) for one in arms])
    linear = [straightness(settings, drawn[:, i]) for i in range(drawn.shape[1])]
    kept = [estimate(one.parts(fidelity)) for one in arms]
    obeyed = next((n for n in names if n == "prompt_accuracy" or n.startswith("text ")), None)
    worst = None
    if obeyed is not None:
        changes = [difference(one.parts(obeyed), arms[0].parts(obeyed)) for one in arms[1:]]
        least = min(changes, key=lambda change: change.estimate)
        worst = (least.estimate, least.low, least.high)
    return DialCheck(
        family,
        tuple(settings.tolist()),
        tuple(reached.tolist()),
        straightness(settings, reached),
        float(np.quantile(linear, 0.025)),
        min(kept) / kept[0],
        worst,
    )


def _axes(names: dict[str, Parts]) -> tuple[str, str]:
    if "entropy" in names:
        return "entropy", "retention"
    first = next(name for name in names if name.startswith("vendi "))
    return first, first.replace("vendi ", "image ")


def straightness(settings: np.ndarray, reached: np.ndarray) -> float:
    """R² of a straight line through what was reached; 0 where nothing changes.

    Args:
        settings: Of the dial, (points,).
        reached: At each of them, (points,).
    """
    if np.ptp(reached) < 1e-9:
        return 0.0
    return float(np.corrcoef(settings, reached)[0, 1] ** 2)


def dial_table(measured: Sequence[Measured]) -> str:
    """HTML; empty where a study has no dial."""
    rows = []
    for check in check_dials(measured):
        reached = ", ".join(
            f"{setting:g}: {variety:.3f}"
            for setting, variety in zip(check.settings, check.variety, strict=True)
        )
        worst = check.accuracy_change
        change = "-" if worst is None else f"{worst[0]:+.3f} ({worst[1]:+.3f} to {worst[2]:+.3f})"
        rows.append(
            f"<tr><td>{escape(check.family)}</td><td>{reached}</td>"
            f"<td>{check.r_squared:.3f}<br><small>at least {check.r_squared_low:.3f}</small></td>"
            f"<td>{check.kept:.1%}</td><td>{change}</td></tr>"
        )
    if not rows:
        return ""
    return (
        "<h2>The dial</h2><p>Variety at each setting; how straight it is; the least share of "
        "setting 0's retention; the worst change of prompt accuracy.</p><div class='wide'><table>"
        "<tr><th>dial</th><th>variety</th><th>R²</th><th>kept</th><th>prompt</th></tr>"
        f"{''.join(rows)}</table></div>"
    )
