"""Where a run's figures go: a log of JSON lines, a progress bar, TensorBoard, Weights & Biases."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ipdiverse.errors import ArgumentError
from ipdiverse.writing import write_text_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from ipdiverse.training.config import TrainConfig

LOG = "log.jsonl"


@contextlib.contextmanager
def tracking(
    config: TrainConfig, out: Path, step: int, main: bool
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Give a function that takes each step's figures.

    Args:
        config: The run.
        out: Its folder. Lines of the log after `step` are dropped: those steps are done again.
        step: Steps done before.
        main: Whether this process reports at all.
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
        return 1 << 62


@contextlib.contextmanager
def _tracker(
    config: TrainConfig, out: Path, step: int
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """TensorBoard or Weights & Biases as one function of figures, or one that does nothing."""
    if config.report_to == "tensorboard":
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard") from error
        again = step + 1 if step else None  # steps after that are done again
        with SummaryWriter(str(out / "tensorboard"), purge_step=again) as writer:

            def write(figures: dict[str, Any]) -> None:
                for name, value in figures.items():
                    if name != "step":
                        writer.add_scalar(name, value, figures["step"])

            yield write
        return
    if config.report_to == "wandb":
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise _missing("wandb") from error
        # named by the folder, so that a resumed run goes on with the same curves
        name = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]
        run = wandb.init(
            project="ipdiverse", id=name, resume="allow", config=asdict(config), dir=str(out)
        )
        try:
            yield lambda figures: run.log(figures, step=figures["step"])
        finally:
            run.finish()
        return
    yield lambda _: None


def _missing(name: str) -> ArgumentError:
    return ArgumentError("is not installed", where=f"report_to {name}", fix=f"pip install {name}.")
