from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

from ipdiverse.adapter.files.checkpoint import (
    adapter_from_tensors,
    load_adapter,
    read_spec,
    save_adapter,
    weights_hash,
)
from ipdiverse.adapter.fusion import BlendFusion, GatedFusion
from ipdiverse.adapter.model import ImagePromptAdapter, new_adapter
from ipdiverse.errors import CheckpointError
from tests import checkpoint_files
from tests.checkpoint_files import KINDS, assert_equal, tensors_of

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import StableDiffusionPipeline


@pytest.fixture
def adapter(pipe: StableDiffusionPipeline) -> ImagePromptAdapter:
    return new_adapter("base", pipe.unet, pipe.image_encoder)


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_save_then_load_is_equal(pipe: StableDiffusionPipeline, kind: Any, tmp_path: Path) -> None:
    sizes = {"width": 64, "depth": 3, "num_tokens": 5} if kind == "plus" else {"num_tokens": 7}
    adapter = new_adapter(kind, pipe.unet, pipe.image_encoder, **sizes)
    file = tmp_path / "a.safetensors"
    save_adapter(adapter, file, {"steps": 3}, dtype=torch.float32)
    loaded = load_adapter(file)
    assert loaded.kind == kind
    assert loaded.image_proj.num_tokens == sizes["num_tokens"]
    expected = adapter.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in loaded.state_dict().items())
    assert {"kind": kind, "steps": 3}.items() <= read_spec(file).items()
    assert [f.name for f in tmp_path.iterdir()] == ["a.safetensors"]


def test_broken_files_are_named(adapter: ImagePromptAdapter, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: no such file"):
        load_adapter(tmp_path / "gone.safetensors")
    (tmp_path / "text.safetensors").write_text("not tensors at all")
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        load_adapter(tmp_path / "text.safetensors")
    state = adapter.state_dict()
    for change, message in (
        ({"extra.weight": torch.zeros(1)}, "unexpected extra.weight"),
        (
            {"ip_adapter.3.to_v_ip.weight": torch.zeros(2, 2)},
            r"to_v_ip.weight is \(2, 2\), expected",
        ),
    ):
        save_file(state | change, tmp_path / "changed.safetensors")
        with pytest.raises(CheckpointError, match=message):
            load_adapter(tmp_path / "changed.safetensors")
    missing = {k: v for k, v in state.items() if k != "ip_adapter.5.to_v_ip.weight"}
    save_file(missing, tmp_path / "missing.safetensors")
    with pytest.raises(CheckpointError, match=r"missing ip_adapter\.5\.to_v_ip\.weight"):
        load_adapter(tmp_path / "missing.safetensors")
    save_file({"ip_adapter.1.to_k_ip.weight": torch.zeros(2, 2)}, tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="holds no known image projection"):
        load_adapter(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("key", "tensor"),
    [
        ("ip_adapter.x.to_k_ip.weight", torch.zeros(2, 2)),
        ("ip_adapter.3.to_k_ip.weight", torch.zeros(2)),
        ("image_proj.norm.weight", torch.zeros(0)),
        ("image_proj.proj.weight", torch.zeros(3)),
    ],
)
def test_hostile_shapes_and_names_are_one_error(
    adapter: ImagePromptAdapter, tmp_path: Path, key: str, tensor: torch.Tensor
) -> None:
    save_file(adapter.state_dict() | {key: tensor}, tmp_path / "hostile.safetensors")
    with pytest.raises(CheckpointError, match=r"hostile\.safetensors: (its tensors|does not fit)"):
        load_adapter(tmp_path / "hostile.safetensors")


def test_a_claim_of_huge_sizes_takes_no_memory(tmp_path: Path) -> None:
    tensors = {
        "image_proj.latents": torch.zeros(1, 1, 200_000),
        "image_proj.proj_in.weight": torch.zeros(1, 8),
        "image_proj.proj_out.weight": torch.zeros(8, 1),
        "image_proj.layers.0.0.to_q.weight": torch.zeros(1, 1),
        "ip_adapter.1.to_k_ip.weight": torch.zeros(2, 2),
    }
    save_file(tensors, tmp_path / "huge.safetensors")
    with pytest.raises(CheckpointError, match="does not fit together"):
        load_adapter(tmp_path / "huge.safetensors")


def test_weights_that_are_not_finite_are_refused(
    adapter: ImagePromptAdapter, tmp_path: Path
) -> None:
    state = adapter.state_dict() | {"image_proj.norm.bias": torch.full((128,), float("nan"))}
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(CheckpointError, match=r"image_proj\.norm\.bias is not finite"):
        load_adapter(tmp_path / "nan.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_the_spec_makes_loading_exact(kind: str, tmp_path: Path) -> None:
    made = checkpoint_files.adapter(kind, lora_rank=3 if kind == "faceid" else 0)
    save_adapter(made, tmp_path / "a.safetensors", {"kind": "stale"}, torch.float32)
    loaded = load_adapter(tmp_path / "a.safetensors")
    assert_equal(tensors_of(loaded), tensors_of(made))
    assert loaded.kind == loaded.spec["kind"] == kind.removesuffix("-v2")
    assert loaded.spec["dims"]["layers"] == 16
    assert loaded.spec["dims"]["token_width"] == 64
    assert loaded.spec.get("shortcut") == {"faceid-plus": False, "faceid-plus-v2": True}.get(kind)
    assert getattr(loaded.image_proj, "shortcut", False) == (kind == "faceid-plus-v2")


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_gated_fusion_keeps_its_heads(heads: int, tmp_path: Path) -> None:
    made = checkpoint_files.adapter()
    made.fusion = GatedFusion(64, 4, heads=heads, width=32)
    torch.nn.init.normal_(made.fusion.gate)
    save_adapter(made, tmp_path / "a.safetensors", {}, torch.float32)
    loaded = load_adapter(tmp_path / "a.safetensors")
    assert isinstance(loaded.fusion, GatedFusion)
    assert loaded.fusion.heads == heads
    assert_equal(tensors_of(loaded), tensors_of(made))
    assert loaded.spec["fusion"] == {"kind": "gated", "heads": heads}


def test_a_hash_names_weights_and_how_they_are_read_and_nothing_else(tmp_path: Path) -> None:
    made = checkpoint_files.adapter()
    made.fusion = GatedFusion(64, 4, heads=1, width=32)

    def hashed(dtype: torch.dtype = torch.float32, **spec: Any) -> str:
        save_adapter(made, tmp_path / "a.safetensors", spec, dtype)
        return weights_hash(tmp_path / "a.safetensors")

    first = hashed(steps=1)
    assert hashed(steps=2, dial={"points": []}) == first
    assert hashed(torch.float16) != first, "rounded weights"
    made.fusion.heads = 2
    assert hashed() != first, "heads are no weights"
    made.fusion.heads = 1
    assert hashed() == first
    made.image_proj.norm.weight.data[3] += 1e-6
    assert hashed() != first


@pytest.mark.parametrize(("width", "heads"), [(128, 2), (64, 1), (48, 1)])
def test_without_a_spec_heads_are_64_wide(width: int, heads: int) -> None:
    made = checkpoint_files.adapter()
    made.fusion = GatedFusion(64, 4, heads=4, width=width)
    loaded = adapter_from_tensors(tensors_of(made), "a")
    assert isinstance(loaded.fusion, GatedFusion)
    assert loaded.fusion.heads == heads


def test_blend_fusion_keeps_its_blend(tmp_path: Path) -> None:
    made = checkpoint_files.adapter()
    made.fusion = BlendFusion(64, blend=0.37)
    save_adapter(made, tmp_path / "a.safetensors", {}, torch.float32)
    loaded = load_adapter(tmp_path / "a.safetensors")
    assert isinstance(loaded.fusion, BlendFusion)
    assert loaded.fusion.blend == made.fusion.blend
    assert loaded.spec["fusion"] == {"kind": "blend"}


def test_the_version_of_faceid_plus_must_be_known(tmp_path: Path) -> None:
    made, file = checkpoint_files.adapter("faceid-plus-v2"), tmp_path / "a.safetensors"
    save_file(tensors_of(made), file)
    with pytest.raises(CheckpointError, match=r"nothing in it tells version 1 from 2\. Say face"):
        load_adapter(file)
    for stated in (True, False):
        projection: Any = load_adapter(file, face_id_plus_v2=stated).image_proj
        assert projection.shortcut is stated
    save_adapter(made, file, {})
    with pytest.raises(CheckpointError, match=r"face_id_plus_v2=False; found True in its spec"):
        load_adapter(file, face_id_plus_v2=False)


def test_parts_that_do_not_fit_each_other_are_named() -> None:
    state = tensors_of(checkpoint_files.adapter())
    other = tensors_of(checkpoint_files.adapter(architecture="sd2"))
    mixed = state | {k: t for k, t in other.items() if k.startswith("image_proj.")}
    message = r"ip_adapter\.1 reads tokens of width 64, expected the projection's 128.*and 11 more"
    with pytest.raises(CheckpointError, match=message):
        adapter_from_tensors(mixed, "a")
    gate = {f"fusion.{k}": t for k, t in GatedFusion(64, 5, heads=1).state_dict().items()}
    with pytest.raises(CheckpointError, match=r"fusion\.gate has 5 tokens, expected 4"):
        adapter_from_tensors(state | gate, "a")
    blend = {f"fusion.{k}": t for k, t in BlendFusion(32).state_dict().items()}
    with pytest.raises(CheckpointError, match=r"fusion reads tokens of width 32, expected the pr"):
        adapter_from_tensors(state | blend, "a")


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_weights_that_are_no_numbers_are_refused(dtype: torch.dtype) -> None:
    state = tensors_of(checkpoint_files.adapter())
    state["image_proj.norm.bias"] = torch.zeros(64, dtype=dtype)
    with pytest.raises(CheckpointError, match=r"norm\.bias is \w+, expected floating point"):
        adapter_from_tensors(state, "a")


def test_missing_sizes_are_named() -> None:
    state = tensors_of(checkpoint_files.adapter("plus"))
    del state["image_proj.proj_in.weight"]
    with pytest.raises(CheckpointError, match=r"do not describe .* missing image_proj\.proj_in"):
        adapter_from_tensors(state, "a")
    flat = {"image_proj.latents": torch.zeros(4, 64)}
    with pytest.raises(CheckpointError, match=r"latents is \(4, 64\), expected \(1, tokens, width"):
        adapter_from_tensors(flat, "a")
    narrow = {"image_proj.latents": torch.zeros(1, 4, 48)}
    with pytest.raises(CheckpointError, match="a width of 48 is not a multiple of 64"):
        adapter_from_tensors(narrow, "a")
    only = {k: t for k, t in state.items() if k.startswith("image_proj.")}
    only["image_proj.proj_in.weight"] = torch.zeros(64, 32)
    with pytest.raises(CheckpointError, match=r"has no `ip_adapter\.N\.to_k_ip\.weight`"):
        adapter_from_tensors(only, "a")


@pytest.mark.parametrize(
    ("spec", "message"),
    [("{", "its spec is broken"), ("[1]", "expected a JSON object"), ("[" * 9999, "is broken")],
)
def test_broken_specs_are_one_error(spec: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file(tensors_of(checkpoint_files.adapter()), file, {"ipdiverse": spec})
    with pytest.raises(CheckpointError, match=message):
        read_spec(file)


def test_absurd_heads_are_one_error(tmp_path: Path) -> None:
    made, file = checkpoint_files.adapter(), tmp_path / "a.safetensors"
    made.fusion = GatedFusion(64, 4, heads=1)
    save_file(tensors_of(made), file, {"ipdiverse": '{"fusion": {"heads": 1000000007}}'})
    with pytest.raises(CheckpointError, match="1000000007 heads do not divide a width of 64"):
        load_adapter(file)


def test_hub_ids_that_cannot_be_had_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        CheckpointError,
        match=r"o/r: no such file; a hub repository needs.* Give the file's path beh",
    ):
        load_adapter("o/r")
    with pytest.raises(
        CheckpointError, match=r"o/r/x\.bin: is not a file here, nor in the local.*Allow"
    ) as said:
        load_adapter("o/r", weight_name="x.bin", local_files_only=True)
    assert "\n" not in str(said.value)
    with pytest.raises(CheckpointError, match=r"models/gone\.bin: no such file\. Check the path"):
        load_adapter("models/gone.bin")
