"""Stage `inspector`: tells valid scenes from planted faults, and reads placement.

A pool of both is drawn once and kept. Half of it went through the VAE, a little noise added to the
latents, as images that are generated come from latents that are slightly off.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from multiprocessing import Pool
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ipdiverse.base.memory import autocast
from ipdiverse.critters.oracle import PLACEMENT, placement_of
from ipdiverse.critters.render import render
from ipdiverse.critters.scene import Scene, sample_scene
from ipdiverse.provenance import derived_seed
from workshop.base.corpus import save_array, to_pixels
from workshop.base.faults import TRAINED, faulty
from workshop.base.oracle import jitter, round_trip

if TYPE_CHECKING:
    from pathlib import Path

    from ipdiverse.critters.oracle import Inspector

VALID, MIXED = "valid", "mixed latents"
KINDS = (VALID, *TRAINED, MIXED)
"""What an image of the pool is; `MIXED` are decoded from the latents of two scenes."""
_LATENT_NOISE = 0.15
"""Largest deviation of noise on latents, in their own deviations."""
_FALSE_ALARMS = 0.004
"""Share of valid validation images that the threshold lets be called invalid."""
_ROUND = 50
_MIRRORED = torch.tensor([name in ("x", "item_side") for name in PLACEMENT])


@dataclass(frozen=True)
class Inspected:
    """Images of one pool, what they are, and where things are in them.

    Args:
        images: uint8, (count, 64, 64, 3).
        kinds: Indices in `KINDS`, (count,).
        placement: In the order of `PLACEMENT`, (count, 5); read of valid scenes only.
        decoded: Which are VAE round trips, (count,).
    """

    images: np.ndarray
    kinds: np.ndarray
    placement: np.ndarray
    decoded: np.ndarray


def scene_with(kind: str, split: str, seed: int, size: int = 64) -> tuple[Scene, int, np.ndarray]:
    """A scene, the seed that renders it, and its image with a fault of this kind to be seen."""
    rng = np.random.default_rng(derived_seed(seed, split, kind))
    while True:
        scene, rendered = sample_scene(rng, split=split), int(rng.integers(2**31))
        whole = kind in (VALID, MIXED)
        image = render(scene, rendered, size) if whole else faulty(kind, scene, rendered, size)
        if image is not None:
            return scene, rendered, image


def _open_vae(folder: Path) -> None:
    """In every worker: its own VAE, on one core."""
    from diffusers import AutoencoderKL

    torch.set_num_threads(1)
    vae: Any = AutoencoderKL.from_pretrained(folder)
    _worker["vae"] = vae.to(memory_format=torch.channels_last)


_worker: dict[str, Any] = {}


def _some(job: tuple[str, str, int, int, bool]) -> tuple[np.ndarray, np.ndarray]:
    kind, split, start, stop, through_vae = job
    drawn = [scene_with(kind, split, index) for index in range(start, stop)]
    images = np.stack([image for _, _, image in drawn])
    if through_vae:
        images = decoded(_worker["vae"], images, kind, start)
    return images, np.array([placement_of(scene, seed) for scene, seed, _ in drawn], np.float32)


def pool(folder: Path, vae: Path, split: str, each: int) -> Inspected:
    """Images of a split, as many valid ones as of all kinds of fault together.

    Args:
        folder: Keeps them.
        vae: The folder of the base's.
        split: Whose identities are drawn.
        each: Images of a kind of fault; a quarter of them are VAE round trips, all of `MIXED`.
    """
    counts = dict.fromkeys(KINDS, each) | {VALID: each * (len(KINDS) - 1)}
    jobs = [
        (kind, split, start, min(start + _ROUND, total), kind == MIXED or start % (4 * _ROUND) == 0)
        for kind, total in counts.items()
        for start in range(0, total, _ROUND)
    ]
    names = [folder / f"faults-{split}-{each}.{part}.npy" for part in ("placement", "images")]
    if not all(name.exists() for name in names):
        with Pool(os.cpu_count(), _open_vae, (vae,)) as workers:
            images, placement = zip(*workers.imap(_some, jobs), strict=True)
        for name, arrays in zip(names, (placement, images), strict=True):
            save_array(name, np.concatenate(arrays))
    return Inspected(
        np.load(names[1], mmap_mode="r"),
        np.repeat(np.arange(len(KINDS)), list(counts.values())),
        np.load(names[0]),
        np.concatenate([np.full(stop - start, through) for _, _, start, stop, through in jobs]),
    )


def decoded(vae: Any, images: np.ndarray, kind: str, seed: int) -> np.ndarray:
    """Images of latents that are slightly off or, of kind `MIXED`, of two scenes' latents."""
    rng = torch.Generator().manual_seed(seed)

    def off(latents: Tensor) -> Tensor:
        latents = latents.float()
        if kind == MIXED:
            latents = _mixed(latents, rng)
        share = _LATENT_NOISE * torch.rand((len(latents), 1, 1, 1), generator=rng)
        return latents + share * latents.std() * torch.randn(latents.shape, generator=rng)

    return round_trip(vae, images, off)


def _mixed(latents: Tensor, rng: torch.Generator) -> Tensor:
    """Each with the next one's, by a smooth mask that gives either a good part of the picture."""
    count, _, height, width = latents.shape
    coarse = torch.randn((count, 1, 4, 4), generator=rng)
    mask = F.interpolate(coarse, (height, width), mode="bicubic")
    mask = torch.sigmoid(4 * (mask - mask.flatten(1).median(1).values.view(-1, 1, 1, 1)))
    return torch.lerp(latents, latents.roll(1, 0), mask)


class InspectorObjective:
    """Cross-entropy of validity and of the kind of fault, and absolute errors of placement."""

    def __init__(
        self, inspector: Inspector, pool: Inspected, held_out: Inspected, batch: int = 128
    ) -> None:
        self.module, self.pool, self.held_out, self.batch = inspector, pool, held_out, batch
        valid = pool.kinds == 0
        self._rows = [
            # a pool as small as a test's has round trips alone
            torch.from_numpy(np.flatnonzero(of & way if (of & way).any() else of))
            for of in (valid, ~valid)
            for way in (pool.decoded, ~pool.decoded)
        ]

    def loss(self, rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """One batch's loss: as many valid scenes as others, as many renders as round trips."""
        half, part = self.batch // 2, self.batch // 4
        drawn = [rows[torch.randint(len(rows), (part,), generator=rng)] for rows in self._rows]
        rows = torch.cat(drawn).numpy()
        placed = torch.from_numpy(self.pool.placement[rows])
        pixels = jitter(to_pixels(self.pool.images[rows]), rng)
        # the world is symmetric: mirrored scenes are scenes
        mirrored = torch.rand(len(rows), generator=rng) < 0.5
        pixels = torch.where(mirrored.view(-1, 1, 1, 1), pixels.flip(-1), pixels)
        placed = torch.where(mirrored[:, None] & _MIRRORED, 1 - placed, placed)
        kinds = torch.from_numpy(self.pool.kinds[rows])
        with autocast():
            seen = self.module(pixels.contiguous(memory_format=torch.channels_last))
        truth = (kinds == 0).float()
        valid = seen.valid.float()
        error = (seen.placement[:half].float() - placed[:half]).abs().mean()
        loss = F.binary_cross_entropy_with_logits(valid, truth)
        loss = loss + 0.3 * F.cross_entropy(seen.kinds.float(), kinds) + error
        details = {
            "missed": float((valid[half:] > 0).float().mean()),
            "false": float((valid[:half] < 0).float().mean()),
            "placement": float(error.detach()),
        }
        return loss, details

    @torch.no_grad()
    def set_threshold(self) -> None:
        """Shift validity so that few valid images of the validation split are called invalid."""
        valid = self.held_out.images[self.held_out.kinds == 0]
        parts = [to_pixels(valid[start : start + 256]) for start in range(0, len(valid), 256)]
        logits = torch.cat([self.module(part).valid for part in parts])
        self.module.valid.bias.sub_(torch.quantile(logits, _FALSE_ALARMS))
