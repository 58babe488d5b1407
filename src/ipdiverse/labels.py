"""Labels on curves."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


_LEAST = 0.045
"""Distance between two labels, as a share of the axis."""


def apart(values: Sequence[float]) -> list[int]:
    """Which points of a curve can be labelled without their labels touching.

    Args:
        values: Along the axis, rising.

    Returns:
        Indices, the first and the last among them.
    """
    if len(values) < 2:
        return list(range(len(values)))
    gap, kept = _LEAST * (values[-1] - values[0]), [0]
    for index, value in enumerate(values[:-1]):
        if value - values[kept[-1]] >= gap and values[-1] - value >= gap:
            kept.append(index)
    return [*kept, len(values) - 1]
