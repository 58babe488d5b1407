"""Ship the trained stages: a standard diffusers folder and the oracle, with how they were made."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from ipdiverse.base.bases import CRITTERS_BASE, CRITTERS_ORACLE, CRITTERS_PROVENANCE
from ipdiverse.critters.oracle import SCALE, load_oracle
from ipdiverse.errors import ModelError
from ipdiverse.writing import write_bytes_atomic, write_text_atomic
from workshop.base import architecture
from workshop.base.stages import STAGES, revision, save_tensors, stage_model

_LARGEST_FILE = "12MB"  # larger weights are split: no shipped file is over 16 MB


def assemble(folder: Path, target: Path) -> None:
    """Write stages vae, text, clip and unet as one fp16 `StableDiffusionPipeline` folder.

    Args:
        folder: Working folder of `train-base`.
        target: Diffusers folder to write; replaced whole.
    """
    import diffusers
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

    text = stage_model(folder, "text")
    build: Any = diffusers.StableDiffusionPipeline
    pipe = build(
        vae=AutoencoderKL.from_pretrained(stage_model(folder, "vae")),
        text_encoder=CLIPTextModel.from_pretrained(text / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(text / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(stage_model(folder, "unet")),
        scheduler=architecture.scheduler(),
        safety_checker=None,
        feature_extractor=architecture.image_processor(),
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(
            stage_model(folder, "clip") / "image_encoder"
        ),
        requires_safety_checker=False,
    )
    pipe.to(torch.float16)
    temporary = target.with_name(target.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    pipe.save_pretrained(temporary, safe_serialization=True, max_shard_size=_LARGEST_FILE)
    # saved as CLIPImageProcessorPil, a class that transformers 4 does not have
    processor = ["transformers", "CLIPImageProcessor"]
    _edit_json(temporary / "model_index.json", feature_extractor=processor)
    for encoder in ("text_encoder", "image_encoder"):
        # transformers opens weights in the type the config names; diffusers' parts are float32
        _edit_json(temporary / encoder / "config.json", dtype="float32")
    # stage clip trains the pooled state into the image encoder's projection space
    _edit_json(temporary / "text_encoder" / "config.json", pooled_in_image_space=True)
    for config in temporary.rglob("config.json"):
        _forget_path(config)
    # two renames: a folder cannot be renamed onto one that is not empty
    replaced = target.with_name(target.name + ".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    temporary.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)


def _edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes, indent=2) + "\n")


def _forget_path(config: Path) -> None:
    """Remove the path that diffusers writes of a part: it means nothing on another machine."""
    content = json.loads(config.read_text())
    content.pop("_name_or_path", None)
    config.write_text(json.dumps(content, indent=2) + "\n")


def continue_from(
    base: Path,
    oracle: Path,
    folder: Path,
    history: dict[str, list[dict[str, Any]]],
    anew: tuple[str, ...] = (),
) -> None:
    """Lay out a shipped base as a working folder, so that its UNet can be trained further.

    Every other stage counts as finished; stage unet starts from the shipped weights.

    Args:
        base: A folder that `assemble` wrote.
        oracle: A file that `ship_oracle` wrote.
        folder: Working folder of `train-base`, new or made by this function before.
        history: How each stage was trained so far (`stage_history`).
        anew: Readers of the oracle, by stage, that are to be trained again.

    Raises:
        ModelError: Nothing was shipped, or the folder holds another training.
    """
    copies = {
        base / "vae": Path("vae", "model"),
        base / "text_encoder": Path("text", "model", "text_encoder"),
        base / "tokenizer": Path("text", "model", "tokenizer"),
        base / "image_encoder": Path("clip", "model", "image_encoder"),
        base / "unet": Path("unet", "start"),
    }
    if not (base / "model_index.json").is_file() or not oracle.is_file():
        raise ModelError("no base was shipped to start from", where=base)
    if (folder / "unet" / "start").exists():
        return
    if folder.exists():
        raise ModelError("holds another training already", where=folder, fix="Choose a new folder.")
    laid_out = folder.with_name(folder.name + ".partial")  # whole or not at all
    shutil.rmtree(laid_out, ignore_errors=True)
    for part, module in load_oracle(oracle).named_children():
        if (stage := _ORACLE_STAGES[part]) not in anew:
            save_tensors(module, laid_out / stage / "model" / f"{stage}.safetensors")
    for source, target in copies.items():
        shutil.copytree(source, laid_out / target)
    for stage, runs in history.items():
        if stage in anew:
            continue
        lines = "".join(json.dumps(run) + "\n" for run in runs)
        (laid_out / stage / "recipe.jsonl").write_text(lines)
    laid_out.rename(folder)


_LARGE = 4096
"""Matrices of so many numbers ship in 8 bits: the readers' verdicts stay the same."""


def ship_oracle(folder: Path, file: Path) -> None:
    """Write both trained readers as one file, large matrices in 8 bits and the rest in fp16."""
    from safetensors.torch import load_file, save

    tensors: dict[str, torch.Tensor] = {}
    for part, stage in _ORACLE_STAGES.items():
        for name, tensor in load_file(stage_model(folder, stage) / f"{stage}.safetensors").items():
            if tensor.dim() > 1 and tensor.numel() >= _LARGE:
                # a scale that fp16 holds exactly, so that reading multiplies by what was divided by
                scale = (tensor.flatten(1).abs().amax(1) / 127).clamp(min=1e-6).half()
                rows = scale.float().view(-1, *[1] * (tensor.dim() - 1))
                tensors[f"{part}.{name}"] = (tensor / rows).round().clamp(-127, 127).to(torch.int8)
                tensors[f"{part}.{name}{SCALE}"] = scale
            else:
                tensors[f"{part}.{name}"] = tensor.half()
    write_bytes_atomic(file, save(tensors))


_ORACLE_STAGES = {"attributes": "oracle", "inspector": "inspector"}
"""Which stage trains which part of `Oracle`."""


def ship_readers(folder: Path, command: str) -> Path:
    """Write the oracle alone, and in the provenance how its stages were trained."""
    ship_oracle(folder, CRITTERS_ORACLE)
    made = json.loads(CRITTERS_PROVENANCE.read_text())
    history = stage_history(folder)
    made["stages"] |= {stage: history[stage] for stage in _ORACLE_STAGES.values()}
    made["oracle"] = {"command": command, "git_revision": revision()}
    write_text_atomic(CRITTERS_PROVENANCE, json.dumps(made, indent=2) + "\n")
    return CRITTERS_ORACLE


def provenance(command: str) -> dict[str, Any]:
    """Command, versions, revision and data that weights are made by."""
    from importlib.metadata import version

    return {
        "command": command,
        "git_revision": revision(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "data": "scenes drawn from the prior of critters.scene, train identities only, "
        "rendered by critters.render, captioned by critters.caption",
    }


def stage_history(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """For each stage, its runs: the first step and the settings of each."""
    history = {}
    for stage in STAGES:
        file = folder / stage / "recipe.jsonl"
        lines = file.read_text().splitlines() if file.is_file() else []
        history[stage] = [json.loads(line) for line in lines]
    return history


def ship_base(folder: Path, command: str) -> Path:
    """Write every finished stage of a working folder, and how they were made.

    Args:
        folder: Working folder of `train-base`.
        command: The command that was typed.

    Returns:
        The diffusers folder in the package.
    """
    CRITTERS_BASE.parent.mkdir(parents=True, exist_ok=True)
    assemble(folder, CRITTERS_BASE)
    ship_oracle(folder, CRITTERS_ORACLE)
    made = {**provenance(command), "stages": stage_history(folder)}
    write_text_atomic(CRITTERS_PROVENANCE, json.dumps(made, indent=2) + "\n")
    return CRITTERS_BASE


def record_gates(report: dict[str, Any]) -> None:
    """Add the figures that `gates` measured to the provenance of the weights."""
    made = json.loads(CRITTERS_PROVENANCE.read_text())
    made["gates"] = {
        key: report[key] for key in ("images", "steps", "guidance", "figures", "gates")
    }
    write_text_atomic(CRITTERS_PROVENANCE, json.dumps(made, indent=2) + "\n")


def start_from_shipped(folder: Path, stages: tuple[str, ...]) -> None:
    """Lay out the shipped base as a working folder (`continue_from`) that lacks these stages."""
    made = json.loads(CRITTERS_PROVENANCE.read_text()) if CRITTERS_PROVENANCE.is_file() else {}
    continue_from(CRITTERS_BASE, CRITTERS_ORACLE, folder, made.get("stages", {}), stages)
