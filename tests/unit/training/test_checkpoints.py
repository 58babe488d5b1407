from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from ipdiverse.errors import ArgumentError, OutputError
from ipdiverse.training.build import open_accelerator
from ipdiverse.training.checkpoints import LOG, tracking
from ipdiverse.training.config import TrainConfig

if TYPE_CHECKING:
    from pathlib import Path


def config(report_to: Any, out: Path) -> TrainConfig:
    return TrainConfig(data="data", out=str(out), steps=3, report_to=report_to)


def test_weights_and_biases_get_every_step_under_one_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, logged, finished = [], [], []

    def init(**options: Any) -> Any:
        started.append(options)
        return SimpleNamespace(
            log=lambda figures, step: logged.append((step, figures["loss"])),
            finish=lambda: finished.append(True),
        )

    fake = ModuleType("wandb")
    fake.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    open_accelerator("no")  # which a run has done, and accelerate's trackers need
    for first in (0, 2):  # a run, then the same resumed
        with tracking(config("wandb", tmp_path), tmp_path, first, True) as track:
            track({"step": first + 1, "loss": 0.5})
    assert logged == [(1, 0.5), (3, 0.5)]
    assert started[0]["id"] == started[1]["id"]
    assert started[0]["resume"] == "allow"
    assert started[0]["config"]["steps"] == 3
    assert len(finished) == 2


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_what_is_not_installed_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "wandb" if name == "wandb" else "torch.utils.tensorboard"
    monkeypatch.setitem(sys.modules, module, None)
    # imported by an earlier test, it would still be found as an attribute of its package
    monkeypatch.delattr("torch.utils.tensorboard", raising=False)
    with (
        pytest.raises(ArgumentError, match=f"report_to {name}: is not installed"),
        tracking(config(name, tmp_path), tmp_path, 0, True),
    ):
        pass


def test_a_log_is_cut_at_the_step_or_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f'{{"step": {step}}}\n' for step in (1, 2, 3)]
    log = tmp_path / LOG
    log.write_text("".join(lines))
    before = log.stat()
    with tracking(config("none", tmp_path), tmp_path, 3, True):
        pass
    assert (log.stat().st_ino, log.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    def fail(*_: object) -> None:
        raise OSError("the power went out")

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.replace", fail)
        with (
            pytest.raises(OutputError, match=LOG),
            tracking(config("none", tmp_path), tmp_path, 2, True),
        ):
            pass
    assert log.read_text() == "".join(lines), "nothing is lost"
    with tracking(config("none", tmp_path), tmp_path, 2, True):
        pass
    assert log.read_text() == "".join(lines[:2])
