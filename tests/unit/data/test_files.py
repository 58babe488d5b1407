"""Files of a data set: nothing out of the root, nothing over its budget, nothing garbled."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from ipdiverse.data import files as module
from ipdiverse.data.files import (
    inside,
    list_files,
    open_below,
    picture_below,
    read_below,
    text_lines,
)
from ipdiverse.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path


def test_links_are_followed_inside_the_root_alone(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "deep").mkdir(parents=True)
    (root / "deep" / "a.txt").write_text("mine")
    (tmp_path / "secret").write_text("secret")
    (root / "good").symlink_to("deep/a.txt")
    (root / "bad").symlink_to(tmp_path / "secret")
    (root / "self").symlink_to("self")
    assert read_below(root, "good", 10) == b"mine"
    for name, message in (
        ("bad", "leaves its root"),
        ("self", "a link to itself"),
        ("no", "exist"),
    ):
        with pytest.raises(DataError, match=message):
            read_below(root, name, 10)
    Image.new("RGB", (20, 16)).save(tmp_path / "secret.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match=r"link\.png: the path leaves its root through a link"):
        picture_below(root, "link.png")
    (root / "deep" / "own.png").write_bytes((tmp_path / "secret.png").read_bytes())
    assert picture_below(root, "deep/own.png").size == (20, 16)


@pytest.mark.parametrize("swapped", ["file", "folder"])
def test_a_name_that_becomes_a_link_after_the_check_reaches_nothing(
    swapped: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, away = tmp_path / "root", tmp_path / "away"
    for folder in (root / "deep", away):
        folder.mkdir(parents=True)
        (folder / "a.txt").write_text(folder.name)
    check = module._descriptor

    def swap(*arguments: object) -> int:
        steps = module._steps(root, root / "deep" / "a.txt")
        monkeypatch.setattr(module, "_steps", lambda *_: steps)
        if swapped == "file":
            (root / "deep" / "a.txt").unlink()
            (root / "deep" / "a.txt").symlink_to(away / "a.txt")
        else:
            (root / "deep").rename(root / "before")
            (root / "deep").symlink_to(away)
        return check(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_descriptor", swap)
    with pytest.raises(DataError, match=r"cannot be read|does not exist"):
        read_below(root, "deep/a.txt", 10)


def test_pipes_and_what_is_too_large_are_refused_unread(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe: is not a file"):
        open_below(tmp_path, "pipe", 10)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match="is too large; expected at most 10 bytes; found 1099511"):
        open_below(tmp_path, "sparse", 10)


@pytest.mark.parametrize("name", ["\ud800.png", "a" * 300, "a/" * 3000 + "b", "\udcff"])
def test_names_that_no_system_has_are_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read|does not exist|leaves its root") as told:
        read_below(tmp_path, name, 10)
    assert len(str(told.value)) < 700
    str(told.value).encode()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-be"])
def test_a_mark_tells_the_encoding(encoding: str) -> None:
    data = "\ufeffä dog\nb\n" if encoding == "utf-16-be" else "ä dog\nb\n"
    lines = list(text_lines(io.BytesIO(data.encode(encoding)), "x", "utf-8"))
    assert "".join(line.strip() for _, line in lines) == "ä dogb"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a\ngr\xfcn\n", r"x, line 2: is not text; expected utf-8; found byte 0xfc at position 2"),
        ("a\n".encode("utf-16-le"), "line 1: is not text; .*NUL"),
        (bytes(2 << 20), "line 1: is too large; expected at most 1048576 bytes"),
    ],
)
def test_what_is_not_text_is_refused_with_its_line(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(text_lines(io.BytesIO(data), "x", "utf-8"))
    assert list(text_lines(io.BytesIO(b"gr\xfcn"), "x", "latin-1")) == [(1, "grün")]


def test_lines_are_counted_before_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINES", 3)
    monkeypatch.setattr(module, "ENTRIES", 3)
    with pytest.raises(DataError, match="at most 3 lines"):
        list(text_lines(io.BytesIO(b"a\n" * 9), "x", "utf-8"))


def test_a_listing_does_not_enter_links_or_prepared_folders(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/10.png", "a.png", ".hidden/c.png", "out/prepare.json", "out/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to(tmp_path)
    found = list_files(tmp_path)
    assert found.files == ("a.png", "b/10.png", "b/2.png")
    assert found.skipped == {
        "links to folders": ["link"],
        "folders that prepare wrote": ["out"],
    }
    with pytest.raises(DataError, match="is not a folder"):
        list_files(tmp_path / "a.png")
    assert inside(tmp_path, "a.png") == tmp_path / "a.png"
