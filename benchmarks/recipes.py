"""What the recipes cost on one GPU, from counted operations; nothing is computed (meta device).

Operations are multiplications and additions. Seconds are those of a GPU that reaches 40 % of
312 · 10¹² a second (an A100 in bf16); reading and decoding pictures comes on top.
"""

from __future__ import annotations

import json

import torch
from timing import flops
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig
from transformers import CLIPVisionModelWithProjection as Vision

from ipdiverse.adapter.generative import GenerativeFusion
from ipdiverse.adapter.projection import LinearProjection, ResamplerProjection

PAIRS = 112_000
"""Of Subjects200K whose three notes are 5 of 5, as its authors count them."""
STEPS, BATCH = 20_000, 256
PER_SECOND = 0.4 * 312e12
DIRECTIONS = 256


def _vit_h() -> int:
    config = CLIPVisionConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=16,
        patch_size=14,
        projection_dim=1024,
    )
    encoder = Vision(config)
    return flops(lambda: encoder(pixel_values=torch.empty(1, 3, 224, 224)))


def _text(width: int, layers: int) -> int:
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
    )
    encoder = CLIPTextModel(config)
    return flops(lambda: encoder(input_ids=torch.zeros(1, 77, dtype=torch.long)))


def _step(width: int, tokens: int) -> int:
    """Operations of one sample of a training step: forward, and backward for twice as much."""
    fusion = GenerativeFusion(width, tokens, DIRECTIONS, words=77)
    some, text = torch.empty(2, tokens, width), torch.empty(2, 77, width)
    both = torch.empty(2, 2, tokens, width)
    mask = torch.ones(2, 77, dtype=torch.bool)
    forward = flops(lambda: fusion.losses(some, some, text, mask, both, torch.empty(2)))
    return 3 * forward // 2


def _hours(operations: float) -> float:
    return round(operations / PER_SECOND / 3600, 2)


def main() -> None:
    """Print the costs as JSON."""
    with torch.device("meta"), torch.inference_mode():
        pooled, hidden = torch.empty(1, 1024), torch.empty(1, 257, 1280)
        base, small = LinearProjection(1024, 768), ResamplerProjection(1280, 768)
        large = ResamplerProjection(1280, 2048, width=1280)
        picture, clip_l, bigg = _vit_h(), _text(768, 12), _text(1280, 32)
        sizes = {
            "sd15": (flops(lambda: base(pooled)), clip_l, 768, 4, 1024),
            "sd15-plus": (flops(lambda: small(hidden)), clip_l, 768, 16, 257 * 1280),
            "sdxl-plus": (flops(lambda: large(hidden)), clip_l + bigg, 2048, 16, 257 * 1280),
        }
        found = {
            name: {
                "fit_hours": _hours(2 * PAIRS * (picture + 2 * projection + text)),
                "cache_gb": round(2 * PAIRS * 2 * numbers / 1e9, 1),
                "generative_hours": _hours(STEPS * BATCH * (_step(width, tokens) + 2 * projection)),
            }
            for name, (projection, text, width, tokens, numbers) in sizes.items()
        }
    print(json.dumps({"pairs": PAIRS, "operations_of_a_picture": picture} | found, indent=1))


if __name__ == "__main__":
    main()
