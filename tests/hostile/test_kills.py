"""Killed, cut off or out of space at any change: the same command then ends with the same bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from ipdiverse.writing import only_one
from tests.hostile.kills import Ended, Killer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.hostile.kills import End

STUDY = """
pairs = 2
images = 2
steps = 1
[[arm]]
name = "plain"
adapter = "plus"
[[arm]]
name = "half"
adapter = "plus"
scale = 0.5
"""
CACHE = "--changed 1 --cache-images hidden"
COMMANDS = {
    "prepare": "prepare s --out d",
    "embed": f"embed d {CACHE}",
    "train": f"train --data d --out r --steps 3 --batch 2 {CACHE} --checkpointing-steps 1 "
    "--checkpoints-total-limit 1 --tokens 2 --width 64 --depth 1 --ema 0.5 --fusion none "
    "--num-validation-images 1 --validate-every 2 --num-images-per-prompt 1 --validation-steps 1",
    "evaluate": "evaluate --config study.toml --out e",
    "calibrate": "calibrate --adapter plus --pairs 2 --images 4 --steps 3 --levers interval "
    "--work w --out c/dial.safetensors",
    "generate": "generate --image s/a.png --prompt x -n 3 --steps 1 --out g",
    "batch": "generate --batch jobs.jsonl --steps 1 --out b",
    "make": "critters make --out m --n 3",
}
FIT = "fit d --adapter plus --out space.safetensors"
"""Embeds first; then the few pictures here are too few for it."""
BEFORE: dict[str, tuple[str, ...]] = dict.fromkeys(("embed", "train", "fit"), ("prepare",))
HELD = {
    "prepare": "d",
    "embed": "d/embedded",
    "fit": "d/embedded",
    "train": "r",
    "evaluate": "e",
    "calibrate": "w",
    "generate": "g",
    "batch": "b",
    "make": "m",
}
"""The folder that a command holds while it works."""
MOST = {"train": 45, "evaluate": 24, "calibrate": 24}
"""Changes that are tried of commands that take seconds; of the others, each change is."""
ENDS: tuple[End, ...] = ("kill", "cut", "full")


@pytest.fixture(scope="module")
def killer() -> Iterator[Killer]:
    with Killer() as killer:
        yield killer


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills")


def start(killer: Killer, home: Path, name: str) -> Path:
    """A folder in which a command can run, made once."""
    folder = home / f"{name}-start"
    if not folder.exists():
        (folder / "s").mkdir(parents=True)
        for number, letter in enumerate("abc"):
            picture = Image.new("RGB", (96, 96), (40 * number, 80, 200 - 30 * number))
            picture.save(folder / "s" / f"{letter}.png")
            (folder / "s" / f"{letter}.txt").write_text(f"a picture {letter}")
        (folder / "study.toml").write_text(STUDY)
        jobs = [{"image": f"s/{letter}.png", "prompt": letter, "n": 2} for letter in "ab"]
        (folder / "jobs.jsonl").write_text("\n".join(map(json.dumps, jobs)))
        for earlier in BEFORE.get(name, ()):
            assert killer.run(folder, COMMANDS[earlier].split()).code == 0
    return folder


def whole(killer: Killer, home: Path, name: str) -> tuple[dict[str, bytes], int]:
    """What a command that nothing disturbs leaves, and how many changes it makes."""
    folder = home / f"{name}-whole"
    count = home / f"{name}-changes"
    if not folder.exists():
        shutil.copytree(start(killer, home, name), folder)
        done = killer.run(folder, COMMANDS[name].split())
        assert done.code == 0, done.printed
        count.write_text(str(done.changes))
    return tree(folder), int(count.read_text())


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its bytes; a journal without the times of source files."""
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    for name in [name for name in found if name.endswith("prepare.journal.jsonl")]:
        rows = [json.loads(line) for line in found[name].splitlines()]
        kept = [{k: v for k, v in row.items() if k not in ("stamp", "check")} for row in rows]
        found[name] = json.dumps(kept).encode()
    return found


def disturb(killer: Killer, home: Path, name: str, end: End, at: int) -> None:
    """End a command at a change and run it again: all is as if nothing had happened."""
    wanted, _ = whole(killer, home, name)
    folder = home / "elsewhere" / f"{name}-{end}-{at}"
    shutil.copytree(start(killer, home, name), folder)
    first = killer.run(folder, COMMANDS[name].split(), end, at)
    if end == "full":
        assert first.code in (0, 2), first.printed
        assert "Traceback" not in first.printed, first.printed
        errors = [line for line in first.printed.split("\n") if line.startswith("ipdiverse: ")]
        assert len(errors) == (first.code == 2), first.printed
    else:
        # `make` renders in processes of its own, and goes on to say that one was killed
        killed = (0, 137, -25, *([2] if name == "make" else []))
        assert first.code in killed, first.printed
        assert first.code != 2 or "a process that rendered was killed" in first.printed
    again = killer.run(folder, COMMANDS[name].split())
    assert again.code == 0, again.printed
    found = tree(folder)
    assert sorted(found) == sorted(wanted), (name, end, at)
    assert [file for file in wanted if found[file] != wanted[file]] == [], (name, end, at)
    shutil.rmtree(folder)


def points(changes: int, most: int, shift: int) -> list[int]:
    """At most so many changes, evenly spread; other ones for each shift of 0 to 2."""
    count = min(changes, most)
    return [1 + (3 * number + shift) * changes // (3 * count) for number in range(count)]


def test_points_are_spread_and_differ_by_shift() -> None:
    assert points(5, 9, 0) == points(5, 9, 2) == [1, 2, 3, 4, 5]
    assert [points(100, 5, shift) for shift in range(3)] == [
        [1, 21, 41, 61, 81],
        [7, 27, 47, 67, 87],
        [14, 34, 54, 74, 94],
    ]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("name", ["prepare", "embed", "train"])
def test_ended_at_a_change_it_goes_on(name: str, end: End, killer: Killer, home: Path) -> None:
    _, changes = whole(killer, home, name)
    disturb(killer, home, name, end, at=changes * (2 + ENDS.index(end)) // 5)


def one_line(done: Ended, said: str) -> None:
    assert done.code == 2, done.printed
    assert "Traceback" not in done.printed, done.printed
    (line,) = [line for line in done.printed.split("\n") if line.startswith("ipdiverse: ")]
    assert said in line


@pytest.mark.parametrize("name", HELD)
def test_a_folder_in_use_and_a_full_disk_are_one_line(
    name: str, killer: Killer, home: Path, tmp_path: Path
) -> None:
    words = (COMMANDS | {"fit": FIT})[name].split()
    shutil.copytree(start(killer, home, name), tmp_path, dirs_exist_ok=True)
    one_line(killer.run(tmp_path, words, "full", 1), "there is no space left")
    (tmp_path / HELD[name]).mkdir(parents=True, exist_ok=True)
    before = {file: data for file, data in tree(tmp_path).items() if ".lock" not in file}
    with only_one(tmp_path / HELD[name]):
        one_line(killer.run(tmp_path, words), "another process is at work in this folder")
    assert {file: data for file, data in tree(tmp_path).items() if ".lock" not in file} == before


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("name", COMMANDS)
def test_ended_at_any_change_it_goes_on(name: str, end: End, killer: Killer, home: Path) -> None:
    _, changes = whole(killer, home, name)
    for at in points(changes, MOST.get(name, changes), ENDS.index(end)):
        disturb(killer, home, name, end, at)
