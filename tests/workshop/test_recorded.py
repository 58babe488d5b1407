"""A study's readings: kept small, published, and taken in place of drawing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from ipdiverse.adapter.files.checkpoint import load_adapter, save_adapter
from ipdiverse.adapter.files.conversion import copy_with_spec
from ipdiverse.base.adapters import CRITTERS_ADAPTERS
from ipdiverse.critters.oracle import Reading
from ipdiverse.dial import OFF, Dial, Levers
from ipdiverse.errors import DataError
from ipdiverse.evaluation import images
from ipdiverse.evaluation.study import read_study
from workshop import recorded
from workshop.__main__ import main
from workshop.recorded import (
    Recorded,
    RecordedRunner,
    find_recorded,
    load_recorded,
    recorded_file,
)

ROOT = Path(__file__).parents[2]
PLUS = CRITTERS_ADAPTERS / "ip-adapter-plus_critters.safetensors"


DIAL = Dial(((0.0, OFF), (1.0, Levers(cads=0.2))), "made up").as_spec()


def study(folder: Path, adapter: Path, scale: float = 0.5) -> Path:
    """A study of one arm."""
    file = folder / "study.toml"
    file.write_text(
        "pairs = 2\nimages = 2\nsteps = 2\n"
        f'[[arm]]\nname = "half"\nadapters = ["{adapter.as_posix()}"]\nscale = {scale}\n'
    )
    return file


def scores(out: Path) -> Any:
    """Of every arm but the anchors."""
    return json.loads((out / "results.json").read_text())["arms"][0]["scores"]


def test_they_come_back_as_they_were(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    attributes = rng.integers(0, 7, (5, 3, 9))
    invalid = rng.random((5, 3)) < 0.3
    placement = rng.integers(0, 4, (5, 3, 5))
    Recorded(Reading(attributes, invalid, placement), {"steps": 4}).save(tmp_path / "a.npz")
    found = load_recorded(tmp_path / "a.npz")
    assert found is not None
    np.testing.assert_array_equal(found.seen.attributes, attributes)
    np.testing.assert_array_equal(found.seen.invalid, invalid)
    np.testing.assert_array_equal(found.seen.placement, placement)
    assert found.about == {"steps": 4}
    Recorded(Reading(attributes), {}).save(tmp_path / "d.npz")
    unknown = load_recorded(tmp_path / "d.npz")
    assert unknown is not None
    assert unknown.seen[1:] == (None, None), "a validity that nobody read is not zero"
    assert load_recorded(tmp_path / "b.npz") is None
    (tmp_path / "c.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:200])
    with pytest.raises(DataError, match="are not readings"):
        load_recorded(tmp_path / "c.npz")


def test_names_that_differ_only_in_signs_have_files_of_their_own(tmp_path: Path) -> None:
    assert recorded_file(tmp_path, "λ: scale 1", 0) != recorded_file(tmp_path, "w: scale 1", 0)
    assert recorded_file(tmp_path, "x", 0) != recorded_file(tmp_path, "x", 1)
    assert recorded_file(tmp_path, "../../x", 0).parent == tmp_path


def test_published_readings_are_taken_where_settings_and_weights_are_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tmp_path / "mine.safetensors"
    adapter.write_bytes(PLUS.read_bytes())
    drawn: list[int] = []
    real = images.sample_array

    def counting(base: Any, jobs: Any, *rest: Any) -> Any:
        drawn.append(len(jobs))
        return real(base, jobs, *rest)

    monkeypatch.setattr(images, "sample_array", counting)

    def run(name: str, config: Path, *more: str) -> int:
        out = ["--out", str(tmp_path / name)]
        return main(["study", str(config), *out, *more])

    published = tmp_path / "published"
    assert run("first", study(tmp_path, adapter), "--publish", str(published)) == 0
    assert drawn == [4]
    taken = ["--readings", str(published / "readings")]
    adapter.unlink()
    assert run("again", study(tmp_path, adapter), *taken) == 0, "weights that are gone are trusted"
    assert drawn == [4]
    assert scores(tmp_path / "again") == scores(tmp_path / "first")
    assert "half" in (tmp_path / "again" / "report.html").read_text()
    assert run("without", study(tmp_path, adapter)) == 2, "without readings they are missed"
    more = study(tmp_path, adapter).read_text() + '[[arm]]\nname = "later"\nadapter = "plus"\n'
    (tmp_path / "study.toml").write_text(more)
    assert run("part", tmp_path / "study.toml", *taken, "--partial") == 0
    assert drawn == [4], "nothing is drawn"
    part = json.loads((tmp_path / "part" / "results.json").read_text())
    assert part["left_out"] == ["later"]
    assert "not drawn yet: later" in (tmp_path / "part" / "report.html").read_text()
    (tmp_path / "runs" / "adapters").mkdir(parents=True)  # also how a hub id begins
    lost = study(tmp_path, Path("runs/adapters/lost/adapter.safetensors"))
    monkeypatch.chdir(tmp_path)
    assert run("lost", lost) == 2
    assert run("none", tmp_path / "study.toml", "--partial") == 2, "not even its baseline"
    copy_with_spec(PLUS, adapter, {"git_revision": "another", "dial": DIAL})
    assert run("same", study(tmp_path, adapter), *taken) == 0
    assert drawn == [4], "the same weights, trained or calibrated another day"
    adapter.write_bytes(PLUS.read_bytes())
    assert run("other", study(tmp_path, adapter, scale=0.25), *taken) == 0
    assert drawn == [4, 4], "other settings are drawn"
    monkeypatch.setattr(recorded, "CRITTERS_ORACLE", PLUS)
    assert run("read", study(tmp_path, adapter), *taken) == 0
    assert drawn == [4, 4, 4], "another oracle reads for itself"
    assert run("dash", study(tmp_path, adapter), *taken, "--partial") == 0
    assert drawn == [4, 4, 4], "or its attributes are reported"
    assert "retention" in scores(tmp_path / "dash")
    assert not {"invalid_rate", "asked_for", "placement_leak"} & scores(tmp_path / "dash").keys()
    monkeypatch.undo()
    monkeypatch.setattr(images, "sample_array", counting)
    diverse = load_adapter(CRITTERS_ADAPTERS / "ip-adapter-diverse_critters.safetensors")
    save_adapter(diverse, adapter, {})
    assert run("changed", study(tmp_path, adapter), *taken) == 0
    assert drawn == [4, 4, 4, 4], "other weights are drawn"


def test_asking_what_is_there_connects_to_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = tmp_path / "published"
    adapter = tmp_path / "runs" / "adapters" / "lost" / "adapter.safetensors"
    adapter.parent.mkdir(parents=True)
    adapter.write_bytes(PLUS.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    config = study(tmp_path, adapter.relative_to(tmp_path))  # also how a hub id begins
    command = ["study", str(config), "--out"]
    assert main([*command, "first", "--publish", str(published)]) == 0
    shutil.rmtree(tmp_path / "runs")  # as on a fresh clone
    asked: list[bool] = []

    def download(*_: Any, local_files_only: bool, **__: Any) -> str:
        asked.append(local_files_only)
        raise LocalEntryNotFoundError("it is not there")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    taken = ["--readings", str(published / "readings"), "--partial"]
    assert main([*command, "again", *taken]) == 0
    assert scores(tmp_path / "again") == scores(tmp_path / "first")
    assert asked
    assert all(asked)


def test_readings_of_version_0_1_are_found_under_the_names_of_today(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded, "RENAMED", {"shaking": "cads", "begin": "start"})
    about = {"settings": {"begin": 0.2}, "levers": {"shaking": 0.1}, "steps": 4}
    old = Recorded(Reading(np.zeros((2, 2, 9), int), np.zeros((2, 2), bool)), about)
    old.save(recorded_file(tmp_path, "family: shaking 0.1, begin 0.2", 0))
    found = find_recorded(tmp_path, "family: cads 0.1, start 0.2", 0)
    assert found is not None
    assert found.about == {"settings": {"start": 0.2}, "levers": {"cads": 0.1}, "steps": 4}
    assert find_recorded(tmp_path, "family: cads 0.2, start 0.2", 0) is None


@pytest.mark.parametrize("name", ["steps", "ends"])
def test_readings_of_weights_that_no_longer_ship_are_not_taken(name: str, tmp_path: Path) -> None:
    """The studies were drawn with earlier weights: nothing of today is told by them."""
    published = read_study(ROOT / "studies" / f"{name}.toml")
    folder = ROOT / "docs" / "study" / name / "readings"
    runner = RecordedRunner(published, tmp_path, folder, partial=True)
    assert not any(runner.recorded(arm, 0) for arm in published.arms)
