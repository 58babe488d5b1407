"""The parts of a run, from its config: adapter, samples, optimizer, learning rate.

Sample number j is the same in every process, worker and micro-batch: everything random about it
(image, crop, reference, drop, latents, noise, timestep) comes from the run's seed and j alone. So a
run that is resumed, or spread over processes, sees the same.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from ipdiverse.adapter.files.checkpoint import load_adapter, weights_hash
from ipdiverse.adapter.fusion import BlendFusion, GatedFusion
from ipdiverse.adapter.generative import GenerativeFusion
from ipdiverse.adapter.model import ImagePromptAdapter, new_adapter
from ipdiverse.base.adapters import adapter_file
from ipdiverse.base.pipelines import fingerprint
from ipdiverse.data.manifest import Record
from ipdiverse.data.references import References, parse_references
from ipdiverse.errors import ArgumentError
from ipdiverse.loading import building
from ipdiverse.provenance import derived_seed
from ipdiverse.training.checkpoints import ADAPTER, finished
from ipdiverse.training.config import TrainConfig
from ipdiverse.training.embed import Embedded, Online, Stored, TrainingData, embed
from ipdiverse.training.fit import fit_directions
from ipdiverse.training.frozen import FrozenEncoders, Preprocessing


@dataclass(eq=False)
class Samples(Dataset[dict[str, Any]]):
    """Sample number to tensors: `latents`, `noise`, `timestep`, text and image embeddings.

    With `drawn`, (tokens, width) of what a generative fusion draws, there are no latents but the
    embeddings of a `target`; `noise` and `timestep` are the flow's.
    """

    data: TrainingData
    trained: list[int]
    references: References
    config: TrainConfig
    reads: str
    scaling: tuple[float, float]
    timesteps: int
    drawn: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not self.config.changed and self.references.may_augment:
            raise ArgumentError(
                "has no changed references to take",
                where=f"reference {self.config.reference!r}",
                expected="changed of 1 or more",
                fix="Run `ipdiverse embed --changed 4`, and train with --changed 4.",
            )

    def __len__(self) -> int:
        return self.config.steps * self.config.batch

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Sample `number`, from 0 at the first step."""
        config = self.config
        rng = np.random.default_rng(derived_seed(config.seed, "sample", number))
        noise = torch.Generator().manual_seed(derived_seed(config.seed, "noise", number))
        epoch, position = divmod(number, len(self.trained))
        place = int(_order(config.seed, epoch, len(self.trained))[position])
        index = self.trained[place]
        # the change is drawn even where none is wanted: the draws after it must not depend on that
        variant, change_number = (int(rng.integers(n)) for n in (config.variants, 1 << 30))
        choice = self.references.choose(place, rng)
        change = 1 + change_number % config.changed if choice.augment else 0
        no_text, no_image = self._drops(rng.random())
        text = self.data.no_text if no_text else self.data.text(index)
        words = {f"text_{name}": tensor for name, tensor in text.items()}
        if self.drawn is not None:
            return self._flow(index, choice.file_name, noise) | words
        picture = self.data.no_image if no_image else self.data.reference(choice.file_name, change)
        moments = self.data.target(index, variant)
        mean, std = moments["mean"].cpu(), moments["std"].cpu()
        scale, shift = self.scaling
        # one generator for three draws: their order is part of what a seed means
        return {
            "latents": (mean + std * _normal(mean.shape, noise) - shift) * scale,
            "noise": _normal(mean.shape, noise),
            "timestep": self._timestep(noise),
            "image": picture[self.reads],
            **words,
        }

    def _flow(self, index: int, reference: str, rng: torch.Generator) -> dict[str, Any]:
        """A pair of pictures, the flow's noise and the reference's, and a time in 0..1."""
        target = self.data.records[index].file_name
        return {
            "image": self.data.reference(reference, 0)[self.reads],
            "target": self.data.reference(target, 0)[self.reads],
            "noise": _normal(torch.Size((2, *(self.drawn or ()))), rng),
            # logit-normal: the middle of the way is hardest (arXiv:2403.03206, section 3.1)
            "timestep": torch.sigmoid(_normal(torch.Size(()), rng)),
        }

    def _timestep(self, rng: torch.Generator) -> Tensor:
        """Uniform, or T(1 − u³) for a uniform u ("cubic sampling", arXiv:2302.08453)."""
        if self.config.timesteps == "uniform":
            return torch.randint(self.timesteps, (), generator=rng)
        uniform = torch.rand((), generator=rng, dtype=torch.float32)
        # u may be 0, and there is no timestep T
        return (self.timesteps * (1 - uniform**3)).long().clamp(max=self.timesteps - 1)

    def _drops(self, u: float) -> tuple[bool, bool]:
        """Whether text and image are dropped, from one uniform number."""
        text, image, both = self.config.drop_text, self.config.drop_image, self.config.drop_both
        dropped = u < text + image + both
        return dropped and not text <= u < text + image, dropped and u >= text


def _normal(shape: torch.Size, rng: torch.Generator) -> Tensor:
    """Standard normal in float32: a thread that loads a model may have changed the default type."""
    return torch.randn(shape, generator=rng, dtype=torch.float32)


@lru_cache(maxsize=4)  # one order serves all samples of an epoch
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of an epoch: every image once."""
    return np.random.default_rng(derived_seed(seed, "epoch", epoch)).permutation(size)


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
        if config.adapter == "base":
            adapter = new_adapter("base", unet, encoder, None, num_tokens=config.tokens or 4)
        else:
            width = config.width or unet.config.cross_attention_dim
            sizes = {"num_tokens": config.tokens or 16, "width": width, "depth": config.depth}
            adapter = new_adapter("plus", unet, encoder, None, **sizes)
    if config.fusion == "none" or adapter.fusion is not None:
        return adapter
    size: int = adapter.token_width
    if config.fusion == "generative":
        adapter.fusion = _generative(config, adapter, samples)
    elif config.fusion == "blend":
        adapter.fusion = BlendFusion(size)
    else:
        tokens: Any = adapter.image_proj.num_tokens
        adapter.fusion = GatedFusion(size, tokens, heads=math.gcd(size, 8))
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
    records = [data.records[index] for index in trained]
    if config.reference != "auto":
        references = References(records, parse_references(config.reference))
    elif (references := References(records, {"augmented": 1})).paired_share:
        references = References(records, {"paired": 1})
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
    accelerator = Accelerator(mixed_precision=mixed_precision)
    if mixed_precision == "fp16" and accelerator.device.type == "cpu":  # torch fails in mid-step
        what, fix = "is not computed in on a CPU", "Leave it out, or choose bf16."
        raise ArgumentError(what, where="mixed_precision", found="fp16", fix=fix)
    return accelerator


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
    kept = sorted(set(range(count)) - held_out(config, count))
    return [index for index in kept for _ in range(records[index].repeats)]


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
