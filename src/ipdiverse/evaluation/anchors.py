"""What bounds every arm: the renderer itself above, copies of the reference below."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ipdiverse.critters.render import render
from ipdiverse.critters.scene import IDENTITY, sample_scene
from ipdiverse.evaluation.arm_images import CHUNK
from ipdiverse.evaluation.study import Arm

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from PIL import Image

    from ipdiverse.evaluation.sampling import Pair

RENDERER, COPY = "renderer", "pixel copy"


def anchors(
    pairs: list[Any], references: list[Image.Image], images: int, known: bool, side: int
) -> list[tuple[Arm, Iterator[np.ndarray]]]:
    """Each anchor with its images, (pairs · images, height, width, 3) of `CHUNK` pairs at a time.

    Args:
        pairs: What was asked.
        references: Of each pair.
        images: Of each pair.
        known: The world is critters, and can be rendered.
        side: Height and width of what arms draw.
    """
    found = [(Arm(RENDERER, "anchor"), rendered(pairs, images))] if known else []
    return [*found, (Arm(COPY, "anchor"), copied(references, images, side))]


def rendered(pairs: Sequence[Pair], images: int) -> Iterator[np.ndarray]:
    """What a perfect model would make: identity and prompt kept, the rest from the prior."""
    rng = np.random.default_rng(0)
    for start in range(0, len(pairs), CHUNK):
        outputs = []
        for pair in pairs[start : start + CHUNK]:
            known = {name: getattr(pair.reference, name) for name in IDENTITY} | pair.stated
            drawn = [sample_scene(rng, known) for _ in range(images)]
            outputs += [render(scene, int(rng.integers(2**31))) for scene in drawn]
        yield np.stack(outputs)


def copied(references: Sequence[Image.Image], images: int, side: int = 64) -> Iterator[np.ndarray]:
    """The reference again and again, at the size of the output."""
    for start in range(0, len(references), CHUNK):
        part = references[start : start + CHUNK]
        shown = [np.asarray(image.convert("RGB").resize((side, side))) for image in part]
        yield np.stack(shown).repeat(images, 0)
