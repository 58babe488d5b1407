"""Whole files or none."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from ipdiverse.errors import OutputError
from ipdiverse.writing import (
    _mark,
    append_text,
    ensure_writable_folder,
    file_hash,
    only_one,
    safetensors_bytes,
    sealed,
    sync_folder,
    unsealed,
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


def test_one_process_holds_a_folder_and_tidies_it(tmp_path: Path) -> None:
    beside, inner = tmp_path / "other", tmp_path / "run" / "inner"
    for folder in (beside, inner, tmp_path / "run" / "plain"):
        folder.mkdir(parents=True)
        (folder / f".{'1' * 32}.tmp").touch()
        (folder / ".mine.tmp").touch()
    (inner / ".lock").touch()  # a folder of its own
    target = beside / "a.bin"
    (beside / f".{_mark(target)}{'0' * 20}.tmp").touch()
    with only_one(tmp_path / "run", target):
        left = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob(".*.tmp"))
        with (
            pytest.raises(OutputError, match="run: another process is at work in this folder"),
            only_one(tmp_path / "run"),
        ):
            pass
    zeros = f".{'1' * 32}.tmp"
    assert left == [
        f"other/{zeros}",
        "other/.mine.tmp",
        f"run/inner/{zeros}",
        "run/inner/.mine.tmp",
        "run/plain/.mine.tmp",
    ]
    with only_one(tmp_path / "run"):
        pass


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys, time; from ipdiverse.writing import only_one\n"
        "with only_one(sys.argv[1]): print(flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE)
    process.stdout.readline()  # type: ignore[union-attr]
    with pytest.raises(OutputError, match="another process"), only_one(tmp_path):
        pass
    process.kill()
    process.wait()
    with only_one(tmp_path):
        pass


def test_a_sealed_object_comes_back_or_is_refused() -> None:
    text = sealed({"a": 1.5, "b": ["ü", None]})
    assert unsealed(text) == {"a": 1.5, "b": ["ü", None]}
    assert unsealed('{"a": 1}') == {"a": 1}, "version 0.1 sealed nothing"
    for place in range(text.index("b")):
        damaged = text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1 :]
        with pytest.raises(ValueError, match=r"."):
            unsealed(damaged)
    with pytest.raises(ValueError, match="not a JSON object"):
        unsealed("[]")


@pytest.mark.parametrize("write", [append_text, write_text_atomic])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_space_is_one_line(
    number: int, write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OutputError, match=r"x\.txt: there is no space left"):
        write(tmp_path / "x.txt", "text")


def test_safetensors_of_one_content_have_the_same_bytes() -> None:
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.float16)}
    about = {"format": "pt", "key": "x", "λ": "ü"}
    made = {safetensors_bytes(tensors, about) for _ in range(20)}
    assert len(made) == 1
    assert all(torch.equal(t, tensors[n]) for n, t in load(made.pop()).items())
