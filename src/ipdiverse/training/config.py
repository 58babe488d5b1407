"""What a training run is: one frozen value, from a TOML file, from flags, or from Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from ipdiverse.config import Range, check
from ipdiverse.errors import ArgumentError, check_range

Count = Annotated[int, Range(1, 100_000_000)]
Share = Annotated[float, Range(0, 1)]

MAY_CHANGE = (
    *("steps", "epochs", "checkpointing_steps", "checkpoints_total_limit", "workers"),
    *("report_to", "out", "micro_batch", "process_batch"),
    *("validate_every", "num_images_per_prompt", "validation_steps", "validation_guidance"),
    "validation_prompts",
)
"""Settings that a resumed run may change; changing any other would make it another run."""

RENAMED = {
    "start": "init_from",
    "schedule": "lr_scheduler",
    "warmup": "lr_warmup_steps",
    "max_norm": "max_grad_norm",
    "precision": "mixed_precision",
    "save_every": "checkpointing_steps",
    "keep": "checkpoints_total_limit",
    "held_out": "num_validation_images",
    "validation_images": "num_images_per_prompt",
}
"""Names of version 0.1, still read, and today's, which are those of diffusers and accelerate."""

DROPPED = {"noise_conditioning": "noise conditioning was removed after version 0.1"}
"""Settings of version 0.1 that have no effect any more, and why."""


@dataclass(frozen=True)
class CacheConfig:
    """What decides a data set's cache; `embed` and `train` take the same options for it.

    Args:
        base: Whose UNet and encoders: `critters`, a preset (`ipdiverse bases`), a hub id, a folder
            or a file.
        image_encoder: A CLIP vision model, folder or hub id; None takes the base's.
        cache_dtype: Type in which embeddings and latents are stored; float16 halves the disk.
        resolution: Height and width of targets in pixels; None takes the base's own.
        variants: Random crops of each target; 1 is the centre crop alone.
        flip: Whether crops may be mirrored.
        changed: Changed references of each image; `augmented` needs at least one.
        image_seed: Seed of crops, flips and changes.
    """

    base: str = "critters"
    image_encoder: str | None = None
    cache_dtype: Literal["float32", "float16"] = "float32"
    resolution: int | None = None
    variants: int = 1
    flip: bool = False
    changed: int = 2
    image_seed: int = 0


@dataclass(frozen=True)
class FitOptions:
    """How a variation space is fitted.

    Args:
        bank: Pictures from which scenes are drawn, at most.
        directions: Principal directions; None takes as many as explain 98.5 %, at most 256.
        shrink: Shrink the scatter within subjects (Ledoit and Wolf), which few pairs need.
        seed: Chooses the pictures of the bank.
    """

    bank: int = 4000
    directions: int | None = None
    shrink: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_range("bank", self.bank, 2, 100_000)
        check_range("directions", self.directions or 2, 2, 2048)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(CacheConfig):
    """How an adapter is trained; the first options are the cache's (`CacheConfig`).

    Args:
        data: A folder that `prepare` wrote.
        out: Folder for checkpoints, log and the finished adapter. A run that was interrupted in it
            is resumed.
        adapter: `base` (pooled embedding, Linear) or `plus` (hidden states, resampler); `auto` is
            the kind of `init_from`, or plus.
        tokens: Image tokens; None is 4 for base and 16 for plus.
        width: Width of the resampler, a multiple of 64; None is the UNet's text width.
        depth: Layers of the resampler.
        init_from: A published adapter to start from, by name, file, folder or hub id
            (`owner/repository/FILE`); its sizes then apply.
        fusion: Text-image fusion; `none` is plain IP-Adapter. `generative` learns alone, of pairs,
            on top of `init_from`: a step needs the cache, and neither UNet nor VAE.
        frozen: Parts that do not learn: `projection`, `layers`, `fusion`.
        reference: `self`, `augmented`, `paired`, or `mixed:paired=0.7,augmented=0.3`; `auto` is
            paired where an image has a partner, else augmented.
        cache: Encode everything once, before the first step (`embed`); False encodes at every step.
        cache_images: Which image embeddings are stored; `auto` is what the adapter reads, unless
            both are there.
        steps: Optimizer steps.
        epochs: Passes over the data; replaces `steps`.
        batch: Samples of a step, over all processes.
        process_batch: Samples of a step in each process; replaces `batch`.
        micro_batch: Samples computed together in one process; None is all of its share.
        learning_rate: Learning rate after warm-up.
        lr_scheduler: The learning rate after warm-up: `constant`, or `linear` or `cosine` to zero.
        lr_warmup_steps: Steps of linear warm-up.
        weight_decay: Weight decay of AdamW.
        optimizer: `adamw`, or `adamw8bit` of bitsandbytes.
        max_grad_norm: Gradients are scaled down to this norm.
        ema: Decay of averaged weights, which are then the ones that are saved; 0 averages nothing.
        drop_text: Share of samples without text.
        drop_image: Share of samples without image.
        drop_both: Share of samples without both.
        timesteps: `uniform`, or `cubic`, which draws more of those where the image is still
            undecided and a reference matters most (T2I-Adapter, arXiv:2302.08453).
        min_snr: γ of min-SNR weighting (arXiv:2303.09556); 0 weights all timesteps alike.
        mixed_precision: `no` computes in float32; `bf16` and `fp16` run the UNet and the adapter's
            forward pass in half precision.
        gradient_checkpointing: Less memory, for a second forward pass.
        bad_batches: The run stops after this many batches in a row with a loss or a gradient that
            is not finite.
        workers: Processes that read the cache.
        seed: Seed of everything else that is random.
        checkpointing_steps: Steps between checkpoints.
        checkpoints_total_limit: Checkpoints to keep; older ones are removed.
        num_validation_images: Images held out of training and drawn with the adapter while it
            trains; 0 draws nothing.
        validate_every: Steps between drawing them.
        num_images_per_prompt: Images drawn of each of them for each prompt.
        validation_prompts: Texts to draw each of them with, besides its own caption.
        validation_steps: Denoising steps.
        validation_guidance: Classifier-free guidance.
        report_to: `tensorboard`, `wandb` or nothing, besides `log.jsonl`.
    """

    data: str
    out: str
    adapter: Literal["auto", "base", "plus"] = "auto"
    tokens: Annotated[int | None, Range(1, 1024)] = None
    width: Annotated[int | None, Range(64, 8192)] = None
    depth: Annotated[int, Range(1, 64)] = 4
    init_from: str | None = None
    fusion: Literal["none", "blend", "gated", "generative"] = "gated"
    frozen: tuple[Literal["projection", "layers", "fusion"], ...] = ()
    reference: str = "auto"
    cache: bool = True
    cache_images: Literal["auto", "pooled", "hidden", "both"] = "auto"
    steps: Count = 1000
    epochs: Count | None = None
    batch: Count = 32
    process_batch: Count | None = None
    micro_batch: Count | None = None
    learning_rate: Annotated[float, Range(0, 10)] = 1e-4
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_steps: Annotated[int, Range(0, 100_000_000)] = 0
    weight_decay: Annotated[float, Range(0, 10)] = 0.01
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    max_grad_norm: Annotated[float, Range(1e-9, 1e9)] = 1.0
    ema: Annotated[float, Range(0, 0.999_999)] = 0.0
    drop_text: Share = 0.05
    drop_image: Share = 0.05
    drop_both: Share = 0.05
    timesteps: Literal["uniform", "cubic"] = "uniform"
    min_snr: Annotated[float, Range(0, 1000)] = 0.0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    bad_batches: Count = 10
    workers: Annotated[int, Range(0, 256)] = 0
    seed: Annotated[int, Range(0, 2**62)] = 0
    checkpointing_steps: Count = 500
    checkpoints_total_limit: Count = 3
    num_validation_images: Annotated[int, Range(0, 1000)] = 0
    validate_every: Count = 500
    num_images_per_prompt: Annotated[int, Range(1, 64)] = 4
    validation_prompts: tuple[str, ...] = ()
    validation_steps: Annotated[int, Range(1, 1000)] = 25
    validation_guidance: Annotated[float, Range(0, 100)] = 5.0
    report_to: Literal["none", "tensorboard", "wandb"] = "none"

    def __post_init__(self) -> None:
        check(self)
        # published resamplers have attention heads of 64
        check_range("width modulo 64", (self.width or 64) % 64, 0, 0)
        check_range("drops together", self.drop_text + self.drop_image + self.drop_both, 0, 1)
        if self.fusion == "generative" and self.init_from is None:
            fix = "Name a trained adapter with --init-from."
            raise ArgumentError("needs an adapter", where="fusion generative", fix=fix)
        if self.init_from == "":
            raise ArgumentError("is empty", where="init_from", fix="Leave it out for new weights.")
        if self.workers and not self.cache:
            # workers are processes of their own, and encoders on a GPU cannot be shared with them
            fix = "Run `ipdiverse embed`, or take workers 0."
            raise ArgumentError("needs the cache", where="workers", fix=fix)


def todays(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under today's names and with today's values, as saved by any version."""
    named = {RENAMED.get(name, name): value for name, value in settings.items()}
    if named.get("mixed_precision") == "fp32":  # accelerate's word, now ours too, is `no`
        named["mixed_precision"] = "no"
    return named
