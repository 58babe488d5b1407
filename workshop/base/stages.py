"""The stages of `python -m workshop train-base`, in order, each resumable on its own."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ipdiverse.critters.oracle import AttributeReader, Inspector
from ipdiverse.errors import ModelError, check_range
from workshop.base import architecture
from workshop.base.clip import (
    ClipObjective,
    TextModules,
    TextObjective,
    VisionModules,
)
from workshop.base.corpus import Corpus, corpus
from workshop.base.inspector import KINDS, InspectorObjective, pool
from workshop.base.loop import Schedule, StageRun
from workshop.base.oracle import OracleObjective
from workshop.base.tokenizer import build_tokenizer
from workshop.base.unet import (
    Alignment,
    Latents,
    UnetModules,
    UnetObjective,
    cache_latents,
    cache_patches,
)
from workshop.base.vae import VaeModules, VaeObjective, latent_scale

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection


STAGES = ("vae", "text", "clip", "unet", "oracle", "inspector")


@dataclass(frozen=True)
class BaseRecipe:
    """How the embedded base is trained.

    Args:
        seed: Of data, initial weights and noise.
        images: Rendered scenes of the training split.
        vae_steps: Steps of stage vae, batch 16.
        text_steps: Steps of stage text, batch 128.
        clip_steps: Steps of stage clip, batch 192.
        unet_steps: Steps of stage unet, batch 128.
        oracle_steps: Steps of stage oracle, batch 64.
        inspector_steps: Steps of stage inspector, batch 128.
        faults: Images of each kind of fault for stage inspector.
        compile: Compile the UNet with torch.compile, which needs a C++ compiler.
    """

    seed: int = 0
    images: int = 40_000
    vae_steps: int = 3500
    text_steps: int = 500
    clip_steps: int = 1200
    unet_steps: int = 3000
    oracle_steps: int = 2000
    inspector_steps: int = 4000
    faults: int = 800
    compile: bool = True

    def __post_init__(self) -> None:
        for field in fields(BaseRecipe):
            value = getattr(self, field.name)
            if field.name.endswith("_steps") or field.name in ("images", "faults"):
                check_range(field.name, value, 1, 100_000_000)
        check_range("seed", self.seed, 0, 2**63 - 1)


def schedule(recipe: BaseRecipe, stage: str) -> Schedule:
    """Steps and learning rate of a stage."""
    return {
        "vae": Schedule(recipe.vae_steps, 1.2e-3, save_every=250, muon=True),
        "text": Schedule(recipe.text_steps, 1.5e-3, weight_decay=0.05, save_every=100),
        "clip": Schedule(recipe.clip_steps, 1e-3, weight_decay=0.05, save_every=100),
        "unet": Schedule(recipe.unet_steps, 1.5e-3, warmup=300, save_every=250, muon=True),
        "oracle": Schedule(recipe.oracle_steps, 1.5e-3, weight_decay=0.02, save_every=250),
        "inspector": Schedule(
            recipe.inspector_steps, 1.5e-3, weight_decay=0.02, ema=0.995, save_every=100
        ),
    }[stage]


def train_stage(stage: str, folder: Path, recipe: BaseRecipe) -> None:
    """Train one stage, or resume it, and save its model under `folder/STAGE/model`.

    Args:
        stage: One of `STAGES`.
        folder: Working folder of the whole training.
        recipe: Steps, seed and number of scenes.

    Raises:
        ModelError: An earlier stage that this one needs is missing.
    """
    target = folder / stage / "model"
    if target.exists():
        return
    (folder / stage).mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    images = corpus(folder / "corpus", "train", recipe.images, recipe.seed)
    objective = _OBJECTIVES[stage](folder, recipe, images)
    plan = schedule(recipe, stage)
    run = StageRun(objective, plan, folder / stage, recipe.seed)
    note_run(folder / stage, run.step, {**asdict(plan), "seed": recipe.seed, "images": len(images)})
    run.train()
    temporary = folder / stage / "model.partial"
    _SAVERS[stage](objective, temporary)
    temporary.rename(target)  # in one step: the folder says that the stage is finished


def note_run(folder: Path, step: int, settings: dict[str, Any]) -> None:
    """Append a run's first step and settings to a stage's `recipe.jsonl`, for the provenance."""
    with (folder / "recipe.jsonl").open("a") as file:
        file.write(json.dumps({"from_step": step, **settings, "revision": revision()}) + "\n")


def revision() -> str:
    """The git revision of this code, or `unknown` outside a checkout."""
    shown = subprocess.run(
        ["git", "rev-parse", "HEAD"],  # noqa: S607 - git from the path, as any build does
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return shown.stdout.strip() or "unknown"


def stage_model(folder: Path, stage: str) -> Path:
    """The folder in which a finished stage saved its model.

    Raises:
        ModelError: The stage is not finished.
    """
    path = folder / stage / "model"
    if not path.exists():
        raise ModelError(
            f"stage {stage} has not been trained",
            where=folder,
            fix=f"Run `python -m workshop train-base --stages {stage}` first.",
        )
    return path


def _vae_objective(folder: Path, recipe: BaseRecipe, images: Corpus) -> VaeObjective:
    return VaeObjective(VaeModules(architecture.vae()), images)


def _save_vae(objective: VaeObjective, target: Path) -> None:
    vae = objective.module.vae
    vae.register_to_config(scaling_factor=latent_scale(vae, objective.corpus))
    vae.save_pretrained(target)


def _text_objective(folder: Path, recipe: BaseRecipe, images: Corpus) -> TextObjective:
    tokenizer = build_tokenizer()
    return TextObjective(TextModules(architecture.text_encoder(len(tokenizer))), tokenizer, images)


def _save_text(objective: TextObjective, target: Path) -> None:
    objective.module.text.save_pretrained(target / "text_encoder")
    objective.tokenizer.save_pretrained(target / "tokenizer")


def _load_text(folder: Path) -> tuple[CLIPTextModel, CLIPTokenizer]:
    from transformers import CLIPTextModel, CLIPTokenizer

    path = stage_model(folder, "text")
    return (
        CLIPTextModel.from_pretrained(path / "text_encoder"),
        CLIPTokenizer.from_pretrained(path / "tokenizer"),
    )


def _clip_objective(folder: Path, recipe: BaseRecipe, images: Corpus) -> ClipObjective:
    text, tokenizer = _load_text(folder)
    return ClipObjective(VisionModules(architecture.image_encoder()), text, tokenizer, images)


def _save_clip(objective: ClipObjective, target: Path) -> None:
    objective.module.vision.save_pretrained(target / "image_encoder")


def _unet_objective(folder: Path, recipe: BaseRecipe, images: Corpus) -> UnetObjective:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    vae: Any = AutoencoderKL.from_pretrained(stage_model(folder, "vae"))
    text, tokenizer = _load_text(folder)
    start = folder / "unet" / "start"
    unet: Any = (
        UNet2DConditionModel.from_pretrained(start) if start.exists() else architecture.unet()
    )
    moments = cache_latents(vae, images, folder / "corpus")
    patches = cache_patches(_load_image_encoder(folder), images, folder / "corpus")
    alignment = Alignment(patches, unet.config.block_out_channels[-1])
    return UnetObjective(
        UnetModules(unet.to(memory_format=torch.channels_last), alignment),
        text,
        tokenizer,
        architecture.noise_schedule(),
        images,
        Latents(moments, vae.config.scaling_factor),
        compiled=recipe.compile,
    )


def _load_image_encoder(folder: Path) -> CLIPVisionModelWithProjection:
    from transformers import CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection.from_pretrained(
        stage_model(folder, "clip") / "image_encoder"
    )


def _save_unet(objective: UnetObjective, target: Path) -> None:
    objective.module.unet.save_pretrained(target)


def _oracle_objective(folder: Path, recipe: BaseRecipe, images: Corpus) -> OracleObjective:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(stage_model(folder, "vae"))
    reader: Any = AttributeReader()
    return OracleObjective(reader.to(memory_format=torch.channels_last), images, vae)


def _inspector_objective(folder: Path, recipe: BaseRecipe, images: Corpus) -> InspectorObjective:
    drawn = partial(pool, folder / "corpus", stage_model(folder, "vae"))
    inspector: Any = Inspector(len(KINDS))
    return InspectorObjective(
        inspector.to(memory_format=torch.channels_last),
        drawn("train", recipe.faults),
        drawn("validation", max(4, recipe.faults // 8)),
    )


def _save_oracle(objective: OracleObjective, target: Path) -> None:
    save_tensors(objective.module, target / "oracle.safetensors")


def _save_inspector(objective: InspectorObjective, target: Path) -> None:
    objective.set_threshold()
    save_tensors(objective.module, target / "inspector.safetensors")


def save_tensors(module: torch.nn.Module, file: Path) -> None:
    """Write a module's weights where `file` says, and its folder."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in module.state_dict().items()}, file)


_OBJECTIVES = {
    "vae": _vae_objective,
    "text": _text_objective,
    "clip": _clip_objective,
    "unet": _unet_objective,
    "oracle": _oracle_objective,
    "inspector": _inspector_objective,
}
_SAVERS = {
    "vae": _save_vae,
    "text": _save_text,
    "clip": _save_clip,
    "unet": _save_unet,
    "oracle": _save_oracle,
    "inspector": _save_inspector,
}
