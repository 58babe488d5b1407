"""The source `critters`: scenes drawn from the world's prior, rendered when they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipdiverse.critters.make import example, png
from ipdiverse.data.items import Item, Source
from ipdiverse.errors import check_range

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ipdiverse.data.options import SourceOptions


def rendered(options: SourceOptions) -> Source:
    """`options.n` scenes of the training identities."""
    check_range("n", options.n, 1, 10_000_000)

    def items() -> Iterator[Item]:
        for index in range(options.n):
            yield _item(index, options)

    return Source("critters", options.n, items)


def _item(index: int, options: SourceOptions) -> Item:
    made = example(index, options.seed, "train", options.edits)
    return Item(
        f"critter-{index:07d}",
        lambda: png(made.scene, made.seed),
        made.text,
        made.scene.subject,
        (lambda: png(made.other, made.other_seed)) if options.pairs else None,
    )
