"""Settings from files and keywords: all that does not fit is named, and nothing else is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pytest

from ipdiverse.config import Range, check, problems, read, read_toml, renamed
from ipdiverse.errors import ArgumentError, check_range

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Paint:
    colour: Literal["red", "green"]
    coats: Annotated[int | None, Range(1, 3)] = None
    share: Annotated[float, Range(0, 1)] = 0.5
    matt: bool = False
    names: tuple[str, ...] = ()
    span: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        check(self)
        check_range("coats and share", (self.coats or 0) + self.share, 0, 3)


def test_a_file_becomes_a_dataclass(tmp_path: Path) -> None:
    file = tmp_path / "paint.toml"
    file.write_text('colour = "red"\ncoats = 2\nshare = 1\nnames = ["a"]\nspan = [0, 1.5]\n')
    assert read(Paint, read_toml(file), file) == Paint("red", 2, 1, False, ("a",), (0, 1.5))


def test_a_byte_order_mark_is_not_content(tmp_path: Path) -> None:
    file = tmp_path / "paint.toml"
    file.write_bytes(b'\xef\xbb\xbfcolour = "red"\n')
    assert read_toml(file) == {"colour": "red"}


@pytest.mark.parametrize("content", [b"colour = ", b"\xff\xff", b"\xff\xfe\x00\xd8", None])
def test_what_cannot_be_read_is_one_line(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "paint.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ArgumentError, match=r"paint\.toml: cannot be read; expected TOML") as told:
        read_toml(file)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("colour", "blue", "colour is 'blue', expected red or green"),
        ("colour", 1, "colour is 1, expected red or green"),
        ("coats", 4, "coats is 4, expected a whole number from 1 to 3"),
        ("coats", 1.5, "coats is 1.5, expected a whole number from 1 to 3"),
        ("coats", True, "coats is True, expected a whole number from 1 to 3"),
        ("share", float("nan"), "share is nan, expected a number from 0 to 1"),
        ("share", "all", "share is 'all', expected a number from 0 to 1"),
        ("matt", 1, "matt is 1, expected true or false"),
        ("names", "a", "names is 'a', expected a list, each a text"),
        ("names", ["a", 1], "names is ['a', 1], expected a list, each a text"),
        ("span", [1], "span is [1], expected a list, each a number"),
        ("coat", 1, "unknown key 'coat', did you mean 'coats'?"),
        ("zzz", 1, "unknown key 'zzz'"),
    ],
)
def test_each_problem_says_key_value_and_what_was_expected(
    key: str, value: Any, problem: str
) -> None:
    assert problems(Paint, {key: value}) == [problem]


@pytest.mark.parametrize(
    ("key", "value"),
    [("coats", 3), ("coats", None), ("share", 0), ("matt", True), ("names", []), ("span", (0, 1))],
)
def test_what_fits_is_no_problem(key: str, value: Any) -> None:
    assert problems(Paint, {key: value}) == []


def test_everything_wrong_is_named_at_once() -> None:
    with pytest.raises(ArgumentError) as told:
        read(Paint, {"share": 2, "nmes": []}, "paint.toml")
    assert str(told.value) == (
        "paint.toml: share is 2, expected a number from 0 to 1; unknown key 'nmes', did you mean "
        "'names'?; missing colour"
    )
    with pytest.raises(ArgumentError, match=r"coats is 9, expected.*; share is -1, expected"):
        Paint("red", coats=9, share=-1)


def test_what_only_the_fields_together_tell_is_said_of_the_file() -> None:
    with pytest.raises(ArgumentError, match=r"paint\.toml: coats and share: is out of range"):
        read(Paint, {"colour": "red", "coats": 3}, "paint.toml")


def test_old_keys_are_read_and_the_new_ones_are_named_once() -> None:
    with pytest.warns(UserWarning, match=r"^a\.toml: renamed tint → colour, x → coats$") as told:
        found = renamed({"tint": "red", "x": 2, "matt": True}, OLD, "a.toml")
    assert found == {"colour": "red", "coats": 2, "matt": True}
    assert len(told) == 1
    with pytest.raises(ArgumentError, match=r"given twice; found x and coats\. Keep the second"):
        renamed({"x": 2, "coats": 1}, OLD, "a.toml")


OLD = {"tint": "colour", "x": "coats"}
