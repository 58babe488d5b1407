"""Studies score what they draw in pieces, and hold no more of it than a report shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from ipdiverse.critters.render import render
from ipdiverse.critters.scene import sample_scene
from ipdiverse.evaluation import anchors, arm_images
from ipdiverse.evaluation.folders import folder_pairs, opened
from ipdiverse.evaluation.measured import SHOWN_IMAGES, SHOWN_PAIRS
from ipdiverse.evaluation.running import Runner
from ipdiverse.evaluation.study import Arm, Study

if TYPE_CHECKING:
    from pathlib import Path

PAIRS, IMAGES = 5, 9


def painted(_base: Any, jobs: Any, *_: Any) -> np.ndarray:
    """In place of a model: a scene for each job, the same in any batch."""
    scenes = [sample_scene(np.random.default_rng([job.seed, job.index])) for job in jobs]
    return np.stack([render(scene, 0) for scene in scenes])


def numbers(parts: dict[str, Any]) -> dict[str, tuple[list[float], list[float]]]:
    return {name: (part.total.tolist(), part.weight.tolist()) for name, part in parts.items()}


def test_scores_do_not_depend_on_the_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arm_images, "sample_array", painted)
    arm = Arm("a", "a", {"adapter": "plus"})
    study = Study(arms=(arm,), pairs=PAIRS, images=IMAGES, steps=1, features=("base",))
    found = []
    for size in (2, 8):
        monkeypatch.setattr(arm_images, "CHUNK", size)
        monkeypatch.setattr(anchors, "CHUNK", size)
        runner = Runner(study, tmp_path / str(size), progress=False)
        found.append([runner.measure(arm), *runner.anchors()])
    for pieces, whole in zip(*found, strict=True):
        assert numbers(pieces.runs[0]) == {
            name: (pytest.approx(total, abs=1e-5), weight)
            for name, (total, weight) in numbers(whole.runs[0]).items()
        }
        assert pieces.sets is not None
        assert whole.sets is not None
        np.testing.assert_array_equal(pieces.sets.outputs, whole.sets.outputs)
        assert whole.images is not None
        assert whole.images.shape == (SHOWN_PAIRS, SHOWN_IMAGES, 64, 64, 3)
        assert whole.images.base is None, "no view that keeps all of them"


def test_a_reference_that_pairs_share_is_opened_once(tmp_path: Path) -> None:
    for name in "ab":
        Image.new("RGB", (16, 16), "red").save(tmp_path / f"{name}.png")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    first, second, again, _ = opened(folder_pairs(tmp_path, prompts, 9))
    assert first is again
    assert first is not second
