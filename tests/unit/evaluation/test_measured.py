"""What a dial promises, on arms whose scores are made up."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

from ipdiverse.evaluation.measured import Measured, check_dials, rounded, straightness
from ipdiverse.evaluation.sets import PairSums
from ipdiverse.evaluation.study import Arm

PAIRS = 30


def sums(mean: float) -> PairSums:
    spread = np.random.default_rng(0).normal(0, 0.05, PAIRS)
    return PairSums(mean + spread - spread.mean(), np.ones(PAIRS))


def arm(setting: float, entropy: float, retention: float, prompt: float, family: str) -> Measured:
    scores = {
        "entropy": sums(entropy),
        "retention": sums(retention),
        "prompt_accuracy": sums(prompt),
    }
    made = Arm(f"{family} {setting}", family, {"adapter": "plus", "diversity": setting})
    return Measured(made, [scores], np.zeros((1, 2, 8, 8, 3), np.uint8))


STRAIGHT = [(0.0, 0.2, 0.8, 0.9), (0.5, 0.4, 0.79, 0.92), (1.0, 0.6, 0.72, 0.91)]


def test_a_straight_dial_says_what_it_kept_and_how_the_prompt_fared() -> None:
    [check] = check_dials([arm(*point, "dial") for point in reversed(STRAIGHT)])
    assert check.settings == (0.0, 0.5, 1.0)
    assert check.variety == pytest.approx((0.2, 0.4, 0.6))
    assert check.r_squared == pytest.approx(1)
    assert check.r_squared_low == pytest.approx(1), "pairs move all settings together"
    assert check.kept == pytest.approx(0.9)
    assert check.accuracy_change is not None
    assert check.accuracy_change == pytest.approx((0.01, 0.01, 0.01))
    assert rounded(asdict(check))["kept"] == 0.9


def test_a_dial_that_comes_on_late_is_not_straight() -> None:
    late = [(0.0, 0.2, 0.8, 0.9), (0.25, 0.2, 0.8, 0.9), (0.5, 0.2, 0.8, 0.8), (1.0, 0.6, 0.8, 0.9)]
    [check] = check_dials([arm(*point, "late") for point in late])
    assert check.r_squared < 0.9
    assert check.accuracy_change is not None
    assert check.accuracy_change[0] == pytest.approx(-0.1)


def test_only_whole_dials_are_checked() -> None:
    without_zero = [arm(*point, "no zero") for point in STRAIGHT[1:]]
    other = Measured(
        Arm("λ", "dial", {"diversity": 0.0, "scale": 0.5}),
        [{"entropy": sums(0.1)}],
        np.zeros((1, 2, 8, 8, 3), np.uint8),
    )
    assert check_dials([*without_zero, other]) == []


def test_what_does_not_move_is_not_straight() -> None:
    assert straightness(np.array([0.0, 0.5, 1.0]), np.full(3, 0.4)) == 0
