"""Studies score what they draw in pieces, and hold no more of it than a report shows."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from ipdiverse.base.adapters import adapter_file
from ipdiverse.base.bases import load_base
from ipdiverse.base.memory import Plan
from ipdiverse.base.pipelines import fingerprint
from ipdiverse.cli import main
from ipdiverse.critters.render import render
from ipdiverse.critters.scene import sample_scene
from ipdiverse.errors import OutputError
from ipdiverse.evaluation import images as study_images
from ipdiverse.evaluation import running
from ipdiverse.evaluation.calibrate import calibrate, calibration_study
from ipdiverse.evaluation.images import StudyImages
from ipdiverse.evaluation.measured import SHOWN_IMAGES, SHOWN_PAIRS
from ipdiverse.evaluation.running import Runner
from ipdiverse.evaluation.study import Arm, Study
from ipdiverse.writing import only_one
from tests.devices import Elsewhere

if TYPE_CHECKING:
    from pathlib import Path

PAIRS, IMAGES = 5, 9
CUDA = Plan("cuda", "float16", "none", False, 24 * 2**30)


def painted(_base: Any, jobs: Any, *_: Any) -> np.ndarray:
    """In place of a model: a scene for each job, the same in any batch."""
    scenes = [sample_scene(np.random.default_rng([job.seed, job.index])) for job in jobs]
    return np.stack([render(scene, 0) for scene in scenes])


def numbers(parts: dict[str, Any]) -> dict[str, tuple[list[float], list[float]]]:
    return {name: (part.total.tolist(), part.weight.tolist()) for name, part in parts.items()}


def test_scores_do_not_depend_on_the_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_images, "sample_array", painted)
    arm = Arm("a", "a", {"adapter": "plus"})
    study = Study(arms=(arm,), pairs=PAIRS, images=IMAGES, steps=1, features=("base",))
    found = []
    for size in (2, 8):
        monkeypatch.setattr(study_images, "CHUNK", size)
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


@pytest.mark.parametrize(
    ("plan", "where"),
    [(None, "cpu"), (CUDA, "cuda"), (replace(CUDA, offload="model"), "cpu")],
)
def test_encoders_run_beside_the_base_unless_it_waits_for_room(
    plan: Plan | None, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    base = replace(load_base(), plan=plan)
    monkeypatch.setattr(running, "open_base", lambda _: base)
    monkeypatch.setattr(running, "open_encoder", lambda _, __, device: opened.append(device))
    Runner(Study((Arm("a", "a"),), pairs=2, images=2, features=("dino",)), tmp_path)
    assert opened == [where]


def test_precision_and_tiles_decide_images_and_critters_have_neither(tmp_path: Path) -> None:
    base, study = load_base(), Study((Arm("a", "a"),), pairs=2, images=2)
    plans = [None, CUDA, replace(CUDA, dtype="bfloat16"), replace(CUDA, tiling=True)]
    decides = [
        StudyImages(study, replace(base, plan=plan), [], [], tmp_path).decides for plan in plans
    ]
    assert len({tuple(each) for each in decides}) == len(plans)
    assert Runner(study, tmp_path).base.plan is None


def test_a_study_and_a_calibration_hold_their_folders(tmp_path: Path) -> None:
    study = calibration_study("plus", pairs=2, images=2)
    with only_one(tmp_path):
        with pytest.raises(OutputError, match="another process is at work"):
            Runner(study, tmp_path).run()
        with pytest.raises(OutputError, match="another process is at work"):
            calibrate(study, tmp_path)
        target, like = tmp_path / "a.safetensors", "plus"
        with pytest.raises(OutputError, match="another process is at work"):
            calibrate(study, tmp_path, target=target, base_weights=like)
        assert not target.exists(), "base weights are stored once the folder is held"


def test_results_name_files_without_the_folders_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_images, "sample_array", painted)
    adapter = tmp_path / "mine.safetensors"
    adapter.write_bytes(adapter_file("critters", "plus").read_bytes())
    arm = Arm("a", "a", {"adapter": str(adapter)})
    Runner(Study((arm,), pairs=2, images=2, steps=1), tmp_path / "out", progress=False).run()
    for name in ("results.json", "results.jsonl"):
        text = (tmp_path / "out" / name).read_text()
        assert '"mine.safetensors"' in text
        assert str(tmp_path) not in text


def test_weights_have_the_same_fingerprint_wherever_they_are() -> None:
    here, there = torch.nn.Module(), torch.nn.Module()
    here.register_buffer("weight", torch.ones(3))
    there.register_buffer("weight", torch.ones(3).as_subclass(Elsewhere))
    assert fingerprint(here) == fingerprint(there)


STUDY = """pairs = 9
images = 2
steps = 1
[[arm]]
name = "a"
scale = 1.0
[[arm]]
name = "b"
scale = 0.5
"""


@pytest.mark.parametrize("count", [1, 3, 7])
def test_a_study_in_parts_is_that_of_one_process(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_images, "sample_array", drawn := Mock(side_effect=painted))
    monkeypatch.setattr(study_images, "CHUNK", 2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.toml").write_text(STUDY)
    words = ["evaluate", "--config", "study.toml", "--out"]
    assert main([*words, "alone"]) == 0
    once = drawn.call_count

    def killed(*given: Any, **more: Any) -> Any:
        if drawn.call_count > once + 1:
            raise KeyboardInterrupt
        return painted(*given, **more)

    drawn.side_effect = killed
    assert main([*words, "out", "--part", "2/2"]) == 130
    drawn.side_effect = painted
    parts = [f"{number + 1}/{count}" for number in range(count)]
    for part in ("2/2", *parts):
        assert main([*words, "out", "--part", part]) == 0
    assert drawn.call_count == 2 * once + 1, "each once, but for that which was killed"
    if count > 1:
        assert main(["merge", "out"]) == 0
    assert drawn.call_count == 2 * once + 1, "merge draws nothing"
    made, wanted = (
        {str(f.relative_to(home)): f.read_bytes() for f in home.rglob("*") if f.is_file()}
        for home in (tmp_path / "out", tmp_path / "alone")
    )
    assert {"results.json", "report.html"} <= wanted.keys()
    assert made == wanted
