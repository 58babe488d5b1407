"""Runs a study. Images are kept as they are drawn, so that an interrupted study resumes.

OUT/images/KEY/00000.npz    images of some pairs of one arm, uint8
OUT/results.jsonl           a line for each finished arm
OUT/results.json            settings, provenance and every arm, for programs
OUT/report.html, *.svg      for people
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ipdiverse.base.adapters import adapter_file, check_adapter
from ipdiverse.base.bases import CRITTERS, Base, check_part, load_image_encoder
from ipdiverse.base.pipelines import fingerprint
from ipdiverse.base.presets import PRESETS, HubFile
from ipdiverse.critters.oracle import Reading, read
from ipdiverse.errors import ArgumentError
from ipdiverse.evaluation.features import feature_sums, open_encoder
from ipdiverse.evaluation.images import COPY, RENDERER, StudyImages, copied, rendered
from ipdiverse.evaluation.measured import (
    SHOWN_IMAGES,
    SHOWN_PAIRS,
    Done,
    Measured,
    check_dials,
    hypervolumes,
    rounded,
)
from ipdiverse.evaluation.pairs import critters_sets, pairs_of, shipped_oracle
from ipdiverse.evaluation.sets import PairSums, Sets, concatenated, pair_sums
from ipdiverse.evaluation.study import Arm, Study
from ipdiverse.parts import Part, forget_parts, holding_parts, part_of
from ipdiverse.sampling import task
from ipdiverse.sampling.draw import versions
from ipdiverse.sampling.request import Request
from ipdiverse.writing import (
    ensure_writable_folder,
    only_one,
    without_folders,
    write_text_atomic,
)

Scored = tuple[dict[str, PairSums], Reading | None, np.ndarray | None]
"""Sums of every score, what was read, and images for the report."""


def needed_files(study: Study) -> list[HubFile]:
    """Files on the hub that a study needs for the presets it names, each once."""
    _check_names(study)
    requests = [_request(study, source) for source in study.sources]
    return list(dict.fromkeys(file for one in requests for file in task.needed_files(one)))


def open_base(study: Study) -> Base:
    """A study's base, placed as the device has room, with the image encoder that presets need."""
    _check_names(study)
    named = [PRESETS[source] for source in study.sources if source in PRESETS]
    reads = next((preset.name for preset in named if preset.encoder is not None), "")
    return task.open_base(_request(study, reads))


def _check_names(study: Study) -> None:
    """Before gigabytes are downloaded."""
    for source in study.sources:
        if source in PRESETS:
            check_adapter(study.base, source)
    if study.image_encoder:
        check_part(study.image_encoder)


def _request(study: Study, adapter: str) -> Request:
    return Request(base=study.base, adapter=adapter, image_encoder=study.image_encoder or "")


class Runner:
    """Draws and scores arms, each image once; a context manager that shows progress.

    Args:
        study: Pairs, seeds and steps; progress is estimated from its arms.
        out: Folder for images and results; a study that was interrupted there resumes.
        progress: Show a bar on standard error; None does so on terminals only.

    Raises:
        IpdiverseError: The base, a reference, an encoder or the folder cannot be used.
    """

    def __init__(self, study: Study, out: Path, progress: bool | None = None) -> None:
        self.out = ensure_writable_folder(out)
        self.pairs, self.references = pairs_of(study)  # before anything is downloaded
        critters = study.base == CRITTERS and study.references is None
        if not critters and not study.features:
            raise ArgumentError(
                "are missing",
                where="features",
                expected='encoders to compare images by, as features = ["dino", "clip"]',
            )
        self.oracle = shipped_oracle() if critters else None
        # folders may give fewer pairs than were asked for
        self.study = study = replace(study, pairs=len(self.pairs))
        self.base = base = open_base(study)
        named = study.image_encoder
        reader = load_image_encoder(named, base) if named else None
        self.images = StudyImages(study, base, self.pairs, self.references, out / "images", reader)
        # where encoders that compare images run: the CPU, if the base fills its device
        roomy = base.plan is not None and base.plan.offload == "none"
        device = base.plan.device if base.plan is not None and roomy else "cpu"
        self.encoders = [open_encoder(name, base.pipe, device) for name in study.features]
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

    def run(self, left_out: Sequence[str] = ()) -> Done:
        """Measure every arm and write the numbers; the report names arms that were `left_out`.

        It holds its folder meanwhile: a second study in it is refused.
        """
        with only_one(self.out), holding_parts(self.out):
            done = self._run(left_out)
            forget_parts(self.out)
            return done

    def draw(self, part: Part, about: Mapping[str, Any]) -> None:
        """Draw a part of all images; `run` then scores them, once all parts have finished.

        Args:
            about: What the study is, for the statement of the part (`parts.part_of`).
        """
        with part_of(self.out, part, about):
            self.check_sources()
            with self:
                for arm in self.study.arms:
                    self._bar.set_description(arm.name)
                    for source in dict.fromkeys(arm.sources):
                        self.images.draw(arm, source, self.advance, part)

    def _run(self, left_out: Sequence[str]) -> Done:
        self.check_sources()
        measured, rows = list[Measured](), list[dict[str, Any]]()
        with self:
            for arm in self.study.arms:
                measured.append(self.measure(arm))
                rows.append(measured[-1].row())
                # written whole again: after a kill it holds every arm before, and no half a line
                lines = "".join(json.dumps(without_folders(row)) + "\n" for row in rows)
                write_text_atomic(self.out / "results.jsonl", lines)
        anchored = self.anchors()
        areas = hypervolumes(self.study, measured)
        settings = {name: v for name, v in asdict(self.study).items() if name != "arms"}
        results = {
            "study": settings,
            "baseline": self.study.baseline_arm.name,
            "versions": versions(),
            "base": fingerprint(self.base.pipe.unet),
            "left_out": list(left_out),
            "dials": rounded([asdict(check) for check in check_dials(measured)]),
            "hypervolumes": areas,
            "arms": [*rows, *(one.row() for one in anchored)],
        }
        text = json.dumps(without_folders(results), indent=1)
        write_text_atomic(self.out / "results.json", text + "\n")
        return Done([*measured, *anchored], self.references, areas, list(left_out))

    def measure(self, arm: Arm) -> Measured:
        """Draw the images of an arm that are missing, and score it."""
        if self._bar is not None:
            self._bar.set_description(arm.name)
        found = [self.measure_seed(arm, number) for number in range(len(arm.sources))]
        seeds = [seen for _, seen, _ in found if seen is not None]
        return Measured(
            arm,
            [sums for sums, _, _ in found],
            next((images for _, _, images in found if images is not None), None),
            self.sets_of(seeds) if seeds else None,
        )

    def anchors(self) -> list[Measured]:
        """What bounds every arm: the renderer, on critters, and copies of the reference."""
        pipe = self.base.pipe
        side = pipe.unet.config.sample_size * pipe.vae_scale_factor
        chunks = {COPY: copied(self.references, self.study.images, side)}
        if self.oracle is not None:
            chunks = {RENDERER: rendered(self.pairs, self.study.images)} | chunks
        measured = []
        for name, drawn in chunks.items():
            sums, seen, images = self._scored(drawn)
            sets = None if seen is None else self.sets_of([seen])
            measured.append(Measured(Arm(name, "anchor"), [sums], images, sets))
        return measured

    def check_sources(self) -> None:
        """Refuse adapters that are missing, before hours are spent."""
        for source in self.study.sources:
            adapter_file(self.study.base, source)

    def measure_seed(self, arm: Arm, number: int) -> Scored:
        """An arm with one of its adapters."""
        return self._scored(self.images.chunks(arm, arm.sources[number], self.advance))

    def _scored(self, chunks: Iterable[np.ndarray]) -> Scored:
        """Scores of images that come in chunks of pairs, as `StudyImages.chunks` yields them."""
        seen, features = list[Reading](), list[dict[str, PairSums]]()
        first, done = None, 0
        for images in chunks:  # an arm's images together may be more than memory holds
            sets = images.reshape(-1, self.study.images, *images.shape[1:])
            first = shown(sets) if first is None else first
            pairs = slice(done, done := done + len(sets))
            pictures = [[Image.fromarray(image) for image in drawn] for drawn in sets]
            asked = self.references[pairs], [pair.prompt for pair in self.pairs[pairs]]
            sums: dict[str, PairSums] = {}
            for encoder in self.encoders:
                sums |= feature_sums(encoder, pictures, *asked)
            features.append(sums)
            if self.oracle is not None:
                seen.append(read(self.oracle, sets))
        found = _joined(seen, axis=0) if seen else None
        exact = {} if found is None else pair_sums(self.sets_of([found]))
        return exact | concatenated(features), found, first

    def sets_of(self, seeds: Sequence[Reading]) -> Sets:
        """What was read for every training seed as sets, the images of a pair together."""
        return critters_sets(_joined(seeds, axis=1), self.pairs)

    def advance(self, pairs: int) -> None:
        """Show that these many pairs more are done."""
        if self._bar is not None:
            self._bar.update(pairs * self.study.images)


def _joined(parts: Sequence[Reading], axis: int) -> Reading:
    """Readings of more pairs, along axis 0, or of more images of the same pairs, along axis 1."""
    joined: list[Any] = [
        None if any(one is None for one in part) else np.concatenate(part, axis)
        for part in zip(*parts, strict=True)
    ]
    return Reading(*joined)


def shown(sets: np.ndarray) -> np.ndarray:
    """The images that a report shows, as a copy: a view would keep all of them in memory."""
    return sets[:SHOWN_PAIRS, :SHOWN_IMAGES].copy()
