"""Bases that are transformers: they open, draw, and are refused in one line where they cannot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import ipdiverse
from ipdiverse.adapter.attach.encoding import text_embeds, text_tower
from ipdiverse.base import pipelines
from ipdiverse.base.memory import Device, plan_dtype, sizes_of
from ipdiverse.base.pipelines import is_transformer
from ipdiverse.base.presets import PRESETS, VIT_H
from ipdiverse.cli import main
from ipdiverse.provenance import generator
from ipdiverse.sampling.request import Request
from ipdiverse.sampling.sample import Job, sampled
from ipdiverse.sampling.selection import joint_text
from ipdiverse.sampling.task import Pictures, task_for
from ipdiverse.training.frozen import open_encoders
from tests import joint_models, models

TENSORS = {"flux": joint_models.xlabs_tensors, "sd3": joint_models.sd3_tensors}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    models.picture(1).save("a.png")
    return tmp_path


def saved(name: str) -> Any:
    pipe = joint_models.pipeline(name, fresh=True)
    pipe.save_pretrained("base")
    return pipe


def generated(*more: str) -> int:
    words = ["--image", "a.png", "--base", "base", "--adapter", "ad.safetensors", "-n", "1"]
    return main(["generate", *words, "--steps", "2", "--height", "64", *more])


@pytest.mark.parametrize("name", TENSORS)
def test_a_folder_opens_and_draws_what_stock_draws(name: str, folder: Path) -> None:
    pipe = saved(name)
    base = ipdiverse.load_base("base")
    sizes: dict[str, Any] = {"width": 64, "height": 64, "steps": 2, "guidance_scale": 3.0}
    request = Request(("a.png",), ("a cat",), base="base", **sizes)
    task = task_for(base, request, Pictures({}, {}))
    (image,) = sampled(task, [Job("a cat", 0, 0)], request)
    stock = pipe(
        prompt=["a cat"],
        negative_prompt=[""],
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=[generator(0, 0)],
        width=64,
        height=64,
    ).images[0]
    drawn, expected = (np.asarray(one).astype(int) for one in (image, stock))
    assert expected.std() > 0
    # weights that were read lie elsewhere in memory, and kernels round by how they are aligned
    assert np.abs(drawn - expected).max() <= 1


@pytest.mark.parametrize("name", TENSORS)
def test_an_image_prompt_on_a_folder(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(name)
    save_file(TENSORS[name](), "ad.safetensors")
    assert generated("--width", "64", "--out", "with") == 0, capsys.readouterr().err
    assert generated("--width", "64", "--scale", "0", "--out", "without") == 0
    images = [np.asarray(Image.open(f"{out}/0000.png")) for out in ("with", "without")]
    assert images[0].std() > 0
    assert (images[0] != images[1]).any()
    assert generated("--width", "60") == 2
    assert "width: is not a multiple of 8" in capsys.readouterr().err


def test_training_on_a_transformer_is_one_line(folder: Path) -> None:
    (folder / "base").mkdir()
    about = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (folder / "base" / "model_index.json").write_text(json.dumps(about))
    with pytest.raises(ipdiverse.IpdiverseError, match="base: cannot be trained for; expected a"):
        open_encoders("base")


@pytest.mark.parametrize("kind", ["PixArtSigmaPipeline", "SanaPipeline", "HunyuanDiTPipeline"])
def test_an_unknown_architecture_is_one_line(kind: str, folder: Path) -> None:
    (folder / "base").mkdir()
    (folder / "base" / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    expected = (
        f"base: is a base of an unknown architecture; expected Stable .* Flux.1; found {kind}"
    )
    with pytest.raises(ipdiverse.IpdiverseError, match=expected):
        ipdiverse.load_base("base")


def test_transformers_compute_in_bfloat16() -> None:
    assert [n for n in PRESETS if is_transformer(n)] == [
        n for n in PRESETS if n.startswith(("flux", "sd35"))
    ]
    gpu = Device("cuda", 2**35, bfloat16=True)
    assert plan_dtype(gpu, half="bfloat16") == "bfloat16"
    assert plan_dtype(gpu) == "float16"
    sizes = sizes_of(joint_models.pipeline("sd3"))
    transformer = joint_models.pipeline("sd3").transformer
    assert sizes.unet == sum(p.numel() * p.element_size() for p in transformer.parameters())
    assert sizes.pixels == 64**2


def test_the_text_half_of_an_image_encoder_is_read_if_it_is_at_hand(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SD 1.5's own text encoder is in no image encoder's space."""
    from tests.hub import write_tokenizer

    pipe = models.pipeline("sd1", fresh=True)
    assert joint_text(pipe, ["a cat"], 64) is None
    monkeypatch.setattr(pipelines, "cached", lambda file: folder / "half" / file.name)
    (folder / "half").mkdir()
    write_tokenizer(folder / "half")
    half = models.text_encoder(32, 200, projects=True)
    half.save_pretrained("half")
    pipe.image_encoder.text_half = lambda: pipelines._text_half(VIT_H.text)
    tower = text_tower(pipe, 64)
    assert tower is not None
    assert all(
        torch.equal(a, b) for a, b in zip(half.parameters(), tower[1].parameters(), strict=True)
    )
    found = text_embeds(pipe, tower, ["a cat", "a dog"])
    assert found.shape == (2, 64)
    assert not torch.equal(found[0], found[1])
    alone = joint_text(pipe, ["a dog"], 64)
    assert alone is not None
    assert torch.equal(alone[0], found[1])
    assert text_tower(pipe, 48) is None, "of another width"
    monkeypatch.setattr(pipelines, "cached", lambda _: None)
    assert text_tower(pipe, 64) is None, "nothing is downloaded for it"
