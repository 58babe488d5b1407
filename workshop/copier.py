"""How much an adapter copies: fidelity, variety and leak over the scale of its image prompt."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ipdiverse.errors import check_range
from ipdiverse.evaluation.running import Runner
from ipdiverse.evaluation.sets import pair_sums, score_sets
from ipdiverse.evaluation.study import Arm, Study
from ipdiverse.sampling.request import MAX_IMAGES, MAX_STEPS

if TYPE_CHECKING:
    from pathlib import Path

    from ipdiverse.evaluation.measured import Measured
    from ipdiverse.evaluation.sets import Sets

COLUMNS = (
    "retention",
    "retention_worst",
    "asked_for",
    "prompt_accuracy",
    "agree_accuracy",
    "contradict_accuracy",
    "entropy",
    "leak",
    "copy_rate",
    "invalid_rate",
)


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


def measure_copier(
    options: CopierOptions, folder: Path, progress: bool | None = None
) -> dict[str, Any]:
    """Draw sets over the scale, with shared seeds, and score each: a study of one lever.

    Args:
        options: What is drawn.
        folder: Where images are kept, so that an interrupted run resumes.
        progress: Show a bar on standard error; None does so on terminals only.

    Returns:
        The options, one row of scores per scale, and two anchors: the renderer itself (ceiling) and
        pixel copies of the reference.
    """
    guidance = {} if options.guidance is None else {"guidance_scale": options.guidance}
    settings = {"adapter": options.adapter, **guidance}
    arms = [Arm(f"λ {scale:g}", "λ", {**settings, "scale": scale}) for scale in options.scales]
    numbers: dict[str, Any] = {
        name: getattr(options, name) for name in ("pairs", "images", "steps")
    }
    with Runner(Study(tuple(arms), **numbers), folder, progress) as runner:
        rows = [
            {"scale": scale, **_scores(runner.measure(arm))}
            for scale, arm in zip(options.scales, arms, strict=True)
        ]
        anchors = {one.arm.name: _scores(one) for one in runner.anchors()}
        used = runner.base.guidance_scale if options.guidance is None else options.guidance
    about = {"adapter": options.adapter, **numbers, "guidance": used}
    return {**about, "rows": rows, "anchors": anchors}


def _scores(measured: Measured) -> dict[str, Any]:
    """Four digits; None, which JSON knows, where nothing could be measured."""
    assert measured.sets is not None, "critters are known"  # noqa: S101 - for types
    scores = asdict(score_sets(measured.sets))
    by = {name: round(value, 4) for name, value in scores.pop("retention_by").items()}
    scores["asked_for_agreeing"] = _agreeing(measured.sets)
    return {"retention_by": by} | {
        name: None if np.isnan(value) else round(float(value), 4) for name, value in scores.items()
    }


def _agreeing(sets: Sets) -> float:
    """`asked_for` where the prompt says nothing that the reference does not show."""
    same = (~sets.stated | (sets.wanted == sets.references)).all(1)
    asked = pair_sums(sets)["asked_for"]
    return float(asked.total[same].sum() / max(1.0, asked.weight[same].sum()))


def copier_table(report: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    head = "| scale | " + " | ".join(name.replace("_", " ") for name in COLUMNS) + " |"
    rule = "|---" * (len(COLUMNS) + 1) + "|"
    named = [(f"{row['scale']:g}", row) for row in report["rows"]]
    rows = [
        f"| {name} | " + " | ".join(_cell(row.get(column)) for column in COLUMNS) + " |"
        for name, row in [*named, *report["anchors"].items()]
    ]
    return "\n".join([head, rule, *rows])


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
