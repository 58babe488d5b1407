"""An image prompt by ipdiverse against stock diffusers: same weights, dtype and seeds, one process.

    python benchmarks/inference.py [--rounds 15] [--sizes 128 256] [--steps 4] [--small]
        [--cells ready repeated] [--out FILE.json]

The Stable Diffusion 1.5 architecture with random weights (`--small`: the embedded one). Rounds
alternate between the two, stock first in even rounds; a figure is the median of the rounds' ratios
stock / ours (above 1: ours is faster), with a bootstrap interval of 95 %. Operations are counted
too, as noise hides small differences in time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from timing import flops, machine, ratio
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from ipdiverse import attach, load_base
from ipdiverse.adapter.fusion import GatedFusion
from ipdiverse.adapter.model import ImagePromptAdapter, layer_widths
from ipdiverse.adapter.projection import ResamplerProjection
from workshop.base.tokenizer import build_tokenizer

CELLS = {"ready": "ready embeddings", "repeated": "the same image again"}
"""Input of a call: embeddings computed before, or the same reference image as in the last call."""


def sd15() -> StableDiffusionPipeline:
    """Stable Diffusion 1.5's architecture and ViT-H's, with random weights."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=64,
        cross_attention_dim=768,
        attention_head_dim=8,
        block_out_channels=(320, 640, 1280, 1280),
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=77,
        )
    )
    image = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=1280,
            intermediate_size=5120,
            projection_dim=1024,
            num_hidden_layers=32,
            num_attention_heads=16,
            image_size=224,
            patch_size=14,
        )
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=build_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=CLIPImageProcessor(),
        image_encoder=image,
        requires_safety_checker=False,
    )


def twin(pipe: Any) -> Any:
    """A second pipeline that shares every weight but has its own attention processors."""
    unet = UNet2DConditionModel.from_config(pipe.unet.config)
    unet.load_state_dict(pipe.unet.state_dict(), assign=True)
    parts = {**pipe.components, "unet": unet}
    return type(pipe)(**parts, requires_safety_checker=False)


class Arms:
    """Stock diffusers and ours, with the same adapter.

    Args:
        pipe: The base.
        width: Of the resampler.
        steps: Denoising steps of a call.
    """

    def __init__(self, pipe: Any, width: int, steps: int) -> None:
        self.steps = steps
        self.stock, self.ours = pipe, twin(pipe)
        for each in (self.stock, self.ours):
            each.set_progress_bar_config(disable=True)
        unet, hidden = pipe.unet, pipe.image_encoder.config.hidden_size
        widths = layer_widths(unet)
        token_width = unet.config.cross_attention_dim
        torch.manual_seed(1)
        projection = ResamplerProjection(hidden, token_width, 16, width, depth=4)
        adapter = ImagePromptAdapter(projection, widths)
        with tempfile.TemporaryDirectory() as folder:
            save_file(adapter.state_dict(), Path(folder) / "a.safetensors")
            self.stock.load_ip_adapter(folder, subfolder="", weight_name="a.safetensors")
        for module in (self.stock.unet, self.ours.unet, pipe.text_encoder, pipe.image_encoder):
            module.requires_grad_(False)
        self.prompt = attach(self.ours, adapter.requires_grad_(False))
        self.image = Image.fromarray(
            np.random.default_rng(0).integers(0, 255, (224, 224, 3), np.uint8)
        )
        embeds = [torch.randn(2, 1, 257, hidden)]
        self.embeds = [e[:, :, : self._patches()] for e in embeds]

    def _patches(self) -> int:
        config = self.stock.image_encoder.config
        return (config.image_size // config.patch_size) ** 2 + 1

    def call(self, pipe: Any, size: int, **options: Any) -> None:
        """Guided steps, without decoding."""
        pipe(
            "a cat in the snow",
            num_inference_steps=self.steps,
            guidance_scale=7.5,
            width=size,
            height=size,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            **options,
        )

    def run_stock(self, size: int, encode: bool) -> None:
        """Stock: with the image, or with ready embeddings."""
        given = (
            {"ip_adapter_image": self.image} if encode else {"ip_adapter_image_embeds": self.embeds}
        )
        self.call(self.stock, size, **given)

    def run_ours(self, size: int, encode: bool) -> None:
        """Ours: the same."""
        from ipdiverse.adapter.reference import Reference

        negative, positive = self.embeds[0].unbind(0)
        if encode:
            self.prompt.set_reference(self.image)
        else:
            self.prompt.set_reference(
                Reference(embeds=[positive]), negative=Reference(embeds=[negative])
            )
        self.call(self.ours, size)


def main() -> None:
    """Measure and print a table; write JSON where asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=CELLS)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    pipe: Any = load_base().pipe if chosen.small else sd15()
    width = 128 if chosen.small else 768
    sizes = [64] if chosen.small else chosen.sizes
    cells: list[dict[str, Any]] = []
    arms = Arms(pipe, width, chosen.steps)
    for size in sizes:
        for name in chosen.cells:
            encode = name == "repeated"
            stock = partial(arms.run_stock, size, encode)
            ours = partial(arms.run_ours, size, encode)
            cell = {"size": size, "what": CELLS[name]}
            cell |= ratio(stock, ours, chosen.rounds)
            cell |= {"stock_gflop": flops(stock) / 1e9, "ours_gflop": flops(ours) / 1e9}
            cells.append(cell)
            print(json.dumps(cell), flush=True)
    fusion = fusion_cost(arms, sizes[0])
    report = {
        "architecture": "critters" if chosen.small else "Stable Diffusion 1.5, ViT-H, plus",
        "steps": chosen.steps,
        "rounds": chosen.rounds,
        **machine(),
        "cells": cells,
        "fusion_flop_share": fusion,
    }
    if chosen.out:
        chosen.out.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))


def fusion_cost(arms: Arms, size: int) -> float:
    """Share of operations that a gated fusion adds to a call."""
    adapter = arms.prompt.adapters[0]
    plain = flops(lambda: arms.run_ours(size, False))
    adapter.fusion = GatedFusion(adapter.token_width, 16, heads=8).requires_grad_(False)
    fused = flops(lambda: arms.run_ours(size, False))
    adapter.fusion = None
    return fused / plain - 1


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    rows = [
        f"| {c['size']} px, {c['what']} | {c['ratio']:.3f} | {c['low']:.3f} to {c['high']:.3f} "
        f"| {c['stock_gflop']:.0f} | {c['ours_gflop']:.0f} |"
        for c in report["cells"]
    ]
    head = ["| cell | stock / ours | 95 % | stock GFLOP | ours GFLOP |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows, f"\nfusion adds {report['fusion_flop_share']:.3%} operations"])


if __name__ == "__main__":
    main()
