"""Adapters that hold their base weights, and the adapters between the two."""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ipdiverse.adapter.attach.attach import attach
from ipdiverse.adapter.files.checkpoint import (
    as_safetensors,
    load_adapter,
    read_spec,
    save_adapter,
    weights_hash,
)
from ipdiverse.adapter.files.conversion import convert, copy_with_spec, store_base_weights
from ipdiverse.adapter.files.inspection import as_text, inspect_checkpoint
from ipdiverse.adapter.files.layouts import BASE_WEIGHTS, PACKED, pack_base_weights
from ipdiverse.adapter.fusion import GatedFusion
from ipdiverse.adapter.model import interpolated, remember_base_weights
from ipdiverse.adapter.reference import Reference
from ipdiverse.dial import OFF, Levers, default_dial
from ipdiverse.errors import ArgumentError, CheckpointError, ModelError
from ipdiverse.sampling.denoiser import release, steer
from ipdiverse.writing import tensors_hash
from tests import models

if TYPE_CHECKING:
    from pathlib import Path

    from ipdiverse.adapter.model import ImagePromptAdapter

KINDS = ("base", "plus", "faceid-plus-v2")


def pair(unet: Any, kind: str = "plus") -> tuple[ImagePromptAdapter, ImagePromptAdapter]:
    """An adapter with a fusion, and the plain one it could have been fine-tuned from."""
    rank = 4 if kind.startswith("faceid") else 0
    plain = models.adapter(kind, unet, lora_rank=rank, seed=5)
    own = models.adapter(kind, unet, lora_rank=rank, seed=6)
    own.fusion = GatedFusion(own.token_width, own.image_proj.num_tokens or 4, heads=2)
    torch.nn.init.constant_(own.fusion.gate, 0.5)
    remember_base_weights(own, plain)
    return own, plain


@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_are_exactly_the_two_and_the_middle_lies_between(kind: str) -> None:
    own, plain = pair(models.two_levels(), kind)
    assert interpolated(own, 1) is own
    first, half = interpolated(own, 0), interpolated(own, 0.5)
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
    interpolated(own, 0.3).state_dict()["image_proj.proj_out.weight"].zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.state_dict().items())
    assert all(torch.equal(own.base_weights[name], t) for name, t in plain.state_dict().items())


def test_what_cannot_be_a_pair_is_refused() -> None:
    unet = models.two_levels()
    own, plain = pair(unet)
    with pytest.raises(ModelError, match="cannot be what this adapter was fine-tuned from"):
        remember_base_weights(own, models.adapter("base", unet))
    with pytest.raises(ModelError, match=r"fusion\..*which differs"):
        remember_base_weights(plain, own)
    with pytest.raises(ModelError, match="does not hold its base weights"):
        interpolated(plain, 0.5)
    with pytest.raises(ArgumentError, match="interpolation"):
        interpolated(own, 1.5)


def test_files_hold_both_and_what_is_missing_is_named(tmp_path: Path) -> None:
    own, plain = pair(models.two_levels())
    file = tmp_path / "own.safetensors"
    save_adapter(own, file, {}, torch.float32)
    loaded = load_adapter(file)
    assert loaded.base_weights.keys() == plain.state_dict().keys()
    assert all(torch.equal(loaded.base_weights[name], t) for name, t in plain.state_dict().items())
    report = inspect_checkpoint(file)
    assert report["loads"]
    assert report["holds_base_weights"]
    assert "its base weights included" in as_text(report)
    assert report["parameters"] == sum(t.numel() for t in load_file(file).values())
    tensors = load_file(file)
    dropped = tensors.pop("base_weights.image_proj.latents")
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"missing base_weights\.image_proj\.latents"):
        load_adapter(file)
    save_file(tensors | {"base_weights.image_proj.latents": dropped * torch.nan}, file)
    with pytest.raises(CheckpointError, match=r"base_weights\.image_proj\.latents is not finite"):
        load_adapter(file)


def test_a_file_is_given_the_other_in_its_own_type(tmp_path: Path) -> None:
    own, plain = pair(models.two_levels())
    own.base_weights = {}
    save_adapter(own, tmp_path / "own.safetensors", {"steps": 7}, torch.float16)
    save_adapter(plain, tmp_path / "plain.safetensors", {}, torch.float16)
    both = tmp_path / "both.safetensors"
    store_base_weights(tmp_path / "own.safetensors", tmp_path / "plain.safetensors", both)
    before, after = load_file(tmp_path / "own.safetensors"), load_file(both)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    stored = load_file(tmp_path / "plain.safetensors")
    assert all(
        torch.equal(after[f"base_weights.{name}"], tensor) for name, tensor in stored.items()
    )
    assert load_adapter(both).spec["steps"] == 7


@pytest.mark.parametrize(("to", "kept"), [("ipdiverse", True), ("diffusers", False)])
def test_conversion_keeps_both_where_there_is_a_place(to: Any, kept: bool, tmp_path: Path) -> None:
    own, _ = pair(models.two_levels())
    save_adapter(own, tmp_path / "own.safetensors", {}, torch.float32)
    target = tmp_path / "converted.safetensors"
    notes = convert(tmp_path / "own.safetensors", target, to)
    assert any("base weights" in note for note in notes) is not kept
    assert any(name.startswith(BASE_WEIGHTS) for name in load_file(target)) is kept


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
            models.as_encoded(attachment, text)
            for share in shares:
                attachment.set_interpolation(share)
                found = pipe.unet(latents, pipe.scheduler.timesteps[0], text).sample
        return found

    assert torch.equal(predicted(own, 1.0, 0.0), predicted(plain, 1.0))


def test_without_calibration_the_dial_leads_from_one_to_the_other() -> None:
    dial = default_dial(fused=True, has_base_weights=True)
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


def packed(folder: Path) -> tuple[Path, ImagePromptAdapter]:
    """A file that holds its base weights packed, and the adapter."""
    own, _ = pair(models.two_levels())
    whole, file = folder / "whole.safetensors", folder / "packed.safetensors"
    save_adapter(own, whole, {"steps": 7}, torch.float16)
    tensors = load_file(whole)
    base = {n.removeprefix(BASE_WEIGHTS): t for n, t in tensors.items() if BASE_WEIGHTS in n}
    kept = {name: tensor for name, tensor in tensors.items() if BASE_WEIGHTS not in name}
    kept[PACKED] = pack_base_weights(kept, base)
    file.write_bytes(as_safetensors(kept, read_spec(whole)))
    return file, load_adapter(whole)


def test_packed_base_weights_are_the_same_to_the_bit(tmp_path: Path) -> None:
    file, own = packed(tmp_path)
    loaded = load_adapter(file)
    assert loaded.base_weights.keys() == own.base_weights.keys()
    assert all(torch.equal(loaded.base_weights[n], t) for n, t in own.base_weights.items())
    report = inspect_checkpoint(file)
    assert report["loads"]
    assert report["holds_base_weights"]
    assert report["dtypes"].keys() == {"float16"}
    hashes = {weights_hash(file), weights_hash(tmp_path / "whole.safetensors")}
    assert len(hashes) == 1, "however the base weights are stored"


def test_copies_stay_packed_and_conversions_are_whole(tmp_path: Path) -> None:
    file, own = packed(tmp_path)
    copy_with_spec(file, file, {"dial": {}})
    convert(file, tmp_path / "converted.safetensors", "ipdiverse")
    store_base_weights(file, _base_file(own, tmp_path), tmp_path / "again.safetensors")
    assert PACKED in load_file(file)
    assert read_spec(file)["steps"] == 7
    for name in ("converted", "again"):
        stored = load_file(tmp_path / f"{name}.safetensors")
        assert PACKED not in stored
        assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
        found = {n.removeprefix(BASE_WEIGHTS): t for n, t in stored.items() if BASE_WEIGHTS in n}
        assert all(torch.equal(found[n].float(), t) for n, t in own.base_weights.items()), name


def _base_file(own: ImagePromptAdapter, folder: Path) -> Path:
    file = folder / "base.safetensors"
    save_adapter(interpolated(own, 0), file, {}, torch.float16)
    return file


@pytest.mark.parametrize("broken", ["cut", "longer", "another type", "own in float32"])
def test_broken_packed_base_weights_are_refused(broken: str, tmp_path: Path) -> None:
    file, _ = packed(tmp_path)
    tensors = load_file(file)
    stored = tensors[PACKED]
    if broken == "cut":
        tensors[PACKED] = stored[:-20].clone()
    elif broken == "longer":
        claims = zlib.compress(bytes(50_000_000))
        tensors[PACKED] = torch.frombuffer(bytearray(claims), dtype=torch.uint8)
    elif broken == "another type":
        tensors[PACKED] = stored.to(torch.int32)
    else:
        tensors = {n: t.float() if n != PACKED else t for n, t in tensors.items()}
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match="its packed base weights are broken"):
        load_adapter(file)


def named(folder: Path) -> tuple[Path, ImagePromptAdapter, ImagePromptAdapter]:
    """As version 0.1 wrote it: a file that names its base weights in another, and the pair."""
    own, plain = pair(models.two_levels())
    save_adapter(plain, folder / "plain.safetensors", {}, torch.float32)
    before, own.base_weights = own.base_weights, {}
    file = folder / "own.safetensors"
    told = {"file": "plain.safetensors", "sha256": tensors_hash(plain.state_dict())}
    save_adapter(own, file, {"steps": 7, "plain": told}, torch.float32)
    own.base_weights = before
    return file, own, plain


def test_a_file_of_0_1_names_its_base_weights_in_another_file(tmp_path: Path) -> None:
    file, own, plain = named(tmp_path)
    loaded = load_adapter(file)
    assert loaded.spec["steps"] == 7
    assert "plain" not in loaded.spec, "it holds them now"
    assert loaded.base_weights.keys() == plain.state_dict().keys()
    assert all(torch.equal(loaded.base_weights[n], t) for n, t in own.base_weights.items())
    assert inspect_checkpoint(file)["loads"]
    copy_with_spec(file, tmp_path / "copied.safetensors", {"dial": {}})
    convert(file, tmp_path / "converted.safetensors", "ipdiverse")
    (tmp_path / "plain.safetensors").rename(tmp_path / "gone.safetensors")
    for name in ("copied", "converted"):
        found = load_adapter(tmp_path / f"{name}.safetensors")
        assert all(torch.equal(found.base_weights[n], t) for n, t in own.base_weights.items())


def test_a_file_of_0_1_may_hold_its_base_weights_as_plain(tmp_path: Path) -> None:
    own, _ = pair(models.two_levels())
    file = tmp_path / "own.safetensors"
    save_adapter(own, file, {}, torch.float32)
    now = weights_hash(file)
    old = {name.replace(BASE_WEIGHTS, "plain."): t for name, t in load_file(file).items()}
    save_file(old, file, {"ipdiverse": json.dumps(read_spec(file))})
    found = load_adapter(file)
    assert all(torch.equal(found.base_weights[n], t) for n, t in own.base_weights.items())
    assert weights_hash(file) == now


def test_base_weights_of_0_1_that_are_gone_or_others_are_refused(tmp_path: Path) -> None:
    file, _, plain = named(tmp_path)
    other = tmp_path / "plain.safetensors"
    other.rename(tmp_path / "gone.safetensors")
    refused = "its base weights are in another file, which is not in its folder; expected 'plain"
    with pytest.raises(CheckpointError, match=refused):
        load_adapter(file)
    report = inspect_checkpoint(file)
    assert not report["loads"]
    assert refused in str(report["notes"])
    plain.image_proj.state_dict()["latents"].add_(1)
    save_adapter(plain, other, {}, torch.float32)
    with pytest.raises(CheckpointError, match="and that file holds other weights"):
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
    found = read_spec(file)["plain"]
    (folder / "plain.safetensors").rename(tmp_path / "plain.safetensors")
    spec = {**read_spec(file), "plain": {**found, "file": name}}
    save_file(load_file(file), file, {"ipdiverse": json.dumps(spec)})
    with pytest.raises(CheckpointError, match="which is not in its folder"):
        load_adapter(file)


def test_noise_conditioning_of_0_1_is_read_and_no_longer_acts(tmp_path: Path) -> None:
    _, plain = pair(models.two_levels())
    file = tmp_path / "noised.safetensors"
    save_adapter(plain, file, {"noise_conditioned": True}, torch.float32)
    noise = {"noise.mean": torch.zeros(4), "noise.level.0.weight": torch.zeros(4, 128)}
    save_file(load_file(file) | noise, file, {"ipdiverse": json.dumps(read_spec(file))})
    with pytest.warns(UserWarning, match=r"noised\.safetensors: noise conditioning no longer acts"):
        found = load_adapter(file)
    assert all(torch.equal(found.state_dict()[n], t) for n, t in plain.state_dict().items())
    assert "noise_conditioned" not in found.spec
    assert inspect_checkpoint(file)["loads"]
