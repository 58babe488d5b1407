"""The same critter in other places: the reference says who, the prompts say where.

python examples/scene_change.py --out out/scene_change
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

PLACES = ("in a meadow", "on the beach", "in the snow", "on the moon")


def main() -> None:
    """One image for each place, all from one reference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--image", type=Path, help="the reference; without one, a drawn critter")
    parser.add_argument("--scale", type=float, default=0.8)
    parser.add_argument("--steps", type=int, default=25)
    options = parser.parse_args()

    scene = sample_scene(np.random.default_rng(3))
    reference = load_image(options.image) if options.image else Image.fromarray(render(scene, 0))
    prompts = [f"a critter {place}" for place in PLACES]
    base = ipdiverse.load_base()
    adapter = ipdiverse.load_adapter(adapter_file("critters", "plus"))
    with ipdiverse.attach(base.pipe, adapter) as attachment:
        attachment.set_scale(options.scale)
        attachment.set_reference(reference)  # one for all; a list is one for each prompt
        images = base.pipe(
            prompt=prompts,
            generator=[generator(0, index) for index in range(len(prompts))],
            num_inference_steps=options.steps,
            guidance_scale=base.guidance_scale,
        ).images

    options.out.mkdir(parents=True, exist_ok=True)
    sheet = contact_sheet(reference, images, prompts, title="One critter, four places")
    sheet.save(options.out / "scene_change.png")
    print(f"wrote {options.out / 'scene_change.png'}")


if __name__ == "__main__":
    main()
