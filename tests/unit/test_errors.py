"""The one line that every error is."""

from __future__ import annotations

from pathlib import Path

import pytest

from ipdiverse import errors


def test_all_parts_stand_in_one_line_in_order():
    error = errors.ImageError(
        "it is too small", where="a.png", expected="64 px", found="8 px", fix="Use a larger one."
    )
    assert str(error) == "a.png: it is too small; expected 64 px; found 8 px. Use a larger one."


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        ({}, "it is wrong"),
        ({"where": Path("a.png")}, "a.png: it is wrong"),
        ({"expected": 3}, "it is wrong; expected 3"),
        ({"found": 0}, "it is wrong; found 0"),
        ({"fix": "Mend it."}, "it is wrong. Mend it."),
    ],
)
def test_missing_parts_leave_no_trace(parts: dict, line: str):
    assert str(errors.IpdiverseError("it is wrong", **parts)) == line


def test_line_breaks_in_what_was_found_are_folded():
    error = errors.ArgumentError("it is wrong", found="one\ntwo\t three", fix="Mend\nit.")
    assert str(error) == "it is wrong; found one two three. Mend it."


def test_parts_can_be_read_one_by_one():
    error = errors.OutputError("what", where="where", expected=1, found=2, fix="fix")
    parts = (error.what, error.where, error.expected, error.found, error.fix)
    assert parts == ("what", "where", 1, 2, "fix")


@pytest.mark.parametrize("name", ["ImageError", "ArgumentError", "OutputError", "ModelError"])
def test_every_error_has_the_one_base(name: str):
    assert issubclass(getattr(errors, name), errors.IpdiverseError)


def test_a_broken_checkpoint_is_a_model_error():
    assert issubclass(errors.CheckpointError, errors.ModelError)
