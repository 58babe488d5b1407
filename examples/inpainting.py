"""Put the critter of one picture into another: inpainting with an image prompt.

python examples/inpainting.py --out out/inpainting
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image, ImageDraw

import ipdiverse
from ipdiverse.base.adapters import adapter_file
from ipdiverse.base.bases import any_latents
from ipdiverse.critters.render import render
from ipdiverse.critters.scene import sample_scene
from ipdiverse.provenance import generator


def main() -> None:
    """Repaint what the mask shows in white, by the reference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--strength", type=float, default=1.0, help="how much is painted over")
    parser.add_argument("--steps", type=int, default=25)
    options = parser.parse_args()

    rng = np.random.default_rng(3)
    picture, reference = (Image.fromarray(render(sample_scene(rng), seed)) for seed in (0, 1))
    mask = Image.new("L", picture.size)
    ImageDraw.Draw(mask).ellipse((12, 12, 52, 60), fill=255)
    base = ipdiverse.load_base()
    pipe = StableDiffusionInpaintPipeline(**base.pipe.components, requires_safety_checker=False)
    adapter = ipdiverse.load_adapter(adapter_file("critters", "plus"))
    with any_latents(pipe), ipdiverse.attach(pipe, adapter) as attachment:
        attachment.set_reference(reference)
        image = pipe(
            "a critter",
            image=picture,
            mask_image=mask,
            strength=options.strength,
            num_inference_steps=options.steps,
            guidance_scale=base.guidance_scale,
            generator=generator(0, 0),
        ).images[0]

    options.out.mkdir(parents=True, exist_ok=True)
    named = {"picture": picture, "mask": mask, "reference": reference, "image": image}
    for name, shown in named.items():
        shown.save(options.out / f"{name}.png")
    print(f"wrote {options.out / 'image.png'}")


if __name__ == "__main__":
    main()
