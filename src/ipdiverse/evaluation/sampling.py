"""Many small generations for measurement: prompts from held-out scenes, images as one array."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ipdiverse.base.bases import CRITTERS, CRITTERS_ORACLE, Base
from ipdiverse.critters.caption import caption
from ipdiverse.critters.oracle import Oracle, load_oracle
from ipdiverse.critters.render import render
from ipdiverse.critters.scene import ATTRIBUTES, IDENTITY, Scene, conditional, edited, sample_scene
from ipdiverse.errors import ModelError
from ipdiverse.evaluation.sets import Sets
from ipdiverse.sampling.sample import Job, sample
from ipdiverse.seeding import derived_seed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from ipdiverse.adapter.attach.attach import Attachment
    from ipdiverse.evaluation.metrics import Bools, Ints
    from ipdiverse.sampling.request import Request

MEASURING_BATCH = 64
"""Images denoised together when only statistics matter."""


@dataclass(frozen=True)
class Pair:
    """A prompt and a reference to measure on.

    Args:
        reference: The reference's scene.
        stated: What the prompt states.
        prompt: Those attributes in words.
        seed: Renders the reference.
    """

    reference: Scene
    stated: dict[str, str]
    prompt: str
    seed: int

    def image(self) -> Image.Image:
        """The rendered reference."""
        from PIL import Image

        return Image.fromarray(render(self.reference, self.seed))


def shipped_oracle() -> Oracle:
    """The oracle of the package.

    Raises:
        ModelError: It has not been trained.
    """
    if not CRITTERS_ORACLE.is_file():
        raise ModelError(
            "the oracle is not trained",
            where=CRITTERS_ORACLE,
            fix="Run `make base` in a checkout, or install a released package.",
        )
    return load_oracle(CRITTERS_ORACLE)


def held_out_scenes(count: int, seed: int) -> list[tuple[Scene, int]]:
    """Scenes of the test split, and the seeds that render them."""
    rng = np.random.default_rng(derived_seed("held out", seed))
    return [(sample_scene(rng, split="test"), int(rng.integers(2**31))) for _ in range(count)]


def study_pairs(count: int, seed: int, split: str = "test", edits: bool = False) -> list[Pair]:
    """(prompt, reference) pairs: the prompt states one or two scene attributes.

    They are drawn from the prior apart from the reference, so some agree with it and most
    contradict it; identity is left to the reference, and at least two scene attributes stay open.
    With `edits` the prompt also states one attribute of identity, not as the reference has it.
    """
    rng = np.random.default_rng(derived_seed("pairs", seed))
    pairs = []
    for _ in range(count):
        reference, wanted = sample_scene(rng, split=split), sample_scene(rng).as_dict()
        names = rng.choice([n for n in ATTRIBUTES if n not in IDENTITY], rng.integers(1, 3), False)
        stated = {str(name): wanted[str(name)] for name in names}
        if edits:
            name, changed = edited(reference, rng)
            stated |= {name: getattr(changed, name)}
        words = caption(stated, int(rng.integers(2**31)))
        pairs.append(Pair(reference, stated, words, int(rng.integers(2**31))))
    return pairs


def critters_sets(outputs: Ints, invalid: Bools, pairs: Sequence[Pair]) -> Sets:
    """What was asked of pairs and what the oracle read, to be scored.

    Args:
        outputs: Values that the oracle read, (pairs, images, attributes).
        invalid: Images that are no valid scene, (pairs, images).
        pairs: What was asked.
    """
    return Sets(
        outputs,
        invalid,
        references=np.array([pair.reference.indices() for pair in pairs]),
        stated=np.array([[name in pair.stated for name in ATTRIBUTES] for pair in pairs]),
        wanted=np.array([_wanted(pair) for pair in pairs]),
        identity=np.array([name in IDENTITY for name in ATTRIBUTES]),
        n_values=tuple(len(values) for values in ATTRIBUTES.values()),
        priors=[[conditional(name, pair.stated) for name in ATTRIBUTES] for pair in pairs],
    )


def _wanted(pair: Pair) -> list[int]:
    """Index of each stated value; 0 where nothing is stated, which no score reads."""
    return [
        values.index(pair.stated[name]) if name in pair.stated else 0
        for name, values in ATTRIBUTES.items()
    ]


def sample_array(
    base: Base,
    jobs: list[Job],
    request: Request,
    attachment: Attachment | None = None,
    progress: bool | None = None,
) -> np.ndarray:
    """Images of many jobs, uint8 (count, height, width, 3), in large batches on critters.

    Args:
        base: An open base.
        jobs: What to make.
        request: Steps, guidance and levers.
        attachment: The attached adapter; None for text alone.
        progress: Show a bar on standard error; None does so on terminals only.
    """
    size = MEASURING_BATCH if base.name == CRITTERS else base.batch
    wide = replace(base, batch=min(size, len(jobs)))
    images = sample(wide, jobs, request, attachment, progress)
    return np.stack([np.asarray(image) for image in images])
