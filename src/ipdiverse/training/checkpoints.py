"""What a run leaves in its folder: checkpoints, and a log of its figures.

    log.jsonl                                       a line for each step
    checkpoint-00000500/adapter.safetensors         what users load
    checkpoint-00000500/training_state.safetensors  the optimizer's moments; with averaging, also
                                                    the weights, as the adapter has the averages
    checkpoint-00000500/training_state.json         step, the run's settings, counters

A checkpoint is a loadable adapter and, in other files, all that resuming needs. It is written under
a temporary name and renamed when it is whole; only then are older ones removed. Nothing is
unpickled: a checkpoint from a stranger can be resumed. A resumed run cuts its log and its curves at
the checkpoint's step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ipdiverse.errors import ArgumentError, CheckpointError, OutputError
from ipdiverse.writing import (
    ensure_writable_folder,
    sync_folder,
    write_bytes_atomic,
    write_text_atomic,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from ipdiverse.training.config import TrainConfig

ADAPTER = "adapter.safetensors"
LOG = "log.jsonl"
_NAME = re.compile(r"checkpoint-(\d{8})")


@dataclass
class State:
    """What a run is resumed from.

    Args:
        step: Steps done.
        weights: Trained parameters by name; a loaded state may hold frozen ones too.
        average: Their running average by name; empty without one.
        optimizer: The optimizer's tensors, `PARAMETER.NAME`.
        counters: Batches skipped, the micro-batch that fits, the state of a gradient scaler.
    """

    step: int
    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    counters: dict[str, Any]


def finished(out: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    if not out.is_dir():
        return []
    return sorted(path for path in out.iterdir() if path.is_dir() and _NAME.fullmatch(path.name))


def save_checkpoint(
    out: Path,
    state: State,
    settings: Mapping[str, Any],
    save_adapter: Callable[[Path], None],
    total_limit: int,
) -> Path:
    """Write a checkpoint, then remove all but the newest.

    Args:
        out: The run's folder.
        state: What to resume from.
        settings: The run's.
        save_adapter: Writes the loadable adapter to a file.
        total_limit: How many checkpoints to keep.

    Raises:
        OutputError: It cannot be written, as on a full disk; every earlier one stays.
    """
    target = out / f"checkpoint-{state.step:08d}"
    partial = out / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    ensure_writable_folder(partial)
    try:
        save_adapter(partial / ADAPTER)
        write_bytes_atomic(partial / "training_state.safetensors", save(_flat(state)))
        about = {"step": state.step, "counters": state.counters, "settings": dict(settings)}
        write_text_atomic(partial / "training_state.json", json.dumps(about, indent=2) + "\n")
        replaced = out / f".{target.name}.replaced"
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
        sync_folder(out)
    except OSError as error:
        raise OutputError("cannot be written", where=target, found=error.strerror) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
    for old in finished(out)[:-total_limit]:
        shutil.rmtree(old)
    return target


def load_checkpoint(folder: Path) -> tuple[State, dict[str, Any]]:
    """Read a checkpoint: state and settings.

    Raises:
        CheckpointError: It is broken.
    """
    try:
        about = json.loads((folder / "training_state.json").read_text())
        tensors = load_file(folder / "training_state.safetensors")
        groups: dict[str, dict[str, Tensor]] = {"weights": {}, "average": {}, "optimizer": {}}
        for key, tensor in tensors.items():
            group, _, name = key.partition("/")
            groups[group][name] = tensor
        if not groups["average"]:
            groups["weights"] = load_file(folder / ADAPTER)
        return State(about["step"], **groups, counters=about["counters"]), about["settings"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            "is broken",
            where=folder,
            found=f"{type(error).__name__}: {error}",
            fix="Remove it; the run is then resumed from the one before.",
        ) from error


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


def _flat(state: State) -> dict[str, Tensor]:
    groups = {"optimizer": state.optimizer}
    if state.average:
        groups |= {"weights": state.weights, "average": state.average}
    return {
        f"{group}/{name}": tensor.detach().cpu().contiguous().clone()
        for group, tensors in groups.items()
        for name, tensor in tensors.items()
    }


@contextlib.contextmanager
def tracking(
    config: TrainConfig, out: Path, step: int, main: bool
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A context that gives a function for each step's figures.

    Args:
        config: The run.
        out: Its folder. The log's lines after `step` are dropped: those steps are repeated.
        step: Steps done before.
        main: Whether this is the process that reports.
    """
    from tqdm import tqdm

    if not main:
        yield lambda _: None
        return
    log = out / LOG
    if log.is_file():
        found = log.read_text()
        lines = [line for line in found.split("\n") if _step_of(line) <= step]
        if (whole := "".join(f"{line}\n" for line in lines)) != found:
            write_text_atomic(log, whole)
    with (
        tqdm(total=config.steps, initial=step, unit="step", disable=None) as bar,
        log.open("a", buffering=1) as file,
        _tracker(config, out, step) as tracker,
    ):

        def track(figures: dict[str, Any]) -> None:
            bar.update(1)
            file.write(json.dumps(figures) + "\n")
            tracker(figures)

        yield track


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62  # a line cut off in mid-write: later than any step, so it is dropped


@contextlib.contextmanager
def _tracker(
    config: TrainConfig, out: Path, step: int
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Accelerate's TensorBoard or W&B tracker as a function of figures, or one that does nothing.

    Raises:
        ArgumentError: Its package is not installed.
    """
    if config.report_to == "none":
        yield lambda _: None
        return
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    if config.report_to == "tensorboard":
        again = step + 1 if step else None  # curves are cut where the run is resumed
        tracker: Any = TensorBoardTracker("tensorboard", out, purge_step=again)
    else:
        # an id made from the folder, so that a resumed run extends the same curves
        name = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]
        tracker = WandBTracker(
            "ipdiverse", id=name, resume="allow", config=asdict(config), dir=str(out)
        )
    try:
        tracker.start()
    except ImportError as error:
        name = config.report_to
        raise ArgumentError(
            "is not installed", where=f"report_to {name}", fix=f"pip install {name}."
        ) from error
    try:
        yield lambda figures: tracker.log(
            {k: v for k, v in figures.items() if k != "step"}, step=figures["step"]
        )
    finally:
        tracker.finish()
