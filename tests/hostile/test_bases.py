"""Folders of bases that lack a part, or are of another task: one line each, of ours alone."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from ipdiverse.adapter.files.checkpoint import save_adapter
from ipdiverse.cli import main
from tests import models

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, pipe = tmp_path_factory.mktemp("bases"), models.pipeline("sd1")
    pipe.save_pretrained(folder / "sound")
    save_adapter(models.adapter("base", pipe.unet), folder / "a.safetensors", spec={})
    models.picture(1).save(folder / "a.png")
    return folder


def without(name: str) -> Callable[[Path], None]:
    return lambda base: shutil.rmtree(base / name)


def index(**changes: Any) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        file = base / "model_index.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def each(pattern: str, act: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        found = list(base.glob(pattern))
        assert found
        for file in found:
            act(file)

    return change


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


HURT: dict[str, tuple[Callable[[Path], None], str]] = {
    "no VAE": (without("vae"), "cannot be opened; found Error no file named config.json"),
    "no tokenizer": (without("tokenizer"), "its tokenizer does not fit its text encoder"),
    "no scheduler": (without("scheduler"), "found Error no file named scheduler_config.json"),
    "no weights": (each("unet/*.safetensors", lambda file: file.unlink()), "cannot be opened"),
    "cut weights": (each("unet/*.safetensors", cut), "cannot be opened"),
    "no JSON": (each("unet/config.json", lambda file: file.write_text("x")), "not a valid JSON"),
    "index": (each("model_index.json", lambda file: file.write_text("[]")), "cannot be opened"),
    "empty part": (index(text_encoder=[None, None]), "cannot be opened"),
    "upscaler": (index(_class_name="StableDiffusionUpscalePipeline"), "cannot be opened"),
    "unknown": (index(_class_name="FooPipeline"), "is a base of an unknown architecture"),
    "edits": (index(_class_name="StableDiffusionInstructPix2PixPipeline"), "of another task"),
}


@pytest.mark.parametrize("name", HURT)
def test_a_base_that_lacks_something_is_one_line(
    name: str, home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hurt, said = HURT[name]
    base = tmp_path / "base"
    shutil.copytree(home / "sound", base)
    hurt(base)
    words = ["--image", str(home / "a.png"), "--adapter", str(home / "a.safetensors")]
    words += ["--base", str(base), "-n", "1", "--steps", "1", "--out", str(tmp_path / "out")]
    capfd.readouterr()
    assert main(["generate", *words]) == 2
    captured = capfd.readouterr()
    (line,) = (captured.out + captured.err).splitlines()
    assert line.startswith(f"ipdiverse: {base}: ")
    assert said in line
    assert not (tmp_path / "out" / "0000.png").exists()
