"""Files of a data set: found, opened and decoded, each within a budget and below its root.

A data set may come from anybody. So a file is opened once, step by step from the root's handle,
without following links, and what was opened is checked: a name that is swapped for a link after
the check reaches nothing. Every kind of file has a budget, checked before work is done on it.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from ipdiverse.config import MARKS, decoded
from ipdiverse.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL import Image

KIB, MIB = 1024, 1024 * 1024
LIST_BYTES = 4096 * MIB
"""Of a list with one row a line, which is streamed."""
WHOLE_BYTES = 256 * MIB
"""Of a list that is read as a whole: JSON, or UTF-16."""
LINE_BYTES = MIB
LINES = 10_000_000
CAPTION_BYTES = 64 * KIB
ENTRIES = 10_000_000
"""Files of a folder with all its subfolders, or members of an archive."""
PARTS = 64
"""Members of one sample of an archive."""
HEADER_BYTES = 64 * KIB
"""Of one long name or other extra header of an archive."""

SETTINGS = "prepare.json"
"""Marks a folder that `prepare` wrote."""
_JUNK = ("__MACOSX", "Thumbs.db", "desktop.ini")
_ASCII_LINES = ("utf-16", "utf-32")
"""Encodings in which a line feed is more than one byte."""


_ADDRESS = re.compile(r"(?!(?:file|https?):)([a-z][a-z0-9+.-]+):/+(.+)", re.IGNORECASE)
"""An object store's, as a Path has it: of two slashes one is left."""


@lru_cache(maxsize=256)
def remote(place: Path) -> tuple[Any, str] | None:
    """The file system of an address such as `s3://bucket/folder`, and the path there."""
    found = _ADDRESS.fullmatch(place.as_posix())
    if found is None or os.path.lexists(place):
        return None
    from fsspec.core import url_to_fs

    address = "://".join(found.groups())
    try:
        return url_to_fs(address)
    except (ImportError, ValueError) as error:  # which say what to install
        raise DataError("cannot be opened", where=address, found=error) from error


def is_file(place: Path) -> bool:
    """Whether there is a file; False for a name that no system can have."""
    there = remote(place)
    return there[0].isfile(there[1]) if there else os.path.isfile(place)  # noqa: PTH113


def is_folder(place: Path) -> bool:
    """Whether there is a folder; False for a name that no system can have."""
    there = remote(place)
    return there[0].isdir(there[1]) if there else os.path.isdir(place)  # noqa: PTH112


@dataclass(frozen=True)
class Listing:
    """What a folder holds, with all its subfolders; hidden names are left out."""

    root: Path
    files: tuple[str, ...]
    skipped: dict[str, list[str]]


def list_files(root: Path) -> Listing:
    """Everything below a folder, but for links to folders and prepared data sets in it."""
    if not is_folder(root):
        raise DataError("is not a folder", where=root)
    if there := remote(root):
        system, home = there
        names = [name.removeprefix(home).lstrip("/") for name in system.find(home)]
        names = [n for n in names if not any(p[0] == "." or p in _JUNK for p in n.split("/"))]
        check_budget(len(names), ENTRIES, root, "files")
        return Listing(root, tuple(sorted(names, key=lambda name: name.split("/"))), {})
    files: list[str] = []
    skipped: dict[str, list[str]] = {}

    def skip(reason: str, path: str) -> None:
        skipped.setdefault(reason, []).append(os.path.relpath(path, root).replace(os.sep, "/"))

    def unread(error: OSError) -> None:
        skip("folders that may not be read", str(error.filename))

    for folder, inner, names in os.walk(root, onerror=unread):
        home = Path(folder)
        if SETTINGS in names and home != root:
            skip("folders that prepare wrote", folder)
            inner.clear()
            continue
        links = [name for name in inner if (home / name).is_symlink()]
        for name in links:
            skip("links to folders", str(home / name))
        inner[:] = [n for n in inner if n not in links and n[0] != "." and n not in _JUNK]
        prefix = "" if home == root else home.relative_to(root).as_posix() + "/"
        files += [prefix + n for n in names if n[0] != "." and n not in _JUNK]
        check_budget(len(files), ENTRIES, root, "files")
    return Listing(root, tuple(sorted(files, key=lambda name: name.split("/"))), skipped)


def check_budget(count: int, most: int, where: object, unit: str = "bytes") -> None:
    """Refuse a file that would cost more than its kind may."""
    if count > most:
        raise DataError("is too large", where=where, expected=f"at most {most} {unit}", found=count)


def inside(root: Path, name: str) -> Path:
    """A file below a root."""
    pure = PurePosixPath(name.replace("\\", "/"))
    windows_drive = len(name) > 1 and name[1] == ":"
    if not name or pure.is_absolute() or windows_drive or ".." in pure.parts or "\0" in name:
        raise DataError(
            "the path leaves its root", where=name or "an empty path", expected=f"a path in {root}"
        )
    path = root.joinpath(*pure.parts)
    try:
        if not remote(root):
            _steps(root, path)
    except ValueError as error:
        raise DataError("the path leaves its root through a link", where=name) from error
    return path


def open_below(root: Path, name: str, most: int) -> IO[bytes]:
    """Open a file below a root, which may have no more than `most` bytes."""
    path = inside(root, name)
    if there := remote(path):
        return _open_remote(*there, name, most)
    try:
        file = os.fdopen(_descriptor(root, path), "rb")
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):  # reading a pipe may block for ever
            file.close()
            raise DataError("is not a file", where=name)
        check_budget(found.st_size, most, name)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError("does not exist", where=name) from error
    except (OSError, ValueError) as error:
        looped = getattr(error, "errno", None) == errno.ELOOP
        reason = "a link to itself, or put there just now" if looped else error
        found = getattr(error, "strerror", None) if not looped else reason
        raise DataError("cannot be read", where=name, found=found or error) from error
    return file


def _open_remote(system: Any, path: str, name: str, most: int) -> IO[bytes]:
    try:
        check_budget(system.size(path) or 0, most, name)
        return system.open(path, "rb")
    except FileNotFoundError as error:
        raise DataError("does not exist", where=name) from error
    except OSError as error:
        raise DataError("cannot be read", where=name, found=error) from error


def read_below(root: Path, name: str, most: int) -> bytes:
    """The bytes of a file below a root; raises as `open_below` does."""
    with open_below(root, name, most) as file:
        data = file.read(most + 1)  # the file may grow after its size was taken
    check_budget(len(data), most, name)
    return data


def picture_bytes(root: Path, name: str) -> bytes:
    """The bytes of a picture below a root, still encoded."""
    from ipdiverse.image_io import MAX_FILE_BYTES  # not above: `--help` does without Pillow

    return read_below(root, name, MAX_FILE_BYTES)


def picture_below(root: Path, name: str) -> Image.Image:
    """A picture below a root, decoded."""
    from ipdiverse.image_io import load_image_bytes

    return load_image_bytes(picture_bytes(root, name), str(root / name))


def text_lines(file: IO[bytes], where: object, encoding: str) -> Iterator[tuple[int, str]]:
    """Number and text of each line, decoded by the file's mark, or else in one encoding."""
    head = file.read(4)
    mark = next((m for m in MARKS if head.startswith(m)), b"")
    codec = MARKS.get(mark, encoding)
    file.seek(len(mark))
    number = 0
    try:
        if codec.startswith(_ASCII_LINES):
            rest = file.read(WHOLE_BYTES + 1)
            check_budget(len(rest), WHOLE_BYTES, where)
            yield from enumerate(decoded(rest, codec).split("\n"), 1)
            return
        while line := file.readline(LINE_BYTES + 1):
            number += 1
            check_budget(len(line), LINE_BYTES, f"{where}, line {number}")
            check_budget(number, LINES, where, "lines")
            yield number, decoded(line, codec)
    except ValueError as error:
        raise DataError(
            "is not text",
            where=f"{where}, line {number + 1 - bool(number)}",
            expected=codec,
            found=error,
            fix="Save it as UTF-8, or name its encoding with --encoding.",
        ) from error


def stamp_of(root: Path, name: str) -> str:
    """A file's size and times: if they are the same, so is its content, unless somebody cheats."""
    try:
        if there := remote(root / name):
            return str(there[0].ukey(there[1]))
        found = (root / name).stat()
    except (OSError, ValueError):
        return "missing"
    return f"{found.st_size}-{found.st_mtime_ns}-{found.st_ctime_ns}"


def _steps(root: Path, path: Path) -> tuple[str, ...]:
    """The way from a root to a file after links are followed; ValueError where it leads out."""
    # realpath, unlike Path.resolve, does not raise on a link to itself
    target = Path(os.path.realpath(path))
    return target.relative_to(os.path.realpath(root)).parts


def _descriptor(root: Path, path: Path) -> int:
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    if os.open not in os.supports_dir_fd:  # Windows has no handles of folders to open from
        return os.open(os.path.realpath(path), flags)
    handle = os.open(os.path.realpath(root), flags | os.O_DIRECTORY)
    steps = _steps(root, path)
    for index, step in enumerate(steps):
        # without O_NONBLOCK, opening a pipe would wait for somebody to write to it
        kind = os.O_DIRECTORY if index + 1 < len(steps) else os.O_NONBLOCK
        try:
            inner = os.open(step, flags | os.O_NOFOLLOW | kind, dir_fd=handle)
        finally:
            os.close(handle)
        handle = inner
    return handle
