"""What a source yields before anything is checked: a name, a way to the bytes, words about it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ipdiverse.data.manifest import inside
from ipdiverse.errors import DataError
from ipdiverse.image_io import MAX_FILE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Item:
    """One image of a source, unread.

    Args:
        name: Unique in the source, and the same each time it is read: the key for going on.
        load: Gives the file's bytes.
        text: Its caption, if the source has one.
        subject: Its subject, if the source says.
        load_reference: Gives the bytes of a reference of its own, if there is one.
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
        count: How many items; None when only reading tells.
        items: Yields them, each time from the first, in the same order.
    """

    kind: str
    count: int | None
    items: Callable[[], Iterator[Item]]


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
    path = inside(root, name)
    try:
        if not path.is_file():
            raise DataError("there is no such file", where=name)
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise DataError("cannot be read", where=name, found=error.strerror) from error


def subject_class(subject: str) -> str:
    """A subject's name as words: `bear_plushie` is "bear plushie", `dog2` is "dog"."""
    return re.sub(r"[\s_-]+", " ", re.sub(r"\d+$", "", subject)).strip() or subject
