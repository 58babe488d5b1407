"""Where the time of eight images goes: start-up, denoiser calls, and all the rest.

Run `make benchmarks`. Each round generates and writes eight images in 25 steps in one process; the
whole command is timed as well, to include starting Python and its libraries. Times are medians over
rounds. To compare machines, use the shares.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timing import machine, ratio_of

from ipdiverse import generate, load_base
from ipdiverse.critters.render import render
from ipdiverse.critters.scene import sample_scene

ROUNDS = 3
IMAGES = 8
STEPS = 25


class Stopwatch:
    """Sums the time spent in one module's calls."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.seconds, self._started = 0.0, 0.0
        module.register_forward_pre_hook(self._start)
        module.register_forward_hook(self._stop)

    def _start(self, *_: object) -> None:
        self._started = time.perf_counter()

    def _stop(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started


def one_round(
    base: Any, denoiser: Stopwatch, reference: Path, folder: Path, images: int = IMAGES
) -> dict[str, float]:
    """Seconds of generating, of its denoiser calls, and of writing."""
    denoiser.seconds = 0.0
    start = time.perf_counter()
    result = generate(
        reference, "a critter in the snow", n=images, steps=STEPS, seed=0, loaded=base
    )
    generated = time.perf_counter()
    result.save(tempfile.mkdtemp(dir=folder))  # a run that is there is not written again
    end = time.perf_counter()
    return {
        "total": end - start,
        "denoiser": denoiser.seconds,
        "writing": end - generated,
        "encoding, decoding, scheduling": generated - start - denoiser.seconds,
    }


def whole_command(reference: Path, folder: Path) -> float:
    """Seconds of `ipdiverse generate` as a process."""
    command = ["-m", "ipdiverse", "generate", "--image", str(reference), "-n", str(IMAGES)]
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, *command, "--out", str(folder / "command")],
        check=True,
        capture_output=True,
    )
    return time.perf_counter() - start


def main() -> None:
    """Measure and print JSON; write it where asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference = folder / "reference.png"
        Image.fromarray(render(sample_scene(np.random.default_rng(0)), 0)).save(reference)
        start = time.perf_counter()
        base = load_base()
        loading = time.perf_counter() - start
        denoiser = Stopwatch(base.pipe.unet)
        one_round(base, denoiser, reference, folder)
        rounds = [one_round(base, denoiser, reference, folder) for _ in range(ROUNDS)]
        first = [one_round(base, denoiser, reference, folder, 1) for _ in range(chosen.rounds)]
        process = statistics.median(whole_command(reference, folder) for _ in range(3))
    medians = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
    report = {
        **machine(),
        "rounds": chosen.rounds,
        "cells": [
            {
                "what": "critters, first image after a warm request over its "
                "denoiser calls (1 is best)",
                "peer": "the denoiser's own calls in it",
                **ratio_of(*(np.array([one[k] for one in first]) for k in ("total", "denoiser"))),
            }
        ],
        "images": IMAGES,
        "steps": STEPS,
        "seconds": {k: round(v, 3) for k, v in medians.items()},
        "seconds_loading_weights": round(loading, 3),
        "seconds_whole_command": round(process, 3),
        "share_outside_denoiser_in_process": round(1 - medians["denoiser"] / medians["total"], 3),
        "share_outside_denoiser_with_loading": round(
            1 - medians["denoiser"] / (medians["total"] + loading), 3
        ),
        "share_outside_denoiser_whole_command": round(1 - medians["denoiser"] / process, 3),
    }
    text = json.dumps(report, indent=2) + "\n"
    sys.stdout.write(text)
    if chosen.out:
        chosen.out.write_text(text)


if __name__ == "__main__":
    main()
