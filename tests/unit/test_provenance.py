"""Writing whole files, and the record inside a PNG."""

from __future__ import annotations

import errno
import json
import os
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ipdiverse import provenance
from ipdiverse.errors import ArgumentError, ImageError, OutputError
from ipdiverse.provenance import (
    ensure_writable_folder,
    read_provenance,
    save_png,
    write_bytes_atomic,
    write_text_atomic,
)

RECORD = {"prompt": "a red frog", "seed": 3, "diversity": 0.5, "levers": {"interval": [0.2, 0.8]}}
SIGNATURE = b"\x89PNG\r\n\x1a\n"
END = b"\0\0\0\0IEND\xaeB`\x82"


def picture() -> Image.Image:
    return Image.effect_noise((32, 24), 60).convert("RGB")


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def record_chunk(text: bytes, *, compressed: bool = False) -> bytes:
    flags = b"\1\0" if compressed else b"\0\0"
    return chunk(b"iTXt", b"ipdiverse\0" + flags + b"\0\0" + text)


def text_file(path: Path, *chunks: bytes) -> Path:
    path.write_bytes(SIGNATURE + b"".join(chunks) + END)
    return path


def assert_explains(caught: pytest.ExceptionInfo, *words: object) -> None:
    line = str(caught.value)
    assert "\n" not in line
    assert all(str(word) in line for word in words), line


def fail_with(number: int):
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_record_comes_back_and_pixels_are_untouched(tmp_path: Path):
    image, path = picture(), tmp_path / "a.png"
    save_png(image, path, RECORD)
    assert read_provenance(path) == RECORD
    with Image.open(path) as stored:
        assert stored.tobytes() == image.tobytes()


def test_other_tools_see_a_line_that_people_can_read(tmp_path: Path):
    save_png(picture(), tmp_path / "a.png", {**RECORD, "prompt": "a red\n frog, größer\0"})
    with Image.open(tmp_path / "a.png") as stored:
        assert stored.text["parameters"] == "a red frog, größer | seed: 3, diversity: 0.5"
        assert json.loads(stored.text["ipdiverse"])["seed"] == 3


def test_nothing_but_the_image_is_left_in_the_folder(tmp_path: Path):
    save_png(picture(), tmp_path / "a.png", RECORD)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_the_same_call_gives_the_same_bytes(tmp_path: Path):
    image = picture()
    for name in ("a.png", "b.png"):
        save_png(image, tmp_path / name, RECORD)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(), st.text(st.characters()) | st.integers() | st.booleans()))
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, record: dict):
    path = tmp_path_factory.mktemp("any") / "a.png"
    save_png(picture(), path, record)
    assert read_provenance(path) == record


def test_broken_unicode_from_a_command_line_survives(tmp_path: Path):
    save_png(picture(), tmp_path / "a.png", {"prompt": "caf\udce9"})
    assert read_provenance(tmp_path / "a.png") == {"prompt": "caf\udce9"}


@pytest.mark.parametrize("name", ["a.jpg", "a"])
def test_only_png_names_are_taken(tmp_path: Path, name: str):
    with pytest.raises(OutputError) as caught:
        save_png(picture(), tmp_path / name, RECORD)
    assert_explains(caught, name, "PNG only", "ends in .png", "Change the extension")


def test_a_mode_that_png_lacks_is_refused(tmp_path: Path):
    with pytest.raises(OutputError) as caught:
        save_png(picture().convert("CMYK"), tmp_path / "a.png", RECORD)
    assert_explains(caught, "a.png", "cannot be stored as PNG", "CMYK")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), object(), b"bytes"])
def test_a_record_beyond_json_is_refused(tmp_path: Path, value: object):
    with pytest.raises(ArgumentError) as caught:
        save_png(picture(), tmp_path / "a.png", {"value": value})
    assert_explains(caught, "record", "cannot be stored as JSON")
    assert not list(tmp_path.iterdir())


def test_too_large_a_record_is_refused(tmp_path: Path):
    with pytest.raises(ArgumentError) as caught:
        save_png(picture(), tmp_path / "a.png", {"value": "x" * provenance.MAX_RECORD_BYTES})
    assert_explains(caught, "record", "too large", "1048576 bytes")


def test_a_record_of_the_largest_size_comes_back(tmp_path: Path):
    record = {"v": "x" * (provenance.MAX_RECORD_BYTES - len('{"v": ""}'))}
    save_png(picture(), tmp_path / "a.png", record)
    assert read_provenance(tmp_path / "a.png") == record


def test_an_image_without_a_record(tmp_path: Path):
    picture().save(tmp_path / "a.png")
    with pytest.raises(ImageError) as caught:
        read_provenance(tmp_path / "a.png")
    assert_explains(caught, "a.png", "no record", '"ipdiverse"', "found none", "Only PNG files")


def test_a_record_of_somebody_else_is_not_ours(tmp_path: Path):
    other = chunk(b"iTXt", b'ipdiverse2\0\0\0\0\0{"seed": 1}')
    with pytest.raises(ImageError, match="no record"):
        read_provenance(text_file(tmp_path / "a.png", other))


def test_a_jpeg_has_no_record(tmp_path: Path):
    picture().save(tmp_path / "a.jpg")
    with pytest.raises(ImageError) as caught:
        read_provenance(tmp_path / "a.jpg")
    assert_explains(caught, "a.jpg", "not a PNG", "Only PNG files carry a record")


def test_a_record_after_the_pixels_and_a_compressed_one_are_found(tmp_path: Path):
    text = zlib.compress(b'{"seed": 1}')
    path = text_file(
        tmp_path / "a.png", chunk(b"IDAT", b"pixels"), record_chunk(text, compressed=True)
    )
    assert read_provenance(path) == {"seed": 1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{", ["damaged", "expected JSON"]),
        (b"[1]", ["damaged", "a JSON object", "list"]),
        (b"\xff\xfe", ["damaged"]),
        (b"[" * 500_000, ["damaged"]),
        (b"x" * (provenance.MAX_RECORD_BYTES + 300), ["too large", "1048576"]),
        (b"\x80\x04cos\nsystem\n.", ["damaged"]),
    ],
)
def test_a_broken_record(tmp_path: Path, text: bytes, words: list[str]):
    with pytest.raises(ImageError) as caught:
        read_provenance(text_file(tmp_path / "a.png", record_chunk(text)))
    assert_explains(caught, "a.png", "record", "Use the original file", *words)


def test_a_record_that_inflates_without_end(tmp_path: Path):
    text = zlib.compress(b" " * 50_000_000)
    with pytest.raises(ImageError) as caught:
        read_provenance(text_file(tmp_path / "a.png", record_chunk(text, compressed=True)))
    assert_explains(caught, "too large", "found more")


def test_a_record_that_does_not_inflate(tmp_path: Path):
    with pytest.raises(ImageError) as caught:
        read_provenance(text_file(tmp_path / "a.png", record_chunk(b"no zlib", compressed=True)))
    assert_explains(caught, "damaged", "compressed text")


def test_a_flipped_bit_in_the_record_is_noticed(tmp_path: Path):
    path = tmp_path / "a.png"
    save_png(picture(), path, RECORD)
    path.write_bytes(path.read_bytes().replace(b'"seed": 3', b'"seed": 4'))
    with pytest.raises(ImageError) as caught:
        read_provenance(path)
    assert_explains(caught, "damaged", "checksum")


def test_a_png_cut_short_before_its_record(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(SIGNATURE + b"\0\0")
    with pytest.raises(ImageError, match="no record"):
        read_provenance(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("name", "words"),
    [("absent.png", "does not exist"), (".", "a folder"), ("a\0b", "cannot be read")],
)
def test_a_record_from_nowhere(tmp_path: Path, name: str, words: str):
    with pytest.raises(ImageError, match=words):
        read_provenance(tmp_path / name)


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
    provenance._sync_folder(tmp_path)


def test_a_folder_that_fails_to_sync_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "open", fail_with(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        provenance._sync_folder(tmp_path)


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
