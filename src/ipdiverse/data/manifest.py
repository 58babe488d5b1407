"""The manifest of a prepared data set: one JSON line for each image, checked when it is read.

    {"file_name": "images/3f/3fa1….jpg", "text": "a dog on the beach", "subject": "dog",
     "reference": null, "sha256": "3fa1…", "width": 640, "height": 480, "source": "dog/00.jpg"}

`datasets` opens such a folder as an image folder. Paths are relative to the manifest's folder and
cannot leave it.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ipdiverse.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MANIFEST = "metadata.jsonl"


@dataclass(frozen=True)
class Record:
    """One training image.

    Args:
        file_name: The image, relative to the manifest's folder.
        text: Its caption; "" when there is none.
        subject: Whom or what it shows; images of one subject may be each other's references.
        reference: An image prompt of its own, relative to the folder; None when it has none.
        sha256: Of the pixels (`image_io.content_hash`), 64 hexadecimal digits.
        width: In pixels, upright.
        height: In pixels, upright.
        source: What it was called where it came from.
    """

    file_name: str
    text: str
    subject: str | None
    reference: str | None
    sha256: str
    width: int
    height: int
    source: str


_TYPES: dict[str, type | tuple[type, ...]] = {
    "file_name": str,
    "text": str,
    "subject": (str, type(None)),
    "reference": (str, type(None)),
    "sha256": str,
    "width": int,
    "height": int,
    "source": str,
}

_BY_PREPARE_ALONE = ("sha256", "width", "height", "source")
"""Fields that other image folders, such as those of `critters make`, do without."""


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


def read_manifest(folder: Path) -> list[Record]:
    """Read and check a prepared folder's manifest; whether images are there is not looked at.

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
    records, problems, lines = [], [], list(json_lines(file))
    _check_prepared(file, [line for _, line in lines])
    for number, line in lines:
        try:
            records.append(_record(line, folder))
        except DataError as error:
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


def manifest_text(records: Iterable[Record]) -> str:
    """The manifest's content."""
    return "".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records)


def json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """Number and value of each line that is not blank; a line that is no JSON gives its text."""
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
        raise DataError("is no JSON object", found=repr(line)[:60])
    missing = [name for name in _TYPES if name not in line]
    unknown = sorted(set(line) - set(_TYPES))
    wrong = [
        name
        for name, kind in _TYPES.items()
        if name in line and (not isinstance(line[name], kind) or isinstance(line[name], bool))
    ]
    for what, names in (("lacks", missing), ("has unknown", unknown), ("has ill-typed", wrong)):
        if names:
            raise DataError(f"{what} {', '.join(names)}")
    record = Record(**{field.name: line[field.name] for field in fields(Record)})
    for name in (record.file_name, record.reference):
        if name is not None:
            inside(folder, name)
    return record
