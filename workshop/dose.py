"""Dose response: how much of the reference's scene comes through, by what pairs share.

Photographs of one subject often share more than the subject: the room, the pose, the light. Here
pairs of critters share each scene attribute with a chance p beyond luck. What comes through an
adapter trained on them, or a variation space fitted on them, is predicted in closed form, from a
world without sharing alone.

Training on pairs: the best that a model can do is to draw from what the reference says of the
target: its own value with chance p, else one from the prior. Its leak is the mutual information of
the two.

A variation space: with z = Σ_a f_a(value of a) + rest, a pair's scatter is
S_w(p) = S_w(0) − p Σ_a Cov(f_a). Directions whose scatter falls under the threshold are kept from
the reference, and with them their share of each Cov(f_a). A linear reader of the recombined tokens
says what that does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ipdiverse.adapter.files.checkpoint import load_adapter
from ipdiverse.adapter.imagine import VariationSpace, load_space
from ipdiverse.base.adapters import adapter_file
from ipdiverse.base.bases import CRITTERS
from ipdiverse.commands.evaluate import Fit
from ipdiverse.critters.make import example, png
from ipdiverse.critters.scene import ATTRIBUTES, SCENE, Scene, marginal
from ipdiverse.data.prepare import PrepareOptions, prepare
from ipdiverse.evaluation.metrics import leak
from ipdiverse.training.config import CacheConfig
from ipdiverse.training.embed import EmbeddedPictures, Stored
from ipdiverse.training.fit import IS_SCENE
from ipdiverse.training.frozen import Preprocessing, open_encoders
from ipdiverse.writing import ensure_writable_folder, write_bytes_atomic, write_text_atomic
from workshop.arms import shared_scenes

CHANCES = (0.0, 0.25, 0.5, 0.75, 1.0)


def fit_spaces(folder: Path, images: int) -> list[Path]:
    """Prepare pairs that share scenes with each chance, and fit a space of `plus` on each."""
    files = list[Path]()
    for chance in CHANCES:
        name = f"{100 * chance:.0f}"
        data = folder / f"pairs-{name}"
        _write_pairs(folder / f"renders-{name}", images, chance)
        prepare(str(folder / f"renders-{name}"), data, PrepareOptions())
        files.append(folder / f"space-{name}.safetensors")
        if not files[-1].exists():
            Fit(str(data), str(files[-1]), "plus").run()
    return files


def _write_pairs(folder: Path, images: int, chance: float) -> None:
    """Pairs without the names of their subjects.

    The same creature is in other pairs too, with which it would share nothing.
    """
    if (folder / "metadata.jsonl").exists():
        return
    ensure_writable_folder(folder)
    with shared_scenes(chance):
        made = [example(i, 0, "train") for i in range(images)]
    rows = list[dict[str, str]]()
    for index, one in enumerate(made):
        row = {"file_name": f"{index:07d}.png", "reference": f"{index:07d}-reference.png"}
        write_bytes_atomic(folder / row["file_name"], png(one.scene, one.seed))
        write_bytes_atomic(folder / row["reference"], png(one.other, one.other_seed))
        rows.append(row | {"text": one.text})
    write_text_atomic(folder / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def trained_leak(chance: float) -> float:
    """Mean leak over scene attributes of the best model of pairs that share with a chance, nats.

    I = H(m) − Σ_x m(x) H(p·δ_x + (1 − p)·m), with m an attribute's prior.
    """
    found = list[float]()
    for name in SCENE:
        prior = marginal(name)
        given = chance * np.eye(len(prior)) + (1 - chance) * prior
        found.append(_entropy(prior) - float(prior @ [_entropy(row) for row in given]))
    return float(np.mean(found))


def _entropy(shares: np.ndarray) -> float:
    held = shares[shares > 0]
    return float(-(held * np.log(held)).sum())


@dataclass(frozen=True)
class World:
    """Tokens of pictures whose scenes are known, without sharing: z is of the pairs' two sides."""

    space: VariationSpace
    z: tuple[Tensor, Tensor]
    labels: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of(cls, folder: Path) -> World:
        """Read what `fit_spaces` embedded."""
        space, data = load_space(folder / "space-0.safetensors"), folder / "pairs-0"
        adapter = load_adapter(adapter_file(CRITTERS, "plus"))
        encoders = open_encoders(CRITTERS, None, local_files_only=True, unet=False)
        shown = Preprocessing.of(CacheConfig(), encoders.resolution)
        pictures = EmbeddedPictures(data, encoders, shown, Stored("hidden"))

        @torch.no_grad()
        def reduced(names: list[str]) -> Tensor:
            rows = torch.stack([pictures[name]["hidden"] for name in names])
            tokens = torch.cat([adapter.tokens(part) for part in rows.split(256)])
            return space.reduce(tokens).double()

        records = pictures.records
        made = [example(int(r.source[:7]), 0, "train") for r in records]
        sides = [r.file_name for r in records], [str(r.reference) for r in records]
        labels = [e.scene for e in made], [e.other for e in made]
        return cls(space, tuple(map(reduced, sides)), tuple(map(_indices, labels)))  # type: ignore[arg-type]

    def spaces_leak(self, chance: float) -> tuple[float, int]:
        """Predicted leak of a space fitted on pairs that share, nats, and its scene directions."""
        first, second = self.z
        both, labels = torch.cat(self.z), np.concatenate(self.labels)
        parts = _parts(both, labels)
        apart = (first - second) / 2**0.5
        within = apart.T @ apart / len(apart) - chance * sum(parts)
        values, vectors = torch.linalg.eigh(within)
        scene = vectors[:, values >= IS_SCENE]
        # references and bank are two halves, so that no picture is its own scene
        half = len(first) // 2
        bank = second[half : half + half]
        mixed = first[:half] + (bank - first[:half]) @ scene @ scene.T
        weights = torch.linalg.lstsq(_with_one(both), _one_hot(labels)).solution
        read = _with_one(mixed) @ weights
        found, start = list[float](), 0
        for index, name in enumerate(SCENE):
            count = len(ATTRIBUTES[name])
            seen = read[:, start : start + count].argmax(1).numpy()
            found.append(leak(seen, self.labels[0][:half, index], count))
            start += count
        return float(np.mean(found)), scene.shape[1]


def _indices(scenes: list[Scene]) -> np.ndarray:
    """Scene attributes as numbers, (scenes, attributes)."""
    return np.array([[ATTRIBUTES[n].index(getattr(s, n)) for n in SCENE] for s in scenes])


def _one_hot(labels: np.ndarray) -> Tensor:
    """(pictures, values of all scene attributes)."""
    parts = [np.eye(len(ATTRIBUTES[n]))[labels[:, i]] for i, n in enumerate(SCENE)]
    return torch.from_numpy(np.concatenate(parts, 1))


def _with_one(z: Tensor) -> Tensor:
    return torch.cat([z, z.new_ones(len(z), 1)], 1)


def _parts(z: Tensor, labels: np.ndarray) -> list[Tensor]:
    """Cov(f_a) of each scene attribute, from one least-squares fit of z on all of them."""
    hot = _one_hot(labels)
    found = torch.linalg.lstsq(_with_one(hot), z, driver="gelsd").solution[:-1]
    parts, start = list[Tensor](), 0
    for name in SCENE:
        stop = start + len(ATTRIBUTES[name])
        said = hot[:, start:stop] @ found[start:stop]
        said = said - said.mean(0)
        parts.append(said.T @ said / len(said))
        start = stop
    return parts


def dose_response(folder: Path, images: int) -> dict[str, Any]:
    """Fit the spaces and predict; what is measured comes from drawing (`studies/dose.toml`)."""
    files = fit_spaces(folder, images)
    world = World.of(folder)
    rows = list[dict[str, Any]]()
    for chance, file in zip(CHANCES, files, strict=True):
        predicted, directions = world.spaces_leak(chance)
        fitted = load_space(file).spec["directions"]["scene"]
        row = {"shared": chance, "trained": trained_leak(chance), "space": predicted}
        rows.append(row | {"scene_directions": {"predicted": directions, "fitted": fitted}})
    return {"images": images, "predicted": rows}
