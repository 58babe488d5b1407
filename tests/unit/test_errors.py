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
        ({"fix": "Repair it."}, "it is wrong. Repair it."),
    ],
)
def test_missing_parts_leave_no_trace(parts: dict, line: str):
    assert str(errors.IpdiverseError("it is wrong", **parts)) == line


def test_line_breaks_in_what_was_found_are_folded():
    error = errors.ArgumentError("it is wrong", found="one\ntwo\t three", fix="Repair\nit.")
    assert str(error) == "it is wrong; found one two three. Repair it."


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("frog \x1b[31m\x9b2J", r"frog \x1b[31m\x9b2J"),
        ("a\rb", r"a\rb"),
        ("a\0b", r"a\x00b"),
        ("a\x7fb\x08", r"a\x7fb\x08"),
        ("gnp.\u202egnp\u2067", r"gnp.\u202egnp\u2067"),
        ("\u200eleft \u2028line", r"\u200eleft \u2028line"),
        ("half\udcff", r"half\udcff"),
        ("tag\U000e0041", r"tag\U000e0041"),
        ("größe 蛙 🐸", "größe 蛙 🐸"),
        (r"C:\temp\new.png", r"C:\temp\new.png"),
        ("two\r\n\tlines\n", "two lines"),
        (Path("a.png"), "a.png"),
        (ValueError("no\x1bbell"), r"no\x1bbell"),
        (b"\x1b", r"b'\x1b'"),
    ],
)
def test_text_of_a_file_cannot_steer_a_terminal(text: object, shown: str):
    assert errors.quoted(text) == shown
    error = errors.DataError(
        f"has {text}", where=text, expected=text, found=text, fix=f"Drop {text}"
    )
    assert str(error).count(shown) == 5
    assert str(error).isprintable()


@pytest.mark.parametrize("name", ["n" * 6000, "\x1b" * 6000, "\U0010ffff" * 201, "a\n" * 6000])
def test_a_long_name_is_cut_in_the_middle(name: str):
    shown = errors.quoted(name + "end.png")
    assert len(shown) <= errors.MAX_QUOTED
    assert "…" in shown
    assert shown.endswith("end.png")
    assert errors.quoted(name, None).isprintable()
    assert len(errors.quoted(name, 50)) <= 50
    error = errors.DataError(f"has {name}", where=name, expected=name, found=name, fix=name)
    limit = 2 * errors.MAX_QUOTED + 3 * errors.MAX_SENTENCE
    assert len(str(error)) < limit + 50
    assert error.where == name


def test_a_name_at_the_limit_is_whole():
    assert errors.quoted("n" * errors.MAX_QUOTED) == "n" * errors.MAX_QUOTED


def test_parts_can_be_read_one_by_one():
    error = errors.OutputError("what", where="where", expected=1, found=2, fix="fix")
    parts = (error.what, error.where, error.expected, error.found, error.fix)
    assert parts == ("what", "where", 1, 2, "fix")


@pytest.mark.parametrize("name", ["ImageError", "ArgumentError", "OutputError", "ModelError"])
def test_every_error_has_the_one_base(name: str):
    assert issubclass(getattr(errors, name), errors.IpdiverseError)


def test_a_broken_checkpoint_is_a_model_error():
    assert issubclass(errors.CheckpointError, errors.ModelError)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), True, "1", None])
def test_a_number_outside_its_range_is_refused(value: object):
    errors.check_range("scale", 0, 0, 1)
    errors.check_range("scale", 1.0, 0, 1)
    with pytest.raises(errors.ArgumentError, match="scale: is out of range; expected 0 to 1"):
        errors.check_range("scale", value, 0, 1)


@pytest.mark.parametrize("value", [1.0, True, "1", None])
def test_anything_but_a_whole_number_is_refused(value: object):
    errors.check_whole("steps", 1)
    with pytest.raises(errors.ArgumentError, match="steps: is not a whole number; expected an int"):
        errors.check_whole("steps", value)
