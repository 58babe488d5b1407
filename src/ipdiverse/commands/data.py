"""`prepare` and `embed`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ipdiverse.commands.console import agree_to_encoders, say, say_json
from ipdiverse.data.options import PrepareOptions
from ipdiverse.training.config import CacheConfig


@dataclass(frozen=True)
class Prepare(PrepareOptions):
    """Check a source of images and captions, and write what is good as one data set to train on.

    Args:
        source: A folder, a list (.jsonl, .csv, .json), a .tar, a hub id, or `critters`.
        out: Target folder, new or of an interrupted run.
        json: Print the doctor's report as JSON.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")] = field(
        kw_only=True
    )
    out: str = field(kw_only=True)
    json: bool = False

    def run(self) -> None:
        """Prepare and report."""
        from ipdiverse.data.doctor import as_text
        from ipdiverse.data.prepare import prepare

        options = PrepareOptions(**{f.name: getattr(self, f.name) for f in fields(PrepareOptions)})
        report = prepare(self.source, Path(self.out), options)
        say_json(report) if self.json else say(as_text(report))


@dataclass(frozen=True)
class Embed(CacheConfig):
    """Compute everything frozen of a prepared data set once, so that training need not.

    Training takes it if it is asked for the same base, images and changes; what differs is computed
    anew.

    Args:
        folder: A folder that `prepare` wrote.
        cache_images: `pooled` embeddings serve base adapters, `hidden` states plus adapters.
        local_files_only: Never connect.
        json: Print the report as JSON.
        yes: Download what a preset needs without asking.
    """

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")] = field(kw_only=True)
    cache_images: Literal["pooled", "hidden", "both"] = "both"
    local_files_only: bool = False
    json: bool = False
    yes: bool = False

    def run(self) -> None:
        """Embed and report."""
        from ipdiverse.training.embed import Stored, embed
        from ipdiverse.training.frozen import open_encoders
        from ipdiverse.training.preprocessing import Preprocessing

        agree_to_encoders(self.base, self.image_encoder, self.yes)
        encoders = open_encoders(
            self.base, self.image_encoder, local_files_only=self.local_files_only
        )
        shown = Preprocessing.of(self, encoders.resolution)
        stored = Stored(self.cache_images, self.cache_dtype)
        report = embed(Path(self.folder), encoders, shown, stored)
        if self.json:
            say_json(report)
            return
        say(
            f"{report['images']} images and {report['pictures']} pictures in {report['shards']} "
            f"shards, {report['computed']} of them computed now, {report['bytes'] / 1e6:.1f} MB"
        )
        if self.variants > 1 or self.changed:
            say(
                f"{self.variants} variants of each target are stored; training draws among these "
                f"alone, and among {self.changed} changed references of each image"
            )
