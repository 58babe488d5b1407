"""What the command line asks of calibration."""

from __future__ import annotations

from dataclasses import dataclass

from ipdiverse.base.bases import CRITTERS


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
