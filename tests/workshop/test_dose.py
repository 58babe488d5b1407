from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ipdiverse.critters.scene import SCENE, marginal
from ipdiverse.evaluation.metrics import mutual_information
from workshop import dose


def test_the_best_model_of_pairs_leaks_what_they_share() -> None:
    """The closed form against two million draws from the model that it describes."""
    rng, chance = np.random.default_rng(0), 0.5
    found = []
    for name in SCENE:
        prior = marginal(name)
        given = rng.choice(len(prior), 2_000_000, p=prior)
        fresh = rng.choice(len(prior), 2_000_000, p=prior)
        made = np.where(rng.random(2_000_000) < chance, given, fresh)
        found.append(mutual_information(given, made, len(prior), len(prior)))
    assert dose.trained_leak(chance) == pytest.approx(np.mean(found), abs=1e-3)
    assert dose.trained_leak(0) == pytest.approx(0, abs=1e-12)


def test_parts_of_tokens_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """z that is a sum of what each attribute says, and of noise, has these covariances."""
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=(len(marginal(name)), 6)) for name in SCENE}
    labels = np.stack([rng.choice(len(marginal(n)), 5000, p=marginal(n)) for n in SCENE], 1)
    said = [values[name][labels[:, i]] for i, name in enumerate(SCENE)]
    z = torch.from_numpy(np.sum(said, 0) + 0.01 * rng.normal(size=(5000, 6)))
    for part, own in zip(dose._parts(z, labels), said, strict=True):
        torch.testing.assert_close(
            part, torch.from_numpy(np.cov(own.T, bias=True)), atol=0.01, rtol=0
        )


def test_spaces_are_fitted_on_pairs_that_share_and_leak_more(tmp_path: Path) -> None:
    report = dose.dose_response(tmp_path, images=48)
    rows = report["predicted"]
    assert [row["shared"] for row in rows] == list(dose.CHANCES)
    assert {file.name for file in tmp_path.glob("*.safetensors")} == {
        f"space-{100 * chance:.0f}.safetensors" for chance in dose.CHANCES
    }
    directions = [row["scene_directions"]["predicted"] for row in rows]
    assert directions == sorted(directions, reverse=True)
    assert directions[0] > directions[-1]
    assert rows[-1]["space"] > rows[0]["space"]
