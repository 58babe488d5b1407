from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ipdiverse.sampling.selection import judged, select


def value(worth: torch.Tensor, apart: torch.Tensor, group: tuple[int, ...], weight: float) -> float:
    pairs = sum(float(apart[i, j]) for i, j in combinations(group, 2))
    return float(worth[list(group)].sum()) + weight * pairs / max(1, len(group) - 1)


@pytest.mark.parametrize("seed", range(6))
def test_the_group_is_nearly_the_best_there_is(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    worth = torch.randn(9, generator=rng)
    points = torch.randn(9, 3, generator=rng)
    apart = torch.cdist(points, points)
    found = tuple(select(worth, apart, 4))
    values = sorted(value(worth, apart, g, 1.0) for g in combinations(range(9), 4))
    assert value(worth, apart, found, 1.0) >= values[-3]


def test_worth_decides_alone_without_weight_and_distance_alone_without_worth() -> None:
    worth = torch.tensor([0.0, 3.0, 1.0, 2.0])
    line = torch.tensor([[0.0], [0.1], [0.2], [5.0]])
    apart = torch.cdist(line, line)
    assert select(worth, apart, 2, weight=0.0) == [1, 3]
    assert select(torch.zeros(4), apart, 2) == [0, 3]


def test_as_many_as_there_are_is_all_of_them() -> None:
    assert select(torch.zeros(3), torch.zeros(3, 3), 3) == [0, 1, 2]
    assert select(torch.zeros(3), torch.zeros(3, 3), 5) == [0, 1, 2]


def test_previews_are_decoded_where_the_pipeline_computes() -> None:
    """An offloaded VAE waits on the CPU and moves itself to the accelerator, but no arguments."""
    decoded: list[Any] = []

    class Vae:
        dtype, device = torch.float32, torch.device("cpu")
        config = SimpleNamespace(scaling_factor=0.5)

        def decode(self, latents: torch.Tensor) -> Any:
            decoded.append(latents.device.type)
            return SimpleNamespace(sample=torch.rand(len(latents), 3, 16, 16))

    class Encoder(torch.nn.Linear):
        config = SimpleNamespace(image_size=8)

        def forward(self, pixels: torch.Tensor) -> Any:
            return SimpleNamespace(image_embeds=pixels.flatten(1)[:, :4])

    pipe = SimpleNamespace(vae=Vae(), vae_scale_factor=8, _execution_device=torch.device("meta"))
    attachment: Any = SimpleNamespace(
        pipe=pipe, image_encoder=Encoder(1, 1), image_processor=SimpleNamespace()
    )
    worth, apart = judged(attachment, torch.rand(3, 4, 2, 2), ["a", "a", "b"])
    assert decoded == ["meta"]
    assert worth.shape == (3,)
    assert apart.shape == (3, 3)
