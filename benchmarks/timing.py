"""Shared by benchmarks: alternating rounds, ratios with an interval, operations."""

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
        before: The baseline; with a ratio above 1 `after` is faster.
        after: The run to compare.
        rounds: Counted runs of both, after one of each that is not counted.
    """
    times = alternating({"before": before, "after": after}, rounds)
    return ratio_of(times["before"], times["after"])


def alternating(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each run in each round; every other round is in reverse order.

    Args:
        runs: By name; each runs once before anything is counted.
        rounds: How often.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for index in range(rounds):
        for name in list(runs)[:: 1 if index % 2 == 0 else -1]:
            started = time.perf_counter()
            runs[name]()
            if torch.cuda.is_available():  # which answers before it has computed
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
    return {name: np.array(taken) for name, taken in times.items()}


def ratio_of(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """Median of the rounds' ratios, with a bootstrap interval of 95 %.

    Args:
        before: Seconds, (rounds,).
        after: Seconds in the same rounds.
    """
    ratios, rng = before / after, np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return {
        "ratio": float(np.median(ratios)),
        "low": float(low),
        "high": float(high),
        "before_seconds": float(np.median(before)),
        "after_seconds": float(np.median(after)),
    }


def flops(run: Callable[[], Any]) -> int:
    """Operations of one call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def most_memory(run: Callable[[], Any]) -> float | None:
    """The most gigabytes of a GPU's memory in use during a call, weights included; None without."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / 1e9


def machine() -> dict[str, Any]:
    """Machine, threads and torch version, on which times depend."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "machine": gpu or torch.cpu.get_capabilities().get("cpu_name") or platform.machine(),
        "instructions": None if gpu else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
