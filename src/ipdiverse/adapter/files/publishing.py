"""Files in a folder of the disk, or in a repository of the hub."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ipdiverse.base.downloads import HUB_ID
from ipdiverse.errors import ArgumentError, ModelError
from ipdiverse.writing import ensure_writable_folder, write_bytes_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def save_files(folder: Path, files: Mapping[str, bytes | None]) -> list[str]:
    """Write files into a folder, made if need be."""
    ensure_writable_folder(folder)
    for name, content in files.items():
        if content is None:
            (folder / name).unlink(missing_ok=True)
        else:
            write_bytes_atomic(folder / name, content)
    return [name for name, content in files.items() if content is not None]


def push_files(
    repo_id: str,
    files: Callable[[], Mapping[str, bytes | None]],
    *,
    private: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload files to a repository of the hub, made if need be, in one commit."""
    import huggingface_hub

    check_repository(repo_id)
    if not (token or huggingface_hub.get_token()):
        raise ModelError(
            "there is no token to upload with",
            where=repo_id,
            fix="Run `hf auth login`, or set HF_TOKEN to a token that may write.",
        )
    # a folder, because the hub's library uploads what it finds there in one commit
    with tempfile.TemporaryDirectory() as folder:
        save_files(Path(folder), files())
        try:
            api = huggingface_hub.HfApi(token=token)
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or "Upload an image prompt adapter with ipdiverse",
                create_pr=create_pr,
            )
        except Exception as error:  # whatever the hub's library or the network raises
            raise _refused(repo_id, error) from error
    return str(address)


def check_repository(repo_id: str) -> None:
    """Refuse what cannot be a repository."""
    if HUB_ID.fullmatch(repo_id) is None:
        raise ArgumentError(
            "is not a repository of the hub", where="repo_id", expected="owner/name", found=repo_id
        )


def _refused(repo_id: str, error: Exception) -> ModelError:
    """Why an upload failed, in one line."""
    import httpx  # what the hub's library connects with

    why = str(error).strip().partition("\n")[0][:200] or type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        what, fix = "may not be written to", "Check that the token may write there, and its owner."
    elif status is None and isinstance(error, OSError | httpx.TransportError):
        what, fix = "cannot be reached", "Check the network, and that HF_HUB_OFFLINE is not set."
    else:
        what, fix = "cannot be uploaded", "Check the name and your token."
    return ModelError(what, where=repo_id, found=why, fix=fix)
