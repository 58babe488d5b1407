"""Lists of images: every form and dialect, and what is refused, with its line."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from unicodedata import normalize

import pytest
from PIL import Image

from ipdiverse.data.lists import columns_of, list_source, read_rows
from ipdiverse.data.manifest import SourceOptions
from ipdiverse.data.sources import open_source
from ipdiverse.errors import DataError
from ipdiverse.image_io import load_image

if TYPE_CHECKING:
    from pathlib import Path

ROWS = [{"file_name": "a.png", "text": "a dog, on grass"}, {"file_name": "b.png", "text": "b"}]
LINES = [json.dumps(row) for row in ROWS]
READ = {
    "json lines": "\n".join(LINES),
    "commas after lines": ",\n".join(LINES) + ",\n",
    "a list": json.dumps(ROWS, indent=1),
    "a list, one row a line": "[\n" + ",\n".join(LINES) + "\n]",
    "by name": json.dumps({r["file_name"]: {"caption": r["text"]} for r in ROWS}),
    "by name, texts": json.dumps({r["file_name"]: r["text"] for r in ROWS}),
    "commas": 'file_name,text\na.png,"a dog, on grass"\nb.png,b\n',
    "commas and spaces": 'file_name, text\r\na.png, "a dog, on grass"\r\n\r\nb.png, b,\r\n',
    "semicolons": "Text;File_Name\na dog, on grass;a.png\nb;b.png\n",
    "tabs": "file_name\tcaption\na.png\ta dog, on grass\nb.png\tb",
    "bars": " FILE_NAME |prompt\na.png|a dog, on grass\nb.png|b",
}


def read(folder: Path, text: str | bytes, name: str = "l.json", **options: Any) -> list[Any]:
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    source = list_source(folder / name, SourceOptions(**options))
    items = list(source.items())
    assert source.count == len(items)
    return [(i.name.split("#")[0], i.problem or i.text) for i in items]


@pytest.mark.parametrize("form", READ)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_every_form_is_read_whatever_it_is_called(form: str, encoding: str, tmp_path: Path) -> None:
    names = ("l.jsonl", "l.json") if form.startswith("json") else ("l.json", "l.csv", "l.txt")
    for name in names:
        found = read(tmp_path, READ[form].encode(encoding), name)
        assert found == [("a.png", "a dog, on grass"), ("b.png", "b")]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "file_name,text\nz.png,z\na.png,a dog, on grass\n",
            "line 3 has 3 cells for 2 columns; quote captions that contain commas",
        ),
        (
            "file_name;text\nz.png;z\na.png;a; b\n",
            "line 3 has 3 cells for 2 columns; quote captions that contain semicolons",
        ),
        ('{"file_name": "z"}\n{"file_name": "a', "line 2 is not JSON: Unterminated string"),
        ('{"file_name": "z"}\n7\n', "line 2 is not a JSON object"),
        ('{"file_name": "z"}\n{"file_name": 7}\n', "line 2 names no image in 'file_name'"),
        ('{"file_name": "z"}\n{"file_name": "a", "text": ["x"]}\n', "text is not a text: ['x']"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(text: str, problem: str, tmp_path: Path) -> None:
    _, (_, reason) = read(tmp_path, text)
    assert reason.startswith(problem)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "file_name,text\na.png,one\nb.png,gr\xfcn".encode("latin-1"),
            r"line 3: is not text; .*0xfc",
        ),
        ('file_name,text\na.png,one\nb.png,"two\nc.png,three', r"line 4: cannot be read; .*quotes"),
        ('[{"file_name": "a.png"},\n]', "cannot be read; expected JSON; found .* line 2"),
        ('{"images": [1]}', "is not a list of images"),
        ("[" * 100_000, "cannot be read"),
        ("", "has no row that can be read; found no rows"),
        ("7\n8\n", "has no row|has no image column"),
        ("a.png,a dog\nb.png,a cat", "has no image column; .*--image-column"),
        (
            "file_name,label\na.png,dog",
            r"no text column; .*found label\. Name it with --text-column",
        ),
    ],
)
def test_a_list_that_cannot_be_read_is_one_line(
    text: bytes | str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message) as told:
        read(tmp_path, text)
    assert "\n" not in str(told.value)


def test_the_first_caption_that_is_not_empty_counts(tmp_path: Path) -> None:
    rows = [{"image": "a", "text": " ", "caption": "full"}, {"image": "b", "Text": "t"}]
    assert read(tmp_path, "\n".join(map(json.dumps, rows))) == [("a", "full"), ("b", "t")]
    assert columns_of([{"image": "a", "size": "512", "url": "x"}], None, None, "l") == ("image", [])
    assert read(tmp_path, "image,label\na,dog", text_column="") == [("a", None)]
    assert read(tmp_path, "image,label\na,dog", text_column="LABEL ") == [("a", "dog")]
    assert read(tmp_path, b"image,text\na,gr\xfcn", encoding="cp1252") == [("a", "grün")]


def test_a_list_is_read_row_by_row(tmp_path: Path) -> None:
    (tmp_path / "l.jsonl").write_text('{"file_name": "a.png"}\n' * 5 + "\xff")
    rows = read_rows(tmp_path, "l.jsonl")
    assert next(rows) == ("line 1", {"file_name": "a.png"})


@pytest.mark.parametrize(("listed", "there"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_are_found_in_either_form_of_unicode(listed: str, there: str, tmp_path: Path) -> None:
    """macOS decomposes accents, most lists compose them."""
    for stem in ("caf\u00e9", "\u304c"):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{normalize(there, stem)}.png")
    rows = [
        {
            "file_name": normalize(listed, "caf\u00e9.png"),
            "reference": normalize(listed, "\u304c.png"),
        },
        {"file_name": normalize(listed, "\u304c.png")},
    ]
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source(str(tmp_path), SourceOptions(text_column=""))
    items = list(source.items())
    assert source.kind == "metadata"
    assert all(item.load().startswith(b"\x89PNG") for item in items)
    assert items[0].load_reference is not None
    assert items[0].load_reference().startswith(b"\x89PNG")
    assert all(item.stamp is not None and "missing" not in item.stamp() for item in items)
    assert source.unused() == {}


@pytest.mark.parametrize(("listed", "there"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_captions_and_single_images_are_found_in_either_form(
    listed: str, there: str, tmp_path: Path
) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / normalize(there, "\u00c9t\u00e9.png"))
    (tmp_path / normalize(listed, "\u00c9t\u00e9.txt")).write_text("summer")
    (item,) = open_source(str(tmp_path), SourceOptions()).items()
    assert item.text == "summer"
    assert load_image(tmp_path / normalize(listed, "\u00c9t\u00e9.png")).size == (32, 32)
