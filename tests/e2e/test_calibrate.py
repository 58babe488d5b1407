"""`calibrate` from the outside: the path goes into the file, and `generate` follows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ipdiverse.adapter.files.checkpoint import load_adapter
from ipdiverse.base.bases import adapter_source
from ipdiverse.cli import main
from ipdiverse.critters.make import make_dataset
from ipdiverse.dial import OFF, Achieved, Levers, dial_of
from ipdiverse.evaluation import calibrate

TINY = ["--pairs", "2", "--images", "2", "--steps", "2"]


@pytest.fixture
def climbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real measurements of a path that is given: two pairs are too few to climb by."""
    chosen = Levers(cads=0.7, interval=(0.0, 4.0))

    def climb(start, ladders, measure, say):
        first, last = measure(start), measure(chosen)
        assert 0 <= first.variety <= 2
        assert "cads" in ladders
        assert "interpolation" not in ladders, "the plain adapter has no base weights"
        say("one step")
        return [
            (start, Achieved(0.2, first.retention, first.accuracy)),
            (chosen, Achieved(0.6, last.retention, last.accuracy)),
        ]

    monkeypatch.setattr(calibrate, "climb", climb)


def test_the_path_goes_into_the_file_and_generate_follows_it(
    climbed: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = Path(adapter_source("critters", "plus")), tmp_path / "mine.safetensors"
    words = ["calibrate", "--adapter", "plus", "--work", str(tmp_path / "work"), *TINY]
    assert main([*words, "--out", str(target)]) == 0
    assert "one step" in capsys.readouterr().err
    before, after = load_file(source), load_file(target)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    adapter = load_adapter(target)
    assert adapter.spec["reference"] == "self", "what the file said before is kept"
    dial = dial_of(adapter.spec, target)
    assert dial is not None
    assert dial.at(0) == OFF
    assert dial.at(0.5).cads == pytest.approx(0.35)
    assert [one.variety for one in dial.achieved] == [0.2, 0.6]
    make_dataset(tmp_path / "refs", 1)
    image = next((tmp_path / "refs" / "images").iterdir())
    drawn = ["generate", "--image", str(image), "-n", "1", "--steps", "2", "--json"]
    hashes, halfway = [], dial.at(0.5).interval
    for levers in (
        ["--adapter", str(target), "--diversity", "0.5"],
        ["--adapter", "plus", "--cads", "0.35", "--interval", *map(str, halfway)],
    ):
        assert main([*drawn, *levers, "--out", str(tmp_path / "out")]) == 0
        hashes.append(json.loads(capsys.readouterr().out)["image_sha256"])
    assert hashes[0] == hashes[1]


def test_a_finished_calibration_draws_nothing_again(
    climbed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ipdiverse.evaluation import arm_images

    target = str(tmp_path / "mine.safetensors")
    words = ["calibrate", "--adapter", "plus", "--work", str(tmp_path / "work"), *TINY]
    assert main([*words, "--out", target]) == 0

    def never(*_: object) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(arm_images, "sample_array", never)
    assert main([*words, "--out", target]) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--adapter", "none"], "unknown adapter"),
        (["--adapter", "plus", "--out", "x.bin"], "must end in .safetensors"),
        (["--adapter", "plus"], "was published by others.*--out FILE"),
        (["--adapter", "plus", "--out", "OUT", "--pairs", "1"], "pairs"),
        (["--adapter", "plus", "--out", "OUT", "--references", "none"], "none: is no folder"),
        (
            ["--adapter", "plus", "--out", "OUT", "--prompts", "p.txt"],
            "prompts: go with references",
        ),
        (
            ["--adapter", "plus", "--out", "OUT", "--levers", "interpolation", "cads"],
            "adapter plus: has no such lever; expected interval, cads.*; found interpolation",
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
    import re

    monkeypatch.setattr("ipdiverse.base.bases.open_pipeline", lambda *_: pytest.fail("was opened"))
    more = [str(tmp_path / "x.safetensors") if word == "OUT" else word for word in more]
    assert main(["calibrate", "--work", str(tmp_path / "work"), *more]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_plain_adapter_is_stored_beside_and_the_dial_leads_from_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, object] = {}

    def climb(start, ladders, measure, say):
        seen.update(start=start, ladders=ladders, first=measure(start))
        return [(start, Achieved(0.2, 0.8, 0.5)), (OFF, Achieved(0.6, 0.8, 0.9))]

    monkeypatch.setattr(calibrate, "climb", climb)
    source, target = Path(adapter_source("critters", "diverse")), tmp_path / "mine.safetensors"
    words = ["calibrate", "--adapter", "diverse", "--plain", "plus", "--out", str(target)]
    words += ["--work", str(tmp_path / "work"), *TINY]
    assert main([*words, "--levers", "interpolation", "interval"]) == 0
    assert seen["start"] == Levers(interpolation=0.0)
    assert set(seen["ladders"]) == {"interpolation", "interval"}  # pyright: ignore[reportArgumentType]
    adapter, plain = load_adapter(target), load_file(adapter_source("critters", "plus"))
    assert all(torch.equal(adapter.plain[name], t.float()) for name, t in plain.items())
    assert adapter.spec["arm"] == load_adapter(source).spec["arm"], "what it said before is kept"
    dial = dial_of(adapter.spec, target)
    assert dial is not None
    assert dial.at(0.5).interpolation == pytest.approx(0.5)
    assert main([*words, "--levers", "nothing"]) == 2
    assert "are none that a dial may move" in capsys.readouterr().err
