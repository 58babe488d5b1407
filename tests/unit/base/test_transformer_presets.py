"""Presets of Flux.1 and SD 3.5, from a cache that holds the files they name and nothing else.

The files have the published names, parts and keys, and small random weights. Kolors is not here:
diffusers offers it only where sentencepiece is installed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file

from ipdiverse.base import bases
from ipdiverse.base.memory import Device
from ipdiverse.base.presets import PRESETS, HubFile
from ipdiverse.cli import main
from ipdiverse.commands.checkpoints import reads
from tests import hub, joint_models, models
from tests.checkpoint_files import nested

if TYPE_CHECKING:
    from torch import Tensor

NAMES: dict[str, tuple[str, Any]] = {
    "flux-dev": ("flux", joint_models.xlabs_tensors),
    "flux-dev-v2": ("flux", lambda: joint_models.xlabs_tensors(16)),
    "flux-dev-instantx": ("flux", lambda: of_siglip(joint_models.instantx_tensors())),
    "flux-dev-redux": ("flux", joint_models.redux_tensors),
    "flux-schnell": ("flux", joint_models.xlabs_tensors),
    "sd35-large": ("sd3", joint_models.sd3_tensors),
}
"""The architecture and the adapter of each preset that has one."""


def of_siglip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """InstantX' adapter for an encoder of another width, as SigLIP in small is narrower."""
    first = tensors["image_proj.proj.0.weight"][:, : models.CLIP_WIDTH].contiguous()
    return tensors | {"image_proj.proj.0.weight": first}


def t5_tokenizer() -> Any:
    """Of letters, as `tokenizer.json` holds it."""
    from tokenizers import Tokenizer, models
    from transformers import T5Tokenizer

    words = ["<pad>", "</s>", "<unk>", *map(chr, (*range(33, 127), *range(192, 256)))]
    unigram = models.Unigram([(word, -1.0) for word in words], unk_id=2)
    return T5Tokenizer(tokenizer_object=Tokenizer(unigram), extra_ids=0)


def place(file: HubFile, folder: Path, cache: Path) -> None:
    """Put a file of a saved pipeline where the hub's cache keeps it; small ones may say nothing."""
    source = folder / file.name
    if not source.exists():
        assert not file.size, f"{file.name} is in no saved pipeline"
        source.write_text("{}" if source.suffix == ".json" else "")
    hub.copied(source, hub.place(cache, file))


def in_parts(files: list[HubFile], folder: Path) -> None:
    """Divide the weights of a saved pipeline as these were published."""
    for index in (file.name for file in files if file.name.endswith(".index.json")):
        stem = index.removesuffix(".safetensors.index.json")
        parts = [file.name for file in files if file.name.startswith(f"{stem}-")]
        tensors = load_file(folder / f"{stem}.safetensors")
        names, where = sorted(tensors), dict[str, str]()
        for number, part in enumerate(parts):
            held = {name: tensors[name] for name in names[number :: len(parts)]}
            save_file(held, folder / part, {"format": "pt"})
            where |= dict.fromkeys(held, Path(part).name)
        size = sum(tensor.nbytes for tensor in tensors.values())
        told = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / index).write_text(json.dumps(told))


def adapter_at(file: Path, tensors: dict[str, Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".bin":
        torch.save(nested(tensors), file)
    else:
        save_file(tensors, file)


@pytest.fixture(params=NAMES)
def preset(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name, (architecture, tensors) = request.param, NAMES[request.param]
    preset, cache, saved = PRESETS[name], tmp_path / "hub", tmp_path / "saved"
    last = "tokenizer_3" if architecture == "sd3" else "tokenizer_2"
    own = {"image_encoder": None, "feature_extractor": None, last: t5_tokenizer()}
    pipe = joint_models.pipeline(architecture, fresh=True, **own)
    pipe.to(torch.bfloat16).save_pretrained(saved)
    for folder in saved.glob("tokenizer*"):
        if folder.name != last:
            hub.write_tokenizer(folder)
    in_parts(preset.base_files(), saved)
    for file in preset.base_files():
        place(file, saved, cache)
    encoder = joint_models.siglip() if "SigLIP" in reads(preset) else models.image_encoder()
    encoder.save_pretrained(tmp_path / "encoder")
    for file in preset.encoder_files():
        hub.copied(tmp_path / "encoder" / Path(file.name).name, hub.place(cache, file))
    for file in preset.adapter_files():
        adapter_at(hub.place(cache, file), tensors())
    for repository in preset.repositories():
        refs = hub.folder_of(cache, repository).parents[1] / "refs"
        refs.mkdir()
        (refs / "main").write_text(repository.revision)
    shutil.rmtree(saved)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(bases, "this_device", lambda: Device("cpu", 16 * 2**30))
    monkeypatch.chdir(tmp_path)
    models.picture(1).save("a.png")
    return name


def test_one_word_opens_what_was_published(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--base", preset, "--image", "a.png", "--prompt", "acat"]
    words += ["--width", "64", "--height", "64", "--steps", "2", "-n", "1"]
    for out, more in (("with", []), ("without", ["--scale", "0"])):
        assert main([*words, *more, "--out", out]) == 0, capsys.readouterr().err
    images = [np.asarray(Image.open(f"{out}/0000.png")) for out in ("with", "without")]
    assert images[0].std() > 0
    assert (images[0] != images[1]).any()
    record = json.loads(Path("with/generation.json").read_text())["request"]
    assert record["adapter"] == preset
    assert record["revision"] == PRESETS[preset].base.revision
