"""A request: flat outside, one value inside, and the command that repeats it."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from ipdiverse.dial import Levers
from ipdiverse.errors import ArgumentError
from ipdiverse.sampling.request import Request

FULL: dict[str, Any] = {
    "image": ("a b.png", "c.png"),
    "prompt": ("x", "y"),
    "combine": "weighted",
    "weights": (0.5, 1.5),
    "start_at": 0.2,
    "safety_checker": False,
    "tiling": True,
    "cads": 0.3,
    "interval": (0.1, 4.0),
}


def test_flat_values_and_back() -> None:
    request = Request.of(FULL)
    assert request.levers == Levers(cads=0.3, interval=(0.1, 4.0))
    assert request.stated() == FULL
    assert Request.of(request.flat()) == request
    assert Request().stated() == {}
    assert Request().stated("n", "prompt") == {"n": 4, "prompt": ("",)}


def test_one_of_what_may_be_several_and_lists_are_tuples() -> None:
    request = Request.of({"image": "a.png", "prompt": [], "interval": [0, 4]})
    assert (request.image, request.prompt) == (("a.png",), ("",))
    assert request == Request(("a.png",), ("",), levers=Levers(interval=(0, 4)))


def test_the_command_says_everything_once() -> None:
    words = shlex.split(Request.of(FULL).command("my out"))
    assert words[:2] == ["ipdiverse", "generate"]
    stated = ["--image=a b.png", "--image=c.png", "--weights=0.5", "--weights=1.5", "--cads=0.3"]
    assert [word for word in words if word in stated] == stated
    assert "--no-safety-checker" in words
    assert "--tiling" in words
    at = words.index("--interval")
    assert words[at + 1 : at + 3] == ["0.1", "4.0"]
    assert words[-1] == "--out=my out"


def test_names_of_version_0_1_are_understood_with_a_note() -> None:
    with pytest.warns(UserWarning, match="record: ") as told:
        request = Request.of({"training": 0.5, "end": 0.9, "particle": 0.1}, "record")
    assert request == Request(end_at=0.9, levers=Levers(interpolation=0.5))
    assert sorted(str(one.message) for one in told) == [
        "record: particle no longer acts",
        "record: renamed training → interpolation, end → end_at",
    ]
    with pytest.raises(TypeError, match="no_such"):
        Request.of({"no_such": 1})


def test_every_picture_file_is_named_once() -> None:
    request = Request(image=("a", "b"), mask=("m", "m"), init_image="a", mask_image="m")
    assert request.picture_files == ("a", "b", "m")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "image: is missing"),
        ({"image": "a", "base": "sd99"}, "sd99: unknown base"),
        ({"image": "a", "preset": "vibes"}, "preset: is not a preset"),
        ({"image": "a", "strength": 0.5}, "strength: needs init_image. Give --init-image."),
        ({"image": "a", "combine": "weighted"}, "weights"),
        (
            {"image": "a", "base": "sd15", "adapter": "sd15-plus", "faces": "f.npy"},
            "faces: are not read by this adapter; found sd15-plus. Leave out --faces",
        ),
    ],
)
def test_what_could_not_be_drawn_is_said_before_anything_is_opened(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        Request.of(values).check()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"end_at": 0.1, "start_at": 0.2}, "end_at: is out of range"),
        ({"width": 60}, "width: is not a multiple of 8; found 60"),
        ({"n": 3, "candidates": 2}, "candidates: is out of range; expected 3 to 1024"),
        ({"steps": 2.5}, "steps: is not a whole number"),
        ({"mask_image": "m.png"}, "mask_image: needs init_image"),
    ],
)
def test_values_are_checked_when_a_request_is_made(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Request(**values)
