"""Variety by one line: `python examples/one_line.py --out out/one_line --steps 25`."""

import sys
from pathlib import Path

import ipdiverse
from ipdiverse.base.adapters import CRITTERS_ADAPTERS as FOLDER

file, how = Path(sys.argv[2], "snow.png"), {"num_inference_steps": int(sys.argv[4])}
pipe = ipdiverse.load_base().pipe  # or StableDiffusionPipeline.from_pretrained(…)
photo = pipe("a red critter on the beach", **how).images[0]
pipe.load_ip_adapter(str(FOLDER), subfolder="", weight_name="ip-adapter-plus_critters.safetensors")
ipdiverse.diversify(pipe, 1.0)  # the one line
image = pipe("a critter in the snow", ip_adapter_image=photo, **how).images[0]
file.parent.mkdir(parents=True, exist_ok=True)
image.save(file)
print(f"wrote {file}")
