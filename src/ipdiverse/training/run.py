"""Train and ship plain IP-Adapter on the embedded base."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from ipdiverse.adapter.attach import attach
from ipdiverse.adapter.checkpoint import save_adapter
from ipdiverse.adapter.model import Kind, new_adapter
from ipdiverse.bases import CRITTERS, CRITTERS_ADAPTERS, load_base
from ipdiverse.critters.pipeline import provenance
from ipdiverse.critters.recipe import BaseRecipe
from ipdiverse.critters.training.corpus import corpus
from ipdiverse.critters.training.loop import Schedule, StageRun
from ipdiverse.critters.training.stages import stage_model
from ipdiverse.critters.training.unet import Latents, cache_latents
from ipdiverse.errors import check_range
from ipdiverse.training.plain import PlainObjective, cache_image_embeds

if TYPE_CHECKING:
    from pathlib import Path

PROJECTION_SIZES: dict[str, dict[str, int]] = {
    "base": {"num_tokens": 4},
    "plus": {"num_tokens": 16, "width": 128, "depth": 4},
}
FILES: dict[str, str] = {
    "base": "ip-adapter_critters.safetensors",
    "plus": "ip-adapter-plus_critters.safetensors",
}


def train_plain(kind: Kind, folder: Path, steps: int, seed: int = 0, images: int = 20_000) -> Path:
    """Train one adapter with reference = target, and write it in the published layout.

    Args:
        kind: `base` or `plus`.
        folder: Working folder of `train-base`.
        steps: Optimizer steps, batch 64.
        seed: Of data, initial weights and noise.
        images: How many training scenes to use.

    Returns:
        The shipped file.
    """
    from diffusers import AutoencoderKL

    check_range("steps", steps, 1, 100_000_000)
    check_range("images", images, 1, 100_000_000)
    recipe = BaseRecipe()  # the base's own scenes, whatever this adapter's seed
    pipe: Any = load_base(CRITTERS).pipe
    scenes = corpus(folder / "corpus", "train", recipe.images, recipe.seed)
    vae: Any = AutoencoderKL.from_pretrained(stage_model(folder, "vae"))
    moments = cache_latents(vae, scenes, folder / "corpus")
    scenes = scenes.first(images)
    embeds = cache_image_embeds(pipe.image_encoder, scenes, kind, folder / "corpus")
    torch.manual_seed(seed)
    adapter = new_adapter(kind, pipe.unet, pipe.image_encoder, None, **PROJECTION_SIZES[kind])
    attach(pipe, adapter)
    latents = Latents(moments, vae.config.scaling_factor)
    objective = PlainObjective(adapter, pipe, scenes, latents, embeds)
    schedule = Schedule(steps, 5e-4, warmup=100, save_every=250)
    run = StageRun(objective, schedule, folder / f"plain-{kind}", seed)
    run.folder.mkdir(parents=True, exist_ok=True)
    run.train()
    CRITTERS_ADAPTERS.mkdir(parents=True, exist_ok=True)
    recipe_used = {**asdict(schedule), "batch": objective.batch, "seed": seed, "images": images}
    made = provenance(f"ipdiverse critters train-plain --kind {kind} --steps {steps} --seed {seed}")
    spec = {"reference": "self", "recipe": recipe_used, **made}
    save_adapter(adapter, CRITTERS_ADAPTERS / FILES[kind], spec)
    return CRITTERS_ADAPTERS / FILES[kind]
