"""What a run is made of, from its config: adapter, samples, optimizer."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ipdiverse.adapter.files.checkpoint import load_adapter
from ipdiverse.adapter.fusion import BlendFusion, GatedFusion
from ipdiverse.adapter.model import ImagePromptAdapter, new_adapter
from ipdiverse.base.adapters import adapter_file
from ipdiverse.data.references import References, parse_references
from ipdiverse.errors import ArgumentError
from ipdiverse.loading import building
from ipdiverse.seeding import derived_seed
from ipdiverse.training.embed import Embedded, Online, Stored, embed
from ipdiverse.training.preprocessing import Preprocessing
from ipdiverse.training.samples import Samples

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from accelerate import Accelerator
    from torch import nn

    from ipdiverse.data.manifest import Record
    from ipdiverse.training.config import TrainConfig
    from ipdiverse.training.frozen import FrozenEncoders


def adapter_to_start_from(config: TrainConfig) -> ImagePromptAdapter | None:
    """The adapter that a run goes on from; None learns from new weights.

    Raises:
        ArgumentError: It is of another kind than is asked for, or the fusion does not fit it.
        ModelError: There is no such adapter, or it cannot be opened.
    """
    if config.start is None:
        return None
    adapter = load_adapter(adapter_file(config.base, config.start))
    if config.adapter not in ("auto", adapter.kind):
        raise ArgumentError(
            "is of another kind",
            where=config.start,
            expected=config.adapter,
            found=adapter.kind,
        )
    if config.fusion == "gated" and adapter.fusion is None and not adapter.image_proj.num_tokens:
        raise ArgumentError(
            "makes as many tokens as the image encoder has states, and each gate is one token's",
            where=config.start,
            fix="Train with --fusion=blend or --fusion=none.",
        )
    return adapter


def embedding_read(config: TrainConfig, start: ImagePromptAdapter | None) -> str:
    """What the run's adapter reads from the image encoder, `pooled` or `hidden`."""
    if start is not None:
        return start.reads[0]
    return "pooled" if config.adapter == "base" else "hidden"


@building()
def build_adapter(
    config: TrainConfig, encoders: FrozenEncoders, start: ImagePromptAdapter | None
) -> ImagePromptAdapter:
    """The adapter to start from, or a new one that fits the base, with the fusion asked for."""
    unet, encoder = encoders.pipe.unet, encoders.images.encoder
    adapter = start
    if adapter is None:
        kind = "base" if config.adapter == "base" else "plus"
        tokens = config.tokens or (4 if kind == "base" else 16)
        width = config.width or unet.config.cross_attention_dim
        sizes = {"num_tokens": tokens}
        if kind == "plus":
            sizes |= {"width": width, "depth": config.depth}
        adapter = new_adapter(kind, unet, encoder, None, **sizes)
    if config.fusion == "none" or adapter.fusion is not None:
        return adapter
    width: int = adapter.token_width
    if config.fusion == "blend":
        adapter.fusion = BlendFusion(width)
    else:
        tokens: Any = adapter.image_proj.num_tokens
        adapter.fusion = GatedFusion(width, tokens, heads=_heads(width))
    return adapter


def build_samples(
    config: TrainConfig,
    encoders: FrozenEncoders,
    reads: str,
    first: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Samples:
    """The run's samples, from the cache, which is completed first, or encoded at every step.

    Args:
        config: The run.
        encoders: Of its base.
        reads: What the adapter reads, `pooled` or `hidden`.
        first: A context that lets the main process go first.

    Raises:
        DataError: The data set is not prepared, not embedded so, or has no pairs to take.
    """
    shown = Preprocessing.of(config, encoders.resolution)
    folder = Path(config.data)
    if config.cache:
        images: Any = reads if config.cache_images == "auto" else config.cache_images
        stored = Stored(images, config.cache_dtype)
        with first():
            embed(folder, encoders, shown, stored)
        data = Embedded(folder, encoders.fingerprint(), shown, stored)
    else:
        data = Online(folder, encoders, shown)
    trained = _trained(config, len(data.records))
    references = _references(config.reference, [data.records[index] for index in trained])
    vae = encoders.pipe.vae.config
    scaling = (vae.scaling_factor, getattr(vae, "shift_factor", None) or 0.0)
    timesteps = encoders.pipe.scheduler.config.num_train_timesteps
    return Samples(data, trained, references, config, reads, scaling, timesteps)


def build_optimizer(config: TrainConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, fused, or its 8-bit form.

    Raises:
        ArgumentError: The 8-bit form is not installed.
    """
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)
    try:
        import bitsandbytes  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ArgumentError(
            "is not installed",
            where="optimizer adamw8bit",
            fix="pip install bitsandbytes, or take adamw.",
        ) from error
    return bitsandbytes.optim.AdamW8bit(parameters, **options)


_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def hold_as_computed(unet: torch.nn.Module, precision: str) -> None:
    """Keep frozen matrices in the type that autocast computes them in; norms stay in float32.

    Weights that were just loaded are pages of their file, which stay in memory as long as one of
    them is used: so norms are copied.
    """
    if precision not in _DTYPES:
        return
    for module in unet.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.to(_DTYPES[precision])
        else:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.clone()


def open_accelerator(precision: str) -> Accelerator:
    """Accelerate, in a precision that an earlier run of this process may not have had."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    wanted = "no" if precision == "fp32" else precision
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != wanted:
        AcceleratorState._reset_state()
    return Accelerator(mixed_precision=wanted)


def _trained(config: TrainConfig, count: int) -> list[int]:
    """All images but those held out, which the seed decides."""
    if config.held_out >= count:
        raise ArgumentError(
            "leaves nothing to train on",
            where="held_out",
            expected=f"fewer than {count}",
            found=config.held_out,
        )
    rng = np.random.default_rng(derived_seed(config.seed, "held out"))
    held_out = set(rng.permutation(count)[: config.held_out].tolist())
    return [index for index in range(count) if index not in held_out]


def _references(kind: str, records: list[Record]) -> References:
    if kind != "auto":
        return References(records, parse_references(kind))
    augmented = References(records, {"augmented": 1})
    return References(records, {"paired": 1}) if augmented.paired_share else augmented


def _heads(width: int) -> int:
    """Eight where they divide the width, else the largest power of two below that does."""
    return next(heads for heads in (8, 4, 2, 1) if width % heads == 0)
