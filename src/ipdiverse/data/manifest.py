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
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ipdiverse.config import read
from ipdiverse.errors import ArgumentError, DataError
from ipdiverse.writing import file_hash, unsealed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

MANIFEST, REPORT = "metadata.jsonl", "report.json"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Item:
    """One image of a source, unread.

    Args:
        name: Unique in the source, and the same each time it is read: an interrupted run is
            resumed by it.
        load: Gives the file's bytes.
        text: Its caption, if the source has one.
        subject: Its subject, if the source says.
        load_reference: Gives the bytes of the item's own reference, if it has one.
        problem: Why it cannot be used, when the source already knows.
    """

    name: str
    load: Callable[[], bytes]
    text: str | None = None
    subject: str | None = None
    load_reference: Callable[[], bytes] | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Source:
    """Where images come from.

    Args:
        kind: One of `sources.KINDS`.
        count: How many items; None when it is known only after reading them.
        items: Yields them, each time from the first, in the same order.
    """

    kind: str
    count: int | None
    items: Callable[[], Iterator[Item]]


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
    """

    file_name: str
    text: str
    subject: str | None
    reference: str | None
    sha256: str
    width: int
    height: int
    source: str


_BY_PREPARE_ALONE = ("sha256", "width", "height", "source")
"""Fields that other image folders, such as those of `critters make`, lack."""


def inside(root: Path, name: str) -> Path:
    """A file below a root.

    Args:
        root: A folder.
        name: Relative path in it, with `/`.

    Raises:
        DataError: The name is absolute, climbs out, or leaves the root through a link.
    """
    pure = PurePosixPath(name.replace("\\", "/"))
    windows_drive = len(name) > 1 and name[1] == ":"
    if not name or pure.is_absolute() or windows_drive or ".." in pure.parts or "\0" in name:
        raise DataError(
            "the path leaves its root", where=name or "an empty path", expected=f"a path in {root}"
        )
    path = root.joinpath(*pure.parts)
    if not path.resolve().is_relative_to(root.resolve()):
        raise DataError("the path leaves its root through a link", where=name, found=path.resolve())
    return path


def file_item(
    root: Path,
    name: str,
    text: str | None = None,
    subject: str | None = None,
    reference: str | None = None,
) -> Item:
    """An item whose image, and reference, are files below a root."""
    return Item(
        name,
        lambda: read_file(root, name),
        text,
        subject,
        None if reference is None else (lambda: read_file(root, reference)),
    )


def read_file(root: Path, name: str) -> bytes:
    """The bytes of a file below a root, no more than an image may have.

    Raises:
        DataError: It leaves the root, is missing or unreadable.
    """
    from ipdiverse.image_io import MAX_FILE_BYTES

    path = inside(root, name)
    try:
        if not path.is_file():
            raise DataError("does not exist", where=name)
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise DataError("cannot be read", where=name, found=error.strerror) from error


def read_manifest(folder: Path) -> list[Record]:
    """Read and check a prepared folder's manifest, but not whether its images exist.

    Raises:
        DataError: It is missing, empty, of a folder that was not prepared, or a line is broken; the
            first bad lines are named.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise DataError(
            "holds no prepared data",
            where=folder,
            expected=f"a file {MANIFEST}",
            fix="Run `ipdiverse prepare SOURCE --out` with this folder first.",
        )
    if not is_whole(folder):
        raise DataError(
            "is not as prepare wrote it",
            where=file,
            fix="Run the same `ipdiverse prepare` again. If you changed it yourself, remove "
            f"{REPORT}.",
        )
    records, problems, lines = [], [], list(json_lines(file))
    _check_prepared(file, [line for _, line in lines])
    for number, line in lines:
        try:
            records.append(_record(line, folder))
        except (ArgumentError, DataError) as error:
            problems.append(f"line {number}: {error}")
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
    return "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records)


def json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """Number and value of each line that is not blank; a line that is not JSON gives its text."""
    try:
        # not splitlines: other marks that it cuts at may stand within a JSON string
        lines = file.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeError) as error:
        raise DataError(
            "cannot be read", where=file, expected="a text in UTF-8", found=error
        ) from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, line


def _check_prepared(file: Path, lines: list[Any]) -> None:
    """Tell another image folder, all of whose lines lack something, from a broken one."""
    lacking = [
        [name for name in _BY_PREPARE_ALONE if name not in line]
        for line in lines
        if isinstance(line, dict)
    ]
    if lines and len(lacking) == len(lines) and all(lacking):
        raise DataError(
            "was not written by prepare",
            where=file,
            found=f"no {', '.join(lacking[0])}",
            fix=f"Run `ipdiverse prepare {shlex.quote(str(file.parent))} --out DIR`, and train on "
            "DIR.",
        )


def _record(line: Any, folder: Path) -> Record:
    if not isinstance(line, dict):
        raise DataError("is not a JSON object", found=repr(line)[:60])
    record = read(Record, line)
    for name in (record.file_name, record.reference):
        if name is not None:
            inside(folder, name)
    return record
