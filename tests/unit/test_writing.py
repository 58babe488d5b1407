"""Whole files or none."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from ipdiverse.errors import OutputError
from ipdiverse.writing import (
    ensure_writable_folder,
    file_hash,
    sync_folder,
    write_bytes_atomic,
    write_text_atomic,
)


def assert_explains(caught: pytest.ExceptionInfo, *words: object) -> None:
    line = str(caught.value)
    assert "\n" not in line
    assert all(str(word) in line for word in words), line


def fail_with(number: int):
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_text_and_bytes_are_written_exactly(tmp_path: Path):
    write_text_atomic(tmp_path / "a.txt", "größer\r\nline\n")
    write_bytes_atomic(str(tmp_path / "b"), b"\0\1")
    assert (tmp_path / "a.txt").read_bytes() == "größer\r\nline\n".encode()
    assert (tmp_path / "b").read_bytes() == b"\0\1"


def test_a_broken_character_does_not_cost_the_text(tmp_path: Path):
    write_text_atomic(tmp_path / "a.txt", "caf\udce9 noir")
    assert (tmp_path / "a.txt").read_text() == "caf? noir"


def test_an_existing_file_is_replaced(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("a long old text")
    write_text_atomic(path, "new")
    assert path.read_text() == "new"


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_files_have_ordinary_permissions(tmp_path: Path):
    (tmp_path / "ordinary").touch()
    write_bytes_atomic(tmp_path / "a", b"1")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("call", ["os.fsync", "pathlib.Path.replace"])
def test_a_failure_half_way_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
):
    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(call, fail_with(errno.ENOSPC))
    with pytest.raises(OutputError) as caught:
        write_bytes_atomic(tmp_path / "a", b"new")
    assert_explains(caught, tmp_path / "a", "no space left", "Free some space")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bytes_atomic(tmp_path / "a", b"new")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_synced_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(os, "open", fail_with(errno.EINVAL))
    sync_folder(tmp_path)


def test_a_folder_that_fails_to_sync_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "open", fail_with(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        sync_folder(tmp_path)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, ["no space left", "Free some space"]),
        (errno.EDQUOT, ["no space left"]),
        (errno.EACCES, ["may not be written to", "Choose another folder"]),
        (errno.EROFS, ["may not be written to"]),
        (errno.EIO, ["cannot be written", "Choose another path"]),
    ],
)
def test_each_cause_has_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: list[str]
):
    monkeypatch.setattr(os, "fsync", fail_with(number))
    with pytest.raises(OutputError) as caught:
        ensure_writable_folder(tmp_path / "out")
    assert_explains(caught, tmp_path / "out", os.strerror(number), *words)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent/a", ["does not exist", "Create it first"]),
        ("folder", ["in the way", "Choose another name"]),
        ("file/a", ["in the way"]),
        ("a\0b", ["cannot be written", "null byte"]),
    ],
)
def test_places_that_cannot_be_written(tmp_path: Path, name: str, words: list[str]):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError) as caught:
        write_bytes_atomic(tmp_path / name, b"1")
    assert_explains(caught, *words)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file"}


def test_a_writable_folder_is_made_and_left_empty(tmp_path: Path):
    folder = ensure_writable_folder(str(tmp_path / "a" / "b"))
    assert folder == tmp_path / "a" / "b"
    assert not list(folder.iterdir())
    assert ensure_writable_folder(folder) == folder


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_file_where_the_folder_should_be(tmp_path: Path, name: str):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError) as caught:
        ensure_writable_folder(tmp_path / name)
    assert_explains(caught, tmp_path / name, "in the way", "Choose another name")


@pytest.mark.skipif(
    os.name == "nt" or os.geteuid() == 0, reason="the administrator may write anywhere"
)
def test_a_folder_that_forbids_writing(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError) as caught:
        ensure_writable_folder(tmp_path)
    tmp_path.chmod(0o700)
    assert_explains(caught, "may not be written to", "Choose another folder")


def test_a_hash_is_that_of_the_bytes(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_hash(tmp_path / "a").startswith("ba7816bf8f01cfea")
