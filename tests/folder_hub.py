"""The hub as a folder: repositories are uploaded to it and downloaded from it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError

if TYPE_CHECKING:
    import pytest


class Refused(Exception):  # noqa: N818 - as the hub's library: an error with a response
    """What the hub's library raises for an HTTP error."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.response = type("Response", (), {"status_code": status})()


class FolderHub:
    """Stands in for `huggingface_hub.HfApi` and `hf_hub_download`.

    Args:
        root: Where the repositories are.
        owner: Whose token it is: other owners' repositories are refused.
    """

    def __init__(self, root: Path, owner: str = "me") -> None:
        self.root, self.owner = root, owner
        self.tokens: list[str | None] = []
        self.made: dict[str, bool] = {}
        self.uploads: list[dict[str, Any]] = []
        self.fails: Exception | None = None

    def install(self, monkeypatch: pytest.MonkeyPatch, token: str | None = "t") -> FolderHub:  # noqa: S107
        monkeypatch.setattr(huggingface_hub, "HfApi", self._api)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        return self

    def _api(self, token: str | None = None) -> FolderHub:
        self.tokens.append(token)
        return self

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        if self.fails is not None:
            raise self.fails
        if not repo_id.startswith(f"{self.owner}/"):
            raise Refused(403, "403 Forbidden: you may not write here\nlong story")
        assert exist_ok
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        self.made[repo_id] = private
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> None:
        self.uploads.append(options)
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)

    def download(self, repo_id: str, filename: str, **options: Any) -> str:
        file = self.root / repo_id / (options.get("subfolder") or "") / filename
        if not file.is_file():
            raise EntryNotFoundError(f"404: {filename} is not in {repo_id}")
        return str(file)
