"""The oracle: reads the attributes of any 64×64 image, whether it is a valid scene, and placement.

Two plain convolutional nets, trained separately. They share no weights with the encoder that
conditions generation, so an adapter cannot score well by fooling its own encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ipdiverse.critters.render import Jitter, side_of
from ipdiverse.critters.scene import ATTRIBUTES, Scene
from ipdiverse.loading import building

PLACEMENT: Mapping[str, int] = MappingProxyType(
    {"x": 4, "height": 4, "size": 4, "horizon": 4, "item_side": 2}
)
"""What no caption mentions and the oracle reads, and into how many equal bins it goes: the place of
the creature within its `position`, its height and size, the horizon, where the item is held."""

SCALE = ".scale"
"""Ends the name of the scales, one a row, by which a tensor of 8 bits is multiplied."""
_WIDTHS = (32, 64, 128, 192)
_INSPECTOR_WIDTHS = (32, 64, 96)
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


class AttributeReader(nn.Module):
    """Pixels in -1..1, (batch, 3, 64, 64), to logits per attribute in the order of `ATTRIBUTES`."""

    def __init__(self) -> None:
        super().__init__()
        pairs = zip((3, *_WIDTHS[:-1]), _WIDTHS, strict=True)
        self.blocks = nn.Sequential(*[_Block(a, b) for a, b in pairs])
        self.hidden = nn.Linear(_WIDTHS[-1] * 16, 384)
        self.heads = nn.ModuleList([nn.Linear(384, len(v)) for v in ATTRIBUTES.values()])

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Logits, (batch, values) each."""
        hidden = torch.relu(self.hidden(self.blocks(pixels).flatten(1)))
        return [head(hidden) for head in self.heads]


class _Residual(nn.Module):
    """Two convolutions at one resolution, added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, channels)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(x + self.norm2(self.conv2(inner)))


def _halved(channels_in: int, channels_out: int, size: int) -> list[nn.Module]:
    down = nn.Conv2d(channels_in, channels_out, size, stride=2, padding=size // 2)
    return [down, nn.GroupNorm(8, channels_out), nn.ReLU()]


class Inspection(NamedTuple):
    """What `Inspector` sees."""

    valid: Tensor
    """Logit that an image is a valid scene, (batch,)."""
    kinds: Tensor
    """Logits of the kinds of fault it was trained on, (batch, kinds); read in training only."""
    placement: Tensor
    """In the order of `PLACEMENT`, (batch, 5)."""


class Inspector(nn.Module):
    """Finds scenes with a fault, and reads where things are; pixels as `AttributeReader`'s.

    A net of its own: what is learnt for attributes looks past the faults, as a critter without
    eyes still has a colour. It keeps 8×8 positions to the end, so that it can count.
    """

    def __init__(self, kinds: int) -> None:
        super().__init__()
        stem, middle, last = _INSPECTOR_WIDTHS
        self.blocks = nn.Sequential(
            *_halved(3, stem, 5),
            *_halved(stem, middle, 3),
            _Residual(middle),
            *_halved(middle, last, 3),
            _Residual(last),
            nn.Conv2d(last, 32, 1),
            nn.Flatten(),
        )
        self.hidden = nn.Linear(32 * 8 * 8, 128)
        self.valid = nn.Linear(128, 1)
        self.kinds = nn.Linear(128, kinds)
        self.placement = nn.Linear(128, len(PLACEMENT))

    def forward(self, pixels: Tensor) -> Inspection:
        """What it sees in each image."""
        hidden = torch.relu(self.hidden(self.blocks(pixels)))
        valid = self.valid(hidden).squeeze(-1)
        return Inspection(valid, self.kinds(hidden), self.placement(hidden))


class Oracle(nn.Module):
    """Both readers.

    Args:
        kinds: Of fault, that the inspector was trained on.
    """

    def __init__(self, kinds: int) -> None:
        super().__init__()
        self.attributes, self.inspector = AttributeReader(), Inspector(kinds)


class Reading(NamedTuple):
    """What the oracle sees in images: attributes, where no valid scene is shown, and placement."""

    attributes: np.ndarray
    """Indices in the order of `ATTRIBUTES`, int64 (..., 9)."""
    invalid: np.ndarray | None = None
    """bool (...); None in readings that an oracle published without this measure made."""
    placement: np.ndarray | None = None
    """Bins in the order of `PLACEMENT`, int64 (..., 5); None as `invalid`."""


@torch.no_grad()
def read(oracle: Oracle, images: np.ndarray) -> Reading:
    """Read uint8 images (..., size, size, 3); sizes other than 64 are resized first."""
    attributes, invalid, placement = [], [], []
    flat = images.reshape(-1, *images.shape[-3:])
    for start in range(0, len(flat), _BATCH):
        pixels = torch.from_numpy(flat[start : start + _BATCH]).permute(0, 3, 1, 2).float()
        pixels = pixels / 127.5 - 1
        if pixels.shape[-1] != 64:
            pixels = nn.functional.interpolate(pixels, 64, mode="bilinear", antialias=True)
        seen = oracle.inspector(pixels)
        attributes.append(torch.stack([h.argmax(-1) for h in oracle.attributes(pixels)], dim=1))
        invalid.append(seen.valid < 0)
        placement.append(seen.placement)
    shape = images.shape[:-3]
    return Reading(
        torch.cat(attributes).numpy().reshape(*shape, -1),
        torch.cat(invalid).numpy().reshape(shape),
        placement_bins(torch.cat(placement).numpy()).reshape(*shape, -1),
    )


def placement_of(scene: Scene, seed: int) -> tuple[float, ...]:
    """What `PLACEMENT` lists of a render, each 0..1 and uniform over scenes but for the side."""
    jitter = Jitter.from_seed(seed)
    return (
        jitter.x / 0.06 + 0.5,
        (jitter.y - 0.6) / 0.05 + 0.5,
        (jitter.radius - 0.185) / 0.03,
        (jitter.horizon - 0.56) / 0.14,
        float(side_of(scene, jitter) > 0),
    )


def placement_bins(values: np.ndarray) -> np.ndarray:
    """Equal bins of placements (..., 5), so that they are scored as attributes are."""
    bins = np.array(tuple(PLACEMENT.values()))
    return np.clip((values * bins).astype(np.int64), 0, bins - 1)


def load_oracle(file: Path) -> Oracle:
    """Open the oracle that `python -m workshop train-base` shipped."""
    from safetensors.torch import load_file

    stored = load_file(file)
    tensors = {name: _whole(name, stored) for name in stored if not name.endswith(SCALE)}
    with building():
        oracle = Oracle(len(tensors["inspector.kinds.bias"]))
    oracle.load_state_dict(tensors)
    return oracle.eval()


def _whole(name: str, stored: dict[str, Tensor]) -> Tensor:
    """A tensor in float32, as images come: small ones ship in fp16, large ones in 8 bits a row."""
    scale = stored.get(name + SCALE)
    tensor = stored[name].float()
    return tensor if scale is None else tensor * scale.float().view(-1, *[1] * (tensor.dim() - 1))
