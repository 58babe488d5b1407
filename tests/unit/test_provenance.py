"""The record inside a PNG."""

from __future__ import annotations

import json
import shlex
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ipdiverse import provenance
from ipdiverse.cli import main
from ipdiverse.errors import ArgumentError, ImageError, OutputError
from ipdiverse.provenance import as_text, read_provenance, save_png

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


def test_record_comes_back_and_pixels_are_untouched(tmp_path: Path):
    image, path = picture(), tmp_path / "a.png"
    save_png(image, path, RECORD)
    assert read_provenance(path) == RECORD
    with Image.open(path) as stored:
        assert stored.tobytes() == image.tobytes()


def test_a_shared_image_does_not_tell_of_folders_at_home(tmp_path: Path):
    home = str(tmp_path / "Anna's photos")
    request = {
        "image": [f"{home}/cat one.png", "pics/dog.png"],
        "base": f"{home}/models/mine",
        "adapter": "plus",
        "prompt": ["/imagine a cat"],
    }
    values = {"image": f"{home}/cat one.png", "base": f"{home}/models/mine", "out": home}
    flags = [f"--{name}={shlex.quote(value)}" for name, value in values.items()]
    command = " ".join(["ipdiverse generate", *flags, "--image=pics/dog.png", "--seed=3"])
    command += " --prompt='/imagine a cat --base=/x'"
    save_png(picture(), tmp_path / "a.png", {"command": command, "request": request})
    assert read_provenance(tmp_path / "a.png") == {
        "command": "ipdiverse generate --image='cat one.png' --base=mine "
        """--out='Anna'"'"'s photos' --image=pics/dog.png --seed=3 """
        "--prompt='/imagine a cat --base=/x'",
        "request": {
            "image": ["cat one.png", "pics/dog.png"],
            "base": "mine",
            "adapter": "plus",
            "prompt": ["/imagine a cat"],
        },
    }


def test_other_tools_see_a_line_that_people_can_read(tmp_path: Path):
    save_png(picture(), tmp_path / "a.png", {**RECORD, "prompt": "a red\n frog, größer\0"})
    with Image.open(tmp_path / "a.png") as stored:
        assert stored.text["parameters"] == "a red frog, größer\\x00 | seed: 3, diversity: 0.5"
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


def test_long_text_of_another_tool_hides_no_record(tmp_path: Path):
    workflow = chunk(b"iTXt", b"workflow\0\0\0\0\0" + b"x" * (provenance.MAX_RECORD_BYTES + 300))
    path = text_file(tmp_path / "a.png", workflow, record_chunk(b'{"seed": 1}'))
    assert read_provenance(path) == {"seed": 1}


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


def test_a_record_for_people_leaves_out_what_is_empty_and_cannot_steer_a_terminal():
    record = {
        "prompt": "a red\x1b[2J frog\n",
        "request": {"image": ["a", "b"], "seed": 0, "preset": "", "width": None, "mask": []},
        "versions": {"ipdiverse": "0.1.0", "torch": "2"},
        "notes": [],
    }
    lines = [
        r"  prompt    a red\x1b[2J frog",
        "  image     a, b",
        "  seed      0",
        "  versions  ipdiverse 0.1.0, torch 2",
    ]
    assert as_text(record) == "\n".join(lines)
    assert as_text({}) == ""


def test_inspect_says_how_a_picture_was_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "a.PNG"
    save_png(picture(), file, RECORD | {"command": "ipdiverse generate --seed=3"})
    assert main(["inspect", str(file)]) == 0
    first, *rows = capsys.readouterr().out.splitlines()
    assert first == str(file)
    assert rows == [
        "  prompt     a red frog",
        "  seed       3",
        "  diversity  0.5",
        "  levers     interval 0.2, 0.8",
        "  command    ipdiverse generate --seed=3",
    ]
    assert main(["inspect", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["levers"] == RECORD["levers"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a.png", "a.png: the image has no record of how it was made"),
        ("a.jpg", "a.jpg: this is not a PNG file"),
        ("absent.png", "absent.png: the image file does not exist"),
    ],
)
def test_inspect_says_in_a_line_that_a_picture_has_no_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, words: str
):
    if name != "absent.png":
        picture().save(tmp_path / name)
    assert main(["inspect", str(tmp_path / name)]) == 2
    out, error = capsys.readouterr()
    assert not out
    assert words in error
    assert error.count("\n") == 1
