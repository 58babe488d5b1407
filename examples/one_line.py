"""Variety for a script of stock diffusers: one line more.

python examples/one_line.py --out out/one_line
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

import ipdiverse
from ipdiverse.base.adapters import CRITTERS_ADAPTERS
from ipdiverse.contact_sheet import contact_sheet
from ipdiverse.critters.render import render
from ipdiverse.critters.scene import sample_scene
from ipdiverse.seeding import generator

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--steps", type=int, default=25)
options = parser.parse_args()

photo = Image.fromarray(render(sample_scene(np.random.default_rng(3)), 0))
pipe = ipdiverse.load_base().pipe  # or StableDiffusionPipeline.from_pretrained(…)
pipe.load_ip_adapter(
    str(CRITTERS_ADAPTERS), subfolder="", weight_name="ip-adapter-plus_critters.safetensors"
)
ipdiverse.diversify(pipe, 1.0)  # the one line
images = pipe(
    "a critter in the snow",
    ip_adapter_image=photo,
    num_images_per_prompt=4,
    num_inference_steps=options.steps,
    guidance_scale=3.0,
    generator=[generator(0, number) for number in range(4)],
).images

options.out.mkdir(parents=True, exist_ok=True)
captions = [f"seed {number}" for number in range(4)]
sheet = contact_sheet(photo, images, captions, title="diversity 1")
sheet.save(options.out / "contact_sheet.png")
print(f"wrote {options.out / 'contact_sheet.png'}")
