"""`prepare`, `embed` and `train`, and `critters make`, which makes a data set for them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ipdiverse.commands.cluster import Spread, in_parts
from ipdiverse.commands.console import agree_to_encoders, note, say, say_json
from ipdiverse.commands.generate import renamed_flags
from ipdiverse.config import problems, read_toml, renamed
from ipdiverse.data.manifest import PrepareOptions
from ipdiverse.errors import ArgumentError
from ipdiverse.parts import WHOLE, Part
from ipdiverse.training.config import DROPPED, RENAMED, CacheConfig, TrainConfig, todays

if TYPE_CHECKING:
    from collections.abc import Callable

ORIGINAL_FLAGS = {
    "pretrained_model_name_or_path": "base",
    "pretrained_ip_adapter_path": "init_from",
    "image_encoder_path": "image_encoder",
    "data_json_file": "data",
    "data_root_path": "root",
    "train_batch_size": "process_batch",
    "num_train_epochs": "epochs",
    "dataloader_num_workers": "workers",
    "output_dir": "out",
    "save_steps": "checkpointing_steps",
}
"""Flags of the original IP-Adapter trainer with another name here; the rest are spelled alike."""

IGNORED_FLAGS = {
    "--logging-dir": "logs are written to the folder of the run",
    "--local-rank": "the launcher has told accelerate which process this is",
}
"""Flags of the original, each with a value, that change nothing here, and why."""

# two ways to say one thing: a flag of the second overrides the first in a file
_IN_PLACE_OF = {"epochs": "steps", "process-batch": "batch"}


@dataclass(frozen=True)
class Prepare:
    """Check a source of images and captions, and write what is good as one data set to train on.

    Args:
        source: A folder, a list (.jsonl, .csv, .json) or a .tar, here or at an address such as
            `s3://bucket/folder`; a hub id, or `critters`.
        out: Target folder, new or of an interrupted run.
        data: How the source is read and what is kept of it.
        spread: How the work is spread over processes.
        json: Print the report as JSON.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    out: str
    data: PrepareOptions = field(default_factory=PrepareOptions)
    spread: Spread = field(default_factory=Spread)
    json: bool = False

    def opened(self) -> Callable[[Part], Any]:
        """What prepares any part; nothing has to be opened."""
        from ipdiverse.data.prepare import prepare

        return lambda part: prepare(self.source, Path(self.out), self.data, part)

    def run(self) -> None:
        """Prepare and report."""
        from ipdiverse.data.doctor import as_text

        def alone() -> None:
            report = self.opened()(WHOLE)
            say_json(report) if self.json else say(as_text(report))

        in_parts(self.spread, Path(self.out), self.opened, alone)


@dataclass(frozen=True)
class Embed:
    """Compute everything frozen of a prepared data set once, so that training need not.

    Training uses it when it has the same base, images and changes; it computes anew what differs.

    Args:
        folder: A folder that `prepare` wrote.
        cache: What is computed.
        cache_images: `pooled` embeddings serve base adapters, `hidden` states plus adapters.
        spread: How the work is spread over processes.
        local_files_only: Never connect.
        json: Print the report as JSON.
        yes: Download what a preset needs without asking.
    """

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    cache: CacheConfig = field(default_factory=CacheConfig)
    cache_images: Literal["pooled", "hidden", "both"] = "both"
    spread: Spread = field(default_factory=Spread)
    local_files_only: bool = False
    json: bool = False
    yes: bool = False

    def opened(self) -> Callable[[Part], Any]:
        """Open the encoders, and embed any part."""
        from ipdiverse.training.embed import Stored, embed
        from ipdiverse.training.frozen import Preprocessing, open_encoders

        cache = self.cache
        agree_to_encoders(cache.base, cache.image_encoder, self.yes)
        encoders = open_encoders(
            cache.base, cache.image_encoder, local_files_only=self.local_files_only
        )
        shown = Preprocessing.of(cache, encoders.resolution)
        stored = Stored(self.cache_images, cache.cache_dtype)
        return lambda part: embed(Path(self.folder), encoders, shown, stored, part)

    def run(self) -> None:
        """Embed and report."""
        in_parts(self.spread, Path(self.folder), self.opened, self._all)

    def _all(self) -> None:
        cache, report = self.cache, self.opened()(WHOLE)
        if self.json:
            say_json(report)
            return
        say(
            f"{report['images']} images and {report['pictures']} pictures in {report['shards']} "
            f"shards, {report['computed']} of them computed now, {report['bytes'] / 1e6:.1f} MB"
        )
        if cache.variants > 1 or cache.changed:
            say(
                f"{cache.variants} variants of each target are stored; training draws among these "
                f"alone, and among {cache.changed} changed references of each image"
            )


@dataclass(frozen=True)
class Train:
    """Train an adapter on a prepared data set; stop it at any time, the same command resumes it.

    `--config FILE.toml` sets any of these options; flags override it. The original trainer's flags
    are understood too.

    Args:
        training: The run.
        root: The folder that image names in `data` are relative to, when that is a list of images
            rather than a prepared folder.
        yes: Download what a preset needs without asking.
    """

    training: TrainConfig
    root: str | None = None
    yes: bool = False

    def run(self) -> None:
        """Prepare what is not prepared, train, and say where the adapter is."""
        from ipdiverse.data.prepare import prepare
        from ipdiverse.training.trainer import train

        config = self.training
        agree_to_encoders(config.base, config.image_encoder, self.yes, config.init_from)
        if Path(config.data).is_file():
            prepared = Path(config.out) / "data"
            report = prepare(config.data, prepared, PrepareOptions(root=self.root))
            for one in report["notes"]:
                note(one)
            config = replace(config, data=str(prepared))
        say(f"wrote {train(config)}")


@dataclass(frozen=True)
class Critters:
    """Write images of critters and a manifest, in the same format as your own data sets.

    Args:
        action: `make`.
        out: Folder for images and metadata.jsonl.
        n: Number of scenes.
        pairs: Give each scene a second image of the same creature as its reference.
        size: Height and width in pixels.
        seed: Seed of scenes, renders and captions.
        split: Draw identities of this split only.
    """

    action: Annotated[Literal["make"], tyro.conf.Positional]
    out: str
    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1000
    pairs: bool = False
    size: int = 64
    seed: int = 0
    split: Literal["train", "validation", "test"] = "train"

    def run(self) -> None:
        """Write them and print where."""
        from ipdiverse.critters.make import make_dataset

        written = make_dataset(Path(self.out), self.n, self.pairs, self.size, self.seed, self.split)
        say(f"wrote {written} images and {Path(self.out) / 'metadata.jsonl'}")


def read_run(file: Path) -> dict[str, Any]:
    """A run's settings from a TOML file, under today's names."""
    content = read_toml(file)
    for key in DROPPED.keys() & content.keys():
        warnings.warn(f"{file}: {key} has no effect: {DROPPED[key]}", stacklevel=2)
        del content[key]
    content = todays(renamed(content, RENAMED, file))
    found = problems(TrainConfig, {k: v for k, v in content.items() if k != "root"})
    found += problems(Train, {k: v for k, v in content.items() if k == "root"})
    if found:
        raise ArgumentError("; ".join(found), where=file)
    return content


def as_flags(arguments: list[str]) -> list[str]:
    """Arguments of `train` with old and original flags renamed and a `--config FILE` spelled out.

    Flags override the file.
    """
    parts = [
        part for one in arguments for part in (one.split("=", 1) if one[:2] == "--" else [one])
    ]
    flags = renamed_flags(parts, RENAMED | ORIGINAL_FLAGS)
    flags = [flag.replace("_", "-") if flag.startswith("--") else flag for flag in flags]
    for index, flag in enumerate(flags[:-1]):
        # 0.1 took names of types; accelerate, whose words these are now, calls none "no"
        if flag == "--mixed-precision" and flags[index + 1] == "fp32":
            flags[index + 1] = "no"
    _leave_out_ignored(flags)
    return spelled_out(flags, read_run)


def spelled_out(flags: list[str], content_of: Callable[[Path], dict[str, Any]]) -> list[str]:
    """Flags with the settings of a `--config FILE` before them; flags override the file."""
    if "--config" not in flags[:-1]:
        return flags
    at = flags.index("--config")
    rest = flags[:at] + flags[at + 2 :]
    given = {part.removeprefix("--").removeprefix("no-") for part in rest if part.startswith("--")}
    spelled: list[str] = []
    for key, value in content_of(Path(flags[at + 1])).items():
        flag = key.replace("_", "-")
        if not {flag, _IN_PLACE_OF.get(flag)} & given:
            spelled += _flag(flag, value)
    return spelled + rest


def _leave_out_ignored(parts: list[str]) -> None:
    dropped = {f"--{name.replace('_', '-')}": why for name, why in DROPPED.items()}
    dropped |= {flag.replace("--", "--no-"): why for flag, why in dropped.items()}
    for flag, why in (IGNORED_FLAGS | dropped).items():
        if flag in parts:
            warnings.warn(f"{flag} has no effect: {why}", stacklevel=3)
        while flag in parts:
            at = parts.index(flag)
            # the original's have a value; switches of 0.1 have none
            del parts[at : at + (2 if flag in IGNORED_FLAGS else 1)]


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)] if value else []
    return [f"--{name}", str(value)]
