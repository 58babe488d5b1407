"""From a stored image to what an encoder is shown: the target's pixels, the reference's picture.

Everything random is a variant: number v of an image is always the same, so it can be stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps

from ipdiverse.data.references import augment
from ipdiverse.errors import check_range
from ipdiverse.seeding import derived_seed

if TYPE_CHECKING:
    from typing import Self

    from torch import Tensor

    from ipdiverse.training.config import CacheConfig


@dataclass(frozen=True)
class Preprocessing:
    """How images are shown to encoders.

    Args:
        resolution: Height and width of targets in pixels, a multiple of 8.
        variants: Random crops and flips of each target; 1 is the centre crop alone.
        flip: Whether variants may be mirrored. Wrong for text, faces told by side, and the like.
        changed: Changed references of each image (`references.augment`), beside the image itself.
        seed: Of crops, flips and changes.
    """

    resolution: int = 512
    variants: int = 1
    flip: bool = False
    changed: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_range("resolution", self.resolution, 16, 4096)
        check_range("variants", self.variants, 1, 64)
        check_range("changed", self.changed, 0, 64)
        check_range("resolution modulo 8", self.resolution % 8, 0, 0)

    @classmethod
    def of(cls, config: CacheConfig, resolution: int) -> Self:
        """What a cache is told.

        Args:
            config: Of `embed` or a run.
            resolution: The base's own.
        """
        return cls(
            config.resolution or resolution,
            config.variants,
            config.flip,
            config.changed,
            config.image_seed,
        )

    def target(self, image: Image.Image, sha256: str, variant: int) -> Tensor:
        """One variant of a target, float32 (3, resolution, resolution) in -1..1.

        Variant 0 is the centre; the others are drawn from the seed, the image and the number.

        Args:
            image: RGB.
            sha256: The image's hash.
            variant: From 0.
        """
        scale = self.resolution / min(image.size)
        width, height = (max(self.resolution, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3)
        x, y, mirrored = (width - self.resolution) // 2, (height - self.resolution) // 2, False
        if variant:
            rng = np.random.default_rng(derived_seed(self.seed, sha256, "target", variant))
            x = int(rng.integers(width - self.resolution + 1))
            y = int(rng.integers(height - self.resolution + 1))
            mirrored = self.flip and bool(rng.random() < 0.5)
        image = image.crop((x, y, x + self.resolution, y + self.resolution))
        pixels = np.array(ImageOps.mirror(image) if mirrored else image)
        return torch.from_numpy(pixels).permute(2, 0, 1).float().div(127.5).sub(1)

    def reference(self, image: Image.Image, sha256: str, change: int) -> Image.Image:
        """One picture to prompt with: 0 is the image itself, the others are changed.

        Args:
            image: RGB.
            sha256: The hash of the image or of its file: the same each time.
            change: From 0.
        """
        if change == 0:
            return image
        rng = np.random.default_rng(derived_seed(self.seed, sha256, "reference", change))
        return augment(image, rng)
