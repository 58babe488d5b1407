"""Folders that are not quite a text-to-image base: they draw, or are refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ipdiverse import load_base, save_adapter
from ipdiverse.base.memory import Device, plan_dtype
from ipdiverse.cli import main
from ipdiverse.errors import ArgumentError, ModelError
from ipdiverse.loading import one_line
from ipdiverse.sampling.sample import _one_line
from tests import models


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    models.picture(1).save("a.png")
    models.picture(2).convert("L").point(lambda value: 255 * (value > 99)).save("mask.png")
    return tmp_path


def saved(task: str = "", **parts: Any) -> Path:
    pipe = models.pipeline("sd1", task, **parts)
    pipe.save_pretrained("base")
    save_adapter(models.adapter("base", pipe.unet), Path("ad.safetensors"), spec={})
    return Path("base")


def generate(*more: str) -> int:
    words = ["--image", "a.png", "--base", "base", "--adapter", "ad.safetensors", "-n", "1"]
    return main(["generate", *words, "--width", "64", "--height", "64", "--steps", "1", *more])


@pytest.mark.parametrize("task", ["Img2Img", "Inpaint"])
def test_a_pipeline_of_another_task_with_an_ordinary_unet_draws(task: str, folder: Path) -> None:
    saved(task)
    assert generate() == 0
    assert (folder / "out" / "0000.png").is_file()


@pytest.mark.parametrize(
    ("task", "channels", "message"),
    [
        (
            "Inpaint",
            9,
            "base: is a base for inpainting; expected a UNet of 4 input channels;",
        ),
        ("InstructPix2Pix", 8, "base: is a pipeline of another task; expected Stable Diffusion"),
        ("", 8, "base: is a base of another task; expected a UNet of 4 input channels; found 8"),
    ],
)
def test_a_unet_that_wants_more_than_latents_is_one_line(
    task: str, channels: int, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(task, unet=models.unet("sd1", in_channels=channels))
    for more in ([], ["--init-image", "a.png", "--strength", "1"]):
        assert generate(*more) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"ipdiverse: {message}")


def test_a_base_for_inpainting_inpaints(folder: Path) -> None:
    saved("Inpaint", unet=models.unet("sd1", in_channels=9))
    assert generate("--init-image", "a.png", "--mask-image", "mask.png", "--strength", "1") == 0


@pytest.mark.parametrize("lost", ["vocab.json merges.txt", "tokenizer.json vocab.json merges.txt"])
def test_a_tokenizer_without_its_vocabulary_is_one_line(lost: str, folder: Path) -> None:
    base = saved()
    there = [base / "tokenizer" / name for name in lost.split()]
    for file in there:
        file.unlink(missing_ok=True)
    if (base / "tokenizer" / "tokenizer.json").exists():
        assert len(load_base("base").pipe.tokenizer) > 100
    else:
        with pytest.raises(ModelError, match=r"^base: .*tokenizer|^base: cannot be opened"):
            load_base("base")


def test_a_tokenizer_of_another_text_encoder_is_one_line(folder: Path) -> None:
    saved(text_encoder=models.text_encoder(64, 20))
    with pytest.raises(ModelError, match="tokenizer does not fit its text encoder; expected 20"):
        load_base("base")


def test_a_tokenizer_without_its_config_reads_as_much_as_its_text_encoder(folder: Path) -> None:
    (saved() / "tokenizer" / "tokenizer_config.json").unlink()
    assert load_base("base").pipe.tokenizer.model_max_length == 40


@pytest.mark.parametrize("part", ["vae", "scheduler", "text_encoder", "tokenizer"])
@pytest.mark.parametrize("named", [True, False])
def test_a_base_that_lacks_a_part_is_one_line(part: str, named: bool, folder: Path) -> None:
    index = saved() / "model_index.json"
    parts = json.loads(index.read_text())
    parts[part] = [None, None]
    if named:
        del parts[part]
    index.write_text(json.dumps(parts))
    with pytest.raises(ModelError, match=rf"^base: (has no {part}|cannot be opened)"):
        load_base("base")


def test_what_a_library_raises_is_one_line() -> None:
    with (
        pytest.raises(ModelError, match=r"^x: cannot be used; found int too big$") as caught,
        one_line("cannot be used", "x"),
    ):
        raise OverflowError("int too big\nand more")
    assert isinstance(caught.value.__cause__, OverflowError)
    base: Any = type("Base", (), {"name": "x", "plan": None})
    with (
        pytest.raises(ModelError, match=r"^x: cannot draw this; found KeyError$"),
        _one_line(base, []),
    ):
        raise KeyError
    stop = RuntimeError("the caller's own")
    with pytest.raises(RuntimeError, match="own"), _one_line(base, [stop]):
        raise stop


def test_half_precision_that_a_cpu_does_not_have_is_refused() -> None:
    with pytest.raises(ArgumentError, match="dtype: is not computed in on a CPU; found float16"):
        plan_dtype(Device("cpu", 2**30), "float16")
    assert plan_dtype(Device("cpu", 2**30), "bfloat16") == "bfloat16"
