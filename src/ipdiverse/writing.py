"""Write results whole or not at all, one process in a folder, and find what was damaged since."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipdiverse.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor

_PROBE_BYTES = 64 * 1024  # an empty file would be written even to a full disk
_IN_THE_WAY = "a file or folder of that name is in the way", "Choose another name."
_FORBIDDEN = "this place may not be written to", "Choose another folder."
_NO_SPACE = "there is no space left", "Free some space or choose another disk."
_REASONS = {
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST, errno.EISDIR), _IN_THE_WAY),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _FORBIDDEN),
    # the last: a limit on the size of files
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _NO_SPACE),
    errno.ENOENT: ("the folder does not exist", "Create it first."),
}
_NO_FOLDER_SYNC = (errno.EACCES, errno.EINVAL, errno.ENOTSUP)
_PROBE = "0" * 12
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")
LOCK = ".lock"

AnyPath = str | os.PathLike[str]


def write_bytes_atomic(
    path: AnyPath, data: bytes | Iterable[bytes], check: Callable[[Path], None] | None = None
) -> None:
    """Write a file completely or not at all.

    Args:
        path: The target, in a folder that exists; an existing file is replaced.
        data: The content, whole or in pieces.
        check: Called with the new file before it replaces the old; if it raises, the old one stays.
    """
    target = Path(path)
    # in the same folder, as a rename is atomic only within one file system
    temporary = target.parent / f".{_mark(target)}{uuid.uuid4().hex[:20]}.tmp"
    try:
        with writing(target):
            _write_synced(temporary, data)
            if check is not None:
                check(temporary)
            temporary.replace(target)
            sync_folder(target.parent)
    finally:
        with contextlib.suppress(OSError, ValueError):
            temporary.unlink(missing_ok=True)


def write_text_atomic(path: AnyPath, text: str) -> None:
    """As `write_bytes_atomic`, in UTF-8; a character that it cannot encode becomes "?"."""
    write_bytes_atomic(path, text.encode("utf-8", "replace"))


def append_text(path: AnyPath, text: str) -> None:
    """Add to a text file in UTF-8; a kill may cut off its end (raises as `write_bytes_atomic`)."""
    with writing(path), Path(path).open("a", encoding="utf-8", newline="") as file:
        file.write(text)


@contextlib.contextmanager
def writing(path: AnyPath) -> Iterator[None]:
    """What the system refuses while a place is written to becomes an OutputError."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise _output_error(Path(path), error) from error


def ensure_writable_folder(path: AnyPath) -> Path:
    """Create a folder if needed, and check before long work that it takes files (`OutputError`)."""
    folder = Path(path)
    probe = folder / f".{_PROBE}{uuid.uuid4().hex[:20]}.tmp"
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f".{_PROBE}*.tmp"):  # by a kill; nobody reads what is in one
                left.unlink(missing_ok=True)
            _write_synced(probe, bytes(_PROBE_BYTES))
    finally:
        with contextlib.suppress(OSError, ValueError):
            probe.unlink(missing_ok=True)
    return folder


@contextlib.contextmanager
def only_one(path: AnyPath, *outside: Path) -> Iterator[None]:
    """Hold a folder, made if needed, for one process; what killed writes left in it is removed.

    Args:
        outside: Files that nobody else writes meanwhile; what kills left beside them goes too.
    """
    from filelock import FileLock, Timeout

    folder = ensure_writable_folder(path)
    is_new = not (folder / LOCK).exists()
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        what, fix = "another process is at work in this folder", "Wait, or choose another folder."
        raise OutputError(what, where=folder, fix=fix) from error
    except OSError as error:
        raise _output_error(folder, error) from error
    try:
        for root, folders, files in os.walk(folder):
            if LOCK in files and Path(root) != folder:
                folders.clear()  # it has a process of its own, now or at its next run
                continue
            for name in filter(_TEMPORARY.fullmatch, files):
                Path(root, name).unlink(missing_ok=True)
        for file in outside:
            for left in file.parent.glob(f".{_mark(file)}*.tmp"):
                left.unlink(missing_ok=True)
        yield
    except BaseException:
        if is_new:  # a folder that was refused is left as it was
            (folder / LOCK).unlink(missing_ok=True)
        raise
    finally:
        lock.release()


def _mark(target: Path) -> str:
    """Twelve hexadecimal digits by which an unfinished file is known as this one's."""
    return hashlib.sha256(target.name.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def sealed(content: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON of an object, with a hash of itself that `unsealed` compares."""
    return json.dumps({**content, "seal": _seal(content)}, indent=indent) + "\n"


def unsealed(text: str) -> dict[str, Any]:
    """What `sealed` was given; an object without a hash, as of 0.1, is taken as it is."""
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    if content.pop("seal", None) not in (None, _seal(content)):
        raise ValueError("it differs from the hash that it was written with")
    return content


def without_folders(content: Any) -> Any:
    """JSON content with the name alone of each absolute path: results are shared, homes are not."""
    if isinstance(content, Mapping):
        return {key: without_folders(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_folders(value) for value in content]
    is_place = isinstance(content, str) and Path(content).is_absolute()
    return Path(content).name if is_place else content


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(content), sort_keys=True).encode()).hexdigest()[:32]


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
        digest.update(exact.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def safetensors_bytes(tensors: dict[str, Tensor], about: Mapping[str, str]) -> bytes:
    """A safetensors file with metadata in one order; the library's own differs from run to run."""
    from safetensors.torch import save

    whole = memoryview(save(tensors, dict(about)))
    start = 8 + int.from_bytes(whole[:8], "little")
    header = {**json.loads(bytes(whole[8:start])), "__metadata__": dict(sorted(about.items()))}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors stay aligned
    return b"".join((len(text).to_bytes(8, "little"), text, whole[start:]))


def _write_synced(path: Path, data: bytes | Iterable[bytes]) -> None:
    with path.open("xb") as file:
        file.writelines([data] if isinstance(data, bytes) else data)
        file.flush()
        os.fsync(file.fileno())


def _output_error(path: Path, error: Exception) -> OutputError:
    number = getattr(error, "errno", 0)
    what, fix = _REASONS.get(number, ("this cannot be written", "Choose another path."))
    return OutputError(what, where=path, found=getattr(error, "strerror", None) or error, fix=fix)
