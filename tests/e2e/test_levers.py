"""Levers and the dial from the outside: Python and command line, on the embedded base."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ipdiverse import generate
from ipdiverse.base.bases import load_base
from ipdiverse.cli import main
from ipdiverse.critters.make import make_dataset

FAST = {"steps": 4, "prompt": "a critter in the snow"}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    make_dataset(folder, 1)
    return next((folder / "images").iterdir())


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image).astype(int) for image in images])


def test_the_dial_moves_images_and_0_is_what_it_is_without(reference: Path) -> None:
    base = load_base()
    given: Any = {"adapter": "plus", "n": 2, "loaded": base, **FAST}
    plain = generate(reference, **given)
    drawn = {d: generate(reference, diversity=d, **given) for d in (0.0, 0.5, 1.0)}
    np.testing.assert_array_equal(pixels(drawn[0.0].images), pixels(plain.images))
    moved = [np.abs(pixels(drawn[d].images) - pixels(plain.images)).mean() for d in (0.5, 1.0)]
    assert 0 < moved[0] < moved[1]


def test_the_default_adapters_dial_leads_from_the_plain_adapter_to_the_bit(reference: Path) -> None:
    base = load_base()
    given: Any = {"n": 2, "loaded": base, **FAST}
    plain = generate(reference, adapter="plus", **given)
    drawn = {d: generate(reference, diversity=d, **given) for d in (0.0, 0.5, 1.0)}
    np.testing.assert_array_equal(pixels(drawn[0.0].images), pixels(plain.images))
    moved = [np.abs(pixels(drawn[d].images) - pixels(plain.images)).mean() for d in (0.5, 1.0)]
    assert 0 < moved[0] < moved[1]
    again = generate(reference, diversity=0.0, **given)
    np.testing.assert_array_equal(pixels(again.images), pixels(plain.images))


def test_with_levers_image_i_is_the_same_alone(reference: Path) -> None:
    base = load_base()
    several = generate(reference, n=3, loaded=base, diversity=0.7, **FAST)
    one = generate(reference, n=1, loaded=base, diversity=0.7, **FAST)
    np.testing.assert_array_equal(pixels(several.images[:1]), pixels(one.images))


def test_candidates_are_begun_and_the_chosen_are_those_images(reference: Path) -> None:
    base = load_base()
    chosen = generate(reference, n=2, candidates=6, loaded=base, **FAST)
    assert len(chosen.images) == len(set(chosen.indices)) == 2
    assert chosen.indices == sorted(chosen.indices)
    everything = generate(reference, n=6, loaded=base, **FAST)
    expected = [everything.images[i] for i in chosen.indices]
    np.testing.assert_array_equal(pixels(chosen.images), pixels(expected))
    again = generate(reference, n=2, candidates=6, loaded=base, **FAST)
    assert again.indices == chosen.indices


def test_the_recorded_command_repeats_levers(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--interval", "0.2", "6", "--cads", "0.3", "--diversity", "0.5"]
    words = ["generate", "--image", str(reference), "--prompt", "a critter", "-n", "2"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert main([*words, *flags, "--steps", "3", "--out", str(first), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["request"]["interval"] == [0.2, 6.0]
    repeated = shlex.split(record["command"])[1:]
    repeated[-1] = f"--out={second}"
    assert main(repeated) == 0
    for name in ("0000.png", "0001.png"):
        with Image.open(first / name) as one, Image.open(second / name) as other:
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--diversity", "1.5"], "diversity"),
        (["--candidates", "1"], "candidates"),
        (["--interval", "3", "1"], "interval"),
        (["--adapter", "plus", "--interpolation", "0.5"], "does not hold its base weights"),
        (["--cads", "-1"], "cads"),
    ],
)
def test_bad_settings_are_one_line(
    flags: list[str], message: str, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--image", str(reference), "-n", "2", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
