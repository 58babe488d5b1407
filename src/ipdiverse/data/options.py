"""How a source is read: what the command line asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ipdiverse.errors import check_range

Square = Literal["keep", "pad", "crop"]


@dataclass(frozen=True)
class SourceOptions:
    """How to read a source.

    Args:
        kind: What the source is; `auto` looks.
        root: The folder that file names are relative to; None is the list's own.
        image_column: Column with the image; None finds it.
        text_column: Column with the caption; None finds it.
        split: Of a hub data set.
        revision: Of a hub data set: branch, tag or commit.
        n: How many scenes of critters.
        pairs: Give each critters scene a reference of the same creature.
        seed: Of critters.
        edits: Share of critters' references that differ from their scene in one attribute of
            identity, which the caption then states.
    """

    kind: Literal[
        "auto", "metadata", "json", "captions", "subjects", "webdataset", "hub", "critters"
    ] = "auto"
    root: str | None = None
    image_column: str | None = None
    text_column: str | None = None
    split: str = "train"
    revision: str | None = None
    n: int = 1000
    pairs: bool = True
    seed: int = 0
    edits: float = 0.0


@dataclass(frozen=True)
class PrepareOptions(SourceOptions):
    """How a source is read and what is kept of it.

    Args:
        square: `keep` the shape; `pad` shows all of the image on a blurred copy of itself; `crop`
            takes the centre and may cut the subject.
        max_bad: Share of bad images above which the command stops.
    """

    square: Square = "keep"
    max_bad: float = 0.05

    def __post_init__(self) -> None:
        check_range("max_bad", self.max_bad, 0, 1)
        check_range("edits", self.edits, 0, 1)
