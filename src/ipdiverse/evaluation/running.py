"""Runs a study. Images are kept as they are drawn, so that an interrupted study resumes.

OUT/images/KEY/00000.npz    images of some pairs of one arm, uint8
OUT/readings/ARM-0.npz      what the oracle read in those of one adapter
OUT/results.jsonl           a line for each finished arm
OUT/results.json            settings, provenance and every arm, for programs
OUT/report.html, *.svg      for people
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ipdiverse.base.bases import (
    CRITTERS,
    CRITTERS_ORACLE,
    check_adapter,
    check_part,
    load_image_encoder,
)
from ipdiverse.base.pipelines import fingerprint
from ipdiverse.base.presets import PRESETS
from ipdiverse.errors import ArgumentError, IpdiverseError
from ipdiverse.evaluation import readings
from ipdiverse.evaluation.features import feature_sums, open_encoder
from ipdiverse.evaluation.images import StudyImages, adapter_file, anchors, what_decides
from ipdiverse.evaluation.measured import (
    SHOWN_IMAGES,
    SHOWN_PAIRS,
    Done,
    Measured,
    check_dials,
    hypervolumes,
)
from ipdiverse.evaluation.pairs import pairs_of
from ipdiverse.evaluation.readings import Readings, critters_sets, read_images, readings_file
from ipdiverse.evaluation.sets import PairSums, concatenated, pair_sums
from ipdiverse.sampling import drawing
from ipdiverse.sampling.generation import versions
from ipdiverse.sampling.request import Request
from ipdiverse.writing import ensure_writable_folder, file_hash, write_text_atomic

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from ipdiverse.base.bases import Base
    from ipdiverse.base.presets import HubFile
    from ipdiverse.evaluation.sets import Sets
    from ipdiverse.evaluation.study import Arm, Study

    Scored = tuple[dict[str, PairSums], Readings | None, np.ndarray | None]
    """Sums of every score, what was read, and images for the report."""


def run_study(
    study: Study,
    out: Path,
    progress: bool | None = None,
    known: Path | None = None,
    partial: bool = False,
) -> Done:
    """Measure every arm, or those that are left.

    Args:
        study: What to measure.
        out: Folder for images and results; a study that was interrupted there resumes.
        progress: Show a bar on standard error; None does so on terminals only.
        known: Folder of published readings, which are taken instead of drawing where settings and
            weights are the same. They are also taken where an adapter is not on this machine, so
            that its weights cannot be compared.
        partial: Draw nothing: report on what was drawn or read so far.

    Raises:
        IpdiverseError: A base, adapter, reference or folder cannot be used.
    """
    runner = Runner(study, out, progress, known)
    left_out = runner.leave_out_undrawn() if partial else []
    runner.check_sources()
    study, measured, rows = runner.study, list[Measured](), list[dict[str, Any]]()
    with runner:
        for arm in study.arms:
            measured.append(runner.measure(arm))
            rows.append(measured[-1].row())
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            write_text_atomic(out / "results.jsonl", lines)
    anchored = runner.anchors()
    areas = hypervolumes(study, measured)
    results = {
        "study": study.settings(),
        "baseline": study.baseline_arm.name,
        "versions": versions(),
        "base": fingerprint(runner.base.pipe.unet),
        "left_out": left_out,
        "dials": [check.as_json() for check in check_dials(measured)],
        "hypervolumes": areas,
        "arms": [*rows, *(one.row() for one in anchored)],
    }
    write_text_atomic(out / "results.json", json.dumps(results, indent=1) + "\n")
    return Done([*measured, *anchored], runner.references, areas, left_out)


def needed_files(study: Study) -> list[HubFile]:
    """Files on the hub that a study needs for the presets it names, each once.

    Raises:
        ModelError: A preset's adapter is for another base, or the image encoder is unknown.
    """
    _check_names(study)
    requests = [_request(study, source) for source in study.sources]
    return list(dict.fromkeys(file for one in requests for file in drawing.needed_files(one)))


def open_base(study: Study) -> Base:
    """The base of a study, placed as the device has room, with the image encoder that presets need.

    Raises:
        IpdiverseError: It cannot be opened or downloaded.
    """
    _check_names(study)
    named = [PRESETS[source] for source in study.sources if source in PRESETS]
    reads = next((preset.name for preset in named if preset.encoder is not None), "")
    return drawing.open_base(_request(study, reads))


def _check_names(study: Study) -> None:
    """Before gigabytes are downloaded. Adapter files may be missing where readings are known."""
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
        out: Folder for images.
        progress: Show a bar on standard error; None does so on terminals only.
        known: As `run_study` takes it.

    Raises:
        IpdiverseError: The base, a reference, an encoder or the folder cannot be used.
    """

    def __init__(
        self, study: Study, out: Path, progress: bool | None = None, known: Path | None = None
    ) -> None:
        self.out, self.known = ensure_writable_folder(out), known
        self.pairs, self.references = pairs_of(study)  # before anything is downloaded
        critters = study.base == CRITTERS and study.references is None
        if not critters and not study.features:
            raise ArgumentError(
                "are missing",
                where="features",
                expected='encoders to compare images by, as features = ["dino", "clip"]',
            )
        self.oracle = readings.shipped_oracle() if critters else None
        self._oracle_hash = file_hash(CRITTERS_ORACLE) if critters else None
        self.study = study = replace(study, pairs=len(self.pairs))
        self.base = base = open_base(study)
        named = study.image_encoder
        reader = load_image_encoder(named, base) if named else None
        given = (study, base, self.pairs, self.references, out / "images", reader)
        self._images = StudyImages(*given)
        self.encoders = [open_encoder(n, base.pipe, _device(base)) for n in study.features]
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
        """Draw the images of an arm that are missing, and score it."""
        if self._bar is not None:
            self._bar.set_description(arm.name)
        found = [self._measure_seed(arm, number) for number in range(len(arm.sources))]
        read = [seen for _, seen, _ in found if seen is not None]
        return Measured(
            arm,
            [sums for sums, _, _ in found],
            next((images for _, _, images in found if images is not None), None),
            self._sets(read) if read else None,
        )

    def anchors(self) -> list[Measured]:
        """What bounds every arm: the renderer, on critters, and copies of the reference."""
        pipe = self.base.pipe
        side = pipe.unet.config.sample_size * pipe.vae_scale_factor
        known = self.oracle is not None
        measured = []
        for arm, chunks in anchors(self.pairs, self.references, self.study.images, known, side):
            sums, seen, images = self._scored(chunks)
            sets = None if seen is None else self._sets([seen])
            measured.append(Measured(arm, [sums], images, sets))
        return measured

    def check_sources(self) -> None:
        """Refuse adapters that are missing before hours are spent.

        Raises:
            IpdiverseError: An adapter is missing.
        """
        for arm in self.study.arms:
            for number, source in enumerate(arm.sources):
                if self._known(arm, number) is None:
                    adapter_file(self.study.base, source)

    def leave_out_undrawn(self) -> list[str]:
        """Take out of the study everything that would have to be drawn.

        Returns:
            The arms that are left out, entirely or for some of their training seeds.

        Raises:
            ArgumentError: The baseline is left out.
        """
        arms, left_out = [], []
        for arm in self.study.arms:
            sources = range(len(arm.sources))
            # readings are numbered by training seed, so only seeds before a missing one can stay
            there = next((n for n in sources if not self._is_there(arm, n)), len(sources))
            if there:
                arms.append(replace(arm, adapters=arm.adapters[:there]))
            if there < len(sources):
                left_out.append(f"{arm.name} (of some seeds)" if there else arm.name)
        self.study = replace(self.study, arms=tuple(arms))
        return left_out

    def _is_there(self, arm: Arm, number: int) -> bool:
        if self._known(arm, number) is not None:
            return True
        try:
            return self._images.all_there(arm, arm.sources[number])
        except IpdiverseError:  # its adapter is missing
            return False

    def _measure_seed(self, arm: Arm, number: int) -> Scored:
        """An arm with one of its adapters."""
        if (known := self._known(arm, number)) is not None:
            self._advance(len(self.pairs))
            sums, seen = pair_sums(self._sets([known])), known
            images = self._first_drawn(arm, arm.sources[number])
        else:
            chunks = self._images.chunks(arm, arm.sources[number], self._advance)
            sums, seen, images = self._scored(chunks)
        if seen is not None:  # known readings too, so that one folder has those of every arm
            folder = ensure_writable_folder(self.out / readings.FOLDER)
            about = seen.about or self._about(arm, number)
            replace(seen, about=about).save(readings_file(folder, arm.name, number))
        return sums, seen, images

    def _known(self, arm: Arm, number: int) -> Readings | None:
        """Published readings, if they are of this study, these settings, weights and oracle."""
        if self.known is None or self.oracle is None or self.encoders:
            return None  # encoders need the images themselves
        found = readings.find_readings(self.known, arm.name, number)
        if found is None:
            return None
        wanted = json.loads(json.dumps(self._about(arm, number)))
        # without the adapter's file neither its weights nor its dial can be compared
        wanted |= {k: found.about.get(k) for k in ("adapter", "levers") if wanted[k] is None}
        return found if found.about == wanted else None

    def _about(self, arm: Arm, number: int) -> dict[str, Any]:
        """Everything that decides readings; None where only a missing adapter could tell."""
        study = self.study
        numbers = {name: getattr(study, name) for name in ("pairs", "images", "seed")}
        try:  # published readings do not need the adapter
            weights = adapter_file(study.base, arm.sources[number], local_files_only=True)
        except IpdiverseError:
            weights = None
        decides = what_decides(self._images.request(arm), weights)
        base = hashlib.sha256(json.dumps(self._images.decides).encode()).hexdigest()
        return {**decides, **numbers, "base": base, "oracle": self._oracle_hash}

    def _scored(self, chunks: Iterable[np.ndarray]) -> Scored:
        """Scores of images that come in chunks of pairs, as `StudyImages.chunks` yields them."""
        read, features = list[Readings](), list[dict[str, PairSums]]()
        shown, done = None, 0
        for images in chunks:
            sets = images.reshape(-1, self.study.images, *images.shape[1:])
            shown = _shown(sets) if shown is None else shown
            pairs = slice(done, done := done + len(sets))
            features.append(self._features(sets, pairs))
            if self.oracle is not None:
                read.append(read_images(self.oracle, sets))
        seen = readings.concatenated(read) if read else None
        exact = {} if seen is None else pair_sums(self._sets([seen]))
        return exact | concatenated(features), seen, shown

    def _sets(self, read: list[Readings]) -> Sets:
        """Readings of every training seed as sets, the images of a pair together."""
        seen = readings.concatenated(read, axis=1)
        return critters_sets(seen.attributes, seen.invalid, self.pairs)

    def _features(self, sets: np.ndarray, pairs: slice) -> dict[str, PairSums]:
        """Every encoder's scores of some pairs, (pairs, images, height, width, 3)."""
        sums: dict[str, PairSums] = {}
        pictures = [[Image.fromarray(image) for image in drawn] for drawn in sets]
        prompts = [pair.prompt for pair in self.pairs[pairs]]
        for encoder in self.encoders:
            sums |= feature_sums(encoder, pictures, self.references[pairs], prompts)
        return sums

    def _first_drawn(self, arm: Arm, source: str) -> np.ndarray | None:
        """Images for the report, if some were drawn here."""
        try:
            images = self._images.first(arm, source)
        except IpdiverseError:  # its adapter is missing
            return None
        if images is None:
            return None
        return _shown(images.reshape(-1, self.study.images, *images.shape[1:]))

    def _advance(self, pairs: int) -> None:
        if self._bar is not None:
            self._bar.update(pairs * self.study.images)


def _shown(sets: np.ndarray) -> np.ndarray:
    """The images that a report shows, as a copy: a view would keep all of them in memory."""
    return sets[:SHOWN_PAIRS, :SHOWN_IMAGES].copy()


def _device(base: Base) -> str:
    """Where encoders that compare images run: the base's device, or the CPU if it is full."""
    return base.plan.device if base.plan is not None and base.plan.offload == "none" else "cpu"
