"""The parts of a run, from its config: adapter, samples, optimizer, learning rate."""

from __future__ import annotations

import hashlib
import json
import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ipdiverse.adapter.files.checkpoint import load_adapter, weights_hash
from ipdiverse.adapter.fusion import BlendFusion, GatedFusion
from ipdiverse.adapter.generative import GenerativeFusion
from ipdiverse.adapter.model import ImagePromptAdapter, new_adapter
from ipdiverse.base.adapters import adapter_file
from ipdiverse.base.pipelines import fingerprint
from ipdiverse.data.references import References, parse_references
from ipdiverse.errors import ArgumentError
from ipdiverse.loading import building
from ipdiverse.seeding import derived_seed
from ipdiverse.training.checkpoints import ADAPTER, finished
from ipdiverse.training.embed import Embedded, Online, Stored, embed
from ipdiverse.training.fit import fit_directions
from ipdiverse.training.frozen import Preprocessing
from ipdiverse.training.samples import Samples

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from accelerate import Accelerator
    from torch import nn

    from ipdiverse.data.manifest import Record
    from ipdiverse.training.config import TrainConfig
    from ipdiverse.training.frozen import FrozenEncoders


def initial_adapter(config: TrainConfig) -> ImagePromptAdapter | None:
    """The adapter that a run starts from (`init_from`); None starts from new weights."""
    if config.init_from is None:
        return None
    adapter = load_adapter(adapter_file(config.base, config.init_from))
    if config.adapter not in ("auto", adapter.kind):
        wanted, found = config.adapter, adapter.kind
        raise ArgumentError(
            "is of another kind", where=config.init_from, expected=wanted, found=found
        )
    fixed = config.fusion == "generative" or (config.fusion == "gated" and adapter.fusion is None)
    if fixed and not adapter.image_proj.num_tokens:
        raise ArgumentError(
            "makes as many tokens as the image encoder has states, and gates need a fixed number",
            where=config.init_from,
            fix="Train with --fusion=blend or --fusion=none.",
        )
    if adapter.fusion is not None and adapter.draws != (config.fusion == "generative"):
        raise ArgumentError(
            "has a fusion that is trained otherwise",
            where=config.init_from,
            expected=config.fusion,
            found=adapter.fusion.kind,
            fix="Start from an adapter without fusion, or with this one.",
        )
    return adapter


@building()
def build_adapter(
    config: TrainConfig,
    encoders: FrozenEncoders,
    initial: ImagePromptAdapter | None,
    samples: Samples,
) -> ImagePromptAdapter:
    """The initial adapter, or a new one that fits the base, with the fusion asked for."""
    unet, encoder, adapter = encoders.pipe.unet, encoders.images.encoder, initial
    if adapter is None:
        kind = "base" if config.adapter == "base" else "plus"
        sizes = {"num_tokens": config.tokens or (4 if kind == "base" else 16)}
        if kind == "plus":
            sizes["width"] = config.width or unet.config.cross_attention_dim
            sizes["depth"] = config.depth
        adapter = new_adapter(kind, unet, encoder, None, **sizes)
    if config.fusion == "none" or adapter.fusion is not None:
        return adapter
    width: int = adapter.token_width
    if config.fusion == "generative":
        adapter.fusion = _generative(config, adapter, samples)
    elif config.fusion == "blend":
        adapter.fusion = BlendFusion(width)
    else:
        tokens: Any = adapter.image_proj.num_tokens
        adapter.fusion = GatedFusion(width, tokens, heads=math.gcd(width, 8))
    return adapter


def build_samples(
    config: TrainConfig,
    encoders: FrozenEncoders,
    initial: ImagePromptAdapter | None,
    first: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Samples:
    """The run's samples: from the cache, which is completed first, or encoded at every step."""
    new_reads = "pooled" if config.adapter == "base" else "hidden"
    reads = new_reads if initial is None else initial.reads[0]
    shown = Preprocessing.of(config, encoders.resolution)
    folder = Path(config.data)
    if config.cache:
        images: Any = reads if config.cache_images == "auto" else config.cache_images
        stored = Stored(images, config.cache_dtype)
        if config.fusion == "generative":  # tokens are learned, and no latents read
            stored = replace(stored, rows=("constants", "texts", "references"))
        with first():  # one process computes what is missing, the others then find it
            embed(folder, encoders, shown, stored)
        data = Embedded(folder, encoders.fingerprint(), shown, stored)
    else:
        data = Online(folder, encoders, shown)
    trained = _trained(config, data.records)
    if config.epochs is not None:
        config = replace(config, steps=config.epochs * -(-len(trained) // config.batch))
    references = _references(config.reference, [data.records[index] for index in trained])
    drawn = None
    if config.fusion == "generative" and initial is not None:
        drawn = (initial.image_proj.num_tokens or 0, initial.token_width)
        trained, references = _paired(data.records, trained)
    vae = encoders.pipe.vae.config
    scaling = (vae.scaling_factor, getattr(vae, "shift_factor", None) or 0.0)
    timesteps = encoders.pipe.scheduler.config.num_train_timesteps
    return Samples(data, trained, references, config, reads, scaling, timesteps, drawn)


def contents_of(
    config: TrainConfig, records: list[Record], encoders: FrozenEncoders
) -> dict[str, str]:
    """Hashes of what a run's data set and local files hold: moved, they are the same."""
    held = [(r.sha256, r.text, r.subject, r.reference) for r in records]
    found = {"data": hashlib.sha256(json.dumps(held).encode()).hexdigest()[:16]}
    if Path(config.base).exists():
        unet = encoders.pipe.unet  # not read where only tokens are learned
        read = "" if unet.device.type == "meta" else f"{fingerprint(unet)} "
        found["base"] = read + encoders.fingerprint()
    if config.image_encoder and Path(config.image_encoder).exists():
        found["image_encoder"] = encoders.fingerprint()
    if config.init_from and Path(config.init_from).exists():
        found["init_from"] = weights_hash(adapter_file(config.base, config.init_from))
    return found


def build_optimizer(config: TrainConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, fused, or its 8-bit form."""
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        where, fix = "optimizer adamw8bit", "pip install bitsandbytes, or take adamw."
        raise ArgumentError("is not installed", where=where, fix=fix) from error
    return bitsandbytes.optim.AdamW8bit(parameters, **options)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of a step, counted from 0: warm-up, then the schedule."""
    # of the step alone, unlike diffusers' `get_scheduler`: a resumed run has no state of it to
    # restore, and `steps` may have grown
    warmup = config.lr_warmup_steps
    warm = min(1.0, (step + 1) / warmup) if warmup else 1.0
    past = max(0.0, (step - warmup) / max(1, config.steps - warmup))
    left = {"constant": 1.0, "linear": 1.0 - past, "cosine": 0.5 * (1 + math.cos(math.pi * past))}
    return config.learning_rate * warm * left[config.lr_scheduler]


def open_accelerator(mixed_precision: str) -> Accelerator:
    """Accelerate, in a precision that an earlier run of this process may not have had."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # accelerate's state is the whole process's, and refuses another precision
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed_precision:
        AcceleratorState._reset_state()
    return Accelerator(mixed_precision=mixed_precision)


def held_out(config: TrainConfig, count: int) -> set[int]:
    """Images that are drawn for validation and not trained on; the seed decides which."""
    rng = np.random.default_rng(derived_seed(config.seed, "held out"))
    return set(rng.permutation(count)[: config.num_validation_images].tolist())


def _trained(config: TrainConfig, records: list[Record]) -> list[int]:
    """All images, as often as each repeats, but those held out."""
    wanted, count = config.num_validation_images, len(records)
    if wanted >= count:
        raise ArgumentError(
            "leaves nothing to train on",
            where="num_validation_images",
            expected=f"fewer than {count}",
            found=wanted,
        )
    validation = held_out(config, count)
    kept = [index for index in range(count) if index not in validation]
    return [index for index in kept for _ in range(records[index].repeats)]


def _references(kind: str, records: list[Record]) -> References:
    if kind != "auto":
        return References(records, parse_references(kind))
    augmented = References(records, {"augmented": 1})
    return References(records, {"paired": 1}) if augmented.paired_share else augmented


def _paired(records: list[Record], trained: list[int]) -> tuple[list[int], References]:
    """Images with a partner alone: of itself a flow would learn to change nothing."""
    rng = np.random.default_rng(0)
    every = References([records[index] for index in trained], {"paired": 1})
    # without a partner a changed copy would be asked for
    kept = [i for place, i in enumerate(trained) if not every.choose(place, rng).augment]
    return kept, References([records[index] for index in kept], {"paired": 1})


def _generative(
    config: TrainConfig, adapter: ImagePromptAdapter, samples: Samples
) -> GenerativeFusion:
    """A new flow on the variation space of the training pairs; a resumed run's own."""
    if done := finished(Path(config.out)):
        found = load_adapter(done[-1] / ADAPTER).fusion
        if isinstance(found, GenerativeFusion):
            return found
    tokens: Any = adapter.image_proj.num_tokens
    no_text = samples.data.no_text
    mask = no_text.get("mask")
    words = no_text["states"] if mask is None else no_text["states"][mask]
    data, trained = samples.data, samples.trained
    records = [data.records[index] for index in trained]
    mean, directions, deviations, scene = fit_directions(data, records, adapter, Path(config.data))
    fusion = GenerativeFusion(adapter.token_width, tokens, len(deviations), len(words))
    fusion.no_text.copy_(words)
    fusion.variation.set(mean, directions, deviations, scene)
    return fusion
