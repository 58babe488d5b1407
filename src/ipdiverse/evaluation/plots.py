"""Variety against fidelity, drawn: every family of arms on the same axes, with anchors."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

from ipdiverse.evaluation.bootstrap import estimate, interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ipdiverse.evaluation.measured import Measured

LABELS = {
    "entropy": "variety of what nobody fixed (1 = the world's own)",
    "retention": "identity kept",
    "prompt_accuracy": "prompt obeyed",
    "edit_accuracy": "prompt obeyed where it changes the reference's identity",
    "contradict_accuracy": "prompt obeyed where it contradicts the reference",
    "agree_accuracy": "prompt obeyed where it agrees with the reference",
    "copy_rate": "copies of the whole scene, minus chance",
    "invalid_rate": "images that are no valid scene",
    "leak": "what outputs tell of the reference's scene (nats)",
    "js": "distance from the world's own scenes (Jensen-Shannon)",
}
"""What scores mean, for people; an encoder's carry its name and stand for themselves."""

_COLOURS = (
    *("#2962c9", "#d35400", "#1b7f4d", "#8e44ad", "#c0392b", "#00838f", "#7a6a00", "#ad1457"),
    *("#455a64", "#6d4c41"),
)
_MARKS = "os^Dv"
"""Another once all colours are taken, so that no two families look alike."""
_ANCHOR = "#1d2330"


def axes_of(measured: Sequence[Measured]) -> list[tuple[str, str]]:
    """Which scores to draw against each other: variety first."""
    names = list(measured[0].runs[0])
    if "entropy" in names:
        return [("entropy", "retention"), ("entropy", "prompt_accuracy")]
    pairs = []
    for name in names:
        kind, _, encoder = name.partition(" ")
        if kind in ("image", "text"):
            pairs.append((f"vendi {encoder}", name))
    return pairs


def tradeoff(measured: Sequence[Measured], across: str, up: str) -> Any:
    """A figure of one pair of scores.

    Args:
        measured: Arms and anchors.
        across: The score of the horizontal axis.
        up: Of the vertical axis.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    families: dict[str, list[Measured]] = {}
    for one in measured:
        families.setdefault(one.arm.family, []).append(one)
    anchors = families.pop("anchor", [])
    for number, (family, arms) in enumerate(families.items()):
        _draw_family(axes, family, arms, across, up, number)
    for one in anchors:
        x, y = (estimate(one.parts(name)) for name in (across, up))
        axes.plot(x, y, "*", color=_ANCHOR, markersize=12)
        axes.annotate(one.arm.name, (x, y), (6, 5), textcoords="offset points", fontsize=8)
    axes.set_xlabel(LABELS.get(across, across))
    axes.set_ylabel(LABELS.get(up, up))
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def _draw_family(
    axes: Any, family: str, arms: Sequence[Measured], across: str, up: str, number: int
) -> None:
    colour, mark = _look(number)
    ordered = list(arms)
    if all(one.arm.at is not None for one in ordered):
        ordered.sort(key=lambda one: one.arm.at or 0.0)
    xs = [interval(one.parts(across)) for one in ordered]
    ys = [interval(one.parts(up)) for one in ordered]
    placed = all(one.arm.at is not None for one in arms)
    joined = "-" if len(arms) > 1 and placed else ""
    axes.errorbar(
        [x.estimate for x in xs],
        [y.estimate for y in ys],
        xerr=[[x.estimate - x.low for x in xs], [x.high - x.estimate for x in xs]],
        yerr=[[y.estimate - y.low for y in ys], [y.high - y.estimate for y in ys]],
        fmt=f"{mark}{joined}",
        color=colour,
        markersize=4,
        elinewidth=0.8,
        alpha=0.9,
        label=family,
    )
    if joined:
        axes.fill_between(
            [x.estimate for x in xs],
            [y.low for y in ys],
            [y.high for y in ys],
            color=colour,
            alpha=0.1,
            linewidth=0,
        )
        for one, x, y in zip(ordered, xs, ys, strict=True):
            words = f"{one.arm.at:g}"
            at = (x.estimate, y.estimate)
            axes.annotate(words, at, (3, 3), textcoords="offset points", fontsize=6, color=colour)


def _look(number: int) -> tuple[str, str]:
    """Colour and mark of a family."""
    again, colour = divmod(number, len(_COLOURS))
    return _COLOURS[colour], _MARKS[again % len(_MARKS)]


def as_bytes(figure: Any, kind: str) -> bytes:
    """A figure as `png` or `svg`."""
    buffer = BytesIO()
    figure.savefig(buffer, format=kind)
    return buffer.getvalue()
