"""The path of uncalibrated adapters, on critters' plain one: more of it, more variety."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipdiverse.adapter.files.checkpoint import read_spec
from ipdiverse.base.adapters import ADAPTERS, CRITTERS_ADAPTERS
from ipdiverse.dial import default_dial
from ipdiverse.evaluation.bootstrap import estimate
from ipdiverse.evaluation.running import Runner
from ipdiverse.evaluation.study import Arm, Study

if TYPE_CHECKING:
    from pathlib import Path

SETTINGS = (0.0, 0.5, 1.0)


def test_the_default_path_is_monotone_on_the_plain_adapter(tmp_path: Path) -> None:
    plain = CRITTERS_ADAPTERS / f"{ADAPTERS['plus']}.safetensors"
    assert read_spec(plain).get("reference") == "self"
    path = default_dial(fused=False)
    arms = tuple(
        Arm(f"{setting:g}", "dial", {"adapter": "plus", **path.at(setting)}) for setting in SETTINGS
    )
    study = Study(arms=arms, pairs=10, images=6, steps=8)
    runner = Runner(study, tmp_path, progress=False)
    measured = [runner.measure(arm) for arm in arms]
    variety = [estimate(one.sums("entropy")) for one in measured]
    assert variety == sorted(variety)
    assert variety[-1] > variety[0] + 0.05
    prompt = [estimate(one.sums("contradict_accuracy")) for one in measured]
    assert prompt[-1] >= prompt[0]
