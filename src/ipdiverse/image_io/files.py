"""Open a file that somebody named, with one clear error for whatever may be wrong with it."""

from __future__ import annotations

import stat
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ipdiverse.errors import ImageError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open an image file for reading; what goes wrong while it is read is reported too.

    Args:
        path: The file.

    Yields:
        The open file.

    Raises:
        ImageError: It is missing, unreadable or no ordinary file.
    """
    try:
        _check_is_file(Path(path))
        with Path(path).open("rb") as file:
            yield file
    except FileNotFoundError as error:
        raise ImageError(
            "the image file does not exist", where=path, fix="Check the path for a typing error."
        ) from error
    except PermissionError as error:
        raise ImageError(
            "the image file may not be read",
            where=path,
            expected="read permission",
            found=error.strerror,
            fix="Change its permissions or copy it elsewhere.",
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        found = getattr(error, "strerror", None) or error
        raise ImageError(
            "the image file cannot be read", where=path, found=found, fix="Check the path."
        ) from error


def _check_is_file(path: Path) -> None:
    """A pipe would block for ever and a device may never end."""
    mode = path.stat().st_mode
    if stat.S_ISREG(mode):
        return
    raise ImageError(
        "this is not a file",
        where=path,
        expected="one image file",
        found="a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device",
        fix="Name one image.",
    )
