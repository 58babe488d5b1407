"""PyTorch's plain attention against its fused one on this CPU, forward and backward.

    python benchmarks/attention.py [--rounds 7] [--out FILE.json]

`training.loss.fast_backward` chooses by these ratios. Above 1 the fused one is faster.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from timing import machine, ratio
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

SHAPES = ((1, 8, 4096, 40), (1, 8, 1024, 80), (4, 8, 576, 8), (4, 8, 144, 16), (64, 4, 64, 24))
"""(batch, heads, tokens, head width): SD 1.5's largest, two of its miniature, critters'."""


def both_ways(shape: tuple[int, int, int, int], dtype: torch.dtype, backend: SDPBackend) -> None:
    """One attention and its gradients."""
    query, key, value = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    with sdpa_kernel(backend):
        F.scaled_dot_product_attention(query, key, value).sum().backward()


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    rounds, cells = chosen.rounds, []
    print(machine())
    print("| tokens | type | plain / fused | 95 % |\n|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            found = ratio(
                lambda shape=shape, dtype=dtype: both_ways(shape, dtype, SDPBackend.MATH),
                lambda shape=shape, dtype=dtype: both_ways(
                    shape, dtype, SDPBackend.FLASH_ATTENTION
                ),
                rounds,
            )
            name = str(dtype).removeprefix("torch.")
            spread = f"{found['low']:.2f} to {found['high']:.2f}"
            cells.append({"what": f"{shape[2]} tokens, {name}, both ways", **found})
            print(f"| {shape[2]} | {name} | {found['ratio']:.2f} | {spread} |", flush=True)
    if chosen.out:
        report = {**machine(), "rounds": rounds, "cells": cells}
        chosen.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
