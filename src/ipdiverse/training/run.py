"""Train and ship plain IP-Adapter on the embedded base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ipdiverse.adapter.attach import attach
from ipdiverse.adapter.checkpoint import save_adapter
from ipdiverse.adapter.model import Kind, new_adapter
from ipdiverse.bases import CRITTERS, CRITTERS_ADAPTERS, load_base
from ipdiverse.critters.pipeline import provenance
from ipdiverse.critters.training.corpus import corpus
from ipdiverse.critters.training.loop import Schedule, StageRun
from ipdiverse.critters.training.stages import BaseRecipe, stage_model
from ipdiverse.critters.training.unet import Latents, cache_latents
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

    recipe = BaseRecipe(seed=seed)
    pipe: Any = load_base(CRITTERS).pipe
    scenes = corpus(folder / "corpus", "train", recipe.images, recipe.seed)
    vae: Any = AutoencoderKL.from_pretrained(stage_model(folder, "vae"))
    moments = cache_latents(vae, scenes, folder / "corpus" / f"latents-{len(scenes)}.npy")
    scenes = scenes.first(images)
    embeds_file = folder / "corpus" / f"embeds-{kind}-{len(scenes)}.npy"
    embeds = cache_image_embeds(pipe.image_encoder, scenes, kind, embeds_file)
    torch.manual_seed(seed)
    adapter = new_adapter(kind, pipe.unet, pipe.image_encoder, **PROJECTION_SIZES[kind])
    attach(pipe, adapter).set_pass_through(True)
    latents = Latents(moments, vae.config.scaling_factor)
    objective = PlainObjective(adapter, pipe, scenes, latents, embeds)
    schedule = Schedule(steps, 5e-4, warmup=100, save_every=250)
    run = StageRun(objective, schedule, folder / f"plain-{kind}", seed)
    run.folder.mkdir(parents=True, exist_ok=True)
    run.train()
    CRITTERS_ADAPTERS.mkdir(parents=True, exist_ok=True)
    made = provenance({"steps": steps, "seed": seed, "images": images}, "critters train-plain")
    save_adapter(adapter, CRITTERS_ADAPTERS / FILES[kind], {"reference": "self", **made})
    return CRITTERS_ADAPTERS / FILES[kind]
