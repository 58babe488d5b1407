"""Every kind of source: recognised by looking, and read with names, words and subjects."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import tarfile
from types import SimpleNamespace
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
    table.to_parquet(tmp_path / "repository" / "data" / "test-00000-of-00001.parquet")
    put(tmp_path / "repository" / "extra.png", png())
    put(tmp_path / "saved" / "extra.txt", "")
    unused = [
        open_source(str(tmp_path / n), SourceOptions()).unused() for n in ("repository", "saved")
    ]
    assert unused == [
        {
            "archives": ["data/test-00000-of-00001.parquet"],
            "images that no list names, or of another split": ["extra.png"],
        },
        {"caption files": ["extra.txt"]},
    ]
    with pytest.raises(DataError, match=r"has no column 'picture'; found image, words, subject"):
        items(tmp_path / "saved", image_column="picture")


def test_files_of_a_hub_data_set_that_are_not_used_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets
    import huggingface_hub

    names = [".gitattributes", "README.md", "data/test.parquet", "data/train.parquet", "x/a.png"]
    monkeypatch.setattr(
        huggingface_hub, "HfApi", lambda: SimpleNamespace(list_repo_files=lambda *_, **__: names)
    )
    files = {part: [f"hf://datasets/o/n@main/data/{part}.parquet"] for part in ("train", "test")}
    builder = SimpleNamespace(config=SimpleNamespace(data_files=files))
    table = datasets.Dataset.from_dict({"image": [Image.new("RGB", (20, 20))]})
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    source = open_source("o/n", SourceOptions())
    assert source.unused() == {
        "other files": ["README.md"],
        "archives": ["data/test.parquet"],
        "images that no list names, or of another split": ["x/a.png"],
    }
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    assert source.unused() == {}, "without a connection"


def test_without_datasets_only_its_own_sources_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    put(tmp_path / "a.png", png())
    assert len(items(tmp_path, "captions")) == 1
    missing = r"^someone/data: needs the package datasets.*pip install 'ipdiverse\[hub-data\]'"
    with pytest.raises(DataError, match=missing):
        items("someone/data", "hub")


def test_pairs_in_one_picture_are_two_pictures_of_a_subject(tmp_path: Path) -> None:
    """Subjects200K: two pictures of 512 with borders of 8, whose middle one they share."""
    import datasets

    whole = Image.new("RGB", (2 * 20 + 3 * 2, 20 + 2 * 2), "white")
    whole.paste((250, 0, 0), (2, 2, 22, 22))
    whole.paste((0, 0, 250), (24, 2, 44, 22))
    kinds = ("compositeStructure", "objectConsistency", "imageQuality")
    told = {"item": "a cup", "description_0": "red", "description_1": "blue", "category": "things"}
    rows = {
        "image": [whole] * 4 + [whole.crop((0, 0, 30, 24))],
        "collection": ["collection_2"] * 5,
        "quality_assessment": [dict.fromkeys(kinds, 5)] * 2
        + [dict.fromkeys(kinds, 5) | {"imageQuality": 4}]
        + [dict.fromkeys(kinds, 5)] * 2,
        "description": [{**told, "description_valid": number != 1} for number in range(5)],
    }
    (tmp_path / "data").mkdir()
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    source = open_source(str(tmp_path), SourceOptions())
    found = list(source.items())
    assert source.count == len(found) == 6
    assert [*source.notes] == ["left out 2 of 5 pairs, which are noted as poor"]
    assert [(item.text, item.subject) for item in found[1:4]] == [
        ("blue", "row-0000000"),
        ("red", "row-0000003"),
        ("blue", "row-0000003"),
    ]
    for item, colour in zip(found[:4], [(250, 0, 0), (0, 0, 250)] * 2, strict=True):
        picture = load_image_bytes(item.load())
        assert picture.size == (20, 20)
        assert picture.getcolors() == [(400, colour)]
    with pytest.raises(DataError, match=r"row-0000004-0: does not show two pictures.*30 x 24"):
        found[4].load()
    as_they_are = items(tmp_path, "hub", text_column="collection")
    assert [load_image_bytes(item.load()).size for item in as_they_are[:1]] == [(46, 24)]


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
    with pytest.raises(
        DataError, match=r"^https://x\.y/z: is an address; expected a folder, a file"
    ):
        kind_of("https://x.y/z")


def test_captions_by_every_usual_name(tmp_path: Path) -> None:
    texts = {
        "a.caption": "a",
        "b.png.txt": "b",
        "C.TXT": "c",
        "d.txt": " ",
        "d.caption": "d",
        "e.json": '{"Caption": "e", "url": "x"}',
    }
    for name, text in texts.items():
        put(tmp_path / name, text)
    for stem in "abcde":
        put(tmp_path / f"{stem}.png", png())
    put(tmp_path / "f.jfif", png())
    put(tmp_path / "f.txt", "gr\u00fcn".encode("latin-1"))
    found = items(tmp_path, "captions")
    assert [item.text for item in found[:5]] == list("abcde")
    assert "f.txt: cannot be read; found byte 0xfc at position 2" in str(found[5].problem)
    assert items(tmp_path, encoding="latin-1")[5].text == "gr\u00fcn"


def test_captions_reach_nothing_outside_the_folder(tmp_path: Path) -> None:
    secret = put(tmp_path / "secret" / "a.txt", "secret")
    put(tmp_path / "secret" / "a.png", png())
    put(tmp_path / "in" / "a.png", png())
    (tmp_path / "in" / "a.txt").symlink_to(secret)
    (item,) = items(tmp_path / "in", "captions")
    assert "leaves its root through a link" in str(item.problem)
    put(tmp_path / "subjects" / "dog" / "a.png", png())
    (tmp_path / "subjects" / "cat").symlink_to(tmp_path / "secret")
    (tmp_path / "subjects" / "classes.csv").symlink_to(secret)
    with pytest.raises(DataError, match="leaves its root through a link"):
        items(tmp_path / "subjects")
    (tmp_path / "subjects" / "classes.csv").unlink()
    source = open_source(str(tmp_path / "subjects"), SourceOptions())
    assert [item.name for item in source.items()] == ["dog/a.png"]
    assert source.unused() == {"links to folders": ["cat"]}
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "metadata.jsonl").symlink_to(secret)
    put(tmp_path / "list" / "a.png", png())
    with pytest.raises(DataError, match="leaves its root through a link"):
        items(tmp_path / "list")


def test_what_is_not_used_is_named(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "x.heic", "y.PSD", "deep/c.png"):
        put(tmp_path / name, png() if name.endswith("png") else b"BM")
    put(tmp_path / "metadata.csv", "file_name,text\n./a.png,one\ndeep\\c.png,two\n")
    for name in ("a.txt", "other.jsonl", "part.zip", "README.md"):
        put(tmp_path / name, "{}")
    source = open_source(str(tmp_path), SourceOptions())
    assert [item.text for item in source.items()] == ["one", "two"]
    assert source.unused() == {
        "other files": ["README.md"],
        "caption files": ["a.txt"],
        "images that no list names, or of another split": ["b.png"],
        "lists": ["other.jsonl"],
        "archives": ["part.zip"],
        "images in a format that is not read without pillow-heif (.heic)": ["x.heic"],
        "images in a format that is not read (.psd)": ["y.PSD"],
    }
    put(tmp_path / "only" / "x.heic", b"x")
    with pytest.raises(DataError, match=r"known kind; .*found 1 images in a format .*heic"):
        kind_of(str(tmp_path / "only"))


def test_lists_in_a_folder_are_found(tmp_path: Path) -> None:
    for number, name in enumerate(("train/METADATA.JSONL", "any.csv", "train/captions.tsv")):
        root = tmp_path / str(number)
        picture = "train/a.png" if name == "any.csv" else "a.png"
        put(root / "train" / "a.png", png())
        put(root / "a.png", png())
        put(root / name, f"file_name,text\n{picture},one\n")
        assert [item.text for item in items(root, "metadata")] == ["one"]
    put(tmp_path / "two" / "a.png", png())
    for name in ("one.csv", "two.csv"):
        put(tmp_path / "two" / name, "file_name,text\na.png,one\n")
    source = open_source(str(tmp_path / "two"), SourceOptions())
    assert (source.kind, len(list(source.items()))) == ("captions", 1)
    assert source.unused() == {"lists": ["one.csv", "two.csv"]}
    put(tmp_path / "two" / "metadata.csv", b"\xff\xff")
    with pytest.raises(DataError, match=r"metadata\.csv, line 1: is not text"):
        items(tmp_path / "two")


def test_names_of_folders_that_say_nothing_make_no_subject(tmp_path: Path) -> None:
    put(tmp_path / "a" / "train" / "0.png", png())
    put(tmp_path / "a" / "test" / "1.png", png())
    source = open_source(str(tmp_path / "a"), SourceOptions())
    assert [(i.name, i.text, i.subject) for i in source.items()] == [("train/0.png", "", None)]
    assert list(source.unused().values()) == [["test/1.png"]]
    put(tmp_path / "b" / "train" / "dog" / "deep" / "0.png", png())
    put(tmp_path / "c" / "train" / "0.png", png())
    put(tmp_path / "c" / "cat" / "1.png", png())
    assert [item.subject for item in items(tmp_path / "b", "subjects")] == ["dog"]
    assert [item.subject for item in items(tmp_path / "c", "subjects")] == ["cat", "train"]


def test_folders_of_kohya_give_repeats_and_subjects(tmp_path: Path) -> None:
    for name in ("img/10_corgi dog/a.png", "img/2024_trip/b.png", "img/0_x/c.png"):
        put(tmp_path / name, png())
    source = open_source(str(tmp_path), SourceOptions())
    found = [(item.subject, item.repeats, item.text) for item in source.items()]
    assert found == [
        ("0_x", 1, "a photo of a 0 x"),
        ("corgi dog", 10, "a photo of a corgi dog"),
        ("2024_trip", 1, "a photo of a 2024 trip"),
    ]
    assert [note[:30] for note in source.notes] == [
        "Captions are made from names o",
        "Each image of '10_corgi dog' i",
    ]


def test_the_usual_layout_of_kohya_and_names_that_are_captions(tmp_path: Path) -> None:
    for name in ("img/10_sks dog/a.png", "reg/1_dog/b.png", "img/2_a photo of a cat/c.png"):
        put(tmp_path / name, png())
    source = open_source(str(tmp_path), SourceOptions())
    assert {item.text: (item.subject, item.repeats) for item in source.items()} == {
        "a photo of a sks dog": ("sks dog", 10),
        "a photo of a cat": ("a photo of a cat", 2),
        "a photo of a dog": ("dog", 1),
    }


def test_a_first_line_that_names_the_delimiter_is_no_header(tmp_path: Path) -> None:
    put(tmp_path / "a.png", png())
    put(tmp_path / "l.csv", b"sep=;\r\nfile_name;text\r\na.png;one, two\r\n")
    (item,) = open_source(str(tmp_path / "l.csv"), SourceOptions()).items()
    assert (item.name, item.text) == ("a.png#3", "one, two")


def tar(file: Path, *members: tuple[str, bytes]) -> bytes:
    with tarfile.open(file, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.read_bytes()


def test_hostile_tar_files_cost_no_more_than_their_budget(tmp_path: Path) -> None:
    file = tmp_path / "x.tar"

    def problems() -> list[str]:
        return [item.problem or "" for item in items(file, "webdataset")]

    tar(file, *((f"a.{i}", b"") for i in range(1000)), ("b.png", png()))
    assert problems() == ["has over 64 parts", ""]
    tar(file, ("a.png", png()), ("a.png", png()))
    assert problems() == ["has two parts of one name"]
    tar(file, ("a.png", png()), ("a.txt", b"gr\xfcn"))
    assert "its text cannot be read: byte 0xfc" in problems()[0]
    tar(file, ("a.png", png()), ("a.txt", bytes(1 << 17)))
    assert "a.txt: is too large" in problems()[0]
    whole = tar(file, ("a.png", png()), ("b.png", png()))
    put(file, whole.replace(b"b.png", b"c.png", 1))
    assert problems()[0] == ""
    assert "broken after 'a': what follows is not a header" in problems()[1]
    long = tarfile.TarInfo("././@LongLink")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    put(file, long.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    assert "a header claims 8589934592 bytes" in problems()[0]
    import gzip

    put(file, gzip.compress(whole))
    with pytest.raises(
        DataError, match=r"x\.tar: is compressed; expected a plain .* gzip\. Unpack"
    ):
        problems()
    put(tmp_path / "shards" / "x.tar", gzip.compress(whole))
    with pytest.raises(DataError, match="is compressed"):
        items(tmp_path / "shards", "webdataset")
    with pytest.raises(
        DataError, match=r"is not a data set; .* found \.gz\. Unpack it, and prepare"
    ):
        kind_of(str(put(tmp_path / "x.tar.gz", gzip.compress(whole))))


def test_a_readme_that_names_files_elsewhere_reaches_none(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "secret.csv", "text\nsecret\n")
    put(tmp_path / "data" / "x.parquet", "")
    for place in ("../secret.csv", str(tmp_path / "secret.csv"), "link.csv"):
        put(
            tmp_path / "data" / "README.md",
            f"---\nconfigs:\n- config_name: default\n  data_files: {place}\n---\n",
        )
        if place == "link.csv":
            (tmp_path / "data" / place).symlink_to(tmp_path / "secret.csv")
        with pytest.raises(DataError, match=r"data: the path leaves its root; found .*csv"):
            items(tmp_path / "data", "hub")
    saved = tmp_path / "saved"
    put(saved / "state.json", json.dumps({"_data_files": [{"filename": "../x.arrow"}]}))
    with pytest.raises(DataError, match=r"\.\./x\.arrow: the path leaves its root"):
        items(saved, "hub")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name", ["a" * 300, "\0", "\ud800", "nope", "no/pe/x", "fifo.jsonl"])
def test_a_name_that_is_no_source_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo.jsonl")
    with pytest.raises(DataError, match="does not exist") as told:
        kind_of(name)
    assert "\n" not in str(told.value)
