"""An image prompt by ipdiverse against stock diffusers: same weights, dtype and seeds, one process.

    python benchmarks/inference.py [--base sd15 sdxl small] [--device cuda] [--dtype float16]
        [--rounds 15] [--sizes 128 256] [--steps 4] [--cells ready repeated] [--out FILE.json]

Architectures of Stable Diffusion 1.5 and XL with random weights, or the embedded base ("small",
also as `--small`). On a GPU, which is taken where there is one, in fp16, with images a second and
the most memory that was in use; `--sizes 512 1024 --steps 30` are usual there. Rounds alternate
between the two, stock first in even rounds; a figure is the median of the rounds' ratios stock /
ours (above 1: ours is faster), with a bootstrap interval of 95 %. Operations are counted too, as
noise hides small differences in time.
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
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import save_file
from timing import flops, machine, most_memory, ratio
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
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


def sdxl() -> StableDiffusionXLPipeline:
    """Stable Diffusion XL's architecture and ViT-H's, with random weights."""
    small = sd15()  # whose first text encoder, image encoder and scheduler it shares
    unet = UNet2DConditionModel(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    text = CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=1280,
            intermediate_size=5120,
            num_hidden_layers=32,
            num_attention_heads=20,
            projection_dim=1280,
        )
    )
    parts = {name: small.components[name] for name in ("vae", "text_encoder", "tokenizer")}
    parts |= {name: small.components[name] for name in ("scheduler", "image_encoder")}
    return StableDiffusionXLPipeline(
        unet=unet,
        text_encoder_2=text,
        tokenizer_2=build_tokenizer(),
        feature_extractor=small.feature_extractor,
        **parts,
    )


BASES = {"sd15": sd15, "sdxl": sdxl, "small": lambda: load_base().pipe}
NAMES = {
    "sd15": "Stable Diffusion 1.5, ViT-H, plus",
    "sdxl": "Stable Diffusion XL, ViT-H, plus",
    "small": "critters",
}


def twin(pipe: Any) -> Any:
    """A second pipeline that shares every weight but has its own attention processors."""
    unet = UNet2DConditionModel.from_config(pipe.unet.config)
    unet.load_state_dict(pipe.unet.state_dict(), assign=True)
    more = {"requires_safety_checker": False} if "safety_checker" in pipe.components else {}
    return type(pipe)(**{**pipe.components, "unet": unet}, **more)


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
        adapter.to(unet.device, unet.dtype)
        self.prompt = attach(self.ours, adapter.requires_grad_(False))
        self.image = Image.fromarray(
            np.random.default_rng(0).integers(0, 255, (224, 224, 3), np.uint8)
        )
        embeds = [torch.randn(2, 1, 257, hidden).to(unet.device, unet.dtype)]
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


def main(words: list[str] | None = None) -> None:
    """Measure and print a table; write JSON where asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", nargs="+", default=["sd15"], choices=BASES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=CELLS)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args(words)
    # a CPU computes fp16 in fp32 at best
    kind = chosen.dtype or ("float32" if chosen.device == "cpu" else "float16")
    cells: list[dict[str, Any]] = []
    fusion = None
    for base in ["small"] if chosen.small else chosen.base:
        pipe = BASES[base]().to(chosen.device, getattr(torch, kind))
        arms = Arms(pipe, {"sd15": 768, "sdxl": 1280, "small": 128}[base], chosen.steps)
        sizes = [64] if base == "small" else chosen.sizes
        for size in sizes:
            for name in chosen.cells:
                cells.append({"architecture": NAMES[base], "size": size, "what": CELLS[name]})
                cells[-1] |= compared(arms, size, name == "repeated", chosen.rounds)
                print(json.dumps(cells[-1]), flush=True)
        fusion = fusion_cost(arms, sizes[0]) if fusion is None else fusion
    report = {
        "architecture": cells[0]["architecture"],
        "steps": chosen.steps,
        "rounds": chosen.rounds,
        **machine(),
        "device": chosen.device,
        "dtype": kind,
        "cells": cells,
        "fusion_flop_share": fusion,
    }
    if chosen.out:
        chosen.out.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))


def compared(arms: Arms, size: int, encode: bool, rounds: int) -> dict[str, Any]:
    """Time of stock over ours, operations, images a second, and on a GPU the memory of each."""
    stock = partial(arms.run_stock, size, encode)
    ours = partial(arms.run_ours, size, encode)
    found: dict[str, Any] = ratio(stock, ours, rounds)
    found |= {"stock_gflop": flops(stock) / 1e9, "ours_gflop": flops(ours) / 1e9}
    for name, run, seconds in (("stock", stock, "before"), ("ours", ours, "after")):
        found[f"{name}_images_a_second"] = 1 / found[f"{seconds}_seconds"]
        found[f"{name}_memory_gb"] = most_memory(run)
    return found


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
