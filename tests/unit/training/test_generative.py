"""Training a generative fusion: of embeddings alone, with the promises of the other trainings."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ipdiverse.adapter.files.checkpoint import load_adapter
from ipdiverse.adapter.fusion import GenerativeFusion
from ipdiverse.data.prepare import PrepareOptions, prepare
from ipdiverse.errors import ArgumentError, DataError
from ipdiverse.training.config import TrainConfig
from ipdiverse.training.trainer import Trainer, train
from tests import models
from tests.unit.training.test_trainer import environment, log

PROCESSES = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, pairs of critters, and an adapter that was trained before."""
    root = tmp_path_factory.mktemp("generative")
    models.pipeline("sd1", fresh=True).save_pretrained(root / "sd1")
    prepare("critters", root / "data", PrepareOptions(n=24))
    sizes = {"tokens": 3, "width": 64, "depth": 1, "fusion": "none", "steps": 1, "batch": 2}
    train(_config(root, root / "plain", **sizes))
    return root


def _config(root: Path, out: Path, **options: object) -> TrainConfig:
    usual = {"base": str(root / "sd1"), "resolution": 64, "checkpointing_steps": 2, "changed": 1}
    return TrainConfig(data=str(root / "data"), out=str(out), **usual | options)  # type: ignore[arg-type]


@pytest.fixture
def config(home: Path, tmp_path: Path) -> TrainConfig:
    plain = str(home / "plain" / "adapter.safetensors")
    sizes = {"steps": 6, "batch": 4, "learning_rate": 1e-3, "ema": 0.9}
    return _config(home, tmp_path / "run", init_from=plain, fusion="generative", **sizes)


def _weights(run: TrainConfig) -> dict[str, torch.Tensor]:
    return load_file(Path(run.out) / "adapter.safetensors")


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_the_flow_learns_alone_without_unet_and_vae(
    home: Path, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("not needed")

    monkeypatch.setattr("ipdiverse.training.frozen.FrozenEncoders.moments", refuse)
    monkeypatch.setattr("ipdiverse.training.frozen.FrozenEncoders.load_unet", refuse)
    trainer = Trainer(config)
    trainer.run()
    before, after = load_file(home / "plain" / "adapter.safetensors"), _weights(config)
    assert all(torch.equal(before[name], after[name]) for name in before)
    learned = [name for name in trainer.names if name.startswith("fusion.")]
    assert learned == trainer.names
    fusion = load_adapter(Path(config.out) / "adapter.safetensors").fusion
    assert isinstance(fusion, GenerativeFusion)
    assert fusion.image_out.weight.abs().sum() > 0


def test_stopped_anywhere_it_ends_with_the_same_weights(config: TrainConfig) -> None:
    train(config)
    pieces = replace(config, out=f"{config.out}-pieces")
    for steps in (2, 4, 6):
        train(replace(pieces, steps=steps))
    assert _same(_weights(config), _weights(pieces))


def test_a_batch_that_is_not_finite_changes_nothing(config: TrainConfig) -> None:
    trainer = Trainer(config)
    batch = next(iter(trainer.batches()))
    before = [parameter.clone() for parameter in trainer.parameters]
    figures = trainer.one_step(batch | {"noise": batch["noise"] * float("nan")})
    assert figures["skipped"] == 1
    assert all(map(torch.equal, before, trainer.parameters))


def test_micro_batches_give_the_gradient_of_one(config: TrainConfig) -> None:
    losses = []
    for size in (1, 4):
        trainer = Trainer(replace(config, out=f"{config.out}-{size}", micro_batch=size))
        losses.append([trainer.one_step(batch)["loss"] for batch in trainer.batches()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_two_processes_give_the_gradients_of_one(config: TrainConfig) -> None:
    """AdamW's first moment after one step is a tenth of the gradient."""
    one = replace(config, steps=1)
    two = replace(one, out=f"{config.out}-two")
    logs, moments = [], []
    for run, launcher in ((one, []), (two, PROCESSES)):
        names = ("data", "out", "base", "init_from", "fusion", "steps", "batch", "learning_rate")
        pairs = [(f"--{name.replace('_', '-')}", str(getattr(run, name))) for name in names]
        words = [*sum(pairs, ()), "--resolution", "64", "--changed", "1", "--ema", "0.9"]
        command = [sys.executable, *launcher, "-m", "ipdiverse", "train", *words]
        subprocess.run(command, check=True, env=environment(), timeout=300)
        state = load_file(Path(run.out) / "checkpoint-00000001" / "training_state.safetensors")
        moments.append({n: 10 * t for n, t in state.items() if n.endswith("exp_avg")})
        logs.append(log(run)[0]["loss"])
    assert len(moments[0]) > 10
    assert any(moment.abs().max() > 0 for moment in moments[0].values())
    torch.testing.assert_close(moments[0], moments[1], atol=1e-6, rtol=1e-5)
    assert logs[0] == pytest.approx(logs[1], abs=1e-6)


def test_it_needs_an_adapter_and_pairs(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"needs an adapter.*--init-from"):
        replace(config, init_from=None)
    prepare("critters", tmp_path / "alone", PrepareOptions(n=4, pairs=False))
    with pytest.raises(DataError, match=r"no image has a reference"):
        Trainer(replace(config, data=str(tmp_path / "alone")))


def test_it_does_not_start_from_another_fusion(config: TrainConfig) -> None:
    gated = replace(config, fusion="gated", out=f"{config.out}-gated", steps=1)
    train(gated)
    file = str(Path(gated.out) / "adapter.safetensors")
    with pytest.raises(ArgumentError, match=r"trained otherwise.*generative.*gated"):
        Trainer(replace(config, init_from=file))
