"""The path of the dial: greedy, kept within bounds, linear in what is achieved."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ipdiverse.dial import OFF, Achieved, Levers
from ipdiverse.errors import ArgumentError
from ipdiverse.evaluation.calibrate import calibrate, climb, placed

LADDERS = {
    "cads": (0.0, 0.5, 1.0),
    "fusion_strength": (1.0, 1.25, 1.5),
    "interval": (None, (0.0, 4.0)),
}


def world(levers: Levers) -> Achieved:
    """CADS gains most and costs least, more fusion gains less, the interval nothing."""
    more = levers.fusion_strength - 1
    variety = 0.3 + 0.3 * levers.cads + 0.2 * more
    return Achieved(variety, 0.9 - 0.02 * levers.cads - 0.02 * more, 0.8)


def test_the_path_moves_the_best_lever_first_and_never_one_that_gains_nothing() -> None:
    path = climb(OFF, LADDERS, world)
    moved = [(levers.cads, levers.fusion_strength) for levers, _ in path]
    assert moved == [(0, 1), (0.5, 1), (1, 1), (1, 1.25), (1, 1.5)]
    assert all(levers.interval is None for levers, _ in path)


def test_a_rung_that_gains_too_little_is_stepped_over_but_not_two() -> None:
    ladders = {"cads": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)}

    def late(levers: Levers) -> Achieved:
        steps = {0.0: 0.1, 0.1: 0.101, 0.2: 0.3, 0.3: 0.301, 0.4: 0.302, 0.5: 0.9}
        return Achieved(steps[levers.cads], 0.9, 0.9)

    assert [levers.cads for levers, _ in climb(OFF, ladders, late)] == [0.0, 0.2]


def test_what_breaks_a_bound_is_not_on_the_path() -> None:
    def strict(levers: Levers) -> Achieved:
        found = world(levers)
        return Achieved(
            found.variety,
            0.9 - 0.06 * levers.cads,  # 0.84 at the top: under 95 % of 0.9
            0.8 - (levers.fusion_strength - 1),
            0.0,
        )

    path = climb(OFF, LADDERS, strict)
    assert [levers.cads for levers, _ in path] == [0, 0.5]
    assert all(levers.fusion_strength == 1 for levers, _ in path)
    broken = climb(OFF, LADDERS, lambda x: Achieved(world(x).variety, 0.9, 0.8, invalid=x.cads))
    assert all(levers.cads == 0 for levers, _ in broken)


def test_where_variety_is_spent_what_copies_less_is_taken_and_ends_the_dial() -> None:
    ladders = {"interpolation": (0.0, 0.5, 1.0), "cads": (0.0, 1.0)}

    def copier(levers: Levers) -> Achieved:
        variety = 0.2 + min(levers.interpolation, 0.5)
        return Achieved(variety, 0.9, 0.9, copies=0.7 - 0.69 * levers.interpolation)

    path = climb(Levers(interpolation=0.0), ladders, copier)
    assert [(x.interpolation, x.cads) for x, _ in path] == [(0, 0), (0.5, 0), (1, 0)]
    dial = placed(path, "test")
    assert [(at, x.interpolation) for at, x in dial.points] == [(0, 0), (1, 1)]
    assert dial.achieved[-1].copies == pytest.approx(0.01)


def test_where_no_lever_gains_variety_there_is_no_path() -> None:
    def flat(levers: Levers) -> Achieved:
        return Achieved(0.5, 0.9, 0.9, copies=0.7 - 0.69 * levers.interpolation)

    assert len(climb(Levers(interpolation=0.0), {"interpolation": (0.0, 1.0)}, flat)) == 1


def test_less_copying_is_not_bought_with_variety() -> None:
    ladders = {"interpolation": (0.0, 0.5, 1.0)}

    def narrow(levers: Levers) -> Achieved:
        variety = {0.0: 0.2, 0.5: 0.7, 1.0: 0.69}[levers.interpolation]
        return Achieved(variety, 0.9, 0.9, copies=0.7 - 0.69 * levers.interpolation)

    assert len(climb(Levers(interpolation=0.0), ladders, narrow)) == 2


def test_the_dial_is_linear_in_what_was_achieved() -> None:
    path = climb(OFF, LADDERS, world)
    dial = placed(path, "test")
    assert dial.points[0] == (0.0, OFF)
    assert dial.points[-1][0] == 1
    achieved = [world(dial.at(d / 20)).variety for d in range(21)]
    slope = np.polyfit(np.linspace(0, 1, 21), achieved, 1)
    np.testing.assert_allclose(np.polyval(slope, np.linspace(0, 1, 21)), achieved, atol=1e-6)


def test_points_that_fall_back_are_pooled() -> None:
    levers = [OFF, Levers(cads=0.1), Levers(cads=0.2), Levers(cads=0.3)]
    scores = [Achieved(v, 1, 1) for v in (0.1, 0.5, 0.4, 0.9)]
    dial = placed(list(zip(levers, scores, strict=True)), "test")
    assert [setting for setting, _ in dial.points] == pytest.approx([0, 0.4375, 1])
    assert [each.cads for _, each in dial.points] == [0, 0.2, 0.3]
    assert [each.variety for each in dial.achieved] == [0.1, 0.4, 0.9]


def test_levers_that_are_all_gone_do_not_stand_for_every_lever() -> None:
    study: Any = SimpleNamespace(sources=["plus"])
    with (
        pytest.warns(UserWarning, match="drop no longer acts"),
        pytest.raises(ArgumentError, match=r"cannot be moved by a dial; .*; found drop"),
    ):
        calibrate(study, Path("nowhere"), ("drop",))
