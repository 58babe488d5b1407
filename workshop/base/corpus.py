"""A pool of rendered scenes that every stage draws from, made once and memory-mapped."""

from __future__ import annotations

import os
from dataclasses import dataclass
from multiprocessing import Pool
from typing import TYPE_CHECKING

import numpy as np
import torch

from ipdiverse.base.memory import autocast
from ipdiverse.critters.render import render
from ipdiverse.critters.scene import ATTRIBUTES, Scene, sample_scene
from ipdiverse.provenance import derived_seed
from workshop.base.architecture import IMAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

_CHUNK = 500
_BATCH = 200


@dataclass(frozen=True)
class Corpus:
    """Rendered scenes of one split.

    Args:
        images: uint8, (count, size, size, 3).
        attributes: int64, (count, 9), indices in the order of `ATTRIBUTES`.
        name: Split, seed, size and count: what the scenes were drawn from.
    """

    images: np.ndarray
    attributes: np.ndarray
    name: str

    def __len__(self) -> int:
        return len(self.images)

    def scene(self, index: int) -> Scene:
        """The scene of one image."""
        values = zip(ATTRIBUTES.items(), self.attributes[index], strict=True)
        return Scene(**{name: allowed[i] for (name, allowed), i in values})

    def pixels(self, indices: np.ndarray) -> Tensor:
        """Images as float32 in -1..1, (batch, 3, size, size)."""
        return to_pixels(self.images[indices])


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 (batch, size, size, 3) to float32 (batch, 3, size, size) in -1..1, channels last."""
    # a copy: a memory-mapped array is read-only, which torch does not support
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def draw(split: str, seed: int, index: int) -> tuple[Scene, int]:
    """Scene number `index` of a split and the seed that renders it."""
    rng = np.random.default_rng(derived_seed(seed, split, index))
    return sample_scene(rng, split=split), derived_seed(seed, split, index, "render")


def _chunk(job: tuple[str, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    split, seed, start, stop = job
    drawn = [draw(split, seed, index) for index in range(start, stop)]
    images = np.stack([render(scene, render_seed, IMAGE_SIZE) for scene, render_seed in drawn])
    return images, np.array([scene.indices() for scene, _ in drawn], dtype=np.int64)


def corpus(folder: Path, split: str, count: int, seed: int = 0) -> Corpus:
    """Open the pool of a split, rendering it on all cores the first time."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{split}-{seed}-{IMAGE_SIZE}-{count}"
    image_file, attribute_file = folder / f"{stem}.images.npy", folder / f"{stem}.attributes.npy"
    if not (image_file.exists() and attribute_file.exists()):
        jobs = [(split, seed, i, min(i + _CHUNK, count)) for i in range(0, count, _CHUNK)]
        with Pool(os.cpu_count()) as pool:
            images, attributes = zip(*pool.map(_chunk, jobs, chunksize=1), strict=True)
        for file, arrays in ((attribute_file, attributes), (image_file, images)):
            save_array(file, np.concatenate(arrays))
    return Corpus(np.load(image_file, mmap_mode="r"), np.load(attribute_file), stem)


@torch.no_grad()
def encoded_once(file: Path, corpus: Corpus, encode: Callable[[Tensor], Tensor]) -> np.ndarray:
    """An encoder's output for every image, float16; later calls open the file, memory-mapped.

    Args:
        file: The file to keep it in; its name must differ for other scenes or weights.
        corpus: The images.
        encode: Pixels (batch, 3, size, size), channels last, to (batch, ...).
    """
    if not file.exists():
        parts = []
        for start in range(0, len(corpus), _BATCH):
            pixels = corpus.pixels(np.arange(start, min(start + _BATCH, len(corpus))))
            with autocast():
                encoded = encode(pixels.contiguous(memory_format=torch.channels_last))
            parts.append(encoded.half().numpy())
        save_array(file, np.concatenate(parts))
    return np.load(file, mmap_mode="r")


def save_array(file: Path, array: np.ndarray) -> None:
    """Write an array whole or not at all."""
    temporary = file.with_suffix(".partial.npy")  # np.save appends .npy to any other suffix
    np.save(temporary, array)
    temporary.replace(file)
