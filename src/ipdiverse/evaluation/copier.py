"""How an adapter copies: fidelity, variety and leak over the scale of its image prompt."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from ipdiverse.bases import CRITTERS, adapter_source, load_base
from ipdiverse.critters.oracle import Oracle
from ipdiverse.evaluation.anchors import COPY, RENDERER, copied, rendered
from ipdiverse.evaluation.readings import read_sets
from ipdiverse.evaluation.sampling import (
    Pair,
    critters_sets,
    sample_array,
    shipped_oracle,
    study_pairs,
)
from ipdiverse.evaluation.sets import score_sets
from ipdiverse.sampling.request import Request
from ipdiverse.sampling.sample import Job, attached

if TYPE_CHECKING:
    from collections.abc import Sequence

COLUMNS = (
    "retention",
    "prompt_accuracy",
    "agree_accuracy",
    "contradict_accuracy",
    "entropy",
    "leak",
    "copy_rate",
    "invalid_rate",
)


def measure_copier(
    adapter: str = "plus",
    scales: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    pairs: int = 200,
    images: int = 8,
    steps: int = 25,
    guidance: float | None = None,
) -> dict[str, Any]:
    """Generate sets over the scale, with shared seeds, and score each.

    Args:
        adapter: A name or file, as `generate` takes.
        scales: Weights of the image prompt (λ).
        pairs: (prompt, reference) pairs on held-out identities.
        images: Images a pair.
        steps: Denoising steps.
        guidance: Classifier-free guidance; None takes the base's default.

    Returns:
        Settings, one row of scores per scale, and two anchors: the renderer itself (ceiling) and
        pixel copies of the reference.
    """
    base, oracle = load_base(CRITTERS), shipped_oracle()
    guidance = base.guidance_scale if guidance is None else guidance
    chosen = study_pairs(pairs, seed=3)
    references = [pair.image() for pair in chosen]
    rows, request = [], Request(n=1, steps=steps, guidance_scale=guidance)
    with attached(base, adapter_source(CRITTERS, adapter)) as attachment:
        for scale in scales:
            attachment.set_scale(scale)
            jobs = [
                Job(pair.prompt, 1000 + number, index, reference)
                for number, (pair, reference) in enumerate(zip(chosen, references, strict=True))
                for index in range(images)
            ]
            outputs = sample_array(base, jobs, request, attachment)
            rows.append({"scale": scale, **score(oracle, outputs, chosen, images)})
    return {
        "adapter": adapter,
        "pairs": pairs,
        "images": images,
        "steps": steps,
        "guidance": guidance,
        "rows": rows,
        "anchors": {
            name: score(oracle, np.concatenate(list(chunks)), chosen, images)
            for name, chunks in (
                (RENDERER, rendered(chosen, images)),
                (COPY, copied(references, images)),
            )
        },
    }


def score(
    oracle: Oracle, outputs: np.ndarray, pairs: list[Pair], images: int
) -> dict[str, float | None]:
    """Scores of one arm.

    Args:
        oracle: Reads the outputs.
        outputs: uint8 (pairs × images, 64, 64, 3), pair by pair.
        pairs: What was asked.
        images: Images a pair.
    """
    seen = read_sets(oracle, outputs.reshape(len(pairs), images, *outputs.shape[1:]))
    scores = score_sets(critters_sets(seen.attributes, seen.invalid, pairs))
    return {name: _number(value) for name, value in asdict(scores).items()}


def _number(value: float) -> float | None:
    """Four digits; None, which JSON knows, where nothing could be measured."""
    return None if np.isnan(value) else round(float(value), 4)


def copier_table(report: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    head = "| scale | " + " | ".join(name.replace("_", " ") for name in COLUMNS) + " |"
    rule = "|---" * (len(COLUMNS) + 1) + "|"
    rows = [
        f"| {row['scale']:g} | " + " | ".join(_cell(row[name]) for name in COLUMNS) + " |"
        for row in report["rows"]
    ]
    rows += [
        f"| {name} | " + " | ".join(_cell(row[column]) for column in COLUMNS) + " |"
        for name, row in report["anchors"].items()
    ]
    return "\n".join([head, rule, *rows])


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
