"""Each published layout by its real key names, with layers as in the files and as few numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ipdiverse.adapter.files.containers import open_checkpoint
from ipdiverse.adapter.files.conversion import convert
from ipdiverse.adapter.files.inspection import as_text, inspect_checkpoint
from ipdiverse.adapter.files.structure import stock_notes
from ipdiverse.adapter.model import ImagePromptAdapter, Joint
from ipdiverse.adapter.projection import LinearProjection
from ipdiverse.cli import main
from ipdiverse.errors import OutputError
from tests import joint_models
from tests.checkpoint_files import assert_equal, nested

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

VIT_H, BIG_G = "OpenCLIP ViT-H/14", "OpenCLIP ViT-bigG/14"
CLIP_L, CLIP_L_336 = "CLIP ViT-L/14", "CLIP ViT-L/14 at 336 px"
SIGLIP = "SigLIP so400m/14 at 384 px"


def zeros(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {f"image_proj.{n.replace('__', '.')}": torch.zeros(s) for n, s in shapes.items()}


def layers(width: int, count: int) -> dict[str, Tensor]:
    """Of a UNet: every second attention has an image branch."""
    names = (f"ip_adapter.{2 * n + 1}.to_{p}_ip.weight" for n in range(count) for p in "kv")
    return {name: torch.zeros(2, width) for name in names}


def base(clip: int, width: int) -> dict[str, Tensor]:
    norm = {"norm__weight": (width,), "norm__bias": (width,)}
    return zeros(proj__weight=(4 * width, clip), proj__bias=(4 * width,), **norm)


def resampler(clip: int, width: int) -> dict[str, Tensor]:
    inner = 64
    shapes: dict[str, tuple[int, ...]] = {"latents": (1, 16, inner)}
    shapes |= {"proj_in__weight": (inner, clip), "proj_in__bias": (inner,)}
    shapes |= {"proj_out__weight": (width, inner), "proj_out__bias": (width,)}
    shapes |= {"norm_out__weight": (width,), "norm_out__bias": (width,)}
    for i in range(4):
        for norm in ("0__norm1", "0__norm2", "1__0"):
            shapes |= {f"layers__{i}__{norm}__{end}": (inner,) for end in ("weight", "bias")}
        shapes |= {f"layers__{i}__0__{name}__weight": (inner, inner) for name in ("to_q", "to_out")}
        shapes[f"layers__{i}__0__to_kv__weight"] = (2 * inner, inner)
        shapes[f"layers__{i}__1__1__weight"] = (4 * inner, inner)
        shapes[f"layers__{i}__1__3__weight"] = (inner, 4 * inner)
    return zeros(**shapes)


def full_face(clip: int, width: int) -> dict[str, Tensor]:
    shapes = {"proj__0": (8, clip), "proj__2": (width, 8), "proj__3": (width,)}
    weights = {f"{name}__weight": shape for name, shape in shapes.items()}
    return zeros(**weights, **{f"{name}__bias": shape[:1] for name, shape in shapes.items()})


def of_width(tensors: dict[str, Tensor], name: str, clip: int) -> dict[str, Tensor]:
    """With the encoder's width in place of the small one."""
    return tensors | {name: torch.zeros(len(tensors[name]), clip)}


SD15, SDXL = layers(768, 16), layers(2048, 70)
FILES: dict[str, tuple[Any, ...]] = {
    "ip-adapter_sd15": (base(1024, 768) | SD15, "published", "base", "SD 1.x", VIT_H),
    "ip-adapter_sd15_light": (base(1024, 768) | SD15, "published", "base", "SD 1.x", VIT_H),
    "ip-adapter_sd15_vit-G": (base(1280, 768) | SD15, "published", "base", "SD 1.x", BIG_G),
    "ip-adapter-plus_sd15": (resampler(1280, 768) | SD15, "published", "plus", "SD 1.x", VIT_H),
    "full-face_sd15": (full_face(1280, 768) | SD15, "published", "full-face", "SD 1.x", VIT_H),
    "ip-adapter_sdxl": (base(1280, 2048) | SDXL, "published", "base", "SDXL", BIG_G),
    "ip-adapter_sdxl_vit-h": (base(1024, 2048) | SDXL, "published", "base", "SDXL", VIT_H),
    "plus_sdxl_vit-h": (resampler(1280, 2048) | SDXL, "published", "plus", "SDXL", VIT_H),
    "kolors-plus": (resampler(1024, 2048) | SDXL, "published", "plus", "Kolors", CLIP_L_336),
    "xlabs": (
        of_width(joint_models.xlabs_tensors(), "ip_adapter_proj_model.proj.weight", 768),
        *("xlabs", "base", "Flux.1", CLIP_L),
    ),
    "xlabs-v2": (
        of_width(joint_models.xlabs_tensors(16), "ip_adapter_proj_model.proj.weight", 768),
        *("xlabs", "base", "Flux.1", CLIP_L),
    ),
    "instantx-flux": (
        of_width(joint_models.instantx_tensors(), "image_proj.proj.0.weight", 1152),
        *("published", "pooled", "Flux.1", SIGLIP),
    ),
    "instantx-sd35": (
        of_width(joint_models.sd3_tensors(), "image_proj.proj_in.weight", 1152),
        *("published", "time-resampler", "SD 3.5", SIGLIP),
    ),
    "redux": (
        of_width(joint_models.redux_tensors(), "redux_up.weight", 1152),
        *("redux", "redux", "Flux.1", SIGLIP),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_inspect_names_kind_base_and_encoder(name: str, tmp_path: Path) -> None:
    tensors, layout, kind, family, encoder = FILES[name]
    save_file(tensors, tmp_path / "a.safetensors")
    report = inspect_checkpoint(tmp_path / "a.safetensors")
    told = {"layout": layout, "kind": kind, "family": family, "encoder": encoder, "loads": True}
    assert told.items() <= report.items()
    assert f"({encoder})\n" in as_text(report)


READ_BY_NOBODY = {
    "diffusers": {"instantx-flux", "redux"},
    "tencent": {"xlabs", "xlabs-v2", "redux"},
}


@pytest.mark.parametrize("name", FILES)
def test_conversion_there_and_back_keeps_every_bit(name: str, tmp_path: Path) -> None:
    """Or it says in a line that nobody would read the result."""
    tensors, start, ours = (
        FILES[name][0],
        tmp_path / "start.safetensors",
        tmp_path / "ours.safetensors",
    )
    save_file(tensors, start)
    convert(start, ours, "ipdiverse")
    expected = load_file(ours)
    assert {tuple(t.shape) for t in expected.values()} == {tuple(t.shape) for t in tensors.values()}
    for to, end in (("diffusers", "there.safetensors"), ("tencent", "there.bin")):
        there, back = tmp_path / end, tmp_path / f"{to}-back.safetensors"
        if name in READ_BY_NOBODY[to]:
            with pytest.raises(
                OutputError, match=rf"nobody reads .* adapters in the layout {to}\. C"
            ):
                convert(ours, there, to)  # type: ignore[arg-type]
            assert not there.exists()
            continue
        # stock knows XLabs' second adapter by its published size, which this one has not
        small = to == "diffusers" and name == "xlabs-v2"
        notes = ["stock diffusers takes 4 image tokens for granted; this has 16"] if small else []
        assert convert(ours, there, to) == notes  # type: ignore[arg-type]
        convert(there, back, "ipdiverse")
        assert_equal(load_file(back), expected)
        if FILES[name][1] == "published":  # these layouts are the authors' own
            assert_equal(open_checkpoint(there).tensors, tensors)


def test_stock_knows_xlabs_second_adapter_by_its_size() -> None:
    with torch.device("meta"):
        projection = LinearProjection(768, 4096, 16)
    assert stock_notes(ImagePromptAdapter(projection, {}, joint=Joint("xlabs"))) == []


def test_the_command_refuses_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(nested(FILES["instantx-flux"][0]), "a.bin")
    assert main(["convert", "a.bin", "b.safetensors", "--to", "diffusers"]) == 2
    line = "ipdiverse: b.safetensors: nobody reads instantx adapters in the layout diffusers. "
    assert capsys.readouterr().err == f"{line}Choose --to ipdiverse.\n"
