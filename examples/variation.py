"""Variations of one picture: no words, only an image prompt.

python examples/variation.py --out out/variation
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

import ipdiverse
from ipdiverse.base.adapters import adapter_file
from ipdiverse.contact_sheet import contact_sheet
from ipdiverse.critters.render import render
from ipdiverse.critters.scene import sample_scene
from ipdiverse.image_io import load_image
from ipdiverse.provenance import generator


def main() -> None:
    """Draw them side by side with their reference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--image", type=Path, help="the reference; without one, a drawn critter")
    parser.add_argument("--scale", type=float, default=0.6, help="lower varies more")
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--steps", type=int, default=25)
    options = parser.parse_args()

    scene = sample_scene(np.random.default_rng(3))
    reference = load_image(options.image) if options.image else Image.fromarray(render(scene, 0))
    base = ipdiverse.load_base()
    adapter = ipdiverse.load_adapter(adapter_file("critters", "plus"))
    with ipdiverse.attach(base.pipe, adapter) as attachment:
        attachment.set_scale(options.scale)
        attachment.set_reference(reference)
        images = base.pipe(
            prompt=[""] * options.n,
            generator=[generator(0, index) for index in range(options.n)],
            num_inference_steps=options.steps,
            guidance_scale=base.guidance_scale,
        ).images

    options.out.mkdir(parents=True, exist_ok=True)
    captions = [f"seed 0, image {index}" for index in range(options.n)]
    sheet = contact_sheet(reference, images, captions, title=f"scale {options.scale}")
    sheet.save(options.out / "variation.png")
    print(f"wrote {options.out / 'variation.png'}")


if __name__ == "__main__":
    main()
