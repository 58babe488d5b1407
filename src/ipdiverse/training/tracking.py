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
