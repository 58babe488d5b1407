"""The source `webdataset`: tar files whose members of one stem are one sample."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ipdiverse.data.items import IMAGE_SUFFIXES, Item, Source
from ipdiverse.errors import DataError
from ipdiverse.image_io import MAX_FILE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

_TEXT_SUFFIXES = (".txt", ".caption", ".text")
_MAX_TEXT_BYTES = 1_000_000


def tar_files(folder: Path) -> list[Path]:
    """The tar files right in a folder, in order."""
    return sorted(folder.glob("*.tar"))


def webdataset(path: Path) -> Source:
    """One tar file, or every tar file of a folder.

    Members are read into memory one sample at a time, and nothing is unpacked to disk, so neither
    their names nor links in them can reach anything.

    Raises:
        DataError: There is no tar file.
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
