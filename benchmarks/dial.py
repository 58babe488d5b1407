"""Time per image at settings of the dial against stock diffusers, same steps, one process.

    python benchmarks/dial.py [--adapter diverse] [--rounds 15] [--settings 0 1] [--out FILE.json]

On the embedded base. Stock is diffusers' own IP-Adapter with the same file, guidance and image;
above 1 ours is faster. Where the dial skips unconditional passes, operations fall too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image
from timing import flops, machine, ratio

from ipdiverse import attach, load_adapter, load_base
from ipdiverse.base.adapters import adapter_file
from ipdiverse.base.bases import CRITTERS
from ipdiverse.critters.render import render
from ipdiverse.critters.scene import sample_scene
from ipdiverse.provenance import generator
from ipdiverse.sampling.denoiser import release, steer
from ipdiverse.sampling.sample import dial_for

PROMPT, IMAGES, STEPS = "a critter in the snow", 4, 25


def call(pipe: Any, **more: Any) -> None:
    """One set of images."""
    pipe(
        PROMPT,
        num_images_per_prompt=IMAGES,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        generator=[generator(0, index) for index in range(IMAGES)],
        **more,
    )


def main() -> None:
    """Measure and print a table; write JSON where asked."""
    import numpy as np

    parser = argparse.ArgumentParser()
    parser.add_argument("--adapter", default="diverse")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--settings", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 1])
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    file = Path(adapter_file(CRITTERS, chosen.adapter))
    image = Image.fromarray(render(sample_scene(np.random.default_rng(0)), 0))
    stock, ours = load_base().pipe, load_base().pipe
    stock.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name)
    attachment = attach(ours, load_adapter(file))
    attachment.set_reference(image)
    dial = dial_for(attachment.adapters[0])

    def run_stock() -> None:
        call(stock, ip_adapter_image=image)

    report: dict[str, Any] = {"steps": STEPS, "images": IMAGES, "rounds": chosen.rounds}
    report |= {**machine(), "dial": dial.source, "cells": []}
    stock_flops = flops(run_stock)
    for setting in chosen.settings:
        steer(attachment, dial.at(setting), range(IMAGES), [PROMPT])
        cell = {"diversity": setting, **ratio(run_stock, lambda: call(ours), chosen.rounds)}
        cell["operations"] = flops(lambda: call(ours)) / stock_flops
        report["cells"].append(cell)
        print(json.dumps(cell), flush=True)
        release(attachment)
    if chosen.out:
        chosen.out.write_text(json.dumps(report, indent=2) + "\n")
    print("| diversity | stock / ours | 95 % | operations, ours / stock |\n|---|---|---|---|")
    for cell in report["cells"]:
        print(
            f"| {cell['diversity']:g} | {cell['ratio']:.3f} | {cell['low']:.3f} to "
            f"{cell['high']:.3f} | {cell['operations']:.3f} |"
        )


if __name__ == "__main__":
    main()
