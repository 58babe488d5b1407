"""What benchmarks share: alternating rounds, ratios with an interval, operations."""

from __future__ import annotations

import platform
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from collections.abc import Callable


def ratio(before: Callable[[], None], after: Callable[[], None], rounds: int) -> dict[str, float]:
    """Median of one's time over the other's, alternating, with a bootstrap interval of 95 %.

    Args:
        before: What `after` is compared with; a ratio above 1 says that `after` is faster.
        after: The other.
        rounds: Of both, after one of each that is not counted.
    """
    times: dict[str, list[float]] = {"before": [], "after": []}
    before(), after()
    for index in range(rounds):
        pairs = [("before", before), ("after", after)]
        for name, run in pairs if index % 2 == 0 else pairs[::-1]:
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    ratios = np.array(times["before"]) / np.array(times["after"])
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (2000, rounds)), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return {
        "ratio": float(np.median(ratios)),
        "low": float(low),
        "high": float(high),
        "before_seconds": float(np.median(times["before"])),
        "after_seconds": float(np.median(times["after"])),
    }


def flops(run: Callable[[], Any]) -> int:
    """Operations of one call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def machine() -> dict[str, Any]:
    """What times depend on."""
    return {
        "machine": torch.cpu.get_capabilities().get("cpu_name") or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
