"""Curves: every family can be told from every other."""

from __future__ import annotations

import numpy as np

from ipdiverse.evaluation.measured import Measured
from ipdiverse.evaluation.plots import tradeoff
from ipdiverse.evaluation.sets import Parts
from ipdiverse.evaluation.study import Arm


def test_no_two_of_many_families_look_alike() -> None:
    parts = {name: Parts(np.ones(3), np.ones(3)) for name in ("entropy", "retention")}
    arms = [Arm(f"arm {n}", f"family {n}", {"adapter": "plus"}) for n in range(24)]
    figure = tradeoff([Measured(arm, [parts], None) for arm in arms], "entropy", "retention")
    _, labels = figure.axes[0].get_legend_handles_labels()
    assert labels == [f"family {n}" for n in range(24)]
    drawn = [bars[0] for bars in figure.axes[0].containers]
    assert len({(line.get_color(), line.get_marker()) for line in drawn}) == 24
