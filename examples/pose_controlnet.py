"""An image prompt with a ControlNet: the reference says who, the drawing says where limbs go.

The embedded model has no trained ControlNet. Without --controlnet an untrained one is made from its
UNet: the example then shows the wiring, and the drawing has no effect.

python examples/pose_controlnet.py --out out/pose
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image, ImageDraw

import ipdiverse
from ipdiverse.base.adapters import adapter_file
from ipdiverse.critters.render import render
from ipdiverse.critters.scene import sample_scene
from ipdiverse.provenance import generator


def main() -> None:
    """Attach to a ControlNet pipeline as to any other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--controlnet", help="a folder or hub id")
    parser.add_argument("--steps", type=int, default=25)
    options = parser.parse_args()

    pose = Image.new("RGB", (64, 64))
    ImageDraw.Draw(pose).line([(20, 56), (32, 36), (32, 16), (46, 28)], fill="orange", width=3)
    reference = Image.fromarray(render(sample_scene(np.random.default_rng(3)), 0))
    base = ipdiverse.load_base()
    if options.controlnet:
        controlnet = ControlNetModel.from_pretrained(options.controlnet)
    else:
        controlnet = ControlNetModel.from_unet(base.pipe.unet)
    pipe = StableDiffusionControlNetPipeline(
        **base.pipe.components, controlnet=controlnet, requires_safety_checker=False
    )
    adapter = ipdiverse.load_adapter(adapter_file("critters", "plus"))
    with ipdiverse.attach(pipe, adapter) as attachment:
        attachment.set_reference(reference)
        image = pipe(
            "a critter", image=pose, num_inference_steps=options.steps, generator=generator(0, 0)
        ).images[0]

    options.out.mkdir(parents=True, exist_ok=True)
    for name, picture in (("reference", reference), ("pose", pose), ("image", image)):
        picture.save(options.out / f"{name}.png")
    print(f"wrote {options.out / 'image.png'}")


if __name__ == "__main__":
    main()
