"""What a training run is: one frozen value, from a TOML file, flags, or the original's flags."""

from __future__ import annotations

import tomllib
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ipdiverse.errors import ArgumentError, check_range

MAY_CHANGE = (
    *("steps", "epochs", "save_every", "keep", "workers", "report_to", "out"),
    *("micro_batch", "process_batch"),
    *("validate_every", "validation_images", "validation_steps", "validation_guidance"),
    "validation_prompts",
)
"""What a resumed run may set otherwise; anything else would make it another run."""

PARTS = ("projection", "layers", "fusion")


@dataclass(frozen=True)
class CacheConfig:
    """What decides a data set's cache; `embed` and `train` are asked for it in the same words.

    Args:
        base: Whose UNet and encoders: `critters`, a preset (`ipdiverse bases`), a hub id, a folder
            or a file.
        image_encoder: A CLIP vision model, folder or hub id; None takes the base's.
        cache_dtype: In which type embeddings and latents are stored; float16 halves the disk.
        resolution: Height and width of targets in pixels; None takes the base's own.
        variants: Random crops of each target; 1 is the centre crop alone.
        flip: Whether crops may be mirrored.
        changed: Changed references of each image; `augmented` needs at least one.
        image_seed: Of crops, flips and changes.
    """

    base: str = "critters"
    image_encoder: str | None = None
    cache_dtype: Literal["float32", "float16"] = "float32"
    resolution: int | None = None
    variants: int = 1
    flip: bool = False
    changed: int = 2
    image_seed: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainConfig(CacheConfig):
    """How an adapter is trained, beside what its cache is told (`CacheConfig`).

    Args:
        data: A folder that `prepare` wrote.
        out: Folder for checkpoints, log and the finished adapter; an interrupted run in it goes on.
        adapter: `base` (pooled embedding, Linear) or `plus` (hidden states, resampler); `auto` is
            that of `start`, or plus.
        tokens: Image tokens; None is 4 for base and 16 for plus.
        width: Of the resampler, a multiple of 64; None is the UNet's text width.
        depth: Layers of the resampler.
        start: A published adapter to start from, by name, file, folder or hub id
            (`owner/repository/FILE`); its sizes then hold.
        fusion: Text-image fusion; `none` is plain IP-Adapter.
        noise_conditioning: Embeddings are noised by a random level that the adapter is told
            (Stable unCLIP's noise level).
        frozen: Parts that do not learn: `projection`, `layers`, `fusion`.
        reference: `self`, `augmented`, `paired`, or `mixed:paired=0.7,augmented=0.3`; `auto` is
            paired where an image has a partner, else augmented.
        cache: Encode everything once, before the first step (`embed`); False encodes at every step.
        cache_images: Which image embeddings are stored; `auto` is what the adapter reads, unless
            both are there.
        steps: Optimizer steps.
        epochs: Passes over the data; takes the place of `steps`.
        batch: Samples a step, over all processes.
        process_batch: Samples a step in each process; takes the place of `batch`.
        micro_batch: Samples computed together in one process; None is all of its share.
        learning_rate: After warm-up.
        schedule: What the rate does after it: `constant`, `linear` or `cosine` to zero.
        warmup: Steps of linear warm-up.
        weight_decay: AdamW's.
        optimizer: `adamw`, or `adamw8bit` of bitsandbytes.
        max_norm: Gradients are scaled down to this norm.
        ema: Decay of averaged weights, which are then what is saved; 0 keeps none.
        drop_text: Share of samples without text.
        drop_image: Share without image.
        drop_both: Share without both.
        timesteps: `uniform`, or `cubic`, which crowds them where the image is still undecided
            and a reference has something to say (T2I-Adapter, arXiv:2302.08453).
        min_snr: γ of min-SNR weighting (arXiv:2303.09556); 0 weights all timesteps alike.
        precision: Of the UNet and the adapter's forward pass.
        gradient_checkpointing: Less memory for a second forward pass.
        bad_batches: How many batches in a row may be not finite before the run stops.
        workers: Processes that read the cache.
        seed: Of everything random.
        save_every: Steps between checkpoints.
        keep: Checkpoints kept.
        held_out: Images that are not trained on, but drawn while training; 0 draws nothing.
        validate_every: Steps between drawing them.
        validation_images: Drawn for each of them and each prompt.
        validation_prompts: Texts to draw each of them with, beside its own caption.
        validation_steps: Denoising steps.
        validation_guidance: Classifier-free guidance.
        report_to: `tensorboard`, `wandb` or nothing, beside `log.jsonl`.
    """

    data: str
    out: str
    adapter: Literal["auto", "base", "plus"] = "auto"
    tokens: int | None = None
    width: int | None = None
    depth: int = 4
    start: str | None = None
    fusion: Literal["none", "blend", "gated"] = "gated"
    noise_conditioning: bool = False
    frozen: tuple[Literal["projection", "layers", "fusion"], ...] = ()
    reference: str = "auto"
    cache: bool = True
    cache_images: Literal["auto", "pooled", "hidden", "both"] = "auto"
    steps: int = 1000
    epochs: int | None = None
    batch: int = 32
    process_batch: int | None = None
    micro_batch: int | None = None
    learning_rate: float = 1e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0
    weight_decay: float = 0.01
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    max_norm: float = 1.0
    ema: float = 0.0
    drop_text: float = 0.05
    drop_image: float = 0.05
    drop_both: float = 0.05
    timesteps: Literal["uniform", "cubic"] = "uniform"
    min_snr: float = 0.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool = False
    bad_batches: int = 10
    workers: int = 0
    seed: int = 0
    save_every: int = 500
    keep: int = 3
    held_out: int = 0
    validate_every: int = 500
    validation_images: int = 4
    validation_prompts: tuple[str, ...] = ()
    validation_steps: int = 25
    validation_guidance: float = 5.0
    report_to: Literal["none", "tensorboard", "wandb"] = "none"

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None:
                check_range(name, value, low, high)
        check_range("width modulo 64", (self.width or 64) % 64, 0, 0)  # heads of 64, as published
        check_range("drops together", self.drop_text + self.drop_image + self.drop_both, 0, 1)
        if self.start == "":
            raise ArgumentError("is empty", where="start", fix="Leave it out for new weights.")
        if unknown := sorted(set(self.frozen) - set(PARTS)):
            raise ArgumentError(
                "is no part", where="frozen", expected=", ".join(PARTS), found=", ".join(unknown)
            )
        if self.workers and not self.cache:
            raise ArgumentError(
                "needs the cache", where="workers", fix="Run `ipdiverse embed`, or take workers 0."
            )


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("tokens", 1, 1024),
    ("width", 64, 8192),
    ("depth", 1, 64),
    ("steps", 1, 100_000_000),
    ("epochs", 1, 1_000_000),
    ("batch", 1, 1_000_000),
    ("process_batch", 1, 1_000_000),
    ("micro_batch", 1, 1_000_000),
    ("learning_rate", 0, 10),
    ("warmup", 0, 100_000_000),
    ("weight_decay", 0, 10),
    ("max_norm", 1e-9, 1e9),
    ("ema", 0, 0.999_999),
    ("drop_text", 0, 1),
    ("drop_image", 0, 1),
    ("drop_both", 0, 1),
    ("min_snr", 0, 1000),
    ("bad_batches", 1, 1_000_000),
    ("workers", 0, 256),
    ("seed", 0, 2**62),
    ("save_every", 1, 100_000_000),
    ("keep", 1, 1_000_000),
    ("held_out", 0, 1000),
    ("validate_every", 1, 100_000_000),
    ("validation_images", 1, 64),
    ("validation_steps", 1, 1000),
    ("validation_guidance", 0, 100),
)


ORIGINAL_FLAGS = {
    "pretrained_model_name_or_path": "base",
    "pretrained_ip_adapter_path": "start",
    "image_encoder_path": "image-encoder",
    "data_json_file": "data",
    "data_root_path": "root",
    "train_batch_size": "process-batch",
    "num_train_epochs": "epochs",
    "dataloader_num_workers": "workers",
    "mixed_precision": "precision",
    "output_dir": "out",
    "save_steps": "save-every",
}
"""The original trainer's flags that have another name here; the rest are spelled alike."""

IGNORED_FLAGS = {
    "--logging-dir": "logs are written to the folder of the run",
    "--local-rank": "the launcher has told accelerate which process this is",
}
"""Flags of the original, each with a value, that change nothing here, and why."""

_IN_PLACE_OF = {"epochs": "steps", "process-batch": "batch"}


def read_toml(file: Path) -> dict[str, Any]:
    """Read a run's fields from a TOML file.

    Args:
        file: Keys are the fields of `TrainConfig`.

    Raises:
        ArgumentError: The file cannot be read, or keys are unknown or of the wrong type; all of
            them are named.
    """
    try:
        content = tomllib.loads(file.read_text("utf-8"))
    except (OSError, UnicodeError, tomllib.TOMLDecodeError) as error:
        raise ArgumentError("cannot be read", where=file, expected="TOML", found=error) from error
    known = {field.name: str(field.type) for field in fields(TrainConfig)} | {"root": "str"}
    problems = [f"unknown key {key!r}" for key in content if key not in known]
    problems += [
        f"{key} is {value!r}, expected {known[key]}"
        for key, value in content.items()
        if key in known and not _fits(value, known[key])
    ]
    if problems:
        raise ArgumentError("; ".join(problems), where=file)
    return content


def as_flags(arguments: list[str]) -> list[str]:
    """Arguments of `train` with the original's flags renamed and a `--config FILE` spelled out.

    A flag that is given holds over the file.

    Raises:
        ArgumentError: The file cannot be read or holds what `TrainConfig` does not.
    """
    plain = [part for argument in arguments for part in _split_flag(argument)]
    renamed = [_renamed(part) for part in plain]
    for index, part in enumerate(renamed[:-1]):
        if part == "--precision" and renamed[index + 1] == "no":
            renamed[index + 1] = "fp32"
    _leave_out_ignored(renamed)
    if "--config" not in renamed[:-1]:
        return renamed
    at = renamed.index("--config")
    rest = renamed[:at] + renamed[at + 2 :]
    given = {part.removeprefix("--").removeprefix("no-") for part in rest if part.startswith("--")}
    spelled: list[str] = []
    for key, value in read_toml(Path(renamed[at + 1])).items():
        flag = key.replace("_", "-")
        if not {flag, _IN_PLACE_OF.get(flag)} & given:
            spelled += _flag(flag, value)
    return spelled + rest


def _split_flag(argument: str) -> list[str]:
    name, equals, value = argument.partition("=")
    return [name, value] if argument.startswith("--") and equals else [argument]


def _renamed(part: str) -> str:
    if not part.startswith("--"):
        return part
    name = part.removeprefix("--").replace("-", "_")
    return f"--{ORIGINAL_FLAGS.get(name, name.replace('_', '-'))}"


def _leave_out_ignored(parts: list[str]) -> None:
    for flag, why in IGNORED_FLAGS.items():
        if flag in parts:
            warnings.warn(f"{flag} is ignored: {why}", stacklevel=3)
        while flag in parts:
            at = parts.index(flag)
            del parts[at : at + 2]


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)] if value else []
    return [f"--{name}", str(value)]


def _fits(value: Any, annotation: str) -> bool:
    """Whether a TOML value may stand in a field with this annotation."""
    if isinstance(value, bool):
        return annotation == "bool"
    if annotation.startswith("Literal"):
        return repr(value).replace("'", '"') in annotation
    if annotation.startswith("tuple"):
        return isinstance(value, list) and all(isinstance(part, str) for part in value)
    kinds: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float)}
    return isinstance(value, kinds.get(annotation.partition(" ")[0], ()))
