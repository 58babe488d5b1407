"""The hub's local cache as the presets leave it: published layout and names, small random weights.

Nothing is in it but the files that the presets name, so a file missing in their lists shows.
"""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from ipdiverse.base.presets import PRESETS, HubFile, Preset, Repository
from ipdiverse.evaluation.features import ENCODERS
from tests import models
from tests.checkpoint_files import nested, tensors_of

if TYPE_CHECKING:
    from pathlib import Path

KINDS = {
    "sd15": "base",
    "sd15-plus": "plus",
    "sd15-plus-face": "plus",
    "sd15-faceid": "faceid",
    "sdxl": "base",
    "sdxl-plus": "plus",
}
"""Presets that are there, and the kind of each one's adapter."""
REVISION = "0123456789abcdef0123456789abcdef01234567"
"""Of what is pinned nowhere."""


def folder_of(cache: Path, repository: Repository) -> Path:
    """Where the cache keeps a repository's files at the pinned commit."""
    name = f"models--{repository.id.replace('/', '--')}"
    return cache / name / "snapshots" / repository.revision


def place(cache: Path, file: HubFile) -> Path:
    return folder_of(cache, file.repository) / file.name


def fill(cache: Path, scratch: Path) -> None:
    """Everything that the presets of `KINDS` need."""
    for name, architecture in (("sd15", "sd1"), ("sdxl", "sdxl")):
        base_of(PRESETS[name], architecture, cache, scratch / name)
    models.image_encoder().half().save_pretrained(scratch / "encoder")
    for file in PRESETS["sd15"].encoder_files():
        copied(scratch / "encoder" / file.name.rpartition("/")[2], place(cache, file))
    for name, kind in KINDS.items():
        adapter_of(PRESETS[name], kind, cache)
    for repository in {r for name in KINDS for r in PRESETS[name].repositories()}:
        refs = folder_of(cache, repository).parents[1] / "refs"
        refs.mkdir()
        (refs / "main").write_text(repository.revision)


def fill_others(cache: Path, scratch: Path) -> None:
    """Other models that the guides name: a ControlNet, and the encoders that compare images."""
    from diffusers import ControlNetModel

    from_unet: Any = ControlNetModel.from_unet
    controlnet = from_unet(models.unet("sd1"), conditioning_embedding_out_channels=(8, 8, 16))
    controlnet.save_pretrained(scratch / "controlnet")
    _clip(scratch / "clip")
    _dino(scratch / "dino")
    placed = {
        "lllyasviel/sd-controlnet-openpose": "controlnet",
        ENCODERS["clip"]: "clip",
        ENCODERS["dino"]: "dino",
    }
    for repository, made in placed.items():
        home = cache / f"models--{repository.replace('/', '--')}"
        shutil.copytree(scratch / made, home / "snapshots" / REVISION)
        (home / "refs").mkdir()
        (home / "refs" / "main").write_text(REVISION)


def _clip(folder: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(7)
    build: Any = CLIPConfig
    text: dict[str, Any] = {"vocab_size": 190, "hidden_size": 16, "intermediate_size": 32}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 2, "eos_token_id": 1}
    vision = models.image_encoder().config.to_dict()
    config = build(text_config=text, vision_config=vision, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    models.image_processor().save_pretrained(folder)
    (folder / "tokenizer").mkdir()
    write_tokenizer(folder / "tokenizer")
    for file in (folder / "tokenizer").iterdir():
        file.rename(folder / file.name)
    (folder / "tokenizer").rmdir()


def _dino(folder: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(8)
    build: Any = Dinov2Config
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    Dinov2Model(build(**sizes, image_size=32, patch_size=8)).save_pretrained(folder)
    square = {"height": 32, "width": 32}
    about = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 32}}
    about |= {"crop_size": square, "do_center_crop": True, "do_resize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))


def base_of(preset: Preset, architecture: str, cache: Path, scratch: Path) -> None:
    """A pipeline as it is published, in half precision and without an image encoder."""
    from diffusers import EulerDiscreteScheduler, PNDMScheduler

    pipe = models.pipeline(architecture, fresh=True, image_encoder=None)
    sd1 = architecture == "sd1"
    kind: Any = PNDMScheduler if sd1 else EulerDiscreteScheduler
    pipe.register_modules(scheduler=kind.from_config(pipe.scheduler.config))
    if sd1:
        pipe.register_modules(safety_checker=safety_checker())
        pipe.register_to_config(requires_safety_checker=True)
    else:
        pipe.register_modules(feature_extractor=None)
    pipe.to(torch.float16).save_pretrained(scratch, variant="fp16")
    for folder in scratch.glob("tokenizer*"):
        write_tokenizer(folder)
    for file in preset.base_files():
        copied(scratch / file.name, place(cache, file))


def safety_checker() -> Any:
    """One that passes everything: no similarity exceeds its thresholds of 1."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    torch.manual_seed(6)
    vision = models.image_encoder().config.to_dict()
    config = CLIPConfig(
        text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        vision_config=vision,
        projection_dim=models.CLIP_DIM,
    )
    build: Any = StableDiffusionSafetyChecker
    return build(config).eval()


def write_tokenizer(folder: Path) -> None:
    """CLIP's own, as published: `vocab.json` and `merges.txt`, here of single letters."""
    shutil.rmtree(folder)
    folder.mkdir()
    letters = [chr(code) for code in range(33, 127)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{x}</w>" for x in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {
        "bos_token": words[0],
        "eos_token": words[1],
        "pad_token": words[1],
        "unk_token": words[1],
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 40, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


def adapter_of(preset: Preset, kind: str, cache: Path) -> None:
    unet = models.unet("sdxl" if preset.name.startswith("sdxl") else "sd1")
    made = models.adapter(kind, unet, lora_rank=4 if kind == "faceid" else 0)
    tensors = {name: t.half() for name, t in tensors_of(made).items()}
    (file,) = preset.adapter_files()
    target = place(cache, file)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".bin":
        torch.save(nested(tensors), target)
    else:
        save_file(tensors, target)


def copied(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def twin(cache: Path, target: Path) -> Path:
    """A cache of one's own to break, sharing the files."""
    shutil.copytree(cache, target, copy_function=os.link)
    return target
