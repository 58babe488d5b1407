"""Runs a study: every arm's images are kept as they come, so that it goes on where it stopped.

OUT/images/KEY/00000.npz    images of some pairs of one arm, uint8
OUT/readings/ARM-0.npz      what the oracle read in those of one adapter
OUT/results.jsonl           a line for each finished arm
OUT/results.json            settings, provenance and every arm, for programs
OUT/report.html, *.svg      for people
"""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
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
    from ipdiverse.evaluation.metrics import Ints
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
        left_out: Adapters that were not there.
    """

    measured: list[Measured]
    references: list[Image.Image]
    hypervolumes: list[dict[str, Any]]
    left_out: list[str]


def run_study(
    study: Study,
    out: Path,
    progress: bool | None = None,
    known: Path | None = None,
    skip_missing: bool = False,
) -> Done:
    """Measure every arm, or what is left of them.

    Args:
        study: What to measure.
        out: Folder for images and results; an interrupted study in it goes on.
        progress: Show a bar on standard error; None does so on terminals only.
        known: Folder of readings that were published: an arm that is there, with these settings and
            weights, is not drawn again. Weights that are not here cannot be compared; then the
            readings are taken.
        skip_missing: Leave out adapters that are not here and whose readings are not either.

    Raises:
        IpdiverseError: A base, adapter, reference or folder is unusable.
    """
    runner = Runner(study, out, progress, known)
    left_out = runner.check_sources(skip_missing)
    study = runner.study
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
        "left_out": left_out,
        "dials": [check.as_json() for check in check_dials(measured)],
        "hypervolumes": areas,
        "arms": [*rows, *(one.row() for one in anchored)],
    }
    write_text_atomic(out / "results.json", json.dumps(report, indent=1) + "\n")
    return Done([*measured, *anchored], runner.references, areas, left_out)


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
        found = [self._run(arm, number) for number in range(len(arm.sources))]
        readings = [read for _, read, _ in found if read is not None]
        return Measured(
            arm,
            [parts for parts, _, _ in found],
            next((images for _, _, images in found if images is not None), None),
            np.concatenate(readings, 1) if readings else None,
            self.pairs,
        )

    def check_sources(self, skip: bool = False) -> list[str]:
        """Refuse what is missing before hours are spent.

        Args:
            skip: Leave it out of the study instead.

        Returns:
            The adapters that are left out.

        Raises:
            IpdiverseError: An adapter is missing, or the baseline's is, or nothing is left.
        """
        arms, missing = [], []
        for arm in self.study.arms:
            there = 0
            for number, source in enumerate(arm.sources):
                try:
                    if self._known(arm, number) is None:
                        local_file(adapter_source(self.study.base, source))
                except IpdiverseError:
                    if not skip:
                        raise
                    missing.append(source)
                    break
                there += 1
            if there:
                adapters = arm.adapters[:there]  # seeds are numbered, so those before
                arms.append(replace(arm, adapters=adapters))
        self.study = replace(self.study, arms=tuple(arms))
        return list(dict.fromkeys(missing))

    def anchors(self) -> list[Measured]:
        """What bounds every arm, where it is known."""
        known = self.oracle is not None
        pipe = self.base.pipe
        side = pipe.unet.config.sample_size * pipe.vae_scale_factor
        found = anchors(self.pairs, self.references, self.study.images, known, side)
        measured = []
        for arm, images in found:
            parts, seen = self._scored(images)
            readings = None if seen is None else seen.attributes
            measured.append(Measured(arm, [parts], self._first(images), readings, self.pairs))
        return measured

    def _drawn(self) -> list[Any]:
        study = self.study
        if study.references is None:
            return list(study_pairs(study.pairs, study.seed, study.split, study.edits))
        prompts = Path(study.prompts) if study.prompts else None
        return list(folder_pairs(Path(study.references), prompts, study.pairs))

    def _run(
        self, arm: Arm, number: int
    ) -> tuple[dict[str, Parts], Ints | None, np.ndarray | None]:
        """Scores, readings and images of an arm with one of its adapters."""
        if (known := self._known(arm, number)) is not None:
            self._advance(len(self.pairs))
            scores = critters_parts(known.attributes, known.invalid, self.pairs)
            seen, images = known, None
        else:
            drawn = self._images(arm, arm.sources[number])
            scores, seen = self._scored(drawn)
            images = self._first(drawn)
        if seen is not None:  # those that were known stay beside those that are new
            folder = ensure_writable_folder(self.out / FOLDER)
            about = seen.about or self._about(arm, number)
            replace(seen, about=about).save(file_of(folder, arm.name, number))
        return scores, None if seen is None else seen.attributes, images

    def _known(self, arm: Arm, number: int) -> Readings | None:
        """Published readings, if they are of this study, these settings and weights."""
        if self.known is None or self.oracle is None or self.encoders:
            return None
        found = load_readings(file_of(self.known, arm.name, number))
        if found is None:
            return None
        wanted = json.loads(json.dumps(self._about(arm, number)))
        wanted["adapter"] = wanted["adapter"] or found.about.get("adapter")
        return found if found.about == wanted else None

    def _about(self, arm: Arm, number: int) -> dict[str, Any]:
        """What decides images; the hash of an adapter that is not here is None."""
        study = self.study
        try:
            file = local_file(adapter_source(study.base, arm.sources[number]))
            weights = hashlib.sha256(file.read_bytes()).hexdigest()
        except IpdiverseError:
            weights = None
        numbers = {name: getattr(study, name) for name in ("pairs", "images", "steps", "seed")}
        settings = {name: value for name, value in arm.settings.items() if name != "adapter"}
        base = hashlib.sha256(json.dumps(self._decides).encode()).hexdigest()
        return {"settings": settings, **numbers, "base": base, "adapter": weights}

    def _scored(self, images: np.ndarray) -> tuple[dict[str, Parts], Readings | None]:
        """Of (pairs · images, height, width, 3)."""
        parts: dict[str, Parts] = {}
        seen = None
        if self.oracle is not None:
            reading, shape = read(self.oracle, images), (len(self.pairs), self.study.images)
            attributes = reading.attributes.numpy().reshape(*shape, -1)
            seen = Readings(attributes, reading.invalid.numpy().reshape(shape), {})
            parts |= critters_parts(seen.attributes, seen.invalid, self.pairs)
        for encoder in self.encoders:
            parts |= self._features(encoder, images)
        return parts, seen

    def _first(self, images: np.ndarray) -> np.ndarray:
        """Those of the first pairs, for the report, (pairs, images, height, width, 3)."""
        size = self.study.images
        return images[: _CHUNK * size].reshape(-1, size, *images.shape[1:]).copy()

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
        settings = asdict(arm.request(self.study.steps, self.base.guidance_scale))
        study = [self.study.images, self.study.seed]
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
