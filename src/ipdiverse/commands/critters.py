"""`critters make`: a data set of the embedded world."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ipdiverse.commands.console import say

Count = Annotated[int, tyro.conf.arg(aliases=["-n"])]


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
    n: Count = 1000
    pairs: bool = False
    size: int = 64
    seed: int = 0
    split: Literal["train", "validation", "test"] = "train"

    def run(self) -> None:
        """Write them and print where."""
        from ipdiverse.critters.make import make_dataset

        written = make_dataset(Path(self.out), self.n, self.pairs, self.size, self.seed, self.split)
        say(f"wrote {written} images and {Path(self.out) / 'metadata.jsonl'}")
