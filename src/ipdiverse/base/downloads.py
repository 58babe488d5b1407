"""Files of the hub: which are in the local cache, which are not, and why one cannot be had.

Errors of the hub's libraries become one line each, with a fix.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ipdiverse.base.presets import SITE, as_size, total
from ipdiverse.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ipdiverse.base.presets import HubFile

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


class Reason(NamedTuple):
    """Why a file cannot be had, and a suggested fix."""

    what: str
    fix: str


_OFF = Reason(
    "it is not in the local cache, and downloads are off",
    "Unset HF_HUB_OFFLINE once, or copy the cache from a machine that has it.",
)


def cached(file: HubFile) -> Path | None:
    """Where a file is in the hub's local cache; None if it is not."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(file.repository.id, file.name, revision=file.at)
    # for a file that the repository is known to lack, the library returns a sentinel
    return Path(found) if isinstance(found, str) else None


def missing(files: Sequence[HubFile]) -> list[HubFile]:
    """Those that are not in the local cache."""
    return [file for file in files if cached(file) is None]


def offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids downloads."""
    from huggingface_hub import is_offline_mode

    return is_offline_mode()


def fetch(files: Sequence[HubFile], name: str, *, local_files_only: bool = False) -> list[Path]:
    """Where files are in the local cache, once the missing ones are downloaded."""
    lacking = missing(files)
    if lacking and (local_files_only or offline()):
        raise not_cached(lacking, name)
    # A branch may move between two files, and a base must not be made of two commits: the first
    # file decides. `snapshot_download` would resolve it too, but it skips a file that the revision
    # lacks, and its errors do not say which file they are about.
    commits: dict[str, str] = {}
    paths: list[Path] = []
    for file in files:
        path = cached(file) or _download(file, commits.get(file.repository.id, file.at), name)
        commits.setdefault(file.repository.id, snapshot(path, file).name)
        paths.append(path)
    return paths


def snapshot(path: Path, file: HubFile) -> Path:
    """The folder of the repository's files at one commit, from the path of one of them."""
    return path.parents[file.name.count("/")]


def not_cached(lacking: Sequence[HubFile], name: str) -> ModelError:
    """The error for missing files where nothing may be downloaded."""
    first = f"{lacking[0].repository.id}/{lacking[0].name}"
    more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
    found = f"no {first}{more} ({as_size(total(list(lacking)))})"
    return ModelError(_OFF.what.removeprefix("it "), where=name, found=found, fix=_OFF.fix)


def cannot_be_opened(what: str, where: str, error: Exception) -> ModelError:
    """A library's error in a line, with a fix where one is known."""
    local = Path(where).exists() or not HUB_ID.match(where)
    known = None if local else reason(error, split_hub_id(where)[0])
    if known is None:
        return ModelError(what, where=where, found=first_line(error))
    return ModelError(f"{what}: {known.what}", where=where, fix=known.fix)


def reason(error: BaseException, repository: str = "") -> Reason | None:
    """Why the hub gave no file; None for errors that are not about the hub."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    chain = list(_chain(error))
    for under in chain:
        if (found := _of_the_hub(under, repository)) is not None:
            return found
    # last, because the hub's library wraps every lost connection in this error
    return _OFF if any(isinstance(under, LocalEntryNotFoundError) for under in chain) else None


def _of_the_hub(error: BaseException, repository: str) -> Reason | None:
    import httpx  # what the hub's library connects with; it passes these errors on as they are
    from huggingface_hub import errors

    page = f"{SITE}/{repository}" if repository else "its page on the hub"
    network = "Check the network and try again: what was downloaded stays."
    lost = (ConnectionError, TimeoutError, httpx.TransportError)
    accept = f"Accept them on {page}, then run `hf auth login`."
    login = "Check the name; for a private one run `hf auth login`."
    revision, file = "Check --revision; `main` is the newest.", f"See {page}, and check --revision."
    # an error comes before those that it inherits from
    table: tuple[tuple[Any, str, str], ...] = (
        (errors.GatedRepoError, "it is gated: its owner wants its terms accepted first", accept),
        (errors.RepositoryNotFoundError, "there is no such repository, or it is private", login),
        (errors.RevisionNotFoundError, "it has no such revision", revision),
        (errors.RemoteEntryNotFoundError, "it lacks a file at this revision", file),
        (errors.OfflineModeIsEnabled, _OFF.what, _OFF.fix),
        (lost, "the hub cannot be reached", network),
        (errors.HfHubHTTPError, "the hub refused", network),
    )
    for kinds, what, fix in table:
        if isinstance(error, kinds):
            return Reason(what, fix)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return Reason("there is no space left for it", "Free some, or set HF_HOME to another disk.")
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from; a library may have closed them to a circle."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def _download(file: HubFile, revision: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(file.repository.id, file.name, revision=revision))
    except Exception as error:  # whatever the hub's library or the network raises
        where = f"{name} ({file.repository.id}/{file.name} at {revision[:12]})"
        if known := reason(error, file.repository.id):
            raise ModelError(known.what, where=where, fix=known.fix) from error
        raise ModelError("cannot be downloaded", where=where, found=first_line(error)) from error


def split_hub_id(source: str) -> tuple[str, str | None]:
    """`owner/name/path/inside` as (`owner/name`, `path/inside`); anything shorter as it is."""
    parts = source.split("/", 2)
    return ("/".join(parts[:2]), parts[2]) if len(parts) == 3 else (source, None)


def first_line(error: Exception) -> str:
    """The first line of a library's message, which may go on for pages."""
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
