"""The oracle: reads the attributes of any 64×64 image and whether it is a valid scene.

A plain convolutional classifier, trained separately. It shares no weights with the encoder that
conditions generation, so an adapter cannot score well by fooling its own encoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ipdiverse.critters.scene import ATTRIBUTES
from ipdiverse.loading import building

if TYPE_CHECKING:
    from pathlib import Path


_WIDTHS = (32, 64, 128, 192)
_BATCH = 256


class _Block(nn.Module):
    """Halve the resolution, then one residual convolution."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1)
        self.norm1 = nn.GroupNorm(8, channels_out)
        self.conv = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.down(x)))
        return torch.relu(x + self.norm2(self.conv(x)))


class Oracle(nn.Module):
    """Pixels in -1..1, (batch, 3, 64, 64), to logits per attribute and one for validity."""

    def __init__(self) -> None:
        super().__init__()
        pairs = zip((3, *_WIDTHS[:-1]), _WIDTHS, strict=True)
        self.blocks = nn.Sequential(*[_Block(a, b) for a, b in pairs])
        features = _WIDTHS[-1] * 16
        self.hidden = nn.Linear(features, 384)
        self.heads = nn.ModuleList([nn.Linear(384, len(v)) for v in ATTRIBUTES.values()])
        self.valid = nn.Linear(384, 1)

    def forward(self, pixels: Tensor) -> tuple[list[Tensor], Tensor]:
        """Attribute logits in the order of `ATTRIBUTES`, and the validity logit (batch,)."""
        hidden = torch.relu(self.hidden(self.blocks(pixels).flatten(1)))
        return [head(hidden) for head in self.heads], self.valid(hidden).squeeze(-1)


class Reading(NamedTuple):
    """What the oracle sees in images: attributes, and where no valid scene is shown."""

    attributes: np.ndarray
    """Indices in the order of `ATTRIBUTES`, int64 (..., 9)."""
    invalid: np.ndarray
    """bool (...)."""


@torch.no_grad()
def read(oracle: Oracle, images: np.ndarray) -> Reading:
    """Read uint8 images (..., size, size, 3); sizes other than 64 are resized first."""
    attributes, invalid = [], []
    flat = images.reshape(-1, *images.shape[-3:])
    for start in range(0, len(flat), _BATCH):
        pixels = torch.from_numpy(flat[start : start + _BATCH]).permute(0, 3, 1, 2).float()
        pixels = pixels / 127.5 - 1
        if pixels.shape[-1] != 64:
            pixels = nn.functional.interpolate(pixels, 64, mode="bilinear", antialias=True)
        logits, valid = oracle(pixels)
        attributes.append(torch.stack([head.argmax(-1) for head in logits], dim=1))
        invalid.append(valid < 0)
    seen, shape = torch.cat(attributes).numpy(), images.shape[:-3]
    return Reading(seen.reshape(*shape, -1), torch.cat(invalid).numpy().reshape(shape))


def load_oracle(file: Path) -> Oracle:
    """Open the oracle that `python -m workshop train-base` saved."""
    from safetensors.torch import load_file

    with building():
        oracle = Oracle()
    # it ships in fp16 to be small; images come as float32
    oracle.load_state_dict({name: tensor.float() for name, tensor in load_file(file).items()})
    return oracle.eval()
