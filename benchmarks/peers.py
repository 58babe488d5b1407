"""One guided step of Stable Diffusion 1.5's UNet with an image prompt, against others' own code.

    python benchmarks/peers.py [--rounds 15] [--size 256] [--narrow 2] [--out FILE.json]
        [--original PATH] [--comfyui PATH]

Peers are used where they are at hand, and named in the report where they are not: stock diffusers;
the attention modules of the original (a checkout of tencent-ailab/IP-Adapter, also by the variable
IPDIVERSE_ORIGINAL); ComfyUI's own UNet (IPDIVERSE_COMFYUI, run with its Python), which knows no
image prompt and so does less. All alternate in one process, with random weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from fast import our_steps, sd15_unet, stock_step
from timing import alternating, flops, machine, ratio_of

if TYPE_CHECKING:
    from collections.abc import Callable

TOKENS = 16
STOCK = "stock diffusers' IP-Adapter"
ORIGINAL = "the original's attention modules"
COMFYUI = "ComfyUI's UNet, without an image prompt"


def original(checkout: str, size: int, narrow: int) -> Callable[[], Any]:
    """A step with the original's processors; its pipelines need versions that are long gone."""
    file = Path(checkout or "nowhere") / "ip_adapter/attention_processor.py"
    spec = importlib.util.spec_from_file_location("original_attention", file)
    if spec is None or spec.loader is None:
        raise ImportError(file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    unet = sd15_unet(narrow)
    processors = {}
    for name in unet.attn_processors:
        if "attn1" in name:
            processors[name] = module.AttnProcessor2_0()
            continue
        width = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
        processors[name] = module.IPAttnProcessor2_0(width, 768, num_tokens=TOKENS)
    unet.set_attn_processor(processors)
    unet.requires_grad_(False)
    sample, text = torch.randn(2, 4, size // 8, size // 8), torch.randn(2, 77 + TOKENS, 768)
    return lambda: unet(sample, 1, text)


def comfyui(folder: str, size: int, narrow: int) -> Callable[[], Any]:
    """A step of ComfyUI's own UNet of the same sizes."""
    if not folder:
        raise ImportError("no folder of ComfyUI was named")
    sys.path.insert(0, folder)
    arguments, sys.argv = sys.argv, ["main.py", "--cpu"]  # read when it is imported
    try:
        import comfy.options  # type: ignore[import-not-found]

        comfy.options.enable_args_parsing()
        import comfy.ops  # type: ignore[import-not-found]
        from comfy.ldm.modules.diffusionmodules.openaimodel import (  # type: ignore[import-not-found]
            UNetModel,
        )
    finally:
        sys.argv = arguments
    # as comfy/model_detection.py has Stable Diffusion 1.5
    unet = UNetModel(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=320 // narrow,
        num_res_blocks=[2] * 4,
        channel_mult=(1, 2, 4, 4),
        num_heads=8,
        use_spatial_transformer=True,
        transformer_depth=[1] * 6 + [0] * 2,
        transformer_depth_middle=1,
        transformer_depth_output=[1] * 9 + [0] * 3,
        context_dim=768,
        legacy=False,
        dtype=torch.float32,
        device="cpu",
        operations=comfy.ops.disable_weight_init,
    )
    for parameter in unet.parameters():  # made without values, which may be slow to compute with
        torch.nn.init.normal_(parameter, std=0.02)
    unet.requires_grad_(False)
    sample, text = torch.randn(2, 4, size // 8, size // 8), torch.randn(2, 77, 768)
    return lambda: unet(sample, torch.ones(2), text)


@torch.no_grad()
def measured(size: int, narrow: int, rounds: int, places: dict[str, str]) -> list[dict[str, Any]]:
    """Each peer's time over ours, or why it is not at hand."""
    torch.manual_seed(0)
    [(_, ours)] = our_steps(size, 0, narrow).values()
    runs: dict[str, Callable[[], Any]] = {"ours": ours, STOCK: stock_step(size, narrow)}
    absent: dict[str, str] = {}
    for name, make in ((ORIGINAL, original), (COMFYUI, comfyui)):
        try:
            runs[name] = make(places[name], size, narrow)
        except (ImportError, OSError) as error:
            absent[name] = f"{type(error).__name__}: {error}".replace(places[name] or "\0", "…")
    operations = {name: flops(run) for name, run in runs.items()}
    times = alternating(runs, rounds)
    cells: list[dict[str, Any]] = [
        {
            "peer": name,
            "size": size,
            **ratio_of(times[name], times["ours"]),
            "operations_ratio": operations[name] / operations["ours"],
        }
        for name in list(runs)[1:]
    ]
    return cells + [{"peer": name, "not_at_hand": why} for name, why in absent.items()]


def main(words: list[str] | None = None) -> None:
    """Measure and print; write JSON where asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--narrow", type=int, default=2)
    parser.add_argument("--original", default=os.environ.get("IPDIVERSE_ORIGINAL", ""))
    parser.add_argument("--comfyui", default=os.environ.get("IPDIVERSE_COMFYUI", ""))
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args(words)
    places = {ORIGINAL: chosen.original, COMFYUI: chosen.comfyui}
    report = {
        "what": f"one guided step, SD 1.5's architecture, {chosen.narrow} times narrower",
        "rounds": chosen.rounds,
        **machine(),
        "cells": measured(chosen.size, chosen.narrow, chosen.rounds, places),
    }
    text = json.dumps(report, indent=1) + "\n"
    sys.stdout.write(text)
    if chosen.out:
        chosen.out.write_text(text)


if __name__ == "__main__":
    main()
