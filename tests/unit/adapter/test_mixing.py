"""Adapters that hold the weights they went on from, and the adapters between the two."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ipdiverse.adapter.attach.attach import attach
from ipdiverse.adapter.beside import naming
from ipdiverse.adapter.files.checkpoint import (
    copy_with_spec,
    load_adapter,
    read_spec,
    remember_in_file,
    save_adapter,
    weights_hash,
)
from ipdiverse.adapter.files.conversion import convert
from ipdiverse.adapter.files.inspection import as_text, inspect_checkpoint
from ipdiverse.adapter.fusion import GatedFusion
from ipdiverse.adapter.mixing import mixed, remember_plain
from ipdiverse.adapter.noise import NoiseConditioning
from ipdiverse.adapter.reference import Reference
from ipdiverse.dial import OFF, Levers, default_dial
from ipdiverse.errors import ArgumentError, CheckpointError, ModelError, OutputError
from ipdiverse.sampling.denoiser import release, steer
from tests import models

if TYPE_CHECKING:
    from pathlib import Path

    from ipdiverse.adapter.model import ImagePromptAdapter

KINDS = ("base", "plus", "faceid-plus-v2")


def pair(unet: Any, kind: str = "plus") -> tuple[ImagePromptAdapter, ImagePromptAdapter]:
    """An adapter with a fusion, and the plain one it could have gone on from."""
    rank = 4 if kind.startswith("faceid") else 0
    plain = models.adapter(kind, unet, lora_rank=rank, seed=5)
    own = models.adapter(kind, unet, lora_rank=rank, seed=6)
    own.fusion = GatedFusion(own.token_width, own.image_proj.num_tokens or 4, heads=2)
    torch.nn.init.constant_(own.fusion.gate, 0.5)
    remember_plain(own, plain)
    return own, plain


@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_are_exactly_the_two_and_the_middle_lies_between(kind: str) -> None:
    own, plain = pair(models.two_levels(), kind)
    assert mixed(own, 1) is own
    first, half = mixed(own, 0), mixed(own, 0.5)
    assert first.fusion is None
    assert first.state_dict().keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(first.state_dict()[name], tensor), name
        middle = (tensor + own.state_dict()[name]) / 2
        torch.testing.assert_close(half.state_dict()[name], middle)
    assert torch.equal(half.state_dict()["fusion.gate"], own.state_dict()["fusion.gate"])


def test_mixing_changes_neither_of_the_two() -> None:
    own, plain = pair(models.two_levels())
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    mixed(own, 0.3).state_dict()["image_proj.proj_out.weight"].zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.state_dict().items())
    assert all(torch.equal(own.plain[name], t) for name, t in plain.state_dict().items())


def test_noise_conditioning_is_no_part_of_the_plain_one() -> None:
    own, plain = pair(models.two_levels())
    own.noise = NoiseConditioning(models.CLIP_WIDTH)
    remember_plain(own, plain)
    assert mixed(own, 0).noise is None
    assert mixed(own, 0.5).noise is not None


def test_what_cannot_be_a_pair_is_refused() -> None:
    unet = models.two_levels()
    own, plain = pair(unet)
    with pytest.raises(ModelError, match="cannot be what this adapter went on from"):
        remember_plain(own, models.adapter("base", unet))
    with pytest.raises(ModelError, match=r"fusion\..*which differs"):
        remember_plain(plain, own)
    with pytest.raises(ModelError, match="does not hold the weights that it went on from"):
        mixed(plain, 0.5)
    with pytest.raises(ArgumentError, match="training"):
        mixed(own, 1.5)


def test_files_hold_both_and_what_is_missing_is_named(tmp_path: Path) -> None:
    own, plain = pair(models.two_levels())
    file = tmp_path / "own.safetensors"
    save_adapter(own, file, {}, torch.float32)
    loaded = load_adapter(file)
    assert loaded.plain.keys() == plain.state_dict().keys()
    assert all(torch.equal(loaded.plain[name], t) for name, t in plain.state_dict().items())
    report = inspect_checkpoint(file)
    assert report["loads"]
    assert report["remembers_plain"]
    assert "the weights it went on from beside" in as_text(report)
    assert report["parameters"] == sum(t.numel() for t in load_file(file).values())
    tensors = load_file(file)
    dropped = tensors.pop("plain.image_proj.latents")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"missing plain\.image_proj\.latents"):
        load_adapter(file)
    save_file(tensors | {"plain.image_proj.latents": dropped * torch.nan}, file)
    with pytest.raises(CheckpointError, match=r"plain\.image_proj\.latents is not finite"):
        load_adapter(file)


def test_a_file_is_given_the_other_in_its_own_type(tmp_path: Path) -> None:
    own, plain = pair(models.two_levels())
    own.plain = {}
    save_adapter(own, tmp_path / "own.safetensors", {"steps": 7}, torch.float16)
    save_adapter(plain, tmp_path / "plain.safetensors", {}, torch.float16)
    both = tmp_path / "both.safetensors"
    remember_in_file(tmp_path / "own.safetensors", tmp_path / "plain.safetensors", both)
    before, after = load_file(tmp_path / "own.safetensors"), load_file(both)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    stored = load_file(tmp_path / "plain.safetensors")
    assert all(torch.equal(after[f"plain.{name}"], tensor) for name, tensor in stored.items())
    assert load_adapter(both).spec["steps"] == 7


@pytest.mark.parametrize(("to", "kept"), [("ipdiverse", True), ("diffusers", False)])
def test_conversion_keeps_both_where_there_is_a_place(to: Any, kept: bool, tmp_path: Path) -> None:
    own, _ = pair(models.two_levels())
    save_adapter(own, tmp_path / "own.safetensors", {}, torch.float32)
    target = tmp_path / "converted.safetensors"
    notes = convert(tmp_path / "own.safetensors", target, to)
    assert any("went on from" in note for note in notes) is not kept
    assert any(name.startswith("plain.") for name in load_file(target)) is kept


def test_the_lever_draws_what_the_plain_adapter_draws_and_is_taken_off() -> None:
    pipe = models.pipeline("sd1")
    own, plain = pair(pipe.unet)

    def drawn(adapter: ImagePromptAdapter, *levers: Levers) -> list[np.ndarray]:
        with attach(pipe, adapter) as attachment:
            attachment.set_reference(models.picture(1))
            images = []
            for chosen in levers:
                steer(attachment, chosen, (1, 2))
                images.append(_latents(pipe))
            release(attachment)
            return [*images, _latents(pipe)]

    ends = drawn(own, Levers(interpolation=0.0), Levers(interpolation=0.5), OFF)
    stock, trained = drawn(plain)[0], drawn(own)[0]
    np.testing.assert_array_equal(ends[0], stock)
    np.testing.assert_array_equal(ends[2], trained)
    np.testing.assert_array_equal(ends[3], trained)
    apart = [np.abs(ends[1] - other).max() for other in (stock, trained)]
    assert min(apart) > 1e-3


def test_the_same_text_tensor_is_not_answered_from_before() -> None:
    """Low-rank changes act on the text's keys too, which are kept for as long as it comes back."""
    pipe = models.pipeline("sd1")
    own, plain = pair(pipe.unet, "faceid-plus-v2")
    text = torch.randn(1, 16, pipe.unet.config.cross_attention_dim)
    latents = torch.randn(1, 4, 16, 16)
    pipe.scheduler.set_timesteps(4)

    def predicted(adapter: ImagePromptAdapter, *shares: float) -> torch.Tensor:
        with attach(pipe, adapter) as attachment, torch.no_grad():
            attachment.set_reference(Reference([models.picture(1)], faces=models.face(1)))
            for share in shares:
                attachment.set_training(share)
                found = pipe.unet(latents, pipe.scheduler.timesteps[0], text).sample
        return found

    assert torch.equal(predicted(own, 1.0, 0.0), predicted(plain, 1.0))


def test_without_calibration_the_dial_leads_from_one_to_the_other() -> None:
    dial = default_dial(fused=True, remembers=True)
    assert dial.at(0).interpolation == 0
    assert dial.at(0.5).interpolation == 0.5
    assert dial.at(1) == OFF


def _latents(pipe: Any) -> np.ndarray:
    return pipe(
        prompt=["a red critter"] * 2,
        generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
        output_type="latent",
        num_inference_steps=2,
        guidance_scale=3.0,
    ).images.numpy()


def named(folder: Path) -> tuple[Path, ImagePromptAdapter, ImagePromptAdapter]:
    """A file that names the plain weights beside it, and the pair."""
    own, plain = pair(models.two_levels())
    save_adapter(plain, folder / "plain.safetensors", {}, torch.float32)
    before, own.plain = own.plain, {}
    file = folder / "own.safetensors"
    save_adapter(own, file, {"steps": 7, **naming(folder / "plain.safetensors")}, torch.float32)
    own.plain = before
    return file, own, plain


def test_a_file_may_name_the_plain_one_beside_it(tmp_path: Path) -> None:
    file, own, plain = named(tmp_path)
    assert not [name for name in load_file(file) if name.startswith("plain.")]
    loaded = load_adapter(file)
    assert loaded.spec["steps"] == 7
    assert "plain" not in loaded.spec, "it holds them now"
    assert loaded.plain.keys() == plain.state_dict().keys()
    assert all(torch.equal(loaded.plain[name], t) for name, t in own.plain.items())
    report = inspect_checkpoint(file)
    assert report["loads"]
    assert report["remembers_plain"]
    assert report["parameters"] == sum(t.numel() for t in load_file(file).values())


def test_whatever_leaves_the_folder_holds_the_plain_one_itself(tmp_path: Path) -> None:
    file, own, _ = named(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    copy_with_spec(file, tmp_path / "beside.safetensors", {"dial": {}})
    copy_with_spec(file, elsewhere / "copied.safetensors", {"dial": {}})
    convert(file, elsewhere / "converted.safetensors", "ipdiverse")
    convert(file, tmp_path / "both.safetensors", "ipdiverse")
    save_adapter(load_adapter(file), elsewhere / "saved.safetensors", {}, torch.float32)
    remember_in_file(file, tmp_path / "plain.safetensors", tmp_path / "again.safetensors")
    assert "plain" in read_spec(tmp_path / "beside.safetensors")
    written = [tmp_path / "both.safetensors", tmp_path / "again.safetensors"]
    hashes = {weights_hash(copy) for copy in (file, written[0])}
    assert len(hashes) == 1, "wherever the plain weights lie"
    for whole in [*elsewhere.iterdir(), *written]:
        assert "plain" not in read_spec(whole), whole
        assert any(name.startswith("plain.") for name in load_file(whole)), whole
    (tmp_path / "plain.safetensors").rename(tmp_path / "gone.safetensors")
    for whole in [*elsewhere.iterdir(), *written]:
        found = load_adapter(whole)
        assert all(torch.equal(found.plain[name], t) for name, t in own.plain.items()), whole


def test_the_folder_is_where_a_name_is_and_not_where_a_link_leads(tmp_path: Path) -> None:
    file, own, _ = named(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "link.safetensors").symlink_to(file)
    copy_with_spec(file, elsewhere / "link.safetensors", {"dial": {}})
    found = load_adapter(elsewhere / "link.safetensors")
    assert all(torch.equal(found.plain[name], t) for name, t in own.plain.items())
    assert "dial" not in read_spec(file)


def test_the_plain_file_is_not_written_over(tmp_path: Path) -> None:
    file, _, _ = named(tmp_path)
    plain = tmp_path / "plain.safetensors"
    before = plain.read_bytes()
    with pytest.raises(OutputError, match=r"holds the weights that own\.safetensors went on from"):
        copy_with_spec(file, plain, {})
    with pytest.raises(OutputError, match=r"holds the weights that own\.safetensors went on from"):
        convert(file, plain, "ipdiverse", force=True)
    assert plain.read_bytes() == before


def test_what_is_written_names_nothing_that_it_holds_or_that_is_no_name(tmp_path: Path) -> None:
    file, _, plain = named(tmp_path)
    whole = tmp_path / "whole.safetensors"
    save_adapter(load_adapter(file), whole, read_spec(file), torch.float32)
    assert "plain" not in read_spec(whole)
    with pytest.raises(CheckpointError, match="cannot be followed"):
        save_adapter(plain, whole, {"plain": "plus"})
    own, _ = pair(models.two_levels())
    save_adapter(own, tmp_path / "fused.safetensors", {}, torch.float32)
    with pytest.raises(CheckpointError, match="expected safetensors of a plain adapter"):
        naming(tmp_path / "fused.safetensors")


def test_a_plain_file_may_say_something_else_of_itself(tmp_path: Path) -> None:
    file, own, _ = named(tmp_path)
    copy_with_spec(tmp_path / "plain.safetensors", tmp_path / "plain.safetensors", {"steps": 9})
    assert load_adapter(file).plain.keys() == own.plain.keys(), "the weights are the same"


def test_a_plain_file_that_is_gone_or_another_is_refused(tmp_path: Path) -> None:
    file, _, plain = named(tmp_path)
    beside = tmp_path / "plain.safetensors"
    beside.rename(tmp_path / "gone.safetensors")
    refused = "the weights that it went on from are not beside it; expected plain.safetensors"
    with pytest.raises(CheckpointError, match=refused):
        load_adapter(file)
    report = inspect_checkpoint(file)
    assert not report["loads"]
    assert refused in str(report["notes"])
    plain.image_proj.state_dict()["latents"].add_(1)
    save_adapter(plain, beside, {}, torch.float32)
    with pytest.raises(CheckpointError, match="beside it are not the weights that it went on from"):
        load_adapter(file)


@pytest.mark.parametrize(
    "name",
    [
        "../plain.safetensors",
        "/plain.safetensors",
        "a\\plain.safetensors",
        "C:plain.safetensors",
        "plain.bin",
        f"{'x' * 300}.safetensors",
        "\ud800.safetensors",
        "",
        None,
    ],
)
def test_a_name_that_leads_elsewhere_is_not_followed(name: Any, tmp_path: Path) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    file, _, _ = named(folder)
    found = naming(folder / "plain.safetensors")["plain"]
    (folder / "plain.safetensors").rename(tmp_path / "plain.safetensors")
    spec = {**read_spec(file), "plain": {**found, "file": name}}
    save_file(load_file(file), file, {"ipdiverse": json.dumps(spec)})
    with pytest.raises(CheckpointError, match="cannot be followed; expected a safetensors file"):
        load_adapter(file)
