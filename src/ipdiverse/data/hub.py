"""The source `hub`: a data set that `datasets` opens, by hub id or from a local repository."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipdiverse.data.items import Item, Source, read_file
from ipdiverse.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ipdiverse.data.options import SourceOptions

HUB_FILES = ("*.parquet", "*.arrow", "state.json")
"""What tells a local repository, or a folder that `save_to_disk` wrote."""


def hub_source(source: str, options: SourceOptions) -> Source:
    """Open a data set; images stay undecoded until they are read.

    No data set's own code is run.

    Raises:
        DataError: It cannot be opened, or has no column of images.
    """
    import datasets

    table = _load(source, options)
    columns: dict[str, Any] = dict(table.features)
    image = options.image_column or _image_column(columns, source)
    for wanted, what in ((image, "image"), (options.text_column, "text")):
        if wanted is not None and wanted not in columns:
            raise DataError(
                f"has no column {wanted!r}",
                where=source,
                found=", ".join(columns),
                fix=f"Name the right one with --{what}-column.",
            )
    text = options.text_column or _text_column(columns)
    if isinstance(columns[image], datasets.Image):
        table = table.cast_column(image, datasets.Image(decode=False))
    reference = "reference" if isinstance(columns.get("reference"), datasets.Image) else None
    if reference:
        table = table.cast_column(reference, datasets.Image(decode=False))

    def items() -> Iterator[Item]:
        for number, row in enumerate(table):
            yield _item(number, row, (image, text, reference), _roots(source))

    return Source("hub", len(table), items)


def _load(source: str, options: SourceOptions) -> Any:
    import datasets

    try:
        if (Path(source) / "state.json").is_file():
            return datasets.load_from_disk(source)
        return datasets.load_dataset(source, split=options.split, revision=options.revision)
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


def _item(
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
