"""How many critters a second: rendering alone on one core, and `critters make` on all of them."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from ipdiverse.critters.make import make_dataset
from ipdiverse.critters.render import render
from ipdiverse.critters.scene import sample_scene

RENDERS = 2000
MADE = 10_000


def main() -> None:
    """Measure and print JSON."""
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng) for _ in range(RENDERS)]
    start = time.perf_counter()
    for seed, scene in enumerate(scenes):
        render(scene, seed)
    rendered = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        make_dataset(Path(folder), MADE)
        made = time.perf_counter() - start
    report = {
        "renders_a_second_on_one_core": round(RENDERS / rendered),
        "files_a_second_with_captions": round(MADE / made),
        "cores": os.cpu_count(),
    }
    sys.stdout.write(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
