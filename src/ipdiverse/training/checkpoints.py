"""What a run leaves in its folder: `log.jsonl`, a line for each step, and checkpoints.

    checkpoint-00000500/adapter.safetensors         what users load
    checkpoint-00000500/training_state.safetensors  the optimizer's moments; with averaging, also
                                                    the weights, as the adapter has the averages
    checkpoint-00000500/training_state.json         step, settings, counters, hashes of all three

Nothing is unpickled: a checkpoint from a stranger can be resumed. No file holds a time or the place
of a folder, so a run that was killed and resumed, or moved, ends with the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ipdiverse.errors import ArgumentError, CheckpointError
from ipdiverse.training.config import DROPPED, MAY_CHANGE, TrainConfig, todays
from ipdiverse.writing import (
    append_text,
    file_hash,
    sealed,
    sync_folder,
    unsealed,
    write_bytes_atomic,
    write_text_atomic,
    writing,
)

ADAPTER = "adapter.safetensors"
LOG = "log.jsonl"
_STATE, _ABOUT = "training_state.safetensors", "training_state.json"
_PLACES = ("data", "base", "image_encoder", "init_from")
_NAME = re.compile(r"checkpoint-(\d{8})")


@dataclass
class State:
    """What a run is resumed from; tensors by group and name, the optimizer's `PARAMETER/NAME`."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    counters: dict[str, Any]


def finished(out: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not out.is_dir():
        return []
    return sorted(path for path in out.iterdir() if path.is_dir() and _NAME.fullmatch(path.name))


def save_checkpoint(
    out: Path,
    state: State,
    run: Mapping[str, Any],
    save_adapter: Callable[[Path], None],
    total_limit: int,
) -> Path:
    """Write a checkpoint, then remove all but the newest."""
    target = out / f"checkpoint-{state.step:08d}"
    partial = out / f".{target.name}.partial"
    flat = {f"{group}/{name}": t for group, of in state.tensors.items() for name, t in of.items()}
    with writing(target):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            save_adapter(partial / ADAPTER)
            # copies, since safetensors refuses tensors that share memory
            copies = {name: t.detach().cpu().contiguous().clone() for name, t in flat.items()}
            write_bytes_atomic(partial / _STATE, save(copies))
            hashes = {name: file_hash(partial / name) for name in (ADAPTER, _STATE)}
            about = {"step": state.step, "counters": state.counters, **run, "files": hashes}
            write_text_atomic(partial / _ABOUT, sealed(about, indent=2))
            if target.exists():
                target.rename(out / f".{target.name}.replaced")
            partial.rename(target)
            sync_folder(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    tidy(out, total_limit)
    return target


def tidy(out: Path, total_limit: int) -> None:
    """Remove all but the newest checkpoints, and what a kill left of others."""
    with writing(out):
        for old in finished(out)[:-total_limit]:
            old.rename(out / f".{old.name}.old")  # half removed, it must not look whole
        for left in out.glob(".checkpoint-*"):
            shutil.rmtree(left)


def load_checkpoint(folder: Path) -> tuple[State, dict[str, Any]]:
    """Read a checkpoint: state, and what tells runs apart (`run` of `save_checkpoint`)."""
    try:
        about = unsealed((folder / _ABOUT).read_text("utf-8"))
        # those of version 0.1 have no hashes
        for name, stored in about.get("files", {}).items():
            if file_hash(folder / name) != stored:
                raise ValueError(f"{name} differs from the hash that it was written with")
        groups: dict[str, dict[str, Tensor]] = {"optimizer": {}}
        for key, tensor in load_file(folder / _STATE).items():
            group, _, name = key.partition("/")
            groups.setdefault(group, {})[name] = tensor
        if "average" not in groups:
            groups["weights"] = load_file(folder / ADAPTER)
        state = State(about["step"], groups, about["counters"])
        return state, {"settings": about["settings"], "contents": about.get("contents", {})}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        found = f"{type(error).__name__}: {error}"
        fix = "Remove it; the run is then resumed from the one before."
        raise CheckpointError("is broken", where=folder, found=found, fix=fix) from error


def without_places(config: TrainConfig) -> dict[str, Any]:
    """A run's settings to be kept: of a file or folder the name alone, and nothing of `out`."""
    settings = json.loads(json.dumps(asdict(config)))
    del settings["out"]
    named = {name: settings[name] for name in _PLACES if settings[name]}
    return settings | {n: Path(v).resolve().name for n, v in named.items() if Path(v).exists()}


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What makes two runs different ones, in words; `before` may be of any version.

    A place is known by the hash of what it holds, as it may have moved; without one, by its name.
    """
    old, new = todays(before["settings"]), now["settings"]
    different = []
    for name in new.keys() - set(MAY_CHANGE):
        was, value = old.get(name), new[name]
        hashes = [run["contents"].get(name) for run in (before, now)]
        same = hashes[0] == hashes[1]
        if None in hashes:
            if name in _PLACES and isinstance(was, str) and was != value:
                was = Path(was).name  # version 0.1 kept its path
            same = was == value
        if not same:
            how = "has changed" if was == value else f"was {was!r}, is {value!r}"
            different.append(f"{name} {how}")
    return sorted(different) + [f"{name} was on" for name in DROPPED if old.get(name)]


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """An optimizer's state as flat tensors, by the names of its parameters in order."""
    state = optimizer.state_dict()["state"]
    return {
        f"{names[index]}/{key}": torch.as_tensor(value)
        for index, values in state.items()
        for key, value in values.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: list[str], tensors: Mapping[str, Tensor]
) -> None:
    """Put `optimizer_tensors` back."""
    numbers = {name: index for index, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition("/")
        state.setdefault(numbers[name], {})[part] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


@contextlib.contextmanager
def tracking(
    config: TrainConfig, out: Path, step: int, main: bool
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A context that gives a function for each step's figures."""
    from tqdm import tqdm

    if not main:
        yield lambda _: None
        return
    log = out / LOG
    if log.is_file():  # a run that was killed logged steps that it now repeats
        found = log.read_text("utf-8", "replace")
        lines = [line for line in found.split("\n") if _step_of(line) <= step]
        if (whole := "".join(f"{line}\n" for line in lines)) != found:
            write_text_atomic(log, whole)
    tracker = _tracker(config, out, step)
    with tqdm(total=config.steps, initial=step, unit="step", disable=None) as bar:

        def track(figures: dict[str, Any]) -> None:
            bar.update(1)
            append_text(log, json.dumps(figures) + "\n")
            if tracker is not None:
                values = {name: value for name, value in figures.items() if name != "step"}
                tracker.log(values, step=figures["step"])

        try:
            yield track
        finally:
            if tracker is not None:
                tracker.finish()


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62  # a line cut off in mid-write: later than any step, so it is dropped


def _tracker(config: TrainConfig, out: Path, step: int) -> Any:
    """Accelerate's TensorBoard or W&B tracker, started; None if none is wanted."""
    if config.report_to == "none":
        return None
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    if config.report_to == "tensorboard":
        again = step + 1 if step else None  # curves are cut where the run is resumed
        tracker: Any = TensorBoardTracker("tensorboard", out, purge_step=again)
    else:
        # an id made from the folder, so that a resumed run extends the same curves
        name = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]
        options: dict[str, Any] = {"config": asdict(config), "dir": str(out)}
        tracker = WandBTracker("ipdiverse", id=name, resume="allow", **options)
    try:
        tracker.start()
    except ImportError as error:
        where, fix = f"report_to {config.report_to}", f"pip install {config.report_to}."
        raise ArgumentError("is not installed", where=where, fix=fix) from error
    return tracker
