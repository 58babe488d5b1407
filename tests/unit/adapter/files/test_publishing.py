"""Folders with a model card, and the hub."""

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub import ModelCardData
from huggingface_hub.repocard_data import CardData
from PIL import Image
from safetensors.torch import load_file

from ipdiverse import ImagePromptAdapter
from ipdiverse.adapter import model
from ipdiverse.adapter.files.checkpoint import load_adapter, read_spec
from ipdiverse.adapter.files.publishing import Stated, curve_png, model_card
from ipdiverse.adapter.fusion import GatedFusion
from ipdiverse.adapter.imagine import load_space
from ipdiverse.adapter.model import interpolated, new_adapter
from ipdiverse.adapter.projection import LinearProjection
from ipdiverse.base.adapters import CRITTERS_ADAPTERS, space_file
from ipdiverse.base.presets import PRESETS
from ipdiverse.cli import main
from ipdiverse.dial import OFF, Achieved, Dial, Levers
from ipdiverse.errors import ArgumentError, CheckpointError, ModelError
from tests.checkpoint_files import public
from tests.folder_hub import FolderHub, Refused

PLUS = CRITTERS_ADAPTERS / "ip-adapter-plus_critters.safetensors"
FILES = {"README.md", "ip-adapter.safetensors"}


@pytest.fixture
def adapter(pipe: Any) -> ImagePromptAdapter:
    new = new_adapter("base", pipe.unet, pipe.image_encoder, GatedFusion(128, 4, heads=4))
    adapter = public(new)
    adapter.spec = {"reference": "paired", "steps": 12}
    return adapter


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FolderHub:
    return FolderHub(tmp_path / "hub").install(monkeypatch)


def calibrated() -> dict[str, Any]:
    achieved = (Achieved(0.3, 0.9, 0.95, 0.01, 0.71), Achieved(0.8, 0.88, None, 0.02))
    points = ((0.0, OFF), (1.0, Levers(cads=0.5)))
    return Dial(points, "calibrated on 32 pairs", achieved).as_spec()


def metadata(card: str) -> dict[str, Any]:
    """As the hub reads it."""
    import yaml

    return yaml.safe_load(card.split("---\n")[1])


# --- folders ---------------------------------------------------------------------------------


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
    for fact in ("| kind | base |", "fusion | gated |", '"reference": "paired"', '"steps": 12'):
        assert fact in card
    assert 'from_pretrained("mine")' in card
    assert {file.name for file in (tmp_path / "mine").iterdir()} == FILES


def test_a_curve_comes_with_a_calibration_and_goes_with_it(
    adapter: ImagePromptAdapter, tmp_path: Path
) -> None:
    adapter.spec["dial"] = calibrated()
    adapter.save_pretrained(tmp_path)
    with Image.open(tmp_path / "dial.png") as image:
        assert image.format == "PNG"
        assert len(set(image.convert("RGB").get_flattened_data())) > 20, "something is drawn"
    assert "](dial.png)" in (tmp_path / "README.md").read_text()
    del adapter.spec["dial"]
    adapter.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == FILES


def test_what_is_opened_is_the_public_class_wherever_it_goes(
    adapter: ImagePromptAdapter, tmp_path: Path
) -> None:
    adapter.save_pretrained(tmp_path)
    opened = load_adapter(tmp_path)
    for one in (opened, copy.deepcopy(opened), pickle.loads(pickle.dumps(opened))):  # noqa: S301
        assert type(one) is ImagePromptAdapter
        assert isinstance(one, model.ImagePromptAdapter)
        assert one.save_pretrained(tmp_path / "again")
    assert type(interpolated(opened, 1)) is ImagePromptAdapter


# --- the card --------------------------------------------------------------------------------


def test_the_hub_understands_the_metadata(adapter: ImagePromptAdapter) -> None:
    stated = Stated("cc-by-4.0", "someone/a-model.v2")
    found = metadata(model_card(adapter, "me/mine", stated))
    assert found == {
        "library_name": "ipdiverse",
        "pipeline_tag": "text-to-image",
        "license": "cc-by-4.0",
        "base_model": "someone/a-model.v2",
        "base_model_relation": "adapter",
        "tags": ["ip-adapter", "image-prompt", "diffusers", "stable-diffusion"],
    }
    assert isinstance(ModelCardData(**found), CardData)
    bare = metadata(model_card(adapter, "me/mine"))
    assert not bare.keys() & {"license", "base_model", "base_model_relation"}
    assert "| license | not stated |" in model_card(adapter, "me/mine")


def test_the_base_is_what_it_was_trained_on() -> None:
    widths = {2 * i + 1: (768, 320) for i in range(16)}
    made = ImagePromptAdapter(LinearProjection(1024, 768), widths)
    assert metadata(model_card(made, "a/b"))["base_model"] == PRESETS["sd15"].base.id
    made.spec = {"recipe": {"base": "someone/their-model"}}
    card = model_card(made, "a/b")
    assert metadata(card)["base_model"] == "someone/their-model"
    assert 'subfolder="models/image_encoder"' in card
    assert "--image-encoder h94/IP-Adapter/models/image_encoder" in card
    widths = {1: (128, 96), 3: (128, 192)}
    made = ImagePromptAdapter(LinearProjection(128, 128), widths)
    made.spec = {"recipe": {"base": "critters"}}
    card = model_card(made, "a/b")
    assert "base_model" not in metadata(card)
    assert 'load_base("critters")' in card
    assert "--base critters" in card
    assert "--image-encoder" not in card


def test_the_card_shows_what_the_dial_achieves(adapter: ImagePromptAdapter) -> None:
    adapter.spec["dial"] = calibrated()
    card = model_card(adapter, "me/mine")
    assert "Its path was calibrated on 32 pairs." in card
    assert "| 0.00 | 0.300 | 0.900 | 0.950 | 0.710 | 0.010 |" in card
    assert "| 1.00 | 0.800 | 0.880 | - | - | 0.020 |" in card
    assert '"points"' not in card, "the numbers are a table, not JSON"


@pytest.mark.parametrize(
    ("dial", "said"),
    [
        (None, "This adapter was not calibrated. Its `diversity` takes a conservative path"),
        ({"points": [[0, {}], [1, {}]], "source": "by hand"}, "by hand. What it achieves was not"),
    ],
)
def test_nothing_is_claimed_that_was_not_measured(
    adapter: ImagePromptAdapter, dial: Any, said: str
) -> None:
    adapter.spec = {} if dial is None else {"dial": dial}
    assert said in model_card(adapter, "me/mine")
    assert curve_png(adapter.spec) is None
    assert "dial.png" not in model_card(adapter, "me/mine")


@pytest.mark.parametrize(
    "dial", [{"points": [[0, {}], [1, {}]], "source": "x", "achieved": ["?"]}, {"points": 3}, 7]
)
def test_a_broken_dial_is_not_published(adapter: ImagePromptAdapter, dial: Any) -> None:
    adapter.spec = {"dial": dial}
    for publish in (lambda: model_card(adapter, "me/mine"), lambda: curve_png(adapter.spec)):
        with pytest.raises(CheckpointError, match="adapter: its dial is broken"):
            publish()


def test_the_card_says_what_stock_diffusers_leaves_out(adapter: ImagePromptAdapter) -> None:
    card = model_card(adapter, "me/mine")
    assert 'pipe.load_ip_adapter(\n    "me/mine", subfolder=""' in card
    assert "leaves out the text-image fusion" in card
    adapter.fusion = None
    assert "From one reference it draws the same there." in model_card(adapter, "me/mine")
    adapter.image_proj = LinearProjection(128, 128, num_tokens=7)
    card = model_card(adapter, "me/mine")
    assert "It cannot be used there: stock diffusers takes 4 image tokens for granted" in card
    assert "load_ip_adapter" not in card


def test_nothing_in_a_spec_leaves_its_fence(adapter: ImagePromptAdapter) -> None:
    adapter.spec = {"command": "x\n```\n---\n# Hello", "note": "````"}
    card = model_card(adapter, "me/mine")
    assert "# Hello" not in card.splitlines()
    fences = [line for line in card.partition("## Training")[2].splitlines() if "`" in line[:1]]
    assert [len(re.match(r"`+", line)[0]) for line in fences] == [4, 4, 5, 5]  # type: ignore[index]


def test_the_example_of_the_card_runs(tmp_path: Path, hub: FolderHub) -> None:
    adapter = load_adapter(PLUS)
    adapter.push_to_hub("me/mine")
    card = (hub.root / "me/mine" / "README.md").read_text()
    ours = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
    ours = ours.replace('("your prompt")', '("a critter", num_inference_steps=1)')
    image = Image.new("RGB", (64, 64), "white")
    scope: dict[str, Any] = {"image": image}
    exec(ours, scope)  # noqa: S102 - the card's own
    assert scope["images"][0].size == (64, 64)


# --- the hub ---------------------------------------------------------------------------------


def test_what_is_pushed_comes_back_by_its_name(adapter: ImagePromptAdapter, hub: FolderHub) -> None:
    adapter.spec["dial"] = calibrated()
    address = adapter.push_to_hub("me/mine", private=True, license="mit", token="secret")  # noqa: S106
    assert address == "https://huggingface.co/me/mine"
    assert (hub.made, hub.tokens) == ({"me/mine": True}, ["secret"])
    assert {f.name for f in (hub.root / "me/mine").iterdir()} == {*FILES, "dial.png"}
    back = ImagePromptAdapter.from_pretrained("me/mine")
    expected = adapter.state_dict()
    assert all(torch.equal(t, expected[k]) for k, t in back.state_dict().items())
    assert back.spec["dial"] == adapter.spec["dial"]
    assert 'from_pretrained("me/mine")' in (hub.root / "me/mine/README.md").read_text()
    named = ImagePromptAdapter.from_pretrained(
        "me/mine", subfolder="", weight_name="ip-adapter.safetensors"
    )
    assert named.kind == back.kind
    with pytest.raises(CheckpointError, match=r"me/other: no such file; .* expected ip-adapter\.s"):
        ImagePromptAdapter.from_pretrained("me/other")


def test_a_repository_that_cannot_be_reached_is_not_called_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import huggingface_hub

    def broken(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", broken)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(
        CheckpointError, match=r"me/mine/ip-adapter\.safetensors: cannot be downloaded"
    ):
        ImagePromptAdapter.from_pretrained("me/mine")


def test_a_proposal_and_its_message_are_passed_on(
    adapter: ImagePromptAdapter, hub: FolderHub
) -> None:
    adapter.push_to_hub("me/mine", commit_message="better", create_pr=True)
    assert hub.uploads == [{"commit_message": "better", "create_pr": True}]
    assert hub.tokens == [None], "the hub's library then takes the one that is logged in"


def test_without_a_token_nothing_is_tried(
    adapter: ImagePromptAdapter, hub: FolderHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.install(monkeypatch, token=None)
    with pytest.raises(ModelError, match=r"^me/mine: there is no token .*`hf auth login`, or set"):
        adapter.push_to_hub("me/mine")
    assert hub.tokens == []


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (Refused(401, "401 Unauthorized"), r"may not be written to; found 401 Un.*Check that the"),
        (Refused(500, "500 oh no\nlong"), r"cannot be uploaded; found 500 oh no\. Check the name"),
        (httpx.ConnectError("no route"), r"cannot be reached; found no route\. Check the network"),
        (ConnectionError("no route"), r"cannot be reached; found no route\. Check the network"),
        (ValueError(), r"cannot be uploaded; found ValueError\. "),
    ],
)
def test_refusals_are_one_line(
    error: Exception, message: str, adapter: ImagePromptAdapter, hub: FolderHub
) -> None:
    hub.fails = error
    with pytest.raises(ModelError, match=message) as said:
        adapter.push_to_hub("me/mine")
    assert "\n" not in str(said.value)


def test_the_repository_of_another_is_refused(adapter: ImagePromptAdapter, hub: FolderHub) -> None:
    with pytest.raises(ModelError, match=r"not/mine: may not be written to; found 403 Forbidden: "):
        adapter.push_to_hub("not/mine")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repo_id": "mine"}, "repo_id: is not a repository of the hub; expected owner/name"),
        ({"license": "My License\nx: y"}, "license: is not a license of the hub"),
        ({"base_model": "sd15"}, "base_model: is not a model of the hub; expected owner/name"),
    ],
)
def test_bad_names_are_refused_before_anything_is_written(
    options: dict[str, str], message: str, adapter: ImagePromptAdapter, hub: FolderHub
) -> None:
    with pytest.raises(ArgumentError, match=message):
        adapter.push_to_hub(**{"repo_id": "me/mine", **options})
    assert not hub.root.exists()


# --- the command line ------------------------------------------------------------------------


def test_a_dry_run_writes_what_would_be_uploaded_to_the_bit(
    hub: FolderHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["push", str(PLUS), "me/mine", "--license", "apache-2.0"]
    out = tmp_path / "out"
    assert main([*words, "--dry-run", "--out", str(out)]) == 0
    assert "nothing was uploaded" in capsys.readouterr().out
    assert not hub.root.exists()
    before, after = load_file(PLUS), load_file(out / "ip-adapter.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(before[k].dtype == after[k].dtype for k in before)
    card = (out / "README.md").read_text()
    assert metadata(card)["license"] == "apache-2.0"
    assert '"base": "critters"' in card
    assert main(words) == 0
    assert capsys.readouterr().out == "published https://huggingface.co/me/mine\n"
    pushed = hub.root / "me/mine"
    assert (pushed / "README.md").read_text() == card
    uploaded = load_file(pushed / "ip-adapter.safetensors")
    assert all(torch.equal(uploaded[k], before[k]) for k in before)
    assert read_spec(pushed / "ip-adapter.safetensors") == read_spec(PLUS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([str(PLUS), "mine"], "repo_id: is not a repository"),
        ([str(PLUS), "you/yours"], "may not be written to"),
        (["gone.safetensors", "me/mine"], "no such file"),
        ([str(PLUS), "me/mine", "--license", "MIT!"], "license: is not a license"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    words: list[str], message: str, hub: FolderHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", *words]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_inspect_reads_what_was_pushed(hub: FolderHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(PLUS), "me/mine"]) == 0
    capsys.readouterr()
    assert main(["inspect", "me/mine", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "plus"


def test_a_space_is_pushed_with_a_card_and_found_by_its_repository(
    hub: FolderHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = CRITTERS_ADAPTERS.parent / "spaces" / "plus.safetensors"
    words = ["push", str(file), "me/scenes", "--license", "apache-2.0"]
    out = tmp_path / "out"
    assert main([*words, "--dry-run", "--out", str(out)]) == 0
    assert "wrote space.safetensors, README.md" in capsys.readouterr().out
    assert not hub.root.exists()
    card = (out / "README.md").read_text()
    assert metadata(card)["license"] == "apache-2.0"
    assert "--space me/scenes" in card
    assert load_space(file).spec["projection"] in card
    assert main(words) == 0
    assert capsys.readouterr().out == "published https://huggingface.co/me/scenes\n"
    assert space_file("me/scenes").read_bytes() == file.read_bytes()
