"""Sources that pack many images into one file.

`hub` is a data set that `datasets` opens, by hub id or from a local repository of parquet or arrow
files; `webdataset` is tar files whose members of one stem are one sample.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ipdiverse.data.manifest import IMAGE_SUFFIXES, Item, Source, read_file
from ipdiverse.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

HUB_FILES = ("*.parquet", "*.arrow", "state.json")
"""Files by which a local repository, or a folder that `save_to_disk` wrote, is recognised."""
_TEXT_SUFFIXES = (".txt", ".caption", ".text")
_MAX_TEXT_BYTES = 1_000_000


def hub_source(
    source: str,
    image_column: str | None = None,
    text_column: str | None = None,
    split: str = "train",
    revision: str | None = None,
) -> Source:
    """Open a data set; images stay undecoded until they are read.

    Code that comes with a data set is never run.

    Args:
        source: A hub id, or a folder.
        image_column: Column with the image; None finds it.
        text_column: Column with the caption; None finds it.
        split: Split of a hub data set.
        revision: Branch, tag or commit of a hub data set.

    Raises:
        DataError: `datasets` is not installed, or the data set cannot be opened or has no column
            of images.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "needs the package datasets, which is not installed",
            where=source,
            fix="pip install 'ipdiverse[hub-data]'.",
        ) from error

    table = _load(source, split, revision)
    columns: dict[str, Any] = dict(table.features)
    image = image_column or _image_column(columns, source)
    for wanted, what in ((image, "image"), (text_column, "text")):
        if wanted is not None and wanted not in columns:
            raise DataError(
                f"has no column {wanted!r}",
                where=source,
                found=", ".join(columns),
                fix=f"Name the right one with --{what}-column.",
            )
    text = text_column or _text_column(columns)
    # undecoded: `datasets` would decode without the limits of `image_io`
    if isinstance(columns[image], datasets.Image):
        table = table.cast_column(image, datasets.Image(decode=False))
    reference = "reference" if isinstance(columns.get("reference"), datasets.Image) else None
    if reference:
        table = table.cast_column(reference, datasets.Image(decode=False))

    def items() -> Iterator[Item]:
        for number, row in enumerate(table):
            yield _row_item(number, row, (image, text, reference), _roots(source))

    return Source("hub", len(table), items)


def _load(source: str, split: str, revision: str | None) -> Any:
    import datasets

    try:
        if (Path(source) / "state.json").is_file():
            return datasets.load_from_disk(source)
        return datasets.load_dataset(source, split=split, revision=revision)
    except Exception as error:  # whatever network, hub, arrow and parquet code raise
        message = str(error).splitlines()
        raise DataError(
            "cannot be opened as a data set",
            where=source,
            found=message[0] if message else type(error).__name__,
            fix="Check the name, the split and the connection.",
        ) from error


def _image_column(columns: dict[str, Any], source: str) -> str:
    import datasets

    found = [
        n for n, kind in columns.items() if isinstance(kind, datasets.Image) and n != "reference"
    ]
    if not found:
        raise DataError(
            "has no column of images",
            where=source,
            found=", ".join(
                f"{name}: {getattr(kind, 'dtype', kind)}" for name, kind in columns.items()
            ),
            fix="Name it with --image-column.",
        )
    return found[0]


def _text_column(columns: dict[str, Any]) -> str | None:
    texts = [name for name, kind in columns.items() if getattr(kind, "dtype", None) == "string"]
    usual = [name for name in ("text", "caption", "prompt") if name in texts]
    others = [name for name in texts if name != "subject"]
    return (usual or others or [None])[0]


def _roots(source: str) -> tuple[Path, ...]:
    """Where files that a table names may be: the data set's own folder and the caches."""
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub.constants import HF_HUB_CACHE

    return (Path(source), Path(HF_DATASETS_CACHE), Path(HF_HUB_CACHE))


def _row_item(
    number: int,
    row: dict[str, Any],
    columns: tuple[str, str | None, str | None],
    roots: tuple[Path, ...],
) -> Item:
    image, text, reference = columns
    name = f"row-{number:07d}"
    words, subject = (row.get(text) if text else None), row.get("subject")
    return Item(
        name,
        lambda: _bytes(row[image], name, roots),
        words if isinstance(words, str) else None,
        subject if isinstance(subject, str) else None,
        (lambda: _bytes(row[reference], name, roots)) if reference and row[reference] else None,
    )


def _bytes(cell: Any, name: str, roots: tuple[Path, ...]) -> bytes:
    """The encoded image of a cell: its bytes, or the file that it names, below one of the roots."""
    if isinstance(cell, bytes):
        return cell
    if isinstance(cell, dict) and cell.get("bytes"):
        return cell["bytes"]
    if isinstance(cell, dict) and cell.get("path"):
        path = Path(cell["path"]).resolve()
        for root in roots:
            if path.is_relative_to(root.resolve()):
                return read_file(root.resolve(), path.relative_to(root.resolve()).as_posix())
        raise DataError("the path leaves its root", where=name, found=cell["path"])
    raise DataError("holds no image", where=name, found=type(cell).__name__)


def tar_files(folder: Path) -> list[Path]:
    """The tar files right in a folder, in order."""
    return sorted(folder.glob("*.tar"))


def webdataset(path: Path) -> Source:
    """One tar file, or every tar file of a folder.

    Members are read into memory one sample at a time, and nothing is unpacked to disk, so neither
    their names nor links in them can reach anything.

    Raises:
        DataError: It holds no tar file.
    """
    files = tar_files(path) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise DataError("holds no tar file", where=path, expected=".tar")

    def items() -> Iterator[Item]:
        for file in files:
            yield from _samples(file)

    return Source("webdataset", None, items)


def _samples(file: Path) -> Iterator[Item]:
    """The samples of one tar: runs of members that share everything before the first dot."""
    from ipdiverse.image_io import MAX_FILE_BYTES

    parts: dict[str, bytes] = {}
    stem = ""
    try:
        with tarfile.open(file) as archive:
            for member in archive:
                base, suffix = _split(member.name)
                if not member.isfile() or not suffix:
                    continue
                if base != stem and parts:
                    yield _sample(file, stem, parts)
                    parts = {}
                stem = base
                opened = archive.extractfile(member)
                if opened is not None:
                    parts[suffix] = opened.read(MAX_FILE_BYTES + 1)
    except (tarfile.TarError, OSError, EOFError) as error:
        if parts:
            yield _sample(file, stem, parts)
        yield Item(file.name, bytes, problem=f"the tar file is broken after {stem!r}: {error}")
        return
    if parts:
        yield _sample(file, stem, parts)


def _split(name: str) -> tuple[str, str]:
    """`a/b.seg.jpg` is sample `a/b`, part `.seg.jpg`."""
    path = PurePosixPath(name)
    stem, dot, suffix = path.name.partition(".")
    return str(path.with_name(stem)) if stem else name, (dot + suffix).lower()


def _sample(file: Path, stem: str, parts: dict[str, bytes]) -> Item:
    name = f"{file.name}/{stem}"
    image = next((parts[s] for s in IMAGE_SUFFIXES if s in parts), None)
    if image is None:
        return Item(name, bytes, problem=f"no image among {', '.join(sorted(parts))}")
    about = _json_of(parts)
    texts = [
        parts[s][:_MAX_TEXT_BYTES].decode("utf-8", "replace") for s in _TEXT_SUFFIXES if s in parts
    ]
    text = texts[0] if texts else about.get("text", about.get("caption"))
    subject = about.get("subject")
    reference = next(
        (parts[f".reference{s}"] for s in IMAGE_SUFFIXES if f".reference{s}" in parts), None
    )
    return Item(
        name,
        lambda: image,
        text if isinstance(text, str) else None,
        subject if isinstance(subject, str) else None,
        None if reference is None else (lambda: reference),
    )


def _json_of(parts: dict[str, bytes]) -> dict[str, Any]:
    try:
        about = json.loads(parts.get(".json", b"{}")[:_MAX_TEXT_BYTES])
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}
