"""The measurement on cases with known answers, read by the shipped oracle."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from ipdiverse.cli import main
from ipdiverse.critters.oracle import read
from ipdiverse.critters.render import render
from ipdiverse.critters.scene import IDENTITY, SCENE, sample_scene, split_of
from ipdiverse.evaluation.demo import copier_command
from ipdiverse.evaluation.pairs import (
    Pair,
    critters_sets,
    held_out_scenes,
    shipped_oracle,
    study_pairs,
)
from ipdiverse.evaluation.sets import score_sets
from tests.captions import parse
from workshop.__main__ import main as workshop
from workshop.copier import COLUMNS, copier_table
from workshop.gates import GATES, _holds, check_base, gate_table, linear_probe

if TYPE_CHECKING:
    from pathlib import Path

PAIRS, IMAGES = 60, 8


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return study_pairs(PAIRS, seed=3)


def test_pairs_are_held_out_and_leave_scene_attributes_open(pairs: list[Pair]) -> None:
    for pair in pairs:
        assert split_of(pair.reference) == "test"
        assert 1 <= len(pair.stated) <= 2
        assert pair.stated.keys() <= set(SCENE)
        assert parse(pair.prompt) == pair.stated
        assert pair.image().size == (64, 64)


def score(outputs: np.ndarray, pairs: list[Pair]) -> dict[str, float]:
    seen = read(shipped_oracle(), outputs.reshape(len(pairs), IMAGES, *outputs.shape[1:]))
    return asdict(score_sets(critters_sets(seen, pairs)))


def test_the_renderer_itself_is_the_ceiling(pairs: list[Pair]) -> None:
    rng = np.random.default_rng(0)
    outputs = []
    for number, pair in enumerate(pairs):
        identity = {name: getattr(pair.reference, name) for name in IDENTITY}
        for index in range(IMAGES):
            scene = sample_scene(rng, identity | pair.stated)
            outputs.append(render(scene, 100 * number + index))
    scores = score(np.stack(outputs), pairs)
    assert scores["retention"] > 0.97
    assert scores["prompt_accuracy"] > 0.97
    assert scores["entropy"] == pytest.approx(1, abs=0.08)
    assert abs(scores["leak"]) < 0.1
    assert abs(scores["copy_rate"]) < 0.03
    assert scores["invalid_rate"] < 0.05


def test_pixel_copies_are_the_copy_ceiling(pairs: list[Pair]) -> None:
    outputs = np.stack([np.asarray(pair.image()) for pair in pairs for _ in range(IMAGES)])
    scores = score(outputs, pairs)
    assert scores["retention"] > 0.97
    assert scores["agree_accuracy"] > 0.95
    assert scores["contradict_accuracy"] < 0.05
    assert scores["entropy"] == pytest.approx(0, abs=0.02)
    assert scores["leak"] > 0.5
    assert scores["copy_rate"] > 0.8


def test_a_probe_finds_what_is_linear_and_nothing_else() -> None:
    rng = torch.Generator().manual_seed(0)
    labels = torch.stack([torch.randint(2, (600,), generator=rng) for _ in range(9)], dim=1)
    noise = torch.randn(600, 30, generator=rng)
    noise[:, 0] += 6 * labels[:, 3]
    right = linear_probe(noise[:500], labels[:500], noise[500:], labels[500:])
    assert right[3] > 0.95
    assert np.delete(right, 3).max() < 0.7


def test_held_out_scenes_repeat() -> None:
    assert held_out_scenes(5, seed=1) == held_out_scenes(5, seed=1)
    assert held_out_scenes(5, seed=1) != held_out_scenes(5, seed=2)


@pytest.mark.parametrize(
    ("name", "better", "worse"), [("vae_psnr", 1.0, -1.0), ("false_alarms", -0.01, 0.01)]
)
def test_a_gate_fails_on_its_wrong_side_alone(name: str, better: float, worse: float) -> None:
    _, bound = GATES[name]
    assert _holds(name, {name: bound})
    assert _holds(name, {name: bound + better})
    assert not _holds(name, {name: bound + worse})
    assert not _holds(name, {name: float("nan")}), "what could not be measured"


def test_one_gate_that_fails_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GATES, "vae_psnr", (">=", 99.0))
    report = check_base(images=64)
    assert report["gates"].keys() == GATES.keys()
    assert not report["gates"]["vae_psnr"]["holds"]
    assert any(gate["holds"] for gate in report["gates"].values())
    assert not report["passed"]
    assert {"probe_mean", "entropy_default_guidance"} <= report["figures"].keys()
    table = gate_table(report)
    assert table.count("| >= 99.0 | NO |") == 1
    assert all(name in table for name in report["figures"])


def test_a_small_copier_run_prints_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "copier.json"
    small = ["--scales", "0", "1", "--pairs", "6", "--images", "2", "--steps", "3"]
    small += ["--guidance", "2.5"]  # not the base's own
    small += ["--folder", str(tmp_path / "images")]
    assert workshop(["copier", *small, "--out", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    images = (tmp_path / "images" / "images").rglob("*.npz")
    drawn = {file: file.stat().st_mtime_ns for file in images}
    assert drawn
    again = shlex.split(copier_command(report))[3:]
    assert workshop([*again, "--folder", str(tmp_path / "images"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == report, "measured again by its own command"
    assert drawn == {file: file.stat().st_mtime_ns for file in drawn}, "nothing is drawn twice"
    assert report == json.loads(out.read_text())
    assert [row["scale"] for row in report["rows"]] == [0, 1]
    assert report["anchors"].keys() == {"renderer", "pixel copy"}
    assert all(name in report["rows"][0] for name in COLUMNS)
    assert copier_table(report).count("\n") == 5  # head, rule, two scales, two anchors


def test_the_demo_page_holds_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    page = (tmp_path / "demo" / "index.html").read_text()
    said = capsys.readouterr()
    assert said.out.strip() == f"open {tmp_path / 'demo' / 'index.html'}"
    assert said.err.startswith("note: drawing 24 images: less than a minute")
    assert page.count("data:image/png;base64,") == 1 + 2 * 3 * 4 + 1 + 2
    assert "identity kept over variety: the dial's points" in page
    assert "http://" not in page
    assert "https://" not in page
    assert "<table>" in page


@pytest.mark.parametrize(
    "arguments",
    [
        ["gates", "--images", "0"],
        ["gates", "--guidance", "nan"],
        ["copier", "--pairs", "0"],
        ["copier", "--images", "1"],
        ["copier", "--scales", "nan"],
        ["train-base", "--unet-steps", "0"],
        ["train-base", "--images", "0"],
        ["train-adapters", "--steps", "0"],
    ],
)
def test_impossible_numbers_get_one_line_and_exit_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert workshop(arguments) == 2
    error = capsys.readouterr().err
    adapters = arguments[0] == "train-adapters"  # whose settings are those of `train`
    expected = "steps is 0, expected a whole number from 1" if adapters else "is out of range"
    assert expected in error
    assert error.count("\n") == 1


def test_a_report_that_cannot_be_written_is_refused_before_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert workshop(["gates", "--out", str(tmp_path / "file" / "x.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
