"""Region masks: where in the image a reference may act."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ipdiverse.errors import ArgumentError

if TYPE_CHECKING:
    from PIL import Image


class RegionMask:
    """Weights in 0..1 over an image, shrunk once for each resolution that asks.

    Args:
        weights: (batch, height, width); one entry serves every item. Its aspect ratio is the
            output's.
    """

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights
        self._shrunk: dict[int, Tensor] = {}

    def at(self, pixels: int) -> Tensor:
        """Weights over that many pixels in row order, (batch, pixels).

        Raises:
            ArgumentError: No grid of the mask's aspect ratio has so many pixels.
        """
        if pixels not in self._shrunk:
            grid = _grid(pixels, self.weights.shape[-1] / self.weights.shape[-2])
            shrunk = F.interpolate(self.weights[:, None].float(), grid, mode="area")
            self._shrunk[pixels] = shrunk[:, 0].flatten(1)
        return self._shrunk[pixels]

    def repeated(self, branches: int) -> RegionMask:
        """The same for every guidance branch."""
        if len(self.weights) == 1 or branches == 1:
            return self
        return RegionMask(self.weights.repeat(branches, 1, 1))


def mask_weights(image: Image.Image) -> Tensor:
    """A picture as weights, (height, width): white acts, black does not."""
    return torch.from_numpy(np.asarray(image.convert("L"), dtype=np.float32) / 255)


def _grid(pixels: int, ratio: float) -> tuple[int, int]:
    """Height and width of a layer with so many pixels in an image of this aspect ratio."""
    best = min(
        (h for h in range(1, pixels + 1) if pixels % h == 0),
        key=lambda h: abs(math.log(pixels / h / h / ratio)),
    )
    height, width = best, pixels // best
    if abs(math.log(width / height / ratio)) > math.log(1.5):
        raise ArgumentError(
            "does not have the output's aspect ratio",
            where="mask",
            expected=f"width/height near {width / height:.2f}",
            found=f"{ratio:.2f}",
            fix="Draw the mask at the output's size.",
        )
    return height, width
