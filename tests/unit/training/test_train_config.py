"""A run's settings: what is impossible is refused, and what 0.1 called otherwise is known."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from ipdiverse.config import read
from ipdiverse.errors import ArgumentError
from ipdiverse.training.config import DROPPED, MAY_CHANGE, RENAMED, TrainConfig, todays


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps is 0, expected a whole number from 1 to"),
        ({"drop_text": 0.5, "drop_both": 0.6}, "drops together: is out of range"),
        ({"process_batch": 0}, "process_batch is 0, expected"),
        ({"width": 100}, "width modulo 64: is out of range"),
        ({"init_from": ""}, "init_from: is empty. Leave it out for new weights."),
        ({"frozen": ("unet",)}, "expected a list, each projection or layers or fusion"),
        ({"workers": 1, "cache": False}, "workers: needs the cache"),
        ({"learning_rate": float("nan")}, "learning_rate is nan, expected a number from 0 to 10"),
        ({"mixed_precision": "fp8"}, "mixed_precision is 'fp8', expected no or bf16 or fp16"),
        ({"steps": 0, "seed": -1}, "steps is 0, expected.*; seed is -1, expected"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        TrainConfig(**{"data": "d", "out": "o", **changes})


def test_settings_of_0_1_have_todays_names_and_values() -> None:
    old = {"start": None, "precision": "fp32", "keep": 2, "steps": 3}
    assert todays(old) == {
        "init_from": None,
        "mixed_precision": "no",
        "checkpoints_total_limit": 2,
        "steps": 3,
    }
    assert todays({"precision": "bf16"}) == {"mixed_precision": "bf16"}


def test_every_name_in_the_tables_is_a_setting_or_was_one() -> None:
    now = {field.name for field in fields(TrainConfig)}
    assert set(RENAMED.values()) | set(MAY_CHANGE) <= now
    assert not (RENAMED.keys() | DROPPED.keys()) & now


def test_every_choice_of_every_key_is_accepted() -> None:
    hints, tried = get_type_hints(TrainConfig), 0
    for name, hint in hints.items():
        for choices in (hint, *get_args(hint)):
            for value in get_args(choices) if get_origin(choices) is Literal else ():
                given = {name: value} | ({"init_from": "a"} if value == "generative" else {})
                listed = hint != choices and get_origin(hint) is tuple
                given[name] = [value] if listed else value
                config = read(TrainConfig, {"data": "d", "out": "o"} | given, "run.toml")
                assert getattr(config, name) == ((value,) if listed else value)
                tried += 1
    assert tried > 20
