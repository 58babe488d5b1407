"""`calibrate` from the outside: the path goes into the file, and `generate` follows it."""

from __future__ import annotations

import json
import re
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from ipdiverse.adapter.files.checkpoint import load_adapter
from ipdiverse.base.adapters import adapter_file
from ipdiverse.cli import main
from ipdiverse.critters.make import make_dataset
from ipdiverse.dial import OFF, Levers, dial_of
from ipdiverse.evaluation import calibrate, images
from ipdiverse.levers import LEVERS

SMALL = ["--pairs", "3", "--images", "4", "--steps", "6"]


class Calibrated(NamedTuple):
    """A calibration, and what it said."""

    words: list[str]
    target: Path
    errors: str
    report: dict[str, Any]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    """A real calibration on a few pairs, along the one lever that gains with so few."""
    folder = tmp_path_factory.mktemp("calibration")
    target = folder / "mine.safetensors"
    words = [
        "calibrate",
        "--adapter",
        "diverse",
        "--base-weights",
        "plus",
        "--levers",
        "interpolation",
        *SMALL,
    ]
    words += ["--work", str(folder / "work"), "--out", str(target), "--json"]
    out, errors = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(errors):
        assert main(words) == 0
    return Calibrated(words, target, errors.getvalue(), json.loads(out.getvalue()))


def test_the_path_is_climbed_until_variety_or_copies_no_longer_gain(
    calibrated: Calibrated,
) -> None:
    path, dial = calibrated.report["path"], dial_of(load_adapter(calibrated.target).spec, "x")
    assert dial is not None
    assert calibrated.report["dial"] == dial.as_spec()
    assert calibrated.errors.count("interpolation ") == len(path) - 1 >= 2, "a line for every rung"
    rungs = [point["interpolation"] for point in path]
    assert rungs == sorted(set(rungs))
    assert set(rungs) <= set(LEVERS["interpolation"].ladder)
    assert path[-1]["variety"] > path[0]["variety"] + 0.2
    assert all(point["retention"] >= 0.95 * path[0]["retention"] for point in path)
    assert path[-1]["copies"] < path[0]["copies"]
    assert dial.at(0) == Levers(interpolation=0.0)
    assert dial.at(1).interpolation == rungs[-1]
    assert [one.variety for one in dial.achieved] == sorted(one.variety for one in dial.achieved)
    assert "3 pairs of 4 images, 6 steps" in dial.source


def test_generate_follows_the_path(
    calibrated: Calibrated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dial = dial_of(load_adapter(calibrated.target).spec, "x")
    assert dial is not None
    make_dataset(tmp_path / "refs", 1)
    image = next((tmp_path / "refs" / "images").iterdir())
    drawn = ["generate", "--image", str(image), "-n", "1", "--steps", "2", "--json"]
    drawn += ["--adapter", str(calibrated.target), "--out", str(tmp_path / "out")]
    hashes = []
    for levers in (["--diversity", "0.5"], [f"--interpolation={dial.at(0.5).interpolation!r}"], []):
        assert main([*drawn, *levers]) == 0
        hashes.append(json.loads(capsys.readouterr().out)["image_sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_plain_adapter_is_stored_with_the_adapters_own_weights(calibrated: Calibrated) -> None:
    adapter, plain = load_adapter(calibrated.target), load_file(adapter_file("critters", "plus"))
    assert all(torch.equal(adapter.base_weights[name], t.float()) for name, t in plain.items())
    source = Path(adapter_file("critters", "diverse"))
    assert adapter.spec["arm"] == load_adapter(source).spec["arm"], "its spec is kept"
    before, after = load_file(source), load_file(calibrated.target)
    own = before.keys() - {"base_weights_packed"}  # which the target holds whole
    assert all(torch.equal(before[name], after[name]) for name in own)


def test_a_finished_calibration_draws_nothing_again(
    calibrated: Calibrated, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(images, "sample_array", lambda *_: pytest.fail("drawn again"))
    assert main(calibrated.words) == 0
    assert json.loads(capsys.readouterr().out) == calibrated.report


def test_an_adapter_starts_where_it_is_stock_and_climbs_what_it_has() -> None:
    start, ladders = calibrate._ladders("plus", "critters")
    assert (start, ladders.keys()) == (OFF, {"interval", "cads"})
    start, ladders = calibrate._ladders("diverse", "critters")
    assert start == Levers(interpolation=0.0)
    assert ladders.keys() == {"interpolation", "fusion_strength", "interval", "cads"}
    assert ladders["fusion_strength"][0] == 1.0, "which the start has already"


def test_a_path_without_a_gain_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = {"cads": replace(LEVERS["cads"], ladder=(0.0,))}  # a ladder with nothing to climb
    monkeypatch.setattr(calibrate, "LEVERS", flat)
    target = tmp_path / "mine.safetensors"
    words = ["calibrate", "--adapter", "plus", "--out", str(target), "--work", str(tmp_path)]
    assert main([*words, "--pairs", "2", "--images", "2", "--steps", "1"]) == 2
    assert "plus: no lever gains variety while it keeps" in capsys.readouterr().err
    assert not target.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--adapter", "none"], "unknown adapter"),
        (["--adapter", "plus", "--out", "x.bin"], "must end in .safetensors"),
        (["--adapter", "plus"], "was published by others.*--out FILE"),
        (["--adapter", "plus", "--out", "OUT", "--pairs", "1"], "pairs"),
        (["--adapter", "plus", "--out", "OUT", "--references", "none"], "none: is not a folder"),
        (
            ["--adapter", "plus", "--out", "OUT", "--prompts", "p.txt"],
            "prompts: needs references",
        ),
        (
            ["--adapter", "plus", "--out", "OUT", "--levers", "interpolation", "cads"],
            "adapter plus: does not have this lever; expected interval, cads.*interpolation",
        ),
        (
            ["--adapter", "plus", "--out", "OUT", "--levers", "nothing"],
            "levers: cannot be moved by a dial; expected .*cads; found nothing",
        ),
    ],
)
def test_bad_input_is_one_line(
    more: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("ipdiverse.base.bases.open_pipeline", lambda *_: pytest.fail("was opened"))
    more = [str(tmp_path / "x.safetensors") if word == "OUT" else word for word in more]
    assert main(["calibrate", "--work", str(tmp_path / "work"), *more]) == 2
    assert re.search(message, capsys.readouterr().err)
