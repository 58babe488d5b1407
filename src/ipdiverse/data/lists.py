"""Lists of images in any form: JSON lines, a JSON list, or a table with a header."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipdiverse.data.files import (
    LIST_BYTES,
    WHOLE_BYTES,
    check_budget,
    is_folder,
    open_below,
    remote,
    text_lines,
)
from ipdiverse.data.manifest import Item, Row, Source, file_item, json_row, json_rows
from ipdiverse.errors import DataError
from ipdiverse.image_io.files import as_on_disk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from ipdiverse.data.manifest import SourceOptions

IMAGE_COLUMNS = ("file_name", "image_file", "image", "file", "path", "image_path", "filename")
TEXT_COLUMNS = ("text", "caption", "captions", "prompt", "description", "sentence")
_NO_TEXT = (
    *("subject", "reference", "source", "url", "link", "license"),
    *("split", "id", "key", "hash", "md5", "sha256"),
)
"""Columns that no one means by a caption."""
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def list_source(
    path: Path,
    options: SourceOptions,
    found_in: Path | None = None,
    used: set[str] | None = None,
    unused: Callable[[], dict[str, list[str]]] = dict,
) -> Source:
    """A list of images; all of it is read once, so what is broken is found before any work."""
    # the user may name a list through a link, but one found in a folder must lie in it
    place = path if remote(path) else path.resolve()
    home, name = place.parent, place.name
    if found_in:
        home, name = found_in, path.relative_to(found_in).as_posix()
    root = Path(options.root) if options.root else path.parent
    if not is_folder(root):
        raise DataError("is not a folder", where=root, fix="Name the images' folder with --root.")
    first = list(itertools.islice(read_rows(home, name, options.encoding), 100))
    rows = [row for _, row in first if isinstance(row, dict)]
    if not rows:
        found = "; ".join(f"{place} {row}" for place, row in first[:3])
        raise DataError("has no row that can be read", where=path, found=found or "no rows")
    columns = columns_of(rows, options.image_column, options.text_column, path)

    def items() -> Iterator[Item]:
        for place, row in read_rows(home, name, options.encoding):
            item = _item(root, place, row, *columns)
            if used is not None and not item.problem:
                file = root / item.name.rpartition("#")[0].replace("\\", "/")
                used.add(os.path.relpath(file, found_in).replace(os.sep, "/"))
            yield item

    kind = "json" if path.suffix.lower() == ".json" else "metadata"
    count = sum(1 for _ in read_rows(home, name, options.encoding))
    return Source(kind, count, items, unused=unused)


def _item(root: Path, place: str, row: Row, image: str, texts: list[str]) -> Item:
    if isinstance(row, str):
        return Item(place, bytes, problem=f"{place} {row}")
    name = row.get(image)
    if not isinstance(name, str) or not name.strip():
        return Item(place, bytes, problem=f"{place} names no image in {image!r}")
    name = as_on_disk(name.strip(), root)
    # a file may have several lines, each with its caption: the line is part of the name
    unique = f"{name}#{place.rsplit(maxsplit=1)[-1]}"
    text = next((row[key] for key in texts if str(row.get(key) or "").strip()), None)
    words = {"text": text, **{key: row.get(key) or None for key in ("subject", "reference")}}
    for key, value in words.items():
        if value is not None and not isinstance(value, str):
            return Item(unique, bytes, problem=f"{key} is not a text: {value!r:.60}")
    words["reference"] = words["reference"] and as_on_disk(words["reference"], root)
    return replace(file_item(root, name, **words), name=unique)


def read_rows(root: Path, name: str, encoding: str = "utf-8") -> Iterator[tuple[str, Row]]:
    """Place and content of each row of a list: JSON lines, a JSON list, or a table with a header.

    What it is, its content decides, since suffixes are often wrong.
    """
    where = root / name
    with open_below(root, name, LIST_BYTES) as file:
        lines = text_lines(file, where, encoding)
        # Excel writes a first line `sep=;`, which is no header
        first = next((one for one in lines if not re.match(r"(?i)(sep=.)?\s*$", one[1])), None)
        if first is None:
            return
        lines = itertools.chain([first], lines)
        start, is_jsonl = first[1].lstrip(), name.lower().endswith((".jsonl", ".ndjson"))
        row = json_row(start)
        is_row = isinstance(row, dict) and bool(matching(row, IMAGE_COLUMNS))
        if start[0] == "[" or (start[0] == "{" and not is_row and not is_jsonl):
            yield from _whole(lines, where)
        elif start[0] == "{":
            yield from json_rows(lines)
        else:
            yield from _delimited(lines, where)


def _whole(lines: Iterator[tuple[int, str]], where: object) -> Iterator[tuple[str, Row]]:
    """A JSON list of objects, or an object of them, whose keys are the images' names."""
    parts, size = [], 0
    for _, line in lines:
        size += len(line)
        check_budget(size, WHOLE_BYTES, where, "characters of JSON that is not one row a line")
        parts.append(line)
    try:
        content = json.loads("".join(parts))
    except (ValueError, RecursionError) as error:
        raise DataError(
            "cannot be read", where=where, expected="JSON", found=f"{error}", fix="Correct it."
        ) from error
    if isinstance(content, dict) and all(isinstance(v, (str, dict)) for v in content.values()):
        rows = ((k, {"text": v} if isinstance(v, str) else v) for k, v in content.items())
        content = [{"file_name": name, **about} for name, about in rows]
    if not isinstance(content, list) or not content:
        raise DataError(
            "is not a list of images",
            where=where,
            expected='[{"image_file": …, "text": …}, …]',
            found=type(content).__name__,
        )
    for number, row in enumerate(content, 1):
        yield f"entry {number}", row if isinstance(row, dict) else "is not a JSON object"


def _delimited(lines: Iterator[tuple[int, str]], where: object) -> Iterator[tuple[str, Row]]:
    """Rows of a table; its header tells what separates the cells."""
    number, header = next(lines)

    def rank(delimiter: str) -> tuple[bool, int]:
        cells = [cell.strip(' "\r\n') for cell in header.split(delimiter)]
        return bool(matching(cells, IMAGE_COLUMNS)), len(cells)

    text = itertools.chain([header], (line for _, line in lines))
    # strict: a quote that is never closed would swallow the rest of the list as one caption
    delimiter = max(_DELIMITERS, key=rank)
    reader = csv.reader(text, delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        columns = [cell.strip() for cell in next(reader)]
        for cells in reader:
            place = f"line {number - 1 + reader.line_num}"
            if any(cells[len(columns) :]):
                counts = f"{len(cells)} cells for {len(columns)} columns"
                yield place, f"has {counts}; quote captions that contain {_DELIMITERS[delimiter]}"
            elif cells:
                yield place, dict(zip(columns, cells, strict=False))
    except csv.Error as error:
        raise DataError(
            "cannot be read",
            where=f"{where}, line {number - 1 + reader.line_num}",
            expected="cells in double quotes where they contain quotes, commas or line breaks",
            found=error,
        ) from error


def matching(columns: Iterable[str], wanted: Sequence[str]) -> list[str]:
    """Columns by the names that are wanted, in their order; case and outer spaces do not count."""
    names, found = list(columns), []
    for name in wanted:
        same = [c for c in names if c.strip().casefold() == name.strip().casefold()]
        found += sorted(same, key=lambda column: column != name)
    return found


def columns_of(
    rows: Sequence[dict[str, Any]], image: str | None, text: str | None, where: object
) -> tuple[str, list[str]]:
    """The column of images, and those of captions, of which a row's first that is filled counts."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    images = matching(columns, IMAGE_COLUMNS if image is None else [image])
    texts = matching(columns, TEXT_COLUMNS if text is None else [text] * bool(text))
    others = [column for column in columns if column not in images and _holds_words(column, rows)]
    if images and (texts or text == "" or (text is None and not others)):
        return images[0], texts
    what, asked, usual = ("text", text, TEXT_COLUMNS) if images else ("image", image, IMAGE_COLUMNS)
    raise DataError(
        f"has no {what} column",
        where=where,
        expected=asked or " or ".join(usual),
        found=", ".join(others if images and others else columns) or "no columns",
        fix=f"Name it with --{what}-column"
        + (", which may be '' for no captions." if images else "."),
    )


def _holds_words(column: str, rows: Sequence[dict[str, Any]]) -> bool:
    values = [row.get(column) for row in rows]
    is_other = column.strip().casefold() in _NO_TEXT
    return not is_other and any(isinstance(v, str) and re.search(r"[^\W\d_]", v) for v in values)
