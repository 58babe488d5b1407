"""An image before and after it is prepared: an item of a source, and a record of the manifest.

The manifest of a prepared data set has one JSON line for each image, checked when it is read:

    {"file_name": "images/3f/3fa1….jpg", "text": "a dog on the beach", "subject": "dog",
     "reference": null, "sha256": "3fa1…", "width": 640, "height": 480, "source": "dog/00.jpg"}

`datasets` opens such a folder as an image folder. Paths are relative to the manifest's folder and
cannot leave it.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from ipdiverse.config import Range, read
from ipdiverse.data.files import LIST_BYTES, inside, open_below, picture_bytes, stamp_of, text_lines
from ipdiverse.errors import ArgumentError, DataError, check_range
from ipdiverse.writing import file_hash, unsealed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

MANIFEST, REPORT = "metadata.jsonl", "report.json"
MAX_REPEATS = 1000
Square = Literal["keep", "pad", "crop"]
Row = dict[str, Any] | str
"""A row of a list, or why it cannot be used."""


@dataclass(frozen=True)
class Item:
    """One image of a source, unread.

    Args:
        name: Unique in the source, and the same each time it is read: what is known of it is kept
            under this name.
        load: Gives the file's bytes.
        text: Its caption, if the source has one.
        subject: Its subject, if the source says.
        load_reference: Gives the bytes of the item's own reference, if it has one.
        problem: Why it cannot be used, when the source already knows.
        stamp: Tells cheaply whether the bytes are those of an earlier run; None if nothing does.
        repeats: How often it is shown in an epoch.
    """

    name: str
    load: Callable[[], bytes]
    text: str | None = None
    subject: str | None = None
    load_reference: Callable[[], bytes] | None = None
    problem: str | None = None
    stamp: Callable[[], str] | None = None
    repeats: int = 1


@dataclass(frozen=True)
class Source:
    """Where images come from.

    Args:
        kind: As in `SourceOptions`, but never `auto`.
        count: How many items; None when it is known only after reading them.
        items: Yields them, each time from the first, in the same order.
        notes: What the user should know; complete when the items have been read.
        unused: What lies there and was not used, by kind; complete when the items have been read.
    """

    kind: str
    count: int | None
    items: Callable[[], Iterator[Item]]
    notes: dict[str, None] = field(default_factory=dict)
    unused: Callable[[], dict[str, list[str]]] = dict


@dataclass(frozen=True)
class SourceOptions:
    """How to read a source.

    Args:
        kind: What the source is; `auto` finds out.
        root: The folder that file names are relative to; None is the list's own.
        image_column: Column with the image; None finds it.
        text_column: Column with the caption; None finds it, '' takes none.
        encoding: Encoding of lists and captions without a byte order mark, such as cp1252.
        split: Split of a data set.
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
    encoding: str = "utf-8"
    split: str = "train"
    revision: str | None = None
    n: int = 1000
    pairs: bool = True
    seed: int = 0
    edits: float = 0.0

    def __post_init__(self) -> None:
        check_range("edits", self.edits, 0, 1)
        try:
            b"a".decode(self.encoding)
        except (LookupError, ValueError) as error:
            raise ArgumentError(
                "is not an encoding of text",
                where="encoding",
                expected="utf-8, cp1252, shift_jis or the like",
                found=repr(self.encoding),
            ) from error


@dataclass(frozen=True)
class PrepareOptions(SourceOptions):
    """How a source is read and what is kept of it.

    Args:
        square: `keep` the shape; `pad` shows all of the image on a blurred copy of itself; `crop`
            takes the centre and may cut the subject.
        max_bad: Share of bad images above which the command stops; one is always allowed, unless
            this is 0.
        keep_edits: Keep a manifest that you edited; otherwise one that prepare did not write is
            taken for damaged, and refused.
    """

    square: Square = "keep"
    max_bad: float = 0.05
    keep_edits: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("max_bad", self.max_bad, 0, 1)


@dataclass(frozen=True)
class Record:
    """One training image.

    Args:
        file_name: The image, relative to the manifest's folder.
        text: Its caption; "" when it has none.
        subject: Who or what it shows; images of one subject may be each other's references.
        reference: The record's own image prompt, relative to the folder, or None.
        sha256: Of the pixels (`image_io.content_hash`), 64 hexadecimal digits.
        width: In pixels, upright.
        height: In pixels, upright.
        source: Its name in the source.
        repeats: How often it is shown in an epoch; not written when it is 1.
    """

    file_name: str
    text: str
    subject: str | None
    reference: str | None
    sha256: str
    width: int
    height: int
    source: str
    repeats: Annotated[int, Range(1, MAX_REPEATS)] = 1


_BY_PREPARE_ALONE = ("sha256", "width", "height", "source")
"""Fields that other image folders, such as those of `critters make`, lack."""


def file_item(root: Path, name: str, reference: str | None = None, **about: Any) -> Item:
    """An item whose image, and reference, are files below a root."""
    files = [name] if reference is None else [name, reference]
    return Item(
        load=lambda: picture_bytes(root, name),
        load_reference=None if reference is None else lambda: picture_bytes(root, reference),
        stamp=lambda: " ".join(stamp_of(root, file) for file in files),
        **{"name": name, **about},
    )


def read_manifest(folder: Path) -> list[Record]:
    """Read and check a prepared folder's manifest, but not whether its images exist."""
    file = folder / MANIFEST
    if not file.is_file():
        raise DataError(
            "holds no prepared data",
            where=folder,
            expected=f"a file {MANIFEST}",
            fix="Run `ipdiverse prepare SOURCE --out` with this folder first.",
        )
    if not is_whole(folder):  # a flipped bit may leave valid JSON
        raise DataError(
            "is not as prepare wrote it",
            where=file,
            fix="Delete it and run the same `ipdiverse prepare` again, or keep what you edited by "
            "running that with --keep-edits.",
        )
    return manifest_records(folder)


def manifest_records(folder: Path) -> list[Record]:
    """The records of a manifest, whoever wrote it."""
    file, records, problems = folder / MANIFEST, [], []
    with open_below(folder, MANIFEST, LIST_BYTES) as opened:
        lines = list(json_rows(text_lines(opened, file, "utf-8")))
    _check_prepared(file, [row for _, row in lines])
    for place, row in lines:  # all of them, so that one run tells every broken line
        try:
            records.append(_record(row, folder))
        except (ArgumentError, DataError) as error:
            problems.append(f"{place}: {error}")
    if problems:
        raise DataError(
            f"{len(problems)} of {len(problems) + len(records)} lines are broken",
            where=file,
            found="; ".join(problems[:3]),
        )
    if not records:
        raise DataError("has no lines", where=file)
    return records


def read_report(folder: Path) -> dict[str, Any] | None:
    """What `prepare` reported of a folder; None where it has not finished, or that is damaged."""
    try:
        return unsealed((folder / REPORT).read_text("utf-8"))
    except (OSError, ValueError):
        return None


def is_whole(folder: Path) -> bool:
    """Whether the manifest is there as its report says; reports of version 0.1 say nothing."""
    file, report = folder / MANIFEST, read_report(folder) or {}
    return file.is_file() and report.get("manifest", held := file_hash(file)) == held


def manifest_text(records: Iterable[Record]) -> str:
    """The manifest's content."""
    rows = [asdict(record) for record in records]
    # so that manifests from before there were repeats stay the same
    kept = [{k: v for k, v in row.items() if (k, v) != ("repeats", 1)} for row in rows]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)


def json_rows(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[str, Row]]:
    """Place and content of each line of JSON lines; blank ones are left out."""
    return ((f"line {number}", json_row(line)) for number, line in lines if line.strip())


def json_row(line: str) -> Row:
    """A line of JSON lines; a comma after it, as in a list, does no harm."""
    try:
        value = json.loads(line.strip().removesuffix(","))
    except json.JSONDecodeError as error:
        return f"is not JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        return f"is not JSON: {error}"
    return value if isinstance(value, dict) else "is not a JSON object"


def _check_prepared(file: Path, rows: list[Row]) -> None:
    """Tell another image folder, all of whose lines lack something, from a broken one."""
    lacking = [
        [name for name in _BY_PREPARE_ALONE if name not in row]
        for row in rows
        if isinstance(row, dict)
    ]
    if rows and len(lacking) == len(rows) and all(lacking):
        raise DataError(
            "was not written by prepare",
            where=file,
            found=f"no {', '.join(lacking[0])}",
            fix=f"Run `ipdiverse prepare {shlex.quote(str(file.parent))} --out DIR`, and train on "
            "DIR.",
        )


def _record(row: Row, folder: Path) -> Record:
    if isinstance(row, str):
        raise DataError(row)
    record = read(Record, row)
    for name in (record.file_name, record.reference):
        if name is not None:
            inside(folder, name)
    return record
