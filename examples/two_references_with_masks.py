"""Two references in one image, each in its own region.

python examples/two_references_with_masks.py --out out/masks
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import ipdiverse
from ipdiverse.base.adapters import adapter_file
from ipdiverse.critters.render import render
from ipdiverse.critters.scene import sample_scene
from ipdiverse.provenance import generator


def main() -> None:
    """The first reference acts on the left, the second on the right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompt", default="two critters side by side")
    parser.add_argument("--steps", type=int, default=25)
    options = parser.parse_args()

    rng = np.random.default_rng(3)
    references = [Image.fromarray(render(sample_scene(rng), seed)) for seed in (0, 1)]
    masks = [Image.new("L", (64, 64)) for _ in references]  # white is where a reference acts
    for mask, left in zip(masks, (0, 32), strict=True):
        ImageDraw.Draw(mask).rectangle((left, 0, left + 31, 63), fill=255)
    base = ipdiverse.load_base()
    adapter = ipdiverse.load_adapter(adapter_file("critters", "plus"))
    with ipdiverse.attach(base.pipe, adapter) as attachment:
        attachment.set_reference(ipdiverse.Reference(references, masks=masks))
        image = base.pipe(
            options.prompt,
            num_inference_steps=options.steps,
            guidance_scale=base.guidance_scale,
            generator=generator(0, 0),
        ).images[0]

    options.out.mkdir(parents=True, exist_ok=True)
    named = {"left": references[0], "right": references[1], "image": image}
    for name, shown in named.items():
        shown.save(options.out / f"{name}.png")
    print(f"wrote {options.out / 'image.png'}")


if __name__ == "__main__":
    main()
