"""Write results whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ipdiverse.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor

_PROBE_BYTES = 64 * 1024  # an empty file would be written even to a full disk
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_IN_THE_WAY = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR)
_NO_FOLDER_SYNC = (errno.EACCES, errno.EINVAL, errno.ENOTSUP)

AnyPath = str | os.PathLike[str]


def write_bytes_atomic(
    path: AnyPath, data: bytes, check: Callable[[Path], None] | None = None
) -> None:
    """Write a file completely or not at all.

    Args:
        path: The target, in a folder that exists; an existing file is replaced.
        data: The whole content.
        check: Called with the new file before it replaces the old; if it raises, the old one stays.

    Raises:
        OutputError: It cannot be written; an earlier file is still there. Only if the disk fails
            in the very last step, making the name durable, may the new file be there instead.
    """
    target = Path(path)
    # in the same folder, as a rename is atomic only within one file system
    temporary = target.parent / f".{uuid.uuid4().hex}.tmp"
    try:
        _write_synced(temporary, data)
        if check is not None:
            check(temporary)
        temporary.replace(target)
        sync_folder(target.parent)
    except (OSError, ValueError) as error:
        raise _output_error(target, error) from error
    finally:
        with contextlib.suppress(OSError, ValueError):
            temporary.unlink(missing_ok=True)


def write_text_atomic(path: AnyPath, text: str) -> None:
    """As `write_bytes_atomic`, in UTF-8; a character that it cannot encode becomes "?"."""
    write_bytes_atomic(path, text.encode("utf-8", "replace"))


def ensure_writable_folder(path: AnyPath) -> Path:
    """Create a folder if needed, and check before long work that it takes files (`OutputError`)."""
    folder = Path(path)
    probe = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_synced(probe, bytes(_PROBE_BYTES))
    except (OSError, ValueError) as error:
        raise _output_error(folder, error) from error
    finally:
        with contextlib.suppress(OSError, ValueError):
            probe.unlink(missing_ok=True)
    return folder


def sync_folder(folder: Path) -> None:
    """Make a new name in a folder survive a power cut, where the system can do that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def file_hash(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors' names, types, shapes and every bit, in hexadecimal."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        exact = tensor.detach().cpu().contiguous().flatten()
        digest.update(exact.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _output_error(path: Path, error: Exception) -> OutputError:
    number = getattr(error, "errno", None)
    if number in _NO_SPACE:
        what, fix = "there is no space left", "Free some space or choose another disk."
    elif number in _FORBIDDEN:
        what, fix = "this place may not be written to", "Choose another folder."
    elif number in _IN_THE_WAY:
        what, fix = "a file or folder of that name is in the way", "Choose another name."
    elif number == errno.ENOENT:
        what, fix = "the folder does not exist", "Create it first."
    else:
        what, fix = "this cannot be written", "Choose another path."
    return OutputError(what, where=path, found=getattr(error, "strerror", None) or error, fix=fix)
