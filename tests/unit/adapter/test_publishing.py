"""Folders with a model card, and the hub."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from ipdiverse.adapter.fusion import GatedFusion
from ipdiverse.adapter.model import ImagePromptAdapter, new_adapter
from ipdiverse.adapter.publishing import model_card
from ipdiverse.errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def adapter(pipe: Any) -> ImagePromptAdapter:
    adapter = new_adapter("base", pipe.unet, pipe.image_encoder, GatedFusion(128, 4, heads=4))
    adapter.spec = {"reference": "paired", "steps": 12}
    return adapter


def test_a_folder_opens_to_the_bit_and_has_a_card(
    adapter: ImagePromptAdapter, tmp_path: Path
) -> None:
    adapter.save_pretrained(tmp_path / "mine")
    opened = ImagePromptAdapter.from_pretrained(tmp_path / "mine")
    expected = adapter.state_dict()
    assert opened.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[k]) for k, t in opened.state_dict().items())
    assert opened.spec["reference"] == "paired"
    card = (tmp_path / "mine" / "README.md").read_text()
    for fact in ("kind | base", "fusion | gated", '"steps": 12', "leaves out the fusion"):
        assert fact in card


def test_the_card_shows_what_the_dial_achieves(adapter: ImagePromptAdapter) -> None:
    scores = [{"variety": 0.3, "retention": 0.9}, {"variety": 0.8, "retention": 0.88}]
    points = [[0.0, {}], [1.0, {"cads": 0.5}]]
    adapter.spec["dial"] = {"points": points, "source": "32 pairs", "achieved": scores}
    card = model_card(adapter)
    assert "## Dial (32 pairs)" in card
    assert "| 1.00 | 0.800 | 0.880 | - |" in card
    assert '"points"' not in card, "the numbers are a table, not JSON"


class FakeHub:
    """What the hub's library is asked to do."""

    calls: list[tuple[str, Any]] = []  # noqa: RUF012 - read by the test

    def __init__(self, token: str | None = None) -> None:
        self.token = token

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        if repo_id == "not/mine":
            raise PermissionError("403 Forbidden\nlong story")
        self.calls.append(("create", (repo_id, private, exist_ok, self.token)))
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: str) -> None:
        from pathlib import Path as LocalPath

        self.calls.append((repo_id, sorted(f.name for f in LocalPath(folder_path).iterdir())))


def test_the_hub_gets_weights_and_card(
    adapter: ImagePromptAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    FakeHub.calls.clear()
    assert adapter.push_to_hub("me/mine", private=True, token="t") == "https://hub/me/mine"  # noqa: S106
    assert FakeHub.calls == [
        ("create", ("me/mine", True, True, "t")),
        ("me/mine", ["README.md", "ip-adapter.safetensors"]),
    ]
    with pytest.raises(ModelError, match=r"not/mine: cannot be uploaded; found 403 Forbidden\. "):
        adapter.push_to_hub("not/mine")
