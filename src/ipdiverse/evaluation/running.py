"""Runs a study: every arm's images are kept as they come, so that it goes on where it stopped.

OUT/images/KEY/00000.npz    images of some pairs of one arm, uint8
OUT/readings/ARM.npz        what the oracle read in them
OUT/results.jsonl           a line for each finished arm
OUT/results.json            settings, provenance and every arm, for programs
OUT/report.html, *.svg      for people
"""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ipdiverse.adapter.sources import local_file
from ipdiverse.bases import CRITTERS, adapter_source, load_base
from ipdiverse.critters.oracle import read
from ipdiverse.critters.training.loop import autocast, fingerprint
from ipdiverse.errors import ArgumentError, IpdiverseError
from ipdiverse.evaluation.anchors import anchors
from ipdiverse.evaluation.dial_check import check_dials
from ipdiverse.evaluation.features import feature_parts, open_encoder
from ipdiverse.evaluation.folders import folder_pairs
from ipdiverse.evaluation.groups import (
    Parts,
    critters_parts,
    interval,
    js_interval,
    leak_interval,
)
from ipdiverse.evaluation.readings import FOLDER, Readings, file_of, load_readings
from ipdiverse.evaluation.report import volumes
from ipdiverse.evaluation.sampling import sample_array, shipped_oracle, study_pairs
from ipdiverse.image_io import content_hash
from ipdiverse.provenance import ensure_writable_folder, write_bytes_atomic, write_text_atomic
from ipdiverse.sampling.generation import versions
from ipdiverse.sampling.sample import Job, attached, scale_of

if TYPE_CHECKING:
    from collections.abc import Sequence

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
        images: The images of the first pairs, for the report: (pairs, images, height, width, 3);
            None where only what was read in them is known.
        readings: What the oracle read, (pairs, images of all seeds, attributes); None where the
            world is not known.
        pairs: What was asked.
    """

    arm: Arm
    runs: list[dict[str, Parts]]
    images: np.ndarray | None
    readings: np.ndarray | None = None
    pairs: Sequence[Any] = ()

    @cached_property
    def leak(self) -> tuple[float, float, float] | None:
        """In nats with its interval, where the world is known."""
        return None if self.readings is None else leak_interval(self.readings, self.pairs)

    @cached_property
    def js(self) -> tuple[float, float, float] | None:
        """Distance from the world's own scenes with its interval, where the world is known."""
        return None if self.readings is None else js_interval(self.readings, self.pairs)

    def parts(self, name: str) -> list[Parts]:
        """One score of every training seed."""
        return [run[name] for run in self.runs]

    def row(self) -> dict[str, Any]:
        """For JSON: each score with its interval."""
        scores = {name: _rounded(interval(self.parts(name))) for name in self.runs[0]}
        for name, found in (("leak", self.leak), ("js", self.js)):
            if found is not None:
                scores[name] = _rounded(found)
        about = {"name": self.arm.name, "family": self.arm.family, "at": self.arm.at}
        return {**about, "settings": self.arm.settings, "seeds": len(self.runs), "scores": scores}


@dataclass(frozen=True)
class Done:
    """A finished study.

    Args:
        measured: Every arm, anchors last.
        references: Of every pair.
        hypervolumes: As `report.volumes` gives them.
    """

    measured: list[Measured]
    references: list[Image.Image]
    hypervolumes: list[dict[str, Any]]


def run_study(
    study: Study, out: Path, progress: bool | None = None, known: Path | None = None
) -> Done:
    """Measure every arm, or what is left of them.

    Args:
        study: What to measure.
        out: Folder for images and results; an interrupted study in it goes on.
        progress: Show a bar on standard error; None does so on terminals only.
        known: Folder of readings that were published: an arm that is there, with these settings and
            weights, is not drawn again. Weights that are not here cannot be compared; then the
            readings are taken.

    Raises:
        IpdiverseError: A base, adapter, reference or folder is unusable.
    """
    runner = Runner(study, out, progress, known)
    runner.check_sources()
    measured: list[Measured] = []
    rows: list[dict[str, Any]] = []
    with runner:
        for arm in study.arms:
            measured.append(runner.measure(arm))
            rows.append(measured[-1].row())
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            write_text_atomic(out / "results.jsonl", lines)
    anchored = runner.anchors()
    areas = volumes(study, measured)
    report = {
        "study": study.settings(),
        "baseline": study.baseline_arm.name,
        "versions": versions(),
        "base": fingerprint(runner.base.pipe.unet),
        "dials": [check.as_json() for check in check_dials(measured)],
        "hypervolumes": areas,
        "arms": [*rows, *(one.row() for one in anchored)],
    }
    write_text_atomic(out / "results.json", json.dumps(report, indent=1) + "\n")
    return Done([*measured, *anchored], runner.references, areas)


class Runner:
    """Draws and scores arms, each image once; a context manager that shows progress.

    Args:
        study: Pairs, seeds and steps; its arms are those that progress is estimated from.
        out: Folder for images.
        progress: Show a bar on standard error; None does so on terminals only.
        known: As `run_study` takes it.

    Raises:
        IpdiverseError: The base, a reference, an encoder or the folder is unusable.
    """

    def __init__(
        self, study: Study, out: Path, progress: bool | None = None, known: Path | None = None
    ) -> None:
        self.study, self.out, self.known = study, ensure_writable_folder(out), known
        self.base = load_base(study.base)
        known = study.base == CRITTERS and study.references is None
        self.oracle = shipped_oracle() if known else None
        self.pairs: list[Any] = self._drawn()
        if len(self.pairs) < 2:
            raise ArgumentError(
                "gives too few pairs of a prompt and a reference",
                where="study",
                expected="2 or more",
                found=len(self.pairs),
            )
        self.study = study = replace(study, pairs=len(self.pairs))
        self.references = [pair.image() for pair in self.pairs]
        asked = [content_hash(image) for image in self.references]
        asked += [pair.prompt for pair in self.pairs]
        self._decides = [*_models(self.base.pipe), *asked]
        self.encoders = [open_encoder(name, self.base.pipe) for name in study.features]
        if not known and not self.encoders:
            raise ArgumentError(
                "are missing",
                where="features",
                expected='encoders to compare images by, as features = ["dino", "clip"]',
            )
        self._hidden = None if progress is None else not progress
        self._bar: Any = None

    def __enter__(self) -> Runner:
        from tqdm import tqdm

        sources = sum(len(arm.sources) for arm in self.study.arms)
        total = sources * len(self.pairs) * self.study.images or None
        self._bar = tqdm(total=total, disable=self._hidden, unit="image")
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._bar = None

    def measure(self, arm: Arm) -> Measured:
        """Draw what is not there of an arm, and score it."""
        if self._bar is not None:
            self._bar.set_description(arm.name)
        if (found := self._known(arm)) is not None:
            self._advance(len(arm.sources) * len(self.pairs))
            runs = [
                critters_parts(read, invalid, self.pairs)
                for read, invalid in zip(found.attributes, found.invalid, strict=True)
            ]
            return Measured(arm, runs, None, np.concatenate([*found.attributes], 1), self.pairs)
        return self._scored(arm, [self._images(arm, source) for source in arm.sources])

    def check_sources(self) -> None:
        """Refuse what is missing before hours are spent.

        Raises:
            IpdiverseError: An adapter is missing.
        """
        for arm in self.study.arms:
            if self._known(arm) is None:
                for source in arm.sources:
                    local_file(adapter_source(self.study.base, source))

    def _known(self, arm: Arm) -> Readings | None:
        """An arm's published readings, if they are of this study, these settings and weights."""
        if self.known is None or self.oracle is None or self.encoders:
            return None
        found = load_readings(file_of(self.known, arm.name))
        if found is None or len(found.attributes) != len(arm.sources):
            return None
        wanted = json.loads(json.dumps(self._about(arm)))
        weights = zip(found.about.pop("adapters", ()), wanted.pop("adapters"), strict=True)
        same_weights = all(mine in (None, theirs) for theirs, mine in weights)
        return found if same_weights and found.about == wanted else None

    def _about(self, arm: Arm) -> dict[str, Any]:
        """What decides an arm's images; an adapter that is not here is None."""
        study, hashes = self.study, []
        for source in arm.sources:
            try:
                file = local_file(adapter_source(study.base, source))
                hashes.append(hashlib.sha256(file.read_bytes()).hexdigest())
            except IpdiverseError:
                hashes.append(None)
        numbers = {name: getattr(study, name) for name in ("pairs", "images", "steps", "seed")}
        settings = {name: value for name, value in arm.settings.items() if name != "adapter"}
        base = hashlib.sha256(json.dumps(self._decides).encode()).hexdigest()
        return {"settings": settings, **numbers, "base": base, "adapters": hashes}

    def anchors(self) -> list[Measured]:
        """What bounds every arm, where it is known."""
        known = self.oracle is not None
        pipe = self.base.pipe
        side = pipe.unet.config.sample_size * pipe.vae_scale_factor
        found = anchors(self.pairs, self.references, self.study.images, known, side)
        return [self._scored(arm, [images]) for arm, images in found]

    def _drawn(self) -> list[Any]:
        study = self.study
        if study.references is None:
            return list(study_pairs(study.pairs, study.seed, study.split))
        prompts = Path(study.prompts) if study.prompts else None
        return list(folder_pairs(Path(study.references), prompts, study.pairs))

    def _scored(self, arm: Arm, runs: list[np.ndarray]) -> Measured:
        """An arm's images, (pairs · images, height, width, 3), of each training seed."""
        shape = (len(self.pairs), self.study.images)
        scored, seen, broken = [], [], []
        for images in runs:
            parts: dict[str, Parts] = {}
            if self.oracle is not None:
                reading = read(self.oracle, images)
                seen.append(reading.attributes.numpy().reshape(*shape, -1))
                broken.append(reading.invalid.numpy().reshape(shape))
                parts |= critters_parts(seen[-1], broken[-1], self.pairs)
            for encoder in self.encoders:
                parts |= self._features(encoder, images)
            scored.append(parts)
        shown = runs[0].reshape(*shape, *runs[0].shape[1:])
        readings = np.concatenate(seen, 1) if seen else None
        if seen and arm.family != "anchor":
            folder = ensure_writable_folder(self.out / FOLDER)
            found = Readings(np.stack(seen), np.stack(broken), self._about(arm))
            found.save(file_of(folder, arm.name))
        return Measured(arm, scored, shown[:_CHUNK].copy(), readings, self.pairs)

    def _features(self, encoder: FeatureEncoder, images: np.ndarray) -> dict[str, Parts]:
        size = self.study.images
        pictures = [Image.fromarray(image) for image in images]
        sets = [pictures[i : i + size] for i in range(0, len(pictures), size)]
        prompts = [pair.prompt for pair in self.pairs]
        return feature_parts(encoder, sets, self.references, prompts)

    def _jobs(self, numbers: range) -> list[Job]:
        """Every image of some pairs; noise depends on pair and number alone, not on the arm."""
        seed = self.study.seed * 1_000_003
        return [
            Job(self.pairs[number].prompt, seed + number, index, self.references[number])
            for number in numbers
            for index in range(self.study.images)
        ]

    def _images(self, arm: Arm, source: str) -> np.ndarray:
        """All images of an arm with one adapter; chunks that are there are not made again."""
        weights = adapter_source(self.study.base, source)
        folder = self.out / "images" / self._key(arm, weights)
        starts = range(0, len(self.pairs), _CHUNK)
        chunks = [range(start, min(start + _CHUNK, len(self.pairs))) for start in starts]
        files = [folder / f"{number:05d}.npz" for number in range(len(chunks))]
        missing = [(c, f) for c, f in zip(chunks, files, strict=True) if not f.exists()]
        self._advance(len(self.pairs) - sum(len(chunk) for chunk, _ in missing))
        if missing:
            ensure_writable_folder(folder)
            self._draw(arm, weights, missing)
        return np.concatenate([np.load(file)["images"] for file in files])

    def _draw(self, arm: Arm, weights: Path | str, missing: list[tuple[range, Path]]) -> None:
        request = arm.request(self.study.steps, self.base.guidance_scale)
        fast = autocast() if self.study.base == CRITTERS else nullcontext()
        with attached(self.base, weights) as attachment:
            scale = scale_of(self.base, request)
            attachment.set_scale(
                request.preset or scale,
                weight=scale,
                start=request.start,
                end=request.end,
            )
            for chunk, file in missing:
                with fast:
                    made = sample_array(self.base, self._jobs(chunk), request, attachment, False)
                _save(file, made)
                self._advance(len(chunk))

    def _key(self, arm: Arm, weights: Path | str) -> str:
        """What decides an arm's images, as 16 hexadecimal digits."""
        settings = {k: v for k, v in arm.settings.items() if k != "adapter"}
        study = [self.study.images, self.study.steps, self.study.seed]
        adapter = hashlib.sha256(local_file(weights).read_bytes()).hexdigest()
        decides = [settings, study, adapter, self._decides, versions()]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]

    def _advance(self, pairs: int) -> None:
        if self._bar is not None:
            self._bar.update(pairs * self.study.images)


def _save(file: Path, images: np.ndarray) -> None:
    buffer = BytesIO()
    np.savez_compressed(buffer, images=images)
    write_bytes_atomic(file, buffer.getvalue())


def _models(pipe: Any) -> list[str]:
    """What decides images, of a base: every model's weights, and the scheduler."""
    names = ("unet", "vae", "text_encoder", "text_encoder_2", "image_encoder")
    modules = [getattr(pipe, name, None) for name in names]
    scheduler = json.dumps(dict(pipe.scheduler.config), sort_keys=True, default=str)
    return [*(fingerprint(module) for module in modules if module is not None), scheduler]


def _rounded(found: tuple[float, float, float]) -> list[float | None]:
    """Estimate, low and high with four digits; None, which JSON knows, for what is not known."""
    return [None if np.isnan(value) else round(float(value), 4) for value in found]
