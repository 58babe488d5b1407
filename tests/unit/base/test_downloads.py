"""What the hub's errors become: one line each, with what mends it."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import httpx
import huggingface_hub
import pytest
from diffusers import DiffusionPipeline
from huggingface_hub import constants, errors

from ipdiverse.base.adapters import find_checkpoint
from ipdiverse.base.bases import load_base
from ipdiverse.base.downloads import cached, fetch, missing, offline, reason
from ipdiverse.base.presets import HubFile, Repository
from ipdiverse.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

COMMIT = "a" * 40
REPOSITORY = Repository("owner/name", COMMIT, "mit")
FILES = [HubFile(REPOSITORY, "model_index.json"), HubFile(REPOSITORY, "unet/w.bin", 2_000_000_000)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "models--owner--name"


def put(cache: Path, commit: str, *names: str) -> None:
    for name in names:
        file = cache / "snapshots" / commit / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")


def _http(kind: type[Exception], status: int) -> Exception:
    request = httpx.Request("GET", "https://huggingface.co/owner/name")
    build: Any = kind
    return build("a long story\nwith more lines", response=httpx.Response(status, request=request))


def _under(outer: Exception, inner: Exception) -> Exception:
    outer.__cause__ = inner
    return outer


ONLINE = [
    (
        _http(errors.GatedRepoError, 403),
        "it is gated: its owner wants its terms accepted first",
        "Accept them on https://huggingface.co/owner/name, then run `hf auth login`.",
    ),
    (
        _http(errors.RepositoryNotFoundError, 401),
        "there is no such repository, or it is private",
        "run `hf auth login`",
    ),
    (_http(errors.RevisionNotFoundError, 404), "it has no such revision", "Check --revision"),
    (_http(errors.RemoteEntryNotFoundError, 404), "it lacks a file at this revision", "--revision"),
    (_http(errors.HfHubHTTPError, 500), "the hub refused", "try again"),
    (httpx.ConnectError("no route"), "the hub cannot be reached", "Check the network"),
    (TimeoutError(), "the hub cannot be reached", "Check the network"),
    (
        _under(errors.LocalEntryNotFoundError("see above"), httpx.ConnectError("no route")),
        "the hub cannot be reached",
        "what was downloaded stays",
    ),
    (
        _under(OSError("wrapped by a library"), _http(errors.GatedRepoError, 403)),
        "it is gated",
        "hf auth login",
    ),
    (OSError(errno.ENOSPC, "No space left"), "there is no space left", "HF_HOME"),
    (ValueError("surprise\nand more"), "cannot be downloaded; found surprise", ""),
]


@pytest.mark.parametrize(("error", "what", "fix"), ONLINE, ids=lambda part: str(part)[:30])
def test_each_is_one_line_with_its_fix(
    cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, what: str, fix: str
) -> None:
    def fails(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    with pytest.raises(ModelError) as caught:
        fetch(FILES, "sd99")
    line = str(caught.value)
    assert line.startswith("sd99 (owner/name/model_index.json at aaaaaaaaaaaa): ")
    assert what in line
    assert fix in line
    assert "\n" not in line


def test_what_is_not_about_the_hub_has_no_reason() -> None:
    assert reason(ValueError("x")) is None
    known = reason(_http(errors.GatedRepoError, 403))
    assert known is not None
    assert "its page on the hub" in known.fix


def test_offline_names_what_is_missing_before_anything_is_tried(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(cache, COMMIT, "model_index.json")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert offline()
    with pytest.raises(ModelError) as caught:
        fetch(FILES, "sd99")
    assert str(caught.value) == (
        "sd99: is not in the local cache, and downloads are off; found no owner/name/unet/w.bin "
        "(2.0 GB). Unset HF_HUB_OFFLINE once, or copy the cache from a machine that has it."
    )


def test_what_is_cached_is_not_asked_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(cache, COMMIT, "model_index.json", "unet/w.bin")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    assert missing(FILES) == []
    assert fetch(FILES, "x") == [cached(file) for file in FILES]


def test_another_commit_in_the_cache_is_not_it(cache: Path) -> None:
    put(cache, "b" * 40, "model_index.json")
    assert missing(FILES) == FILES


def test_a_branch_is_resolved_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch may move on between two files; a base of two commits must not come of it."""
    asked = []

    def download(repository: str, name: str, revision: str) -> str:
        asked.append(revision)
        put(cache, "c" * 40, name)
        return str(cache / "snapshots" / ("c" * 40) / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    fetch([HubFile(REPOSITORY, file.name, revision="main") for file in FILES], "x")
    assert asked == ["main", "c" * 40]


def test_adapters_and_hub_ids_say_the_same(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> str:
        raise _http(errors.GatedRepoError, 403)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    with pytest.raises(ModelError) as adapter:
        find_checkpoint("owner/name", weight_name="x.safetensors")
    assert str(adapter.value) == (
        "owner/name/x.safetensors: cannot be downloaded from the hub: it is gated: its owner wants "
        "its terms accepted first. Accept them on https://huggingface.co/owner/name, then run `hf auth "
        "login`."
    )
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", fails)
    with pytest.raises(ModelError, match="owner/name: cannot be opened: it is gated: its owner"):
        load_base("owner/name")
