"""A face prompt: an embedding of a recognition model says who, the text says what.

The embedded model has no trained FaceID adapter. Without --adapter a random one is made: the
example then shows the wiring. With a real base:

python examples/face.py --out out/face --base sd15 --adapter ip-adapter-faceid_sd15.bin \
    --faces face.npy
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import ipdiverse
from ipdiverse.adapter.attach.face_embeddings import load_face_embeddings
from ipdiverse.adapter.model import layer_widths
from ipdiverse.adapter.projection import FaceIDProjection
from ipdiverse.provenance import generator

FACE_DIM = 512  # of the recognition model (ArcFace)


def main() -> None:
    """Prompt with a face embedding from a file, or with a random one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="critters")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--faces", type=Path, help=".npy, .json or .safetensors")
    parser.add_argument("--steps", type=int, default=25)
    options = parser.parse_args()

    base = ipdiverse.load_base(options.base)
    if options.adapter:
        adapter = ipdiverse.load_adapter(options.adapter)
    else:
        widths = layer_widths(base.pipe.unet)
        projection = FaceIDProjection(FACE_DIM, next(iter(widths.values()))[0])
        adapter = ipdiverse.ImagePromptAdapter(projection, widths)
    torch.manual_seed(0)
    faces = load_face_embeddings(options.faces) if options.faces else torch.randn(1, FACE_DIM)
    with ipdiverse.attach(base.pipe, adapter) as attachment:
        attachment.set_reference(ipdiverse.Reference(faces=faces))
        prompt, steps = "a portrait", options.steps
        image = base.pipe(prompt, num_inference_steps=steps, generator=generator(0, 0)).images[0]

    options.out.mkdir(parents=True, exist_ok=True)
    image.save(options.out / "image.png")
    print(f"wrote {options.out / 'image.png'}")


if __name__ == "__main__":
    main()
