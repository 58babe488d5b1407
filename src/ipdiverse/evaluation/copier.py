"""How an adapter copies: fidelity, variety and leak over the scale of its image prompt."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from ipdiverse.evaluation.running import Runner
from ipdiverse.evaluation.sets import score_sets
from ipdiverse.evaluation.study import Arm, Study

if TYPE_CHECKING:
    from pathlib import Path

    from ipdiverse.evaluation.measured import Measured
    from ipdiverse.evaluation.options import CopierOptions

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
_NUMBERS = ("pairs", "images", "steps", "guidance")


def measure_copier(
    options: CopierOptions, folder: Path, progress: bool | None = None
) -> dict[str, Any]:
    """Draw sets over the scale, with shared seeds, and score each: a study of one lever.

    Args:
        options: What is drawn.
        folder: Where images are kept: an interrupted run goes on.
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


def _scores(measured: Measured) -> dict[str, float | None]:
    """Four digits; None, which JSON knows, where nothing could be measured."""
    assert measured.sets is not None, "critters are known"  # noqa: S101
    scores = asdict(score_sets(measured.sets))
    return {
        name: None if np.isnan(value) else round(float(value), 4) for name, value in scores.items()
    }


def copier_command(report: dict[str, Any]) -> str:
    """The command that measures a report again."""
    scales = " ".join(f"{row['scale']:g}" for row in report["rows"])
    numbers = " ".join(f"--{name} {report[name]:g}" for name in _NUMBERS)
    adapter = shlex.quote(report["adapter"])
    return f"ipdiverse critters copier --adapter {adapter} {numbers} --scales {scales}"


def copier_table(report: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    head = "| scale | " + " | ".join(name.replace("_", " ") for name in COLUMNS) + " |"
    rule = "|---" * (len(COLUMNS) + 1) + "|"
    named = [(f"{row['scale']:g}", row) for row in report["rows"]]
    rows = [
        f"| {name} | " + " | ".join(_cell(row[column]) for column in COLUMNS) + " |"
        for name, row in [*named, *report["anchors"].items()]
    ]
    return "\n".join([head, rule, *rows])


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
