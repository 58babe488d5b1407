"""`critters`: the embedded world."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ipdiverse.commands.console import say

Count = Annotated[int, tyro.conf.arg(aliases=["-n"])]


@dataclass(frozen=True)
class Critters:
    """Write critters images and a manifest, in the format that users' own data sets have.

    Args:
        action: `make`.
        out: Folder for images and metadata.jsonl.
        n: How many scenes.
        pairs: Give each scene a second image of the same creature as its reference.
        size: Height and width in pixels.
        seed: Of scenes, renders and captions.
        split: Identities of `train`, `validation` or `test`.
    """

    action: Annotated[Literal["make"], tyro.conf.Positional]
    out: str
    n: Count = 1000
    pairs: bool = False
    size: int = 64
    seed: int = 0
    split: Literal["train", "validation", "test"] = "train"

    def run(self) -> None:
        """Write them."""
        from ipdiverse.critters.make import make_dataset

        written = make_dataset(Path(self.out), self.n, self.pairs, self.size, self.seed, self.split)
        say(f"wrote {written} images and {Path(self.out) / 'metadata.jsonl'}")
