"""What users call an adapter, and the file that it is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from ipdiverse.base import adapters
from ipdiverse.base.adapters import (
    ADAPTERS,
    CRITTERS_ADAPTERS,
    adapter_file,
    check_adapter,
    find_checkpoint,
)
from ipdiverse.errors import ArgumentError, CheckpointError, ModelError

PLUS = CRITTERS_ADAPTERS / "ip-adapter-plus_critters.safetensors"


def test_names_of_the_package_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert adapter_file("critters") == adapter_file("critters", "plus")
    for name, file in ADAPTERS.items():
        assert adapter_file("critters", name) == CRITTERS_ADAPTERS / f"{file}.safetensors"
    assert adapter_file("critters", PLUS.stem) == PLUS
    Path("mine").mkdir()
    shutil.copy(PLUS, "mine/a.safetensors")
    for named in ("mine", "mine/a.safetensors"):
        assert adapter_file("critters", named) == Path("mine/a.safetensors")
    assert adapter_file("somebody/model", "mine") == Path("mine/a.safetensors")


@pytest.mark.parametrize(
    ("base", "adapter", "kind", "message"),
    [
        ("critters", "gone", ModelError, "gone: unknown adapter; expected diverse, plus, base"),
        ("sd15", "plus", ModelError, "adapter plus: belongs to critters; found base sd15"),
        ("critters", "sd15-plus", ModelError, "adapter sd15-plus: belongs to "),
        ("sdxl", "sd15-plus", ModelError, "adapter sd15-plus: belongs to .* found base sdxl"),
        ("somebody/model", "", ArgumentError, "adapter: is missing; found base somebody/model"),
        ("sd35-medium", "", ArgumentError, "adapter: is missing; found base sd35-medium"),
        ("sd35-large", "sd35-medium", ModelError, "sd35-medium: has no adapter of its own"),
        ("sd35-medium", "sd35-large", ModelError, "adapter sd35-large: belongs to "),
        ("flux-schnell", "sdxl", ModelError, "adapter sdxl: belongs to "),
    ],
)
def test_what_is_not_an_adapter_of_the_base_is_refused(
    base: str, adapter: str, kind: type[Exception], message: str
) -> None:
    for use in (check_adapter, adapter_file):
        with pytest.raises(kind, match=message):
            use(base, adapter)


def test_schnell_takes_the_adapters_of_dev() -> None:
    for adapter in ("", "flux-dev", "flux-dev-v2", "flux-dev-instantx"):
        check_adapter("flux-schnell", adapter)


def test_hub_ids_and_presets_connect_only_where_they_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    asked: list[Any] = []

    def download(repository: str, name: str, **options: Any) -> str:
        asked.append((repository, name, options["local_files_only"]))
        raise LocalEntryNotFoundError("it is not there")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for only in (True, False):
        with pytest.raises(CheckpointError, match=r"o/r/a/x\.bin: "):
            adapter_file("critters", "o/r/a/x.bin", local_files_only=only)
    assert asked == [("o/r", "a/x.bin", True), ("o/r", "a/x.bin", False)]
    fetched: list[bool] = []

    def fetch(_files: Any, _name: str, *, local_files_only: bool) -> list[Path]:
        fetched.append(local_files_only)
        return [PLUS]

    monkeypatch.setattr(adapters, "fetch", fetch)
    assert adapter_file("sd15-plus", local_files_only=True) == PLUS
    assert adapter_file("sd15-plus") == PLUS
    assert fetched == [True, False]


def test_folders_hold_one_checkpoint_or_say_which(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not hold a checkpoint.* found none\. Check"):
        find_checkpoint(tmp_path)
    for name in ("a.bin", "optimizer.bin", "notes.txt"):
        (tmp_path / name).touch()
    assert find_checkpoint(str(tmp_path)) == tmp_path / "a.bin"
    (tmp_path / "b.bin").touch()
    with pytest.raises(
        CheckpointError,
        match=r"not clear .* found a\.bin, b\.bin\. Give the file's path, or weight",
    ):
        find_checkpoint(tmp_path)
    assert find_checkpoint(tmp_path, weight_name="b.bin") == tmp_path / "b.bin"
    (tmp_path / "c.safetensors").touch()
    assert find_checkpoint(tmp_path) == tmp_path / "c.safetensors"
    (tmp_path / "sub").mkdir()
    assert find_checkpoint(tmp_path, subfolder="sub", weight_name="d") == tmp_path / "sub" / "d"


def test_hub_ids_are_fetched_with_what_was_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def fake(*names: Any, **options: Any) -> str:
        calls.append((names, options))
        return str(tmp_path / "x.bin")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    found = find_checkpoint("o/r", weight_name="x.bin", subfolder="models", revision="v2")
    assert found == tmp_path / "x.bin"
    asked = {"subfolder": "models", "revision": "v2", "local_files_only": False}
    assert calls.pop() == (("o/r", "x.bin"), asked)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    find_checkpoint("o/r", weight_name="x.bin")
    assert calls.pop()[1]["local_files_only"] is True
