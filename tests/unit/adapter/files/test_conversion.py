from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ipdiverse.adapter.files import conversion
from ipdiverse.adapter.files.checkpoint import load_adapter, read_spec, save_adapter
from ipdiverse.adapter.files.containers import open_checkpoint
from ipdiverse.adapter.files.conversion import convert
from ipdiverse.adapter.files.inspection import as_text, inspect_checkpoint
from ipdiverse.adapter.fusion import BlendFusion, GatedFusion
from ipdiverse.cli import main
from ipdiverse.errors import CheckpointError, OutputError
from tests import models
from tests.checkpoint_files import (
    KINDS,
    adapter,
    assert_equal,
    blend_layers,
    flux_tensors,
    nested,
    tensors_of,
    trained_state,
    without_shared,
)

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def halves(kind: str, **options: Any) -> dict[str, Tensor]:
    """As published: half precision; -0 and denormals must survive too."""
    tensors = {name: tensor.half() for name, tensor in tensors_of(adapter(kind, **options)).items()}
    first = next(iter(tensors.values())).view(-1)
    first[0], first[1] = -0.0, 6e-8
    return tensors


def assert_same_file(one: Path, other: Path) -> None:
    """But for the order of metadata, which safetensors leaves to chance."""
    assert_equal(load_file(one), load_file(other))
    assert read_spec(one) == read_spec(other)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trips_are_equal_to_the_bit(kind: str, tmp_path: Path) -> None:
    tensors = halves(kind, lora_rank=2 if kind == "faceid" else 0)
    start, ours = tmp_path / "start.bin", tmp_path / "ours.safetensors"
    torch.save(nested(tensors), start)
    version = kind.endswith("v2") if kind.startswith("faceid-plus") else None
    assert convert(start, ours, "ipdiverse", face_id_plus_v2=version) == []
    assert read_spec(ours)["converted_from"] == "published"
    assert_equal(load_file(ours), tensors)
    assert getattr(load_adapter(ours).image_proj, "shortcut", None) == version
    for number, to in enumerate(("tencent", "diffusers", "tencent")):
        end = tmp_path / f"{number}.{'bin' if number == 0 else 'safetensors'}"
        assert convert(ours, end, to) == []
        assert_equal(open_checkpoint(end).tensors, tensors)
    again = tmp_path / "again.safetensors"
    convert(tmp_path / "0.bin", again, "ipdiverse", face_id_plus_v2=version)
    assert_same_file(again, ours)
    assert torch.load(tmp_path / "0.bin").keys() == {"image_proj", "ip_adapter"}


def test_our_spec_survives(tmp_path: Path) -> None:
    save_adapter(adapter(), tmp_path / "a.safetensors", {"steps": 3})
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "ipdiverse")
    assert_same_file(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_a_trainers_checkpoint_becomes_an_adapter(architecture: str, tmp_path: Path) -> None:
    made = adapter("plus", architecture)
    save_file(without_shared(trained_state(made, architecture)), tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "a.bin", "tencent")
    assert_equal(open_checkpoint(tmp_path / "a.bin").tensors, tensors_of(made))


def test_the_first_fusion_projects_training_file_becomes_what_its_inference_wants(
    tmp_path: Path,
) -> None:
    made = adapter()
    layers = blend_layers(made.token_width)
    torch.save(trained_state(made) | layers, tmp_path / "checkpoint-7.pt")
    notes = convert(tmp_path / "checkpoint-7.pt", tmp_path / "five.bin", "tencent")
    assert [note[:47] for note in notes] == ["the file does not hold its fusion's blend; 0.8 "]
    found = torch.load(tmp_path / "five.bin")
    assert found.keys() == {"image_proj", "ip_adapter", "key", "query", "value"}
    assert_equal(open_checkpoint(tmp_path / "five.bin").tensors, tensors_of(made) | layers)
    for source in ("checkpoint-7.pt", "five.bin"):
        convert(tmp_path / source, tmp_path / f"{source}.safetensors", "ipdiverse")
    ours = [load_file(tmp_path / f"{s}.safetensors") for s in ("checkpoint-7.pt", "five.bin")]
    assert_equal(*ours)
    assert ours[0]["fusion.blend"] == torch.tensor(0.8)


def test_what_a_layout_cannot_hold_is_said(tmp_path: Path) -> None:
    made = adapter()
    made.fusion = BlendFusion(64, blend=0.25)
    save_adapter(made, tmp_path / "a.safetensors", {})
    notes = convert(tmp_path / "a.safetensors", tmp_path / "a.bin", "tencent")
    assert notes == [
        "the fusion's blend, 0.25, is left out: the layout has no place for it, "
        "and readers take 0.8"
    ]
    notes = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers")
    assert notes == ["the blend fusion is left out: diffusers has none"]
    made.fusion = GatedFusion(64, 4, heads=2)
    save_adapter(made, tmp_path / "a.safetensors", {})
    notes = convert(tmp_path / "a.safetensors", tmp_path / "c.bin", "tencent")
    assert notes == ["the gated fusion is left out: tencent has none"]
    for name in ("b.safetensors", "c.bin"):
        assert load_adapter(tmp_path / name).fusion is None


def test_what_stock_diffusers_takes_for_granted_is_said(tmp_path: Path) -> None:
    from ipdiverse.adapter.projection import LinearProjection, ResamplerProjection

    made = adapter()
    for projection, note in (
        (LinearProjection(48, 64, 7), "takes 4 image tokens for granted; this has 7"),
        (ResamplerProjection(32, 64, 8, 64, 3), "takes 4 resampler layers for granted; this has 3"),
    ):
        made.image_proj = projection
        save_adapter(made, tmp_path / "a.safetensors", {})
        target = tmp_path / f"{projection.kind}.safetensors"
        notes = convert(tmp_path / "a.safetensors", target, "diffusers")
        assert notes == [f"stock diffusers {note}"]


@pytest.mark.parametrize("kind", ["base", "plus", "full-face"])
def test_stock_diffusers_loads_the_result(kind: str, tmp_path: Path) -> None:
    pipe = models.pipeline("sd1", fresh=True)
    made = models.adapter(kind, pipe.unet)
    made.fusion = GatedFusion(64, 4, heads=2) if kind == "base" else None
    save_adapter(made, tmp_path / "a.safetensors", {}, torch.float32)
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers")
    pipe.load_ip_adapter(tmp_path, subfolder="", weight_name="b.safetensors")
    layers = made.layers()
    for number, processor in enumerate(pipe.unet.attn_processors.values()):
        if number in layers:
            assert torch.equal(processor.to_k_ip[0].weight, layers[number].to_k_ip.weight)
    hidden = torch.randn(1, *((48,) if kind == "base" else (17, 32)))
    stock = pipe.unet.encoder_hid_proj.image_projection_layers[0]
    torch.testing.assert_close(stock(hidden).flatten(), made.tokens(hidden).flatten())


def test_targets_are_not_overwritten_by_accident(tmp_path: Path) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_adapter(adapter(), source, {})
    target.write_text("precious")
    with pytest.raises(OutputError, match=r"b\.safetensors: is there already\. Add --force"):
        convert(source, target, "diffusers")
    (tmp_path / "link.safetensors").symlink_to(source)
    with pytest.raises(OutputError, match=r"is the input itself\. Choose another name"):
        convert(source, tmp_path / "link.safetensors", "diffusers", force=True)
    (tmp_path / "folder.bin").mkdir()
    with pytest.raises(OutputError, match=r"is there already\. Choose another name"):
        convert(source, tmp_path / "folder.bin", "tencent", force=True)
    with pytest.raises(OutputError, match=r"ends in \.safetensors; found \.bin\. Change"):
        convert(source, tmp_path / "c.bin", "diffusers")
    assert target.read_text() == "precious"
    convert(source, target, "diffusers", force=True)
    assert load_adapter(target).kind == "base"


def test_a_result_that_differs_never_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_adapter(adapter(), source, {})
    target.write_text("precious")

    def wrong(tensors: dict[str, Tensor], _: Any) -> bytes:
        from safetensors.torch import save

        return save(tensors | {"image_proj.norm.bias": tensors["image_proj.norm.bias"] + 1})

    monkeypatch.setattr(conversion, "save", wrong)
    with pytest.raises(CheckpointError, match=r"b\.safetensors: was not written.*norm\.bias"):
        convert(source, target, "diffusers", force=True)
    assert target.read_text() == "precious"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_nan_weights_are_not_converted(tmp_path: Path) -> None:
    tensors = halves("base")
    tensors["image_proj.norm.bias"][3] = float("nan")
    torch.save(nested(tensors), tmp_path / "a.bin")
    with pytest.raises(CheckpointError, match=r"a\.bin.*image_proj\.norm\.bias is not finite"):
        convert(tmp_path / "a.bin", tmp_path / "b.safetensors", "ipdiverse")
    assert not (tmp_path / "b.safetensors").exists()


# --- inspect ---------------------------------------------------------------------------------


def test_inspect_describes_a_published_file(tmp_path: Path) -> None:
    torch.save(nested(halves("faceid-plus", lora_rank=2)), tmp_path / "a.bin")
    report = inspect_checkpoint(tmp_path / "a.bin")
    expected = {
        "container": "torch zip",
        "layout": "published",
        "kind": "faceid-plus",
        "family": "custom",
        "num_tokens": 4,
        "token_width": 64,
        "clip_dim": 32,
        "face_dim": 32,
        "layers": 16,
        "fusion": None,
        "lora": {"ranks": [2], "layers": 32},
        "shortcut": None,
        "missing": [],
        "unexpected": [],
        "mismatched": [],
        "loads": True,
        "notes": ["FaceID-Plus version 1 or 2: nothing in the file tells which"],
        "spec": {},
    }
    assert expected.items() <= json.loads(json.dumps(report)).items()
    text = as_text(report)
    assert "a face embedding of width 32 and the image encoder's hidden states of width 32" in text
    assert "rank 2 in 32 layers" in text


@pytest.mark.parametrize(
    ("width", "layers", "family"),
    [(768, 16, "SD 1.x"), (1024, 16, "SD 2.x"), (2048, 70, "SDXL"), (768, 15, "custom")],
)
def test_the_base_family_is_guessed(width: int, layers: int, family: str, tmp_path: Path) -> None:
    tensors = {
        "image_proj.proj.weight": torch.zeros(4 * width, 1),
        "image_proj.proj.bias": torch.zeros(4 * width),
        "image_proj.norm.weight": torch.zeros(width),
        "image_proj.norm.bias": torch.zeros(width),
    }
    for number in range(layers):
        for part in "kv":
            name = f"ip_adapter.{2 * number + 1}.to_{part}_ip.weight"
            tensors[name] = torch.zeros(2, width)
    save_file(tensors, tmp_path / "a.safetensors")
    report = inspect_checkpoint(tmp_path / "a.safetensors")
    assert report["family"] == family
    assert report["loads"]


def test_inspect_tells_what_does_not_fit_instead_of_failing(tmp_path: Path) -> None:
    tensors = tensors_of(adapter())
    del tensors["ip_adapter.3.to_v_ip.weight"]
    tensors["ip_adapter.5.to_v_ip.weight"] = torch.zeros(2, 2)
    save_file(tensors | {"x.y": torch.zeros(1)}, tmp_path / "a.safetensors")
    report = inspect_checkpoint(tmp_path / "a.safetensors")
    assert report["missing"] == ["ip_adapter.3.to_v_ip.weight"]
    assert report["unexpected"] == ["x.y"]
    assert report["mismatched"] == ["ip_adapter.5.to_v_ip.weight is (2, 2), expected (32, 64)"]
    assert not report["loads"]
    assert "  missing       ip_adapter.3.to_v_ip.weight\n" in as_text(report)
    save_file({f"x.{n}": torch.zeros(1) for n in range(9)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"is not an adapter;.*found x\.0, x\.1, x\.2"):
        inspect_checkpoint(tmp_path / "a.safetensors")


def test_inspect_describes_flux_and_frozen_weights(tmp_path: Path) -> None:
    save_file(flux_tensors(), tmp_path / "flux.safetensors")
    report = inspect_checkpoint(tmp_path / "flux.safetensors")
    expected = {"kind": "base", "family": "Flux.1", "layers": 3, "num_tokens": 4, "loads": True}
    assert expected.items() <= report.items()
    assert report["layout"] == "xlabs"
    state = trained_state(adapter()) | blend_layers(64)
    torch.save(state, tmp_path / "checkpoint-1.pt")
    report = inspect_checkpoint(tmp_path / "checkpoint-1.pt")
    assert report["layout"] == "fusion checkpoint"
    assert report["fusion"] == {"kind": "blend"}
    assert report["frozen_tensors"] > 300
    assert "frozen tensors in the same file, never read" in as_text(report)


# --- the command line ------------------------------------------------------------------------


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = adapter()
    made.fusion = GatedFusion(64, 4, heads=2)
    save_adapter(made, tmp_path / "a.safetensors", {"steps": 3})
    source, target = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    assert main(["inspect", source]) == 0
    assert "  fusion        gated, 2 heads\n" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["spec"]["steps"] == 3
    assert main(["convert", source, target, "--to", "diffusers"]) == 0
    said = capsys.readouterr()
    assert said.out == f"wrote {target}\n"
    assert said.err == "note: the gated fusion is left out: diffusers has none\n"
    assert main(["convert", source, target, "--to", "diffusers"]) == 2
    assert "is there already. Add --force to replace it." in capsys.readouterr().err
    assert main(["convert", source, target, "--to", "diffusers", "--force"]) == 0


def test_a_broken_file_is_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.bin").write_text("no tensors")
    for command in (["inspect"], ["convert", str(tmp_path / "b.bin"), "--to", "tencent"]):
        assert main([command[0], str(tmp_path / "a.bin"), *command[1:]]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("ipdiverse: ")
        assert said.err.count("\n") == 1
