from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from ipdiverse.adapter.files.checkpoint import load_adapter
from ipdiverse.adapter.files.conversion import convert
from ipdiverse.adapter.files.inspection import inspect_checkpoint
from ipdiverse.adapter.files.layouts import normalise, recognise
from ipdiverse.adapter.model import attention_layers
from tests import joint_models, models
from tests.checkpoint_files import (
    KINDS,
    Trained,
    adapter,
    assert_equal,
    blend_layers,
    nested,
    tensors_of,
    trained_state,
    without_shared,
)

if TYPE_CHECKING:
    from pathlib import Path

BLEND = r"does not hold its fusion's blend; 0\.8 is taken, as its project did when it generated"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["a.bin", "a.safetensors"])
def test_published_files_of_every_kind_load(kind: str, name: str, tmp_path: Path) -> None:
    made = adapter(kind, lora_rank=4 if kind.startswith("faceid") else 0)
    tensors = tensors_of(made)
    if name == "a.bin":
        torch.save(nested(tensors), tmp_path / name)
    else:
        save_file(tensors, tmp_path / name)
    stated = kind == "faceid-plus-v2" if "plus" in kind and kind != "plus" else None
    loaded = load_adapter(tmp_path / name, face_id_plus_v2=stated)
    assert loaded.kind == kind.removesuffix("-v2")
    assert getattr(loaded.image_proj, "shortcut", None) == stated
    assert loaded.image_proj.num_tokens == made.image_proj.num_tokens
    assert_equal(tensors_of(loaded), tensors)
    assert loaded.spec == {}


def test_portrait_is_faceid_without_lora(tmp_path: Path) -> None:
    made = adapter("faceid")
    torch.save(nested(tensors_of(made)), tmp_path / "a.bin")
    loaded = load_adapter(tmp_path / "a.bin")
    assert loaded.kind == "faceid"
    assert all(layer.to_q_lora is None for layer in loaded.layers().values())


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
@pytest.mark.parametrize("kind", ["base", "faceid"])
def test_dropped_shared_tensors_are_numbered_as_the_unet_numbers_them(
    architecture: str, kind: str
) -> None:
    made = adapter(kind, architecture, lora_rank=2 if kind == "faceid" else 0)
    expected, state = tensors_of(made), trained_state(made, architecture)
    assert recognise(state) == "accelerate"
    assert_equal(normalise(state, "a").tensors, expected)
    state = without_shared(state)
    assert not [name for name in state if name.startswith("adapter_modules.")]
    found = normalise(state, "a")
    assert found.layout == "accelerate, shared tensors dropped"
    assert_equal(found.tensors, expected)
    assert set(found.frozen) == {n for n in state if n.startswith("unet.") and "processor" not in n}


def test_blocks_are_ordered_by_number_not_by_letter() -> None:
    depth = {"transformer_layers_per_block": (1, 2, 12)}
    unet = models.unet("sdxl", **depth)
    made = models.adapter("base", unet)
    state = dict(Trained(unet, made).state_dict())
    assert any(".transformer_blocks.11." in name for name in attention_layers(unet).values())
    state = without_shared(state)
    assert_equal(normalise(state, "a").tensors, tensors_of(made))


def test_without_the_unets_own_weights_the_even_numbers_are_still_left_free() -> None:
    made = adapter()
    state = trained_state(made)
    state = without_shared(state)
    kept = {n: t for n, t in state.items() if "processor" in n or not n.startswith("unet.")}
    assert_equal(normalise(kept, "a").tensors, tensors_of(made))


def test_a_part_of_the_shared_tensors_may_be_dropped() -> None:
    made = adapter()
    state = trained_state(made)
    for number in (1, 31):
        del state[f"adapter_modules.{number}.to_k_ip.weight"]
    assert_equal(normalise(state, "a").tensors, tensors_of(made))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_an_accelerate_folder_loads(name: str, tmp_path: Path) -> None:
    made = adapter("plus")
    state = trained_state(made)
    if name.endswith(".bin"):
        torch.save(state, tmp_path / name)
        assert "adapter_modules.1.to_k_ip.weight" in state
    else:
        state = without_shared(state)
        save_file(state, tmp_path / name)
    torch.save({"state": {}}, tmp_path / "optimizer.bin")
    torch.save({"last_epoch": 3}, tmp_path / "scheduler.bin")
    assert_equal(tensors_of(load_adapter(tmp_path)), tensors_of(made))


@pytest.mark.parametrize("layout", ["fusion checkpoint", "five-key"])
def test_the_first_fusion_projects_files_load_with_the_blend_they_leave_out(
    layout: str, tmp_path: Path
) -> None:
    made = adapter()
    layers, file = blend_layers(made.token_width), tmp_path / "checkpoint-5.pt"
    if layout == "five-key":
        torch.save(nested(tensors_of(made)) | nested(layers), file)
    else:
        torch.save(trained_state(made) | layers, file)
    with pytest.warns(UserWarning, match=BLEND):
        loaded = load_adapter(file)
    assert loaded.fusion is not None
    assert loaded.fusion.kind == "blend"
    assert_equal(
        tensors_of(loaded),
        tensors_of(made)
        | {f"fusion.{name}": tensor for name, tensor in layers.items()}
        | {"fusion.blend": torch.tensor(0.8)},
    )


def test_five_keys_may_be_flat() -> None:
    made = adapter()
    found = normalise(tensors_of(made) | blend_layers(made.token_width), "a")
    assert found.layout == "five-key"
    assert found.notes
    assert "fusion.query.bias" in found.tensors


@pytest.mark.parametrize(
    ("make", "layout", "style", "kind", "family"),
    [
        (joint_models.xlabs_tensors, "xlabs", "xlabs", "base", "Flux.1"),
        (joint_models.instantx_tensors, "published", "instantx", "pooled", "Flux.1"),
        (joint_models.redux_tensors, "redux", "redux", "redux", "Flux.1"),
        (joint_models.sd3_tensors, "published", "sd3", "time-resampler", "SD 3.5"),
    ],
)
def test_adapters_of_transformers_load_and_are_written(
    make: Any, layout: str, style: str, kind: str, family: str, tmp_path: Path
) -> None:
    tensors, file = make(), tmp_path / "a.safetensors"
    save_file(tensors, file)
    report = inspect_checkpoint(file)
    told = {"layout": layout, "kind": kind, "family": family, "loads": True}
    assert told.items() <= report.items()
    convert(file, tmp_path / "ours.safetensors", "ipdiverse")
    for path in (file, tmp_path / "ours.safetensors"):
        adapter = load_adapter(path)
        assert adapter.joint is not None
        assert adapter.joint.style == style
        assert_equal(adapter.state_dict(), normalise(tensors, "a").tensors)


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        (["image_proj.a", "ip_adapter.1.b"], "published"),
        (["ip_adapter.1.b"], "published"),
        (["image_proj.a", "fusion.gate"], "ipdiverse"),
        (["lora_unet_down", "x"], "unknown"),
        ([], "unknown"),
    ],
)
def test_layouts_are_recognised(names: list[str], layout: str) -> None:
    assert recognise(names) == layout


def test_keys_of_nobody_stay_as_they_are() -> None:
    strange: dict[str, Any] = {"image_proj": torch.zeros(1), "x.y": torch.zeros(1)}
    assert normalise(strange, "a").tensors.keys() == strange.keys()
