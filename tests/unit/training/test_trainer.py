"""The trainer: what learns, what does not, and that stopping it anywhere changes nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ipdiverse import ImagePromptAdapter, loading
from ipdiverse.adapter.files.checkpoint import load_adapter, save_adapter
from ipdiverse.adapter.fusion import BlendFusion, GatedFusion
from ipdiverse.base.adapters import adapter_file
from ipdiverse.cli import main
from ipdiverse.data.prepare import PrepareOptions, prepare
from ipdiverse.errors import (
    ArgumentError,
    CheckpointError,
    DataError,
    Interrupted,
    ModelError,
    OutputError,
)
from ipdiverse.training import build, checkpoints
from ipdiverse.training.build import initial_adapter, learning_rate, open_accelerator
from ipdiverse.training.config import RENAMED, TrainConfig
from ipdiverse.training.trainer import Trainer, train
from ipdiverse.writing import only_one, unsealed
from tests import models


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three bases and a data set of six critters, each with a partner."""
    root = tmp_path_factory.mktemp("training")
    for name in models.ARCHITECTURES:
        models.pipeline(name, fresh=True).save_pretrained(root / name)
    prepare("critters", root / "data", PrepareOptions(n=6))
    return root


@pytest.fixture
def config(home: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        data=str(home / "data"),
        out=str(tmp_path / "run"),
        base=str(home / "sd1"),
        resolution=64,
        steps=6,
        batch=4,
        tokens=3,
        width=64,
        depth=1,
        learning_rate=1e-3,
        checkpointing_steps=2,
    )


def weights(run: TrainConfig, name: str = "adapter.safetensors") -> dict[str, torch.Tensor]:
    from pathlib import Path

    return load_file(Path(run.out) / name)


def log(run: TrainConfig) -> list[dict[str, Any]]:
    from pathlib import Path

    return [json.loads(line) for line in (Path(run.out) / "log.jsonl").open()]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("fusion", ["none", "blend", "gated"])
@pytest.mark.parametrize("kind", ["base", "plus"])
def test_every_parameter_learns_and_nothing_frozen_does(
    kind: Any, fusion: Any, config: TrainConfig
) -> None:
    run = Trainer(replace(config, adapter=kind, fusion=fusion, steps=2, learning_rate=0.1))
    frozen = {n: p.detach().clone() for n, p in run.pipe.unet.named_parameters()}
    before = {n: p.detach().clone() for n, p in run.adapter.named_parameters()}
    if fusion == "gated":  # at a gate of 0 nothing behind it has a gradient yet
        run.adapter.fusion.gate.data.fill_(0.1)
        before["fusion.gate"] = run.adapter.fusion.gate.detach().clone()
    run.one_step(next(run.batches()))
    still = [n for n, p in run.adapter.named_parameters() if torch.equal(p, before[n])]
    # softmax ignores what is added to every key alike
    assert [n for n in still if n not in ("fusion.key.bias",)] == []
    assert all(torch.equal(p, frozen[n]) for n, p in run.pipe.unet.named_parameters())
    assert not any(p.requires_grad for p in run.pipe.unet.parameters())


def test_a_frozen_part_stays(config: TrainConfig) -> None:
    run = Trainer(replace(config, frozen=("layers", "fusion")))
    before = {n: p.detach().clone() for n, p in run.adapter.named_parameters()}
    run.one_step(next(run.batches()))
    moved = {n for n, p in run.adapter.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all(name.startswith("image_proj") for name in moved)
    with pytest.raises(ArgumentError, match="leaves nothing to learn"):
        Trainer(replace(config, fusion="none", frozen=("layers", "projection")))


@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_every_architecture_trains_and_its_adapter_loads(
    name: str, home: Path, config: TrainConfig
) -> None:
    chosen = replace(config, base=str(home / name), steps=2, min_snr=5.0)
    adapter = ImagePromptAdapter.from_pretrained(train(chosen))
    assert adapter.kind == "plus"
    assert isinstance(adapter.fusion, GatedFusion)
    assert adapter.spec["recipe"]["steps"] == 2
    assert all(line["loss"] > 0 for line in log(chosen))


def test_the_loss_falls(config: TrainConfig) -> None:
    train(
        replace(
            config, steps=30, batch=6, checkpointing_steps=30, learning_rate=3e-3, reference="self"
        )
    )
    losses = [line["loss"] for line in log(config)]
    assert sum(losses[-8:]) < sum(losses[:8])


def test_with_and_without_the_cache_the_loss_is_the_same(config: TrainConfig) -> None:
    train(config)
    online = replace(config, out=config.out + "-online", cache=False)
    train(online)
    for one, other in zip(log(config), log(online), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)


def test_killed_three_times_in_an_epoch_it_ends_with_the_same_weights(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replace(
        config, out=config.out + "-whole", ema=0.9, lr_scheduler="cosine", lr_warmup_steps=2
    )
    train(whole)
    parts = replace(whole, out=config.out)
    step = Trainer.one_step
    for dies_at in (0, 3, 4):  # after nothing, between checkpoints, right after one

        def dies(self: Trainer, batch: Any, at: int = dies_at) -> Any:
            if self.step == at:
                raise KeyError("the power went out")
            return step(self, batch)

        monkeypatch.setattr(Trainer, "one_step", dies)
        with pytest.raises(KeyError):
            train(parts)
    monkeypatch.setattr(Trainer, "one_step", step)
    train(parts)
    assert same(weights(whole), weights(parts))
    assert log(whole) == log(parts)
    last = "checkpoint-00000006/training_state.safetensors"
    assert same(weights(whole, last), weights(parts, last))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int, config: TrainConfig) -> None:
    train(replace(config, steps=3))
    other = replace(config, out=f"{config.out}-{workers}", steps=3, workers=workers)
    train(other)
    assert same(weights(config), weights(other))


def test_a_signal_saves_first_and_the_same_command_goes_on(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replace(config, out=config.out + "-whole")
    train(whole)
    step, handler = Trainer.one_step, signal.getsignal(signal.SIGTERM)

    def asked(self: Trainer, batch: Any) -> Any:
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch)

    monkeypatch.setattr(Trainer, "one_step", asked)
    with pytest.raises(Interrupted) as stopped:
        train(config)
    assert stopped.value.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == handler, "as it was before"
    from pathlib import Path

    assert checkpoints.finished(Path(config.out))[-1].name == "checkpoint-00000003"
    monkeypatch.setattr(Trainer, "one_step", step)
    train(config)
    assert same(weights(whole), weights(config))


def command(run: TrainConfig, *batch: str) -> list[str]:
    flags = [
        *("--data", run.data, "--out", run.out, "--base", run.base, "--resolution", "64"),
        *("--steps", str(run.steps), *(batch or ("--batch", "4"))),
        *("--tokens", "3", "--width", "64"),
        *("--depth", "1", "--learning-rate", "1e-3", "--checkpointing-steps", "2"),
    ]
    return [sys.executable, "-m", "ipdiverse", "train", *flags]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


STUCK = """
import sys, time
from pathlib import Path
from ipdiverse.cli import main
from ipdiverse.training.trainer import Trainer

save = Trainer._save_adapter

def saves(run, file):
    save(run, file)
    if run.step == 4:
        Path(run.config.out, "stuck").touch()
        time.sleep(3600)

Trainer._save_adapter = saves
sys.exit(main())
"""
"""The command, which gets no further than half of its second checkpoint."""


def test_a_process_killed_while_it_saves_goes_on_to_the_bit(config: TrainConfig) -> None:
    from pathlib import Path

    whole, out = replace(config, out=config.out + "-whole"), Path(config.out)
    subprocess.run(command(whole), check=True, env=environment(), timeout=300)
    _, _, *words = command(config)[1:]
    process = subprocess.Popen([sys.executable, "-c", STUCK, *words], env=environment())
    try:
        deadline = time.monotonic() + 200
        while process.poll() is None and not (out / "stuck").exists():
            assert time.monotonic() < deadline, "waited in vain: the second checkpoint"
            time.sleep(0.02)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert [folder.name for folder in checkpoints.finished(out)] == ["checkpoint-00000002"]
    assert not (out / "adapter.safetensors").exists()
    subprocess.run(command(config), check=True, env=environment(), timeout=300)
    assert same(weights(whole), weights(config))
    assert log(whole) == log(config)


def test_two_processes_give_the_gradients_of_one(config: TrainConfig) -> None:
    """AdamW's first moment after one step is a tenth of the gradient.

    The original's batch size is that of each process, so two have twice as many samples.
    """
    one = replace(config, steps=1)
    two = replace(one, out=config.out + "-two")
    subprocess.run(command(one), check=True, env=environment(), timeout=300)
    launcher = (
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--standalone",
        "--no-python",
    )
    parts = command(two, "--train_batch_size", "2")
    subprocess.run([sys.executable, *launcher, *parts], check=True, env=environment(), timeout=300)
    state = "checkpoint-00000001/training_state.safetensors"
    first, second = weights(one, state), weights(two, state)
    moments = [name for name in first if name.endswith("exp_avg")]
    assert len(moments) > 10
    for name in moments:
        torch.testing.assert_close(10 * first[name], 10 * second[name], atol=1e-6, rtol=1e-5)
    assert log(one)[0]["loss"] == pytest.approx(log(two)[0]["loss"], abs=1e-6)


def poison(run: Trainer, steps: set[int]) -> None:
    read = type(run.samples).__getitem__

    class Poisoned(type(run.samples)):  # type: ignore[misc]
        def __getitem__(self, number: int) -> dict[str, Any]:
            sample = read(self, number)
            if number // run.config.batch in steps:
                sample["latents"] = sample["latents"] * float("nan")
            return sample

    run.samples.__class__ = Poisoned


def test_a_batch_that_is_not_finite_changes_nothing(config: TrainConfig) -> None:
    run = Trainer(config)
    poison(run, {1})
    batches = run.batches()
    run.one_step(next(batches))
    before = [p.detach().clone() for p in run.parameters]
    figures = run.one_step(next(batches))
    assert figures["skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, run.parameters, strict=True))
    assert run.one_step(next(batches))["skipped"] == 1
    assert not all(torch.equal(a, b) for a, b in zip(before, run.parameters, strict=True))


def test_a_unet_that_pools_the_text_itself_is_trained_too(home: Path, config: TrainConfig) -> None:
    """As the embedded one does: its text embedding knows nothing of image tokens."""
    pipe = models.pipeline("sd1", fresh=True)
    pooling = {"addition_embed_type": "text", "addition_embed_type_num_heads": 4}
    pipe.unet = models.unet("sd1", **pooling)
    pipe.save_pretrained(home / "pooling")
    for checkpointing in (False, True):
        run = replace(
            config,
            base=str(home / "pooling"),
            out=f"{config.out}-{checkpointing}",
            gradient_checkpointing=checkpointing,
        )
        train(run)
    assert same(weights(run), weights(replace(run, out=f"{config.out}-False")))


def test_too_many_of_them_stop_the_run(config: TrainConfig) -> None:
    run = Trainer(replace(config, bad_batches=2))
    poison(run, {0, 2, 3})
    with pytest.raises(ModelError, match="step 4: 2 batches in a row are not finite"):
        run.run()


def test_out_of_memory_shrinks_the_micro_batch_and_not_the_batch(config: TrainConfig) -> None:
    train(replace(config, steps=2))
    small = Trainer(replace(config, out=config.out + "-small", steps=2))
    forward = small.model.forward

    def hungry(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if len(batch["latents"]) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return forward(batch)

    small.model.forward = hungry
    small.run()
    assert small.micro == 1
    for one, other in zip(log(config), log(small.config), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["norm"] == pytest.approx(other["norm"], rel=1e-4)


def test_a_full_disk_loses_no_earlier_checkpoint(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pathlib import Path

    write = checkpoints.write_bytes_atomic

    def full(path: Path, data: bytes) -> None:
        if "00000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(checkpoints, "write_bytes_atomic", full)
    with pytest.raises(
        OutputError, match=r"checkpoint-00000004: there is no space left; found No space"
    ):
        train(config)
    names = [path.name for path in Path(config.out).iterdir() if path.is_dir()]
    assert names == ["checkpoint-00000002"], "and nothing half-written"
    monkeypatch.setattr(checkpoints, "write_bytes_atomic", write)
    whole = replace(config, out=config.out + "-whole")
    train(whole)
    train(config)
    assert same(weights(whole), weights(config))


def test_the_last_checkpoints_are_kept_and_each_is_a_loadable_adapter(config: TrainConfig) -> None:
    from pathlib import Path

    train(replace(config, checkpoints_total_limit=2, ema=0.5, fusion="blend"))
    kept = checkpoints.finished(Path(config.out))
    assert [path.name for path in kept] == ["checkpoint-00000004", "checkpoint-00000006"]
    for path in kept:
        adapter = ImagePromptAdapter.from_pretrained(path / "adapter.safetensors")
        assert isinstance(adapter.fusion, BlendFusion)
    state = weights(config, "checkpoint-00000006/training_state.safetensors")
    loaded = adapter.state_dict()
    assert torch.equal(loaded["image_proj.latents"], state["average/image_proj.latents"])
    assert not torch.equal(loaded["image_proj.latents"], state["weights/image_proj.latents"])


def test_a_folder_that_cannot_be_synced_costs_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    state = checkpoints.State(1, {"optimizer": {"a/exp_avg": torch.ones(2)}}, {"bad": 0})
    folder = checkpoints.save_checkpoint(tmp_path, state, {}, Path.touch, 1)
    assert checkpoints.finished(tmp_path) == [folder]


def scaling(precision: str) -> Any:
    """Accelerate with a gradient scaler that grows fast, as fp16 has one elsewhere."""
    accelerator = open_accelerator(precision)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    return accelerator


def test_a_gradient_scaler_goes_on_where_it_was(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ipdiverse.training.build.open_accelerator", scaling)
    whole = replace(config, out=config.out + "-whole", steps=5)
    train(whole)
    train(replace(config, steps=3))
    run = Trainer(replace(config, steps=5))
    scaler = run.accelerator.scaler
    assert scaler is not None
    assert (scaler.get_scale(), scaler.state_dict()["_growth_tracker"]) == (2048, 1)
    run.run()
    assert same(weights(whole), weights(config))
    assert log(whole) == log(config)
    file = checkpoints.finished(Path(config.out))[-1] / "training_state.json"
    about = unsealed(file.read_text())
    del about["counters"]["scaler"]
    file.write_text(json.dumps(about))
    scaler = Trainer(replace(config, steps=6)).accelerator.scaler
    assert scaler is not None
    assert scaler.get_scale() == 1024, "an older checkpoint says nothing of it"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it is computed in")
def test_half_precision_is_refused_where_there_is_none(config: TrainConfig) -> None:
    half = "mixed_precision: is not computed in on a CPU; found fp16. Leave it out, or choose bf16"
    with pytest.raises(ArgumentError, match=half):
        train(replace(config, mixed_precision="fp16"))
    assert not Path(config.out).exists()


def test_another_run_in_the_same_folder_is_refused(config: TrainConfig) -> None:
    train(replace(config, steps=2))
    with pytest.raises(
        ArgumentError, match=r"holds another run; found learning_rate was 0.001, is"
    ):
        train(replace(config, learning_rate=1e-4))
    train(replace(config, steps=4, checkpointing_steps=1))  # a longer run is the same run
    assert len(log(config)) == 4


def test_a_run_of_0_1_is_resumed_and_one_with_noise_conditioning_is_not(
    config: TrainConfig,
) -> None:
    whole = replace(config, out=config.out + "-whole", steps=4)
    train(whole)
    train(replace(config, steps=2))
    file = checkpoints.finished(Path(config.out))[-1] / "training_state.json"
    about = unsealed(file.read_text())
    del about["contents"], about["files"]
    about["settings"] |= {name: getattr(config, name) for name in ("data", "base", "out")}
    todays = {new: old for old, new in RENAMED.items()}
    about["settings"] = {todays.get(k, k): v for k, v in about["settings"].items()}
    about["settings"] |= {"precision": "fp32", "noise_conditioning": False}
    file.write_text(json.dumps(about))
    assert "start" in about["settings"]
    train(replace(config, steps=4))
    assert same(weights(whole), weights(config))
    assert len(log(config)) == 4
    about["settings"]["noise_conditioning"] = True
    for folder in checkpoints.finished(Path(config.out)):
        (folder / "training_state.json").write_text(json.dumps(about))
    with pytest.raises(ArgumentError, match="another run; found noise_conditioning was on"):
        train(replace(config, steps=5))


def test_a_checkpoint_holds_nothing_twice(config: TrainConfig) -> None:
    """Without averaging, the weights to go on with are the adapter's own."""
    train(replace(config, steps=2, checkpointing_steps=2))
    folder = checkpoints.finished(Path(config.out))[-1]
    adapter = sum(t.numel() for t in load_file(folder / "adapter.safetensors").values())
    state = load_file(folder / "training_state.safetensors")
    assert {name.partition("/")[0] for name in state} == {"optimizer"}
    assert sum(t.numel() for t in state.values()) < 2.1 * adapter


def test_a_broken_checkpoint_says_what_to_do(config: TrainConfig) -> None:
    from pathlib import Path

    train(replace(config, steps=2))
    file = Path(config.out) / "checkpoint-00000002" / "training_state.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"is broken.*resumed from the one before"):
        train(replace(config, steps=4))


@pytest.mark.parametrize(
    "name", ["adapter.safetensors", "training_state.safetensors", "training_state.json"]
)
def test_a_flipped_bit_in_a_checkpoint_is_found(name: str, config: TrainConfig) -> None:
    train(replace(config, steps=2))
    file = Path(config.out) / "checkpoint-00000002" / name
    whole = file.read_bytes()
    for place in (0, len(whole) // 3, len(whole) // 2, len(whole) - 3):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"is broken.*resumed from the one before"):
            checkpoints.load_checkpoint(file.parent)
    file.write_bytes(whole)
    assert checkpoints.load_checkpoint(file.parent)[0].step == 2


def test_the_same_places_spelled_otherwise_or_moved_go_on(
    home: Path, config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("data", "sd1"):
        shutil.copytree(home / name, tmp_path / "here" / name)
    start = save_start(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    run = replace(config, data="data", base="./sd1", out="run", init_from=start.name, steps=2)
    train(run)
    for named in ({"data": "./data/"}, {"base": str(tmp_path / "here" / "sd1")}, {"out": "./run"}):
        Trainer(replace(run, **named))
    monkeypatch.chdir(tmp_path)
    Path("here").rename("there")
    moved = {"data": "there/data", "base": "there/sd1", "out": "there/run"}
    Path("there", start.name).rename("renamed.safetensors")
    train(replace(run, **moved, init_from="renamed.safetensors", steps=4))
    other = tmp_path / "there" / "data" / "metadata.jsonl"
    other.write_text(other.read_text().replace('"text": "', '"text": "another ', 1))
    other.with_name("report.json").unlink()  # as one does after an edit by hand
    with pytest.raises(ArgumentError, match="holds another run; found data has changed"):
        train(replace(run, **moved, init_from="renamed.safetensors", steps=6))


def save_start(folder: Path) -> Path:
    adapter = models.adapter("base", models.unet("sd1"))
    save_adapter(adapter, folder / "start.safetensors", {}, torch.float32)
    return folder / "start.safetensors"


def test_no_file_of_a_run_says_where_or_when_it_was_made(config: TrainConfig) -> None:
    train(replace(config, steps=2))
    for file in Path(config.out).rglob("*"):
        if file.is_file():
            text = file.read_bytes()
            assert str(Path(config.out).parent).encode() not in text, file
            assert str(Path(config.data).parent).encode() not in text, file
    recipe = load_adapter(Path(config.out) / "adapter.safetensors").spec["recipe"]
    assert (recipe["data"], recipe["base"]) == ("data", "sd1")
    assert "out" not in recipe


def test_a_second_process_in_the_folder_is_refused(config: TrainConfig) -> None:
    refused = "another process is at work in this folder. Wait, or choose another folder"
    with only_one(config.out), pytest.raises(OutputError, match=refused):
        train(config)
    train(replace(config, steps=2))
    data = Path(config.data, "embedded")
    with only_one(data):
        train(replace(config, steps=4))  # a finished cache is only read
        with pytest.raises(OutputError, match=f"{data}: another process"):
            train(replace(config, out=config.out + "-2", changed=3))


def test_what_kills_left_of_checkpoints_is_gone(config: TrainConfig) -> None:
    train(replace(config, checkpoints_total_limit=1))
    out = Path(config.out)
    for name in ("partial", "old", "replaced"):
        (out / f".checkpoint-00000004.{name}").mkdir()
    half = out / "checkpoint-00000002"
    half.mkdir()
    (out / f".{'0' * 32}.tmp").touch()
    train(replace(config, checkpoints_total_limit=1))
    left = {path.name for path in out.iterdir()}
    assert left == {".lock", "adapter.safetensors", "checkpoint-00000006", "log.jsonl"}


def test_it_starts_from_a_published_adapter(config: TrainConfig) -> None:
    start = train(replace(config, fusion="none", steps=2))
    other = replace(config, out=config.out + "-2", init_from=str(start), steps=1, learning_rate=0.0)
    run = Trainer(other)
    assert isinstance(run.adapter.fusion, GatedFusion), "a fusion is added to plain IP-Adapter"
    started = {n: t for n, t in run.adapter.state_dict().items() if not n.startswith("fusion")}
    assert same(started, weights(config))
    with pytest.raises(ArgumentError, match="is of another kind; expected base; found plus"):
        Trainer(replace(other, adapter="base"))


def test_gates_need_a_number_of_tokens(config: TrainConfig, tmp_path: Path) -> None:
    face = models.adapter("full-face", models.unet("sd1"))
    save_adapter(face, tmp_path / "face.safetensors", {}, torch.float32)
    chosen = replace(config, init_from=str(tmp_path / "face.safetensors"))
    refused = r"face\.safetensors: makes as many .* fixed number.*--fusion=blend or --fusion=none"
    with pytest.raises(ArgumentError, match=refused):
        Trainer(chosen)
    for fusion in ("blend", "none"):
        run = Trainer(replace(chosen, fusion=fusion))
        assert run.one_step(next(run.batches()))["skipped"] == 0


def test_what_it_starts_from_may_have_a_name(config: TrainConfig) -> None:
    named = initial_adapter(replace(config, base="critters", init_from="plus"))
    assert named is not None
    shipped = load_adapter(adapter_file("critters", "plus"))
    assert same(named.state_dict(), shipped.state_dict())
    with pytest.raises(ModelError, match="minus: unknown adapter"):
        initial_adapter(replace(config, init_from="minus"))


def test_references_that_cannot_be_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"has no changed references.*embed --changed"):
        Trainer(replace(config, reference="augmented", changed=0))
    prepare("critters", tmp_path / "single", PrepareOptions(n=2, pairs=False))
    alone = replace(config, data=str(tmp_path / "single"))
    with pytest.raises(DataError, match="no image has a reference"):
        Trainer(replace(alone, reference="paired"))
    assert Trainer(alone).samples.references.weights == {"augmented": 1.0}
    assert Trainer(config).samples.references.weights == {"paired": 1.0}


def test_what_is_new_is_built_while_nobody_loads(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    others: list[bool] = []

    def may_load() -> bool:
        """Whether another thread gets what loading holds."""
        if free := loading._one_builds.acquire(blocking=False):
            loading._one_builds.release()
        return free

    def asked(name: str) -> Any:
        make = getattr(build, name)

        def made(*args: Any, **options: Any) -> Any:
            others.append(pool.submit(may_load).result())
            return make(*args, **options)

        return made

    for name in ("new_adapter", "GatedFusion"):
        monkeypatch.setattr(build, name, asked(name))
    with ThreadPoolExecutor(1) as pool:
        Trainer(config)
    assert others == [False] * 2


def test_gradient_checkpointing_gives_the_same(config: TrainConfig) -> None:
    train(replace(config, steps=2))
    other = replace(config, out=config.out + "-2", steps=2, gradient_checkpointing=True)
    train(other)
    for one, two in zip(log(config), log(other), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-6)


def test_epochs_take_the_place_of_steps(config: TrainConfig) -> None:
    run = Trainer(replace(config, epochs=3))
    assert run.config.steps == len(run.samples) // 4 == 6, "three passes over six, four at a time"


def test_averaged_weights_follow_with_a_decay_that_warms_up(config: TrainConfig) -> None:
    run = Trainer(replace(config, ema=0.2, learning_rate=0.1))
    assert run.ema is not None
    expected = [p.detach().clone() for p in run.parameters]
    for batch, decay in zip(run.batches(), (2 / 11, 0.2, 0.2), strict=False):
        run.one_step(batch)
        now = [p.detach() for p in run.parameters]
        expected = [decay * a + (1 - decay) * p for a, p in zip(expected, now, strict=True)]
        torch.testing.assert_close(run.ema.shadow_params, expected)
    with run._averaged():
        torch.testing.assert_close([p.detach() for p in run.parameters], expected)
    assert all(torch.equal(p, q) for p, q in zip(run.parameters, now, strict=True))


def test_the_rate_warms_up_and_falls(config: TrainConfig) -> None:
    shaped = replace(config, learning_rate=1.0, lr_warmup_steps=4, steps=14)
    assert [learning_rate(shaped, s) for s in (0, 3, 4, 13)] == [0.25, 1, 1, 1]
    linear = replace(shaped, lr_scheduler="linear")
    assert learning_rate(linear, 9) == pytest.approx(0.5)
    cosine = replace(shaped, lr_scheduler="cosine")
    assert learning_rate(cosine, 9) == pytest.approx(0.5)
    assert learning_rate(cosine, 4) == 1


def test_tensorboard_gets_the_figures(config: TrainConfig) -> None:
    from pathlib import Path

    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    reporting = replace(config, report_to="tensorboard")
    train(replace(reporting, steps=3))
    for folder in checkpoints.finished(Path(config.out))[1:]:
        shutil.rmtree(folder)  # the run was killed after step 2, and step 3 is done again
    train(replace(reporting, steps=4))
    found = events.EventAccumulator(str(Path(config.out) / "tensorboard"))
    found.Reload()
    assert {"loss", "learning_rate", "norm", "skipped"} <= set(found.Tags()["scalars"])
    assert "step" not in found.Tags()["scalars"]
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3, 4]
    values = [event.value for event in found.Scalars("loss")]
    assert values == pytest.approx([line["loss"] for line in log(config)])


def test_eight_bits_that_are_not_installed_say_so(config: TrainConfig) -> None:
    if find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    with pytest.raises(ArgumentError, match=r"optimizer adamw8bit: is not installed"):
        Trainer(replace(config, optimizer="adamw8bit"))


def test_eight_bits_are_used_where_they_are_installed(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AdamW8bit(torch.optim.AdamW):
        """Stands for the real one."""

    fake = ModuleType("bitsandbytes")
    fake.optim = SimpleNamespace(AdamW8bit=AdamW8bit)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    run = Trainer(replace(config, steps=1, optimizer="adamw8bit", weight_decay=0.3))
    inner = getattr(run.optimizer, "optimizer", run.optimizer)
    assert isinstance(inner, AdamW8bit)
    assert inner.param_groups[0]["weight_decay"] == 0.3
    run.run()


def test_the_original_trainers_command_runs(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [json.loads(line) for line in (home / "data" / "metadata.jsonl").open()]
    pairs = [{"image_file": r["file_name"], "text": r["text"]} for r in records]
    (tmp_path / "output.json").write_text(json.dumps(pairs))
    arguments = [
        *("train", "--pretrained_model_name_or_path", str(home / "sd1")),
        *("--data_json_file", str(tmp_path / "output.json")),
        *("--data_root_path", str(home / "data"), "--mixed_precision", "no"),
        *("--resolution", "64", "--train_batch_size", "3", "--num_train_epochs", "1"),
        *("--dataloader_num_workers", "0", "--learning_rate", "1e-04", "--weight_decay", "0.01"),
        *("--output_dir", str(tmp_path / "out"), "--save_steps", "1", "--width", "64"),
        *("--logging_dir", "logs", "--local_rank", "0", "--report_to", "tensorboard"),
    ]
    with pytest.warns(UserWarning, match="--logging-dir has no effect"):
        assert main(arguments) == 0
    assert capsys.readouterr().out.strip() == f"wrote {tmp_path / 'out' / 'adapter.safetensors'}"
    ImagePromptAdapter.from_pretrained(tmp_path / "out" / "checkpoint-00000002")
    assert main(["train", "--data", str(tmp_path), "--out", str(tmp_path / "x")]) == 2
    assert "holds no prepared data" in capsys.readouterr().err
