from __future__ import annotations

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from ipdiverse.cli import main
from ipdiverse.critters.make import example, make_dataset
from ipdiverse.critters.scene import IDENTITY, SPLITS, _split_of_subject
from ipdiverse.errors import ArgumentError, OutputError
from tests.captions import parse

if TYPE_CHECKING:
    from pathlib import Path


def rows(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").open()]


def test_images_and_manifest_are_written(tmp_path: Path) -> None:
    assert make_dataset(tmp_path, 12, pairs=True) == 24
    written = rows(tmp_path)
    assert len(written) == 12
    for row in written:
        assert np.asarray(Image.open(tmp_path / row["file_name"])).shape == (64, 64, 3)
        assert Image.open(tmp_path / row["reference"]).size == (64, 64)
        shape, colour, *_ = row["subject"].split("-")
        stated = parse(row["text"])
        assert stated.get("colour", colour) == colour
        assert stated.get("shape", shape) == shape
    assert len(list((tmp_path / "images").iterdir())) == 24


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_holds_its_own_identities_alone(split: str, tmp_path: Path) -> None:
    make_dataset(tmp_path, 8, split=split)
    assert {_split_of_subject(row["subject"]) for row in rows(tmp_path)} == {split}


def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_dataset(tmp_path / name, 5, seed=seed, size=32)
    files = [sorted((tmp_path / n).rglob("*.*")) for n in "abc"]
    files = [[f for f in folder if f.is_file()] for folder in files]
    contents = [[f.read_bytes() for f in folder] for folder in files]
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


def test_datasets_opens_it_as_an_image_folder(tmp_path: Path) -> None:
    from datasets import load_dataset

    make_dataset(tmp_path / "data", 4)
    loaded = load_dataset(
        "imagefolder", data_dir=str(tmp_path / "data"), cache_dir=str(tmp_path / "cache")
    )["train"]
    assert len(loaded) == 4
    assert {"image", "text", "subject"} <= set(loaded.column_names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n: is out of range; expected 1 to 10000000; found 0"),
        ({"n": 3, "size": 8}, "size: is out of range; expected 16 to 2048; found 8"),
        ({"n": 3, "split": "tset"}, "split: is unknown; expected train, validation, test"),
    ],
)
def test_impossible_arguments_are_named(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make_dataset(tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["critters", "make", "-n", "3", "--out", str(tmp_path / "d")]) == 0
    assert "wrote 3 images" in capsys.readouterr().out


def different(one: object, other: object) -> list[str]:
    """Attributes of identity in which two scenes differ."""
    return [name for name in IDENTITY if getattr(one, name) != getattr(other, name)]


def test_a_share_of_examples_states_what_the_reference_has_not() -> None:
    made = [example(index, 0, "train", 0.5) for index in range(200)]
    changed = [one for one in made if different(one.scene, one.other)]
    assert 70 < len(changed) < 130
    for one in changed:
        (name,) = different(one.scene, one.other)
        assert parse(one.text)[name] == getattr(one.scene, name)
    same = [example(index, 0, "train") for index in range(200)]
    assert not any(different(one.scene, one.other) for one in same)
    kept = [a.text == b.text for a, b in zip(made, same, strict=True) if a not in changed]
    assert all(kept), "the others stay as they were"


def test_a_data_set_grows_and_is_made_again_in_its_own_folder(tmp_path: Path) -> None:
    make_dataset(tmp_path, 2)
    first = (tmp_path / "images" / "0000000.png").stat()
    make_dataset(tmp_path, 3)
    again = (tmp_path / "images" / "0000000.png").stat()
    # not the time of reading, which checking the picture changes
    assert (again.st_ino, again.st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    assert len(rows(tmp_path)) == 3
    make_dataset(tmp_path, 2)
    assert len(rows(tmp_path)) == 2


@pytest.mark.parametrize("name", ["metadata.jsonl", "images/0000001.png"])
def test_files_of_others_are_not_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match=rf"{name}: is there already, and is not of this data"):
        make_dataset(tmp_path, 2)
    assert (tmp_path / name).read_text() == "mine"


def test_another_data_set_is_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_dataset(tmp_path, 2)
    before = {f: f.read_bytes() for f in tmp_path.rglob("*.*") if f.is_file()}
    for more in (["--seed", "1"], ["--pairs"], ["--size", "32"]):
        assert main(["critters", "make", "-n", "2", "--out", str(tmp_path), *more]) == 2
        assert "is not of this data set. Choose a new folder" in capsys.readouterr().err
        assert {f: f.read_bytes() for f in tmp_path.rglob("*.*") if f.is_file()} == before


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ipdiverse.critters.make.ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OutputError, match=r"there is no space left; .*Free some space"):
        make_dataset(tmp_path, 2)


def _killed(*_: object, **__: object) -> None:
    os._exit(9)


def test_a_process_that_is_killed_is_said_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ipdiverse.critters.make._write_one", _killed)
    with pytest.raises(OutputError, match=r"a process that rendered was killed\. Run the same"):
        make_dataset(tmp_path / "m", 3)
