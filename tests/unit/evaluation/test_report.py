"""The report: every family can be told from every other, and the page says what was found."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from jinja2 import UndefinedError
from PIL import Image

from ipdiverse.evaluation.measured import Done, Measured
from ipdiverse.evaluation.report import render_page, tradeoff, write_report
from ipdiverse.evaluation.sets import PairSums
from ipdiverse.evaluation.study import Arm, Study

if TYPE_CHECKING:
    from pathlib import Path

PAIRS = 30
SCORES = ("entropy", "retention", "prompt_accuracy")


def measured(arm: Arm, *means: float) -> Measured:
    """An arm with these scores, whose pairs differ alike in every arm; a missing one is NaN."""
    spread = np.random.default_rng(0).normal(0, 0.05, PAIRS)
    spread -= spread.mean()
    sums = {
        name: PairSums(np.nan_to_num(mean) + spread, np.full(PAIRS, float(np.isfinite(mean))))
        for name, mean in zip(SCORES, means, strict=True)
    }
    return Measured(arm, [sums], np.zeros((2, 2, 8, 8, 3), np.uint8))


def page(arms: list[Measured], folder: Path, **more: Any) -> str:
    study = Study(tuple(one.arm for one in arms), **more)
    references = [Image.new("RGB", (8, 8), "red")] * 2
    written = write_report(study, Done(arms, references, [], ["not <yet>"]), folder)
    return " ".join(written.read_text().split())


def test_no_two_of_many_families_look_alike() -> None:
    arms = [measured(Arm(f"arm {n}", f"family {n}"), 1.0, 1.0, 1.0) for n in range(24)]
    figure = tradeoff(arms, "entropy", "retention")
    _, labels = figure.axes[0].get_legend_handles_labels()
    assert labels == [f"family {n}" for n in range(24)]
    drawn = [bars[0] for bars in figure.axes[0].containers]
    assert len({(line.get_color(), line.get_marker()) for line in drawn}) == 24


def test_names_are_escaped_and_numbers_say_what_holds(tmp_path: Path) -> None:
    arms = [
        measured(Arm("a & b", "<b>"), 0.2, 0.8, 0.9),
        measured(Arm("more", "more"), 0.5, 0.8, float("nan")),
    ]
    text = page(arms, tmp_path)
    assert "<td>a &amp; b</td>" in text
    assert "from “a &amp; b”" in text
    assert "not drawn yet: not &lt;yet&gt;." in text
    assert "<b>" not in text
    assert "30 pairs" not in text
    assert "2 pairs of a prompt and a reference (held-out critters), 16 images each" in text
    row = text[text.index("<td>more</td>") :]
    entropy, retention, prompt = re.findall(r"<td>(.*?)</td>", row)[1:4]
    assert "Δ +0.300 * (+0.300 to +0.300)" in entropy
    assert "Δ +0.000 (" in retention, "no star: nothing differs"
    assert prompt == "-"
    assert text.count("Δ +") == 2, "none of the baseline with itself"


def test_identity_shows_its_worst_attribute_and_old_readings_a_dash(tmp_path: Path) -> None:
    def sums(mean: float) -> PairSums:
        return PairSums(np.full(PAIRS, mean), np.ones(PAIRS))

    new, old = (measured(Arm(name, name), 0.2, 0.8, 0.9) for name in ("new", "old"))
    new.runs[0] |= {f"retention {k}": sums(v) for k, v in (("shape", 0.5), ("eyes", 0.9))}
    new.runs[0] |= {"asked_for": sums(0.4)}
    text = page([new, old], tmp_path)
    cells = re.findall(r"<td>(.*?)</td>", text[text.index("<td>new</td>") :])
    assert cells[3].startswith("0.500 <small>(shape)</small>")
    assert "<td>one seed</td>" in text
    row = re.findall(r"<td>(.*?)</td>", text[text.rindex("<td>old</td>") :])
    assert row.count("-") == 2, "the worst attribute, and what was asked for"
    assert new.row()["scores"]["retention_worst"] == new.row()["scores"]["retention shape"]


def test_the_page_shows_every_dial(tmp_path: Path) -> None:
    points = [(0.0, 0.2, 0.8, 0.9), (0.5, 0.4, 0.79, 0.92), (1.0, 0.6, 0.72, 0.91)]
    arms = [measured(Arm(f"d {x}", "a & b", {"diversity": x}), *scores) for x, *scores in points]
    text = page(arms, tmp_path)
    assert "<td>a &amp; b</td> <td>0: 0.200, 0.5: 0.400, 1: 0.600</td>" in text
    assert "<td>1.000<br><small>at least 1.000</small></td> <td>90.0%</td>" in text
    assert "<td>+0.010 (+0.010 to +0.010)</td>" in text
    assert "<h2>The dial</h2>" not in page(arms[:2], tmp_path), "no whole dial"


def test_a_template_with_a_value_too_few_fails() -> None:
    with pytest.raises(UndefinedError, match="'study' is undefined"):
        render_page("report.html", title="x", pairs=1)
