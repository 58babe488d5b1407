"""What the command line asks of measurements: how a dial is calibrated, how a copier is shown."""

from __future__ import annotations

from dataclasses import dataclass

from ipdiverse.bases import CRITTERS
from ipdiverse.errors import check_range
from ipdiverse.sampling.request import MAX_IMAGES, MAX_STEPS


@dataclass(frozen=True)
class CalibrateOptions:
    """How to find the path of an adapter.

    Args:
        adapter: A name, file or hub id.
        base: What it prompts.
        references: Folder of reference images; None takes critters that nothing was trained on.
        prompts: File with a prompt a line.
        features: Encoders to compare images by, for references of your own; the first measures
            variety and retention, the first that reads text measures the prompt.
        pairs: (prompt, reference) pairs.
        images: Of each.
        image_encoder: What the adapter reads references with, a folder or hub id; None takes the
            base's, or a preset adapter's own.
        steps: Denoising steps; None takes the base's own.
        levers: Those that the dial may move; all that the adapter has by default.
    """

    adapter: str
    base: str = CRITTERS
    references: str | None = None
    prompts: str | None = None
    features: tuple[str, ...] = ()
    pairs: int = 32
    images: int = 8
    image_encoder: str | None = None
    steps: int | None = None
    levers: tuple[str, ...] = ()


@dataclass(frozen=True)
class CopierOptions:
    """How an adapter's copying is measured over its scale.

    Args:
        adapter: A name, file or hub id.
        scales: Weights of the image prompt (λ).
        pairs: (prompt, reference) pairs on held-out identities.
        images: Of each.
        steps: Denoising steps.
        guidance: Classifier-free guidance; None takes the base's default.
    """

    adapter: str = "plus"
    scales: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    pairs: int = 200
    images: int = 8
    steps: int = 25
    guidance: float | None = None

    def __post_init__(self) -> None:
        check_range("pairs", self.pairs, 2, 100_000)
        check_range("images", self.images, 2, MAX_IMAGES)
        check_range("steps", self.steps, 1, MAX_STEPS)
        for scale in self.scales:
            check_range("scales", scale, 0, 10)
        if self.guidance is not None:
            check_range("guidance", self.guidance, 0, 100)
