"""Where a run's figures go: a log of JSON lines, a progress bar, TensorBoard, Weights & Biases."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

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
    tracker, log = _tracker(config, out), out / LOG
    if log.is_file():
        lines = [line for line in log.read_text().splitlines() if _step_of(line) <= step]
        log.write_text("".join(f"{line}\n" for line in lines))
    with (
        tqdm(total=config.steps, initial=step, unit="step", disable=None) as bar,
        log.open("a", buffering=1) as file,
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


def _tracker(config: TrainConfig, out: Path) -> Callable[[dict[str, Any]], Any]:
    """TensorBoard or Weights & Biases as one function of figures, or one that does nothing."""
    if config.report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(out / "tensorboard"))
        return lambda f: [writer.add_scalar(k, v, f["step"]) for k, v in f.items() if k != "step"]
    if config.report_to == "wandb":
        import wandb  # pyright: ignore[reportMissingImports]

        run = wandb.init(project="ipdiverse", config=asdict(config), dir=str(out))
        return lambda f: run.log(f, step=f["step"])
    return lambda _: None
