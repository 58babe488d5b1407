from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import replace

import pytest

from ipdiverse.dial import (
    OFF,
    Achieved,
    Dial,
    Levers,
    between,
    current_names,
    default_dial,
    dial_of,
)
from ipdiverse.errors import ArgumentError, CheckpointError


def path() -> Dial:
    half = Levers(cads=0.4, interval=(0.2, 5.0))
    last = half | {"cads": 1.0, "fusion_strength": 1.5}
    return Dial(((0.0, OFF), (0.5, half), (1.0, last)), "by hand")


def test_a_dial_goes_through_its_points_and_between_them() -> None:
    dial = path()
    assert dial.at(0) == OFF
    assert dial.at(0.5).cads == 0.4
    assert dial.at(1).fusion_strength == 1.5
    assert dial.at(0.25).cads == pytest.approx(0.2)
    assert dial.at(0.75).fusion_strength == pytest.approx(1.25)


def test_what_has_no_number_between_comes_on_at_once() -> None:
    mixed = between(OFF, Levers(interval=(0.2, 5.0), image_guidance=2.0), 0.1)
    narrowing = between(Levers(interval=(0.2, 9.0)), Levers(interval=(0.4, 1.0)), 0.5)
    assert narrowing.interval == pytest.approx((0.3, 3.0))
    assert mixed.interval is not None
    assert mixed.interval[1] > 500, "it closes gradually, from where hardly a step lies"
    assert mixed.image_guidance == 2.0


@pytest.mark.parametrize("diversity", [-0.1, 1.1, math.nan])
def test_a_setting_out_of_range_is_refused(diversity: float) -> None:
    with pytest.raises(ArgumentError, match="diversity"):
        path().at(diversity)


@pytest.mark.parametrize(
    "points", [((0.0, OFF),), ((0.1, OFF), (1.0, OFF)), ((0.0, OFF), (0.0, OFF), (1.0, OFF))]
)
def test_a_path_goes_from_0_to_1(points) -> None:
    with pytest.raises(ArgumentError, match="dial"):
        Dial(points, "")


def test_a_dial_survives_json() -> None:
    scores = tuple(Achieved(v, 0.9, a) for v, a in ((0.2, 0.8), (0.3, None), (0.5, 0.7)))
    dial = replace(path(), achieved=scores)
    spec = json.loads(json.dumps({"dial": dial.as_spec()}, allow_nan=False))
    assert dial_of(spec, "file") == dial
    assert dial_of({}, "file") is None


@pytest.mark.parametrize(
    "broken",
    [
        {"points": []},
        {"points": [[0, {}], [1, {"cads": -1}]], "source": ""},
        {"points": [[0, {}], [1, {"no such lever": 1}]], "source": ""},
        {"points": [[0, {}], [1, {"interval": [3]}]], "source": ""},
        {"points": [[0, {}], [1, {}]], "source": "", "achieved": [{"variety": 1}]},
        [],
    ],
)
def test_a_broken_dial_names_its_file(broken) -> None:
    with pytest.raises(CheckpointError, match="some file: its dial is broken"):
        dial_of({"dial": broken}, "some file")


@pytest.mark.parametrize("fused", [True, False])
def test_the_default_path_starts_at_stock_and_only_rises(fused: bool) -> None:
    dial = default_dial(fused)
    assert dial.at(0) == (Levers(fusion_strength=0.0) if fused else OFF)
    settings = [dial.at(i / 20) for i in range(1, 21)]
    strengths = [levers.cads for levers in settings]
    assert strengths == sorted(strengths)
    assert strengths[-1] > 0
    narrowing = [levers.interval[1] for levers in settings]
    assert narrowing == sorted(narrowing, reverse=True)
    assert set().union(*settings) == {"cads", "interval"}
    assert all(levers.fusion_strength == 1 for levers in settings)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("interpolation", 1.5),
        ("fusion_strength", None),
        ("image_guidance", "2"),
        ("cads", -0.1),
        ("interval", (3.0, 1.0)),
        ("interval", (3.0,)),
        ("interval", 5),
        ("interval", {"low": 1}),
    ],
)
def test_strengths_out_of_range_are_refused(field: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=field):
        Levers(**{field: value})


def test_levers_are_a_mapping_of_those_that_are_on() -> None:
    levers = Levers(interval=[0.0, 4.0], cads=0.3, fusion_strength=1)
    assert dict(levers) == {"interval": (0.0, 4.0), "cads": 0.3}
    assert (levers.fusion_strength, levers.interpolation, levers.image_guidance) == (1, 1, None)
    assert levers == Levers(cads=0.3, interval=(0.0, 4.0))
    assert hash(levers) == hash(Levers(cads=0.3, interval=(0.0, 4.0)))
    assert levers | {"interval": None} == Levers(cads=0.3)
    assert copy.deepcopy(levers) == pickle.loads(pickle.dumps(levers)) == levers  # noqa: S301
    with pytest.raises(AttributeError, match="no lever 'drop'"):
        _ = levers.drop


def test_a_dial_of_version_0_1_is_read_and_says_what_no_longer_acts() -> None:
    last = {"training": 0.7, "shield": 0.4, "noise_level": 100, "removal_rank": 4}
    spec = {"dial": {"points": [[0, {"training": 0.0}], [1, last]], "source": "0.1"}}
    with pytest.warns(UserWarning, match="^dial of a.safetensors: shield, noise_level no longer"):
        dial = dial_of(spec, "a.safetensors")
    assert dial is not None
    assert [dict(levers) for _, levers in dial.points] == [
        {"interpolation": 0.0},
        {"interpolation": 0.7},
    ]


def test_what_was_off_goes_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    old = {"training": 1.0, "drop": 0.0, "removal_rank": 4, "noise_level": 0, "scale": 2}
    assert current_names(old) == {"interpolation": 1.0, "scale": 2}
    assert not recwarn.list
