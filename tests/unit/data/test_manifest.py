"""The manifest: what is written is read back, and nothing leaves the folder."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import pytest

from ipdiverse.critters.make import make_dataset
from ipdiverse.data.manifest import Record, inside, manifest_text, read_manifest
from ipdiverse.data.prepare import PrepareOptions, prepare
from ipdiverse.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

RECORD = Record("images/ab/x.png", "a dög", "dog", None, "ab" * 32, 64, 48, "dog/x.png")


def write(folder: Path, *lines: Any) -> None:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metadata.jsonl").write_text(text, "utf-8")


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    records = [RECORD, replace(RECORD, reference="images/cd/y.png", subject=None, text="")]
    write(tmp_path, manifest_text(records))
    assert read_manifest(tmp_path) == records


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": None}, "text is None, expected a text"),
        ({"width": True}, "width is True, expected a whole number"),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"file_name": "../x.png"}, r"\.\./x\.png: the path leaves its root"),
        ({"reference": "/etc/passwd"}, "/etc/passwd: the path leaves its root"),
    ],
)
def test_a_broken_line_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, asdict(RECORD), asdict(RECORD) | change)
    with pytest.raises(DataError, match=rf"1 of 2 lines are broken; found line 2: .*{message}"):
        read_manifest(tmp_path)


def test_lines_that_are_no_records_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no prepared data.*ipdiverse prepare SOURCE --out"):
        read_manifest(tmp_path)
    write(tmp_path)
    with pytest.raises(DataError, match="has no lines"):
        read_manifest(tmp_path)
    write(tmp_path, "{cut off", [1], {"text": "x"})
    with pytest.raises(
        DataError, match=r"3 of 3 lines.*is not a JSON object.*missing file_name, subject"
    ):
        read_manifest(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(DataError, match=r"jsonl, line 1: is not text; expected utf-16"):
        read_manifest(tmp_path)


def test_a_folder_that_was_not_prepared_says_what_to_run(tmp_path: Path) -> None:
    folder = tmp_path / "my refs"
    make_dataset(folder, 2)
    with pytest.raises(DataError) as told:
        read_manifest(folder)
    assert str(told.value) == (
        f"{folder}/metadata.jsonl: was not written by prepare; found no sha256, width, height, "
        f"source. Run `ipdiverse prepare '{folder}' --out DIR`, and train on DIR."
    )
    prepare(str(folder), tmp_path / "DIR", PrepareOptions())
    assert len(read_manifest(tmp_path / "DIR")) == 2


def test_one_prepared_line_makes_the_others_broken(tmp_path: Path) -> None:
    write(tmp_path, asdict(RECORD), {"file_name": "x.png", "text": "x"})
    with pytest.raises(DataError, match=r"1 of 2 lines are broken; found line 2: missing subject"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "name", ["", "..", "a/../../b", "/a", "\\a", "..\\b", "C:/a", "C:a", "a\0b", "a/.."]
)
def test_a_path_that_climbs_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leaves its root"):
        inside(tmp_path, name)


def test_a_link_out_of_the_root_is_refused(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "door").symlink_to(outside)
    (root / "home").symlink_to(root)
    with pytest.raises(DataError, match="leaves its root through a link"):
        inside(root, "door/x.png")
    assert inside(root, "home/x.png") == root / "home" / "x.png"
    assert inside(root, "a/b c.png") == root / "a" / "b c.png"


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
def test_marks_that_json_strings_may_hold_end_no_line(mark: str, tmp_path: Path) -> None:
    records = [replace(RECORD, subject=f"a{mark}b", source=mark), RECORD]
    text = manifest_text(records)
    assert mark in text
    (tmp_path / "metadata.jsonl").write_bytes(text.replace("\n", "\r\n").encode())
    assert read_manifest(tmp_path) == records
