"""Find out what kind of source a path or a name is, and read it.

| kind | what it looks like |
|---|---|
| `metadata` | a folder with `metadata.jsonl` or `.csv` (`file_name`, `text`), or such a file |
| `json` | the original trainer's `output.json`: a list of `image_file` and `text` |
| `captions` | a folder of images, each with its caption in a `.txt` of the same name, or without |
| `subjects` | a folder with one folder of images for each subject |
| `webdataset` | a `.tar`, or a folder of them: members of one stem are one sample |
| `hub` | a data set of `datasets`: a hub id, or a local repository of parquet or arrow files |
| `critters` | the word `critters`: scenes rendered and captioned on the fly |
"""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ipdiverse.data.manifest import IMAGE_SUFFIXES, Item, Source, file_item, json_lines
from ipdiverse.data.packed import HUB_FILES, hub_source, tar_files, webdataset
from ipdiverse.errors import DataError, check_range

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

KINDS = ("metadata", "json", "captions", "subjects", "webdataset", "hub", "critters")
_METADATA = ("metadata.jsonl", "metadata.csv")
_IMAGE_COLUMNS = ("file_name", "image_file", "image", "file", "path", "image_path", "filename")
_TEXT_COLUMNS = ("text", "caption", "prompt", "description")


@dataclass(frozen=True)
class SourceOptions:
    """How to read a source.

    Args:
        kind: What the source is; `auto` finds out.
        root: The folder that file names are relative to; None is the list's own.
        image_column: Column with the image; None finds it.
        text_column: Column with the caption; None finds it.
        split: Split of a hub data set.
        revision: Branch, tag or commit of a hub data set.
        n: How many scenes of critters.
        pairs: Give each critters scene a reference of the same creature.
        seed: Seed of critters.
        edits: Share of critters' references that differ from their scene in one attribute of
            identity, which the caption then states.
    """

    kind: Literal[
        "auto", "metadata", "json", "captions", "subjects", "webdataset", "hub", "critters"
    ] = "auto"
    root: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    split: str = "train"
    revision: str | None = None
    n: int = 1000
    pairs: bool = True
    seed: int = 0
    edits: float = 0.0


def open_source(source: str, options: SourceOptions) -> Source:
    """Open a source.

    Args:
        source: A path, a hub id, or `critters`.
        options: How to read it.

    Raises:
        DataError: It does not exist, its kind is unknown, or it cannot be read at all.
    """
    kind = options.kind if options.kind != "auto" else kind_of(source)
    readers: dict[str, Callable[[], Source]] = {
        "metadata": lambda: _table(Path(source), options),
        "json": lambda: _table(Path(source), options),
        "captions": lambda: _captions(Path(source)),
        "subjects": lambda: _subjects(Path(source)),
        "webdataset": lambda: webdataset(Path(source)),
        "hub": lambda: hub_source(
            source, options.image_column, options.text_column, options.split, options.revision
        ),
        "critters": lambda: _critters(options),
    }
    return readers[kind]()


def kind_of(source: str) -> str:
    """The kind of a source, recognised by its files.

    Raises:
        DataError: It is not a source.
    """
    path = Path(source)
    if source == "critters" and not path.exists():
        return "critters"
    if path.is_file():
        return _kind_of_file(path)
    if path.is_dir():
        return _kind_of_folder(path)
    if source.count("/") <= 1 and not source.startswith((".", "/", "~")):
        return "hub"
    raise DataError(
        "does not exist",
        where=source,
        expected="a folder, a file, a hub id or `critters`",
        fix="Check the path for a typing error.",
    )


def _kind_of_file(path: Path) -> str:
    suffix = path.suffix.lower()
    kinds = {".jsonl": "metadata", ".csv": "metadata", ".json": "json", ".tar": "webdataset"}
    if suffix not in kinds:
        raise DataError(
            "is not a data set", where=path, expected=".jsonl, .csv, .json or .tar", found=suffix
        )
    return kinds[suffix]


def _kind_of_folder(path: Path) -> str:
    if any((path / name).is_file() for name in _METADATA):
        return "metadata"
    if tar_files(path):
        return "webdataset"
    if any(next(path.rglob(pattern), None) for pattern in HUB_FILES):
        return "hub"
    if _images_in(path):
        return "captions"
    if any(_images_in(folder) for folder in _folders(path)):
        return "subjects"
    raise DataError(
        "holds no data set of a known kind",
        where=path,
        expected="images, folders of images, metadata.jsonl, parquet or tar files",
        fix="Name the kind with --kind.",
    )


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images_in(folder: Path, pattern: str = "*") -> list[Path]:
    """Image files of a folder, by suffix, in order; hidden ones are left out."""
    if not folder.is_dir():
        raise DataError("is not a folder", where=folder)
    return sorted(
        file
        for file in folder.glob(pattern)
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
    )


def _captions(folder: Path) -> Source:
    """Every image below the folder; its caption is in the `.txt` of the same name."""
    files = _images_in(folder, "**/*")

    def item(file: Path) -> Item:
        return file_item(folder, file.relative_to(folder).as_posix(), _caption_of(file))

    return Source("captions", len(files), lambda: map(item, files))


def _caption_of(file: Path) -> str | None:
    caption = file.with_suffix(".txt")
    return caption.read_text("utf-8-sig", errors="replace") if caption.is_file() else None


def _subjects(folder: Path) -> Source:
    """Each folder is a subject; captions are `.txt` files or "a photo of a" and its class."""
    if not folder.is_dir():
        raise DataError("is not a folder", where=folder)
    homes = [(home, files) for home in _folders(folder) if (files := _images_in(home))]
    classes = _classes(folder)

    def items() -> Iterator[Item]:
        for home, files in homes:
            words = classes.get(home.name) or subject_class(home.name)
            for file in files:
                text = _caption_of(file) or f"a photo of a {words}"
                yield file_item(folder, f"{home.name}/{file.name}", text, home.name)

    return Source("subjects", sum(len(files) for _, files in homes), items)


def _classes(folder: Path) -> dict[str, str]:
    """Lines `subject,class` of DreamBooth's `prompts_and_classes.txt`, or of `classes.csv`."""
    found = {}
    for name in ("classes.csv", "prompts_and_classes.txt"):
        file = folder / name
        if file.is_file():
            for line in file.read_text("utf-8-sig", errors="replace").split("\n"):
                subject, comma, words = line.partition(",")
                if comma and (folder / subject.strip()).is_dir() and subject.strip():
                    found[subject.strip()] = words.strip()
    return found


def _table(path: Path, options: SourceOptions) -> Source:
    """Rows that name an image file and its text."""
    if path.is_dir():
        present = [path / name for name in _METADATA if (path / name).is_file()]
        if not present:
            raise DataError("holds no metadata", where=path, expected=" or ".join(_METADATA))
        path = present[0]
    rows = _rows(path)
    root = Path(options.root) if options.root else path.parent
    if not root.is_dir():
        raise DataError("is not a folder", where=root, fix="Name the images' folder with --root.")
    columns = sorted({key for _, row in rows[:100] if isinstance(row, dict) for key in row})
    image = _column(options.image_column, _IMAGE_COLUMNS, columns, path, "image")
    text = _column(options.text_column, _TEXT_COLUMNS, columns, path, "text")

    def items() -> Iterator[Item]:
        for number, row in rows:
            yield _row_item(root, number, row, image, text)

    return Source("json" if path.suffix.lower() == ".json" else "metadata", len(rows), items)


def _row_item(root: Path, number: int, row: Any, image: str, text: str) -> Item:
    name = row.get(image) if isinstance(row, dict) else None
    if not isinstance(name, str) or not name:
        where = f"line {number}"
        return Item(where, bytes, problem=f"{where} names no image in {image!r}")
    words = {key: row.get(key) or None for key in (text, "subject", "reference")}
    for key, value in words.items():
        if value is not None and not isinstance(value, str):
            return Item(name, bytes, problem=f"{key} is not a text: {value!r:.60}")
    # a file may have several lines, each with its caption: the line is part of the name
    item = file_item(root, name, words[text], words["subject"], words["reference"])
    return Item(f"{name}#{number}", item.load, item.text, item.subject, item.load_reference)


def _rows(path: Path) -> list[tuple[int, Any]]:
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return list(json_lines(path))
    try:
        if suffix == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as file:
                return list(enumerate(csv.DictReader(file), 2))
        content = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise DataError(
            "cannot be read", where=path, expected=f"{suffix} in UTF-8", found=error
        ) from error
    if not isinstance(content, list):
        raise DataError(
            "is not a list",
            where=path,
            expected='[{"image_file": …, "text": …}, …]',
            found=type(content),
        )
    return list(enumerate(content, 1))


def _column(
    chosen: str | None, usual: tuple[str, ...], columns: list[str], path: Path, what: str
) -> str:
    """The column that was asked for, or the first of the usual names that the table has."""
    names = (chosen,) if chosen else usual
    for name in names:
        if name in columns:
            return name
    if chosen is None and what == "text":
        return usual[0]  # captions may be missing; the report counts them
    raise DataError(
        f"has no {what} column",
        where=path,
        expected=" or ".join(names),
        found=", ".join(columns) or "no columns",
        fix=f"Name it with --{what}-column.",
    )


def subject_class(subject: str) -> str:
    """A subject's name as words: `bear_plushie` is "bear plushie", `dog2` is "dog"."""
    return re.sub(r"[\s_-]+", " ", re.sub(r"\d+$", "", subject)).strip() or subject


def _critters(options: SourceOptions) -> Source:
    """Scenes of the training identities, rendered when they are read."""
    from ipdiverse.critters.make import example, png

    check_range("n", options.n, 1, 10_000_000)

    def item(index: int) -> Item:
        made = example(index, options.seed, "train", options.edits)
        return Item(
            f"critter-{index:07d}",
            lambda: png(made.scene, made.seed),
            made.text,
            made.scene.subject,
            (lambda: png(made.other, made.other_seed)) if options.pairs else None,
        )

    return Source("critters", options.n, lambda: map(item, range(options.n)))
