"""Every kind of source: recognised by looking, and read with names, words and subjects."""

from __future__ import annotations

import csv
import io
import json
import sys
import tarfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from ipdiverse.data.manifest import Item
from ipdiverse.data.sources import SourceOptions, kind_of, open_source, subject_class
from ipdiverse.errors import DataError
from ipdiverse.image_io import load_image_bytes
from tests.captions import parse

if TYPE_CHECKING:
    from pathlib import Path


def png(seed: int = 0, size: tuple[int, int] = (24, 20)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def put(file: Path, data: bytes | str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data.encode() if isinstance(data, str) else data)
    return file


def items(source: Path | str, kind: str | None = None, **options: Any) -> list[Item]:
    if kind is not None:
        assert kind_of(str(source)) == kind
    opened = open_source(str(source), SourceOptions(**options))
    first, second = list(opened.items()), list(opened.items())
    assert [item.name for item in first] == [item.name for item in second], "the same each time"
    assert len({item.name for item in first}) == len(first), "names are keys"
    assert opened.count in (None, len(first))
    return first


def test_images_with_their_captions_beside_them(tmp_path: Path) -> None:
    put(tmp_path / "b.png", png())
    put(tmp_path / "b.txt", "a bee\n")
    put(tmp_path / "deep" / "a.JPG", png())
    put(tmp_path / ".hidden.png", png())
    put(tmp_path / "notes.md", "no image")
    found = items(tmp_path, "captions")
    assert [(i.name, i.text, i.subject) for i in found] == [
        ("b.png", "a bee", None),
        ("deep/a.JPG", "", None),
    ]
    assert load_image_bytes(found[0].load()).size == (24, 20)


def test_folders_of_subjects_are_captioned_by_class(tmp_path: Path) -> None:
    for name in ("bear_plushie/0.png", "bear_plushie/1.png", "dog2/0.png", "can/0.png"):
        put(tmp_path / name, png())
    put(tmp_path / "dog2" / "0.txt", "a dog in the sun")
    put(
        tmp_path / "prompts_and_classes.txt",
        "Classes\n\nsubject_name,class\ncan,tin\u2028can\nx,y\n",
    )
    found = items(tmp_path, "subjects")
    assert [(i.name, i.text, i.subject) for i in found] == [
        ("bear_plushie/0.png", "a photo of a bear plushie", "bear_plushie"),
        ("bear_plushie/1.png", "a photo of a bear plushie", "bear_plushie"),
        ("can/0.png", "a photo of a tin\u2028can", "can"),
        ("dog2/0.png", "a dog in the sun", "dog2"),
    ]
    assert subject_class("42") == "42"


def test_metadata_of_an_image_folder(tmp_path: Path) -> None:
    put(tmp_path / "i" / "a.png", png(1))
    put(tmp_path / "i" / "b.png", png(2))
    rows = [
        {"file_name": "i/a.png", "text": "one", "subject": "s", "reference": "i/b.png"},
        {"file_name": "i/a.png", "text": "two"},
        {"text": "no image"},
        {"file_name": "i/a.png", "text": 3},
        "no object",
    ]
    put(tmp_path / "metadata.jsonl", "\n".join(json.dumps(row) for row in rows))
    one, two, *wrong = items(tmp_path, "metadata")
    assert (one.text, one.subject, two.text, two.load_reference) == ("one", "s", "two", None)
    assert one.load_reference is not None
    assert one.load_reference() == png(2)
    problems = [item.problem for item in wrong]
    assert problems == [
        "line 3 names no image in 'file_name'",
        "text is not a text: 3",
        "line 5 is not a JSON object",
    ]


def test_csv_and_the_original_trainers_json_with_a_root(tmp_path: Path) -> None:
    put(tmp_path / "pictures" / "a.png", png())
    with (tmp_path / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "caption"], ["a.png", 'a "b", c']])
    put(tmp_path / "output.json", json.dumps([{"image_file": "a.png", "text": "x"}]))
    root = str(tmp_path / "pictures")
    for name, kind, text in (("list.csv", "metadata", 'a "b", c'), ("output.json", "json", "x")):
        (item,) = items(tmp_path / name, kind, root=root)
        assert (item.text, item.load()) == (text, png())
    (other,) = items(tmp_path / "list.csv", root=root, text_column="path")
    assert other.text == "a.png"
    (hostile,) = items(put(tmp_path / "h.json", '[{"image_file": "../x.png"}]'))
    with pytest.raises(DataError, match="leaves its root"):
        hostile.load()


def test_webdataset_tars_are_read_without_unpacking(tmp_path: Path) -> None:
    members = {
        "a.jpg": png(1),
        "a.txt": b"a caption",
        "a.json": b'{"subject": "s", "text": "unused"}',
        "../b.png": png(2),
        "../b.reference.png": png(3),
        "../b.json": b'{"caption": "from json"}',
        "c.txt": b"no image",
    }
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("d.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    a, b, c = items(tmp_path, "webdataset")
    assert (a.text, a.subject, a.load(), a.load_reference) == ("a caption", "s", png(1), None)
    assert (b.text, b.load()) == ("from json", png(2))
    assert b.load_reference is not None
    assert b.load_reference() == png(3)
    assert c.problem == "no image among .txt"
    whole = (tmp_path / "0.tar").read_bytes()
    put(tmp_path / "cut.tar", whole[:1800])
    *_, last = items(tmp_path / "cut.tar", "webdataset")
    assert last.problem is not None
    assert "the tar file is broken after" in last.problem


def test_a_repository_of_datasets_is_read_as_the_hub_would_give_it(tmp_path: Path) -> None:
    import datasets

    columns = {
        "image": [Image.open(io.BytesIO(png(i))) for i in range(3)],
        "words": ["one", "two", "three"],
        "subject": ["s", "s", "t"],
    }
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    (tmp_path / "repository" / "data").mkdir(parents=True)
    table.to_parquet(tmp_path / "repository" / "data" / "train-00000-of-00001.parquet")
    table.save_to_disk(tmp_path / "saved")
    for folder in ("repository", "saved"):
        found = items(tmp_path / folder, "hub")
        assert [(i.text, i.subject) for i in found] == [("one", "s"), ("two", "s"), ("three", "t")]
        pixels = np.asarray(load_image_bytes(found[1].load()))
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(png(1)))))
    with pytest.raises(DataError, match=r"has no column 'picture'; found image, words, subject"):
        items(tmp_path / "saved", image_column="picture")


def test_without_datasets_only_its_own_sources_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    put(tmp_path / "a.png", png())
    assert len(items(tmp_path, "captions")) == 1
    missing = r"^someone/data: needs the package datasets.*pip install 'ipdiverse\[hub-data\]'"
    with pytest.raises(DataError, match=missing):
        items("someone/data", "hub")


def test_a_table_that_names_files_elsewhere_reaches_none(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    secret = put(tmp_path / "secret.png", png())
    (tmp_path / "data").mkdir()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": None, "path": str(secret)}]
    pq.write_table(pa.table({"image": pa.array(rows, kind)}), tmp_path / "data" / "train.parquet")
    (item,) = items(tmp_path / "data", "hub", image_column="image")
    with pytest.raises(DataError, match=r"row-0000000: the path leaves its root"):
        item.load()


def test_critters_have_captions_subjects_and_partners() -> None:
    found = items("critters", "critters", n=3, seed=5)
    for item in found:
        image = load_image_bytes(item.load())
        assert image.size == (64, 64)
        assert item.text
        assert item.subject
        shape, colour, *_ = item.subject.split("-")
        stated = parse(item.text)
        assert stated.get("colour", colour) == colour
        assert stated.get("shape", shape) == shape
        assert item.load_reference is not None
        assert item.load_reference() != item.load()
    assert items("critters", n=1, pairs=False)[0].load_reference is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none", None, "does not exist; expected a folder, a file, a hub id or `critters`"),
        ("a.zip", "x", r"is not a data set; expected \.jsonl, .* or \.tar; found \.zip"),
        ("a.json", "{}", "is not a list"),
        ("a.json", "[", "cannot be read; expected JSON; found Expecting value: line 1 column 2"),
        ("a.csv", "x,y\n1,2\n", r"has no image column; .*found x, y\. Name it with --image-column"),
    ],
)
def test_what_is_no_source_is_one_clear_line(
    name: str, content: str | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        put(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        items(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_an_empty_folder_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no data set of a known kind"):
        kind_of(str(tmp_path))
    assert kind_of("someone/some-data") == "hub"
