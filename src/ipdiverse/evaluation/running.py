"""Runs a study: every arm's images are kept as they come, so that it goes on where it stopped.

OUT/images/KEY/00000.npz    images of some pairs of one arm, uint8
OUT/results.jsonl           a line for each finished arm
OUT/results.json            settings, provenance and every arm, for programs
OUT/report.html, *.svg      for people
"""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ipdiverse.bases import CRITTERS, Base, adapter_source, load_base
from ipdiverse.critters.oracle import read
from ipdiverse.critters.training.loop import autocast, fingerprint
from ipdiverse.errors import ArgumentError
from ipdiverse.evaluation.anchors import anchors
from ipdiverse.evaluation.features import feature_parts, open_encoder
from ipdiverse.evaluation.folders import folder_pairs
from ipdiverse.evaluation.groups import Parts, critters_parts, interval, leak_interval
from ipdiverse.evaluation.sampling import sample_array, shipped_oracle, study_pairs
from ipdiverse.provenance import ensure_writable_folder, write_bytes_atomic, write_text_atomic
from ipdiverse.sampling.generate import versions
from ipdiverse.sampling.sample import Job, attached

if TYPE_CHECKING:
    from ipdiverse.evaluation.features import FeatureEncoder
    from ipdiverse.evaluation.study import Arm, Study

_CHUNK = 8
"""Pairs whose images are kept together."""


@dataclass(frozen=True)
class Measured:
    """An arm with its scores.

    Args:
        arm: What was measured.
        runs: For each training seed the parts of every score.
        leak: In nats with its interval, where the world is known.
        images: The images of the first pairs, for the report: (pairs, images, height, width, 3).
    """

    arm: Arm
    runs: list[dict[str, Parts]]
    leak: tuple[float, float, float] | None
    images: np.ndarray

    def parts(self, name: str) -> list[Parts]:
        """One score of every training seed."""
        return [run[name] for run in self.runs]

    def row(self) -> dict[str, Any]:
        """For JSON: each score with its interval."""
        scores = {name: _rounded(interval(self.parts(name))) for name in self.runs[0]}
        if self.leak is not None:
            scores["leak"] = _rounded(self.leak)
        about = {"name": self.arm.name, "family": self.arm.family, "at": self.arm.at}
        return {**about, "settings": self.arm.settings, "seeds": len(self.runs), "scores": scores}


@dataclass(frozen=True)
class Done:
    """A finished study.

    Args:
        measured: Every arm, anchors last.
        references: Of every pair.
    """

    measured: list[Measured]
    references: list[Image.Image]


def run_study(study: Study, out: Path, progress: bool | None = None) -> Done:
    """Measure every arm, or what is left of them.

    Args:
        study: What to measure.
        out: Folder for images and results; an interrupted study in it goes on.
        progress: Show a bar on standard error; None does so on terminals only.

    Raises:
        IpdiverseError: A base, adapter, reference or folder is unusable.
    """
    from tqdm import tqdm

    ensure_writable_folder(out)
    base = load_base(study.base)
    cases = _Cases(study, base)
    total = sum(len(arm.sources) for arm in study.arms) * len(cases.pairs) * study.images
    measured: list[Measured] = []
    results = out / "results.jsonl"
    lines: list[str] = []
    hidden = None if progress is None else not progress
    with tqdm(total=total, disable=hidden, unit="image") as bar:
        for arm in study.arms:
            bar.set_description(arm.name)
            images = [_images(study, arm, source, base, cases, out, bar) for source in arm.sources]
            measured.append(cases.measure(arm, images))
            lines.append(json.dumps(measured[-1].row()))
            write_text_atomic(results, "\n".join(lines) + "\n")
    measured += [cases.measure(arm, [images]) for arm, images in cases.anchors()]
    report = {
        "study": study.settings(),
        "baseline": study.baseline_arm.name,
        "versions": versions(),
        "base": fingerprint(base.pipe.unet),
        "arms": [one.row() for one in measured],
    }
    write_text_atomic(out / "results.json", json.dumps(report, indent=1) + "\n")
    return Done(measured, cases.references)


class _Cases:
    """Pairs, and how their images are scored.

    Args:
        study: With references of its own, or none for critters.
        base: Whose image encoder may be asked.
    """

    def __init__(self, study: Study, base: Base) -> None:
        self.study = study
        known = study.base == CRITTERS and study.references is None
        self.oracle = shipped_oracle() if known else None
        self.pairs: list[Any] = self._drawn()
        self.references = [pair.image() for pair in self.pairs]
        self.encoders = [open_encoder(name, base.pipe) for name in study.features]
        if not known and not self.encoders:
            raise ArgumentError(
                "are missing",
                where="features",
                expected='encoders to compare images by, as features = ["dino", "clip"]',
            )

    def _drawn(self) -> list[Any]:
        study = self.study
        if study.references is None:
            return list(study_pairs(study.pairs, study.seed))
        prompts = Path(study.prompts) if study.prompts else None
        return list(folder_pairs(Path(study.references), prompts, study.pairs))

    def jobs(self, numbers: range) -> list[Job]:
        """Every image of some pairs; noise depends on pair and number alone, not on the arm."""
        seed = self.study.seed * 1_000_003
        return [
            Job(self.pairs[number].prompt, seed + number, index, self.references[number])
            for number in numbers
            for index in range(self.study.images)
        ]

    def measure(self, arm: Arm, runs: list[np.ndarray]) -> Measured:
        """Score an arm's images, (pairs · images, height, width, 3), of each training seed."""
        scored, seen = [], []
        for images in runs:
            parts: dict[str, Parts] = {}
            if self.oracle is not None:
                reading = read(self.oracle, images)
                shape = (len(self.pairs), self.study.images)
                seen.append(reading.attributes.numpy().reshape(*shape, -1))
                parts |= critters_parts(
                    seen[-1], reading.invalid.numpy().reshape(shape), self.pairs
                )
            for encoder in self.encoders:
                parts |= self._features(encoder, images)
            scored.append(parts)
        leak = leak_interval(np.concatenate(seen, 1), self.pairs) if seen else None
        shown = runs[0].reshape(len(self.pairs), self.study.images, *runs[0].shape[1:])
        return Measured(arm, scored, leak, shown[:_CHUNK].copy())

    def _features(self, encoder: FeatureEncoder, images: np.ndarray) -> dict[str, Parts]:
        size = self.study.images
        pictures = [Image.fromarray(image) for image in images]
        sets = [pictures[i : i + size] for i in range(0, len(pictures), size)]
        prompts = [pair.prompt for pair in self.pairs]
        return feature_parts(encoder, sets, self.references, prompts)

    def anchors(self) -> list[tuple[Arm, np.ndarray]]:
        """What bounds every arm, where it is known."""
        return anchors(self.pairs, self.references, self.study.images, self.oracle is not None)


def _images(
    study: Study, arm: Arm, source: str, base: Base, cases: _Cases, out: Path, bar: Any
) -> np.ndarray:
    """All images of an arm with one adapter; chunks that are there are not made again."""
    weights = adapter_source(study.base, source)
    folder = out / "images" / _key(study, arm, weights, base)
    chunks = [
        range(start, min(start + _CHUNK, len(cases.pairs)))
        for start in range(0, len(cases.pairs), _CHUNK)
    ]
    files = [folder / f"{number:05d}.npz" for number in range(len(chunks))]
    if not all(file.exists() for file in files):
        ensure_writable_folder(folder)
        guidance = base.guidance_scale
        request = arm.request(study.steps, guidance)
        with attached(base, weights) as attachment:
            attachment.set_scale(
                request.preset or request.scale,
                weight=request.scale,
                start=request.start,
                end=request.end,
            )
            for chunk, file in zip(chunks, files, strict=True):
                if not file.exists():
                    with autocast() if study.base == CRITTERS else nullcontext():
                        made = sample_array(base, cases.jobs(chunk), request, attachment, False)
                    _save(file, made)
                bar.update(len(chunk) * study.images)
    else:
        bar.update(len(cases.pairs) * study.images)
    return np.concatenate([np.load(file)["images"] for file in files])


def _save(file: Path, images: np.ndarray) -> None:
    buffer = BytesIO()
    np.savez_compressed(buffer, images=images)
    write_bytes_atomic(file, buffer.getvalue())


def _key(study: Study, arm: Arm, weights: Any, base: Base) -> str:
    """What decides an arm's images, as 16 hexadecimal digits."""
    is_file = hasattr(weights, "is_file") and weights.is_file()
    adapter = hashlib.sha256(weights.read_bytes()).hexdigest() if is_file else str(weights)
    decides = {
        "settings": {k: v for k, v in arm.settings.items() if k != "adapter"},
        "study": {k: v for k, v in study.settings().items() if k not in ("features", "baseline")},
        "adapter": adapter,
        "base": [fingerprint(base.pipe.unet), fingerprint(base.pipe.vae)],
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def _rounded(found: tuple[float, float, float]) -> list[float | None]:
    """Estimate, low and high with four digits; None, which JSON knows, for what is not known."""
    return [None if np.isnan(value) else round(float(value), 4) for value in found]
