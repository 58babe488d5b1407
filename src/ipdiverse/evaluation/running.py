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
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ipdiverse.adapter.files.sources import local_file
from ipdiverse.base.bases import CRITTERS, CRITTERS_ORACLE, adapter_source
from ipdiverse.base.pipelines import fingerprint
from ipdiverse.errors import ArgumentError, IpdiverseError
from ipdiverse.evaluation.anchors import anchors
from ipdiverse.evaluation.arm_images import ArmImages, what_decides
from ipdiverse.evaluation.dial_check import check_dials
from ipdiverse.evaluation.features import feature_parts, open_encoder
from ipdiverse.evaluation.measured import SHOWN_IMAGES, SHOWN_PAIRS, Done, Measured
from ipdiverse.evaluation.opening import asked, open_base, open_reader
from ipdiverse.evaluation.readings import (
    FOLDER,
    Readings,
    file_of,
    load_readings,
    read_sets,
    together,
)
from ipdiverse.evaluation.report import volumes
from ipdiverse.evaluation.sampling import critters_sets, shipped_oracle
from ipdiverse.evaluation.sets import Parts, joined, set_parts
from ipdiverse.sampling.draw import versions
from ipdiverse.writing import ensure_writable_folder, file_hash, write_text_atomic

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ipdiverse.base.bases import Base
    from ipdiverse.evaluation.sets import Sets
    from ipdiverse.evaluation.study import Arm, Study


def run_study(
    study: Study,
    out: Path,
    progress: bool | None = None,
    known: Path | None = None,
    partial: bool = False,
) -> Done:
    """Measure every arm, or what is left of them.

    Args:
        study: What to measure.
        out: Folder for images and results; an interrupted study in it goes on.
        progress: Show a bar on standard error; None does so on terminals only.
        known: Folder of readings that were published: an arm that is there, with these settings and
            weights, is not drawn again. Weights that are not here cannot be compared; then the
            readings are taken.
        partial: Draw nothing: report on what was drawn or read so far.

    Raises:
        IpdiverseError: A base, adapter, reference or folder is unusable.
    """
    runner = Runner(study, out, progress, known)
    left_out = runner.keep_what_is_there() if partial else []
    runner.check_sources()
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
        self.pairs, self.references = asked(study)  # before anything comes from the hub
        exact = study.base == CRITTERS and study.references is None
        if not exact and not study.features:
            raise ArgumentError(
                "are missing",
                where="features",
                expected='encoders to compare images by, as features = ["dino", "clip"]',
            )
        self.oracle = shipped_oracle() if exact else None
        self._oracle_hash = file_hash(CRITTERS_ORACLE) if exact else None
        self.study = study = replace(study, pairs=len(self.pairs))
        self.base = base = open_base(study)
        self.reader = open_reader(study, base)
        given = (study, base, self.pairs, self.references, out / "images", self.reader)
        self._images = ArmImages(*given)
        self.encoders = [open_encoder(name, base.pipe, _room(base)) for name in study.features]
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
        read = [seen for _, seen, _ in found if seen is not None]
        return Measured(
            arm,
            [parts for parts, _, _ in found],
            next((images for _, _, images in found if images is not None), None),
            self._sets(read) if read else None,
        )

    def check_sources(self) -> None:
        """Refuse what is missing before hours are spent.

        Raises:
            IpdiverseError: An adapter is missing.
        """
        for arm in self.study.arms:
            for number, source in enumerate(arm.sources):
                if self._known(arm, number) is None:
                    local_file(adapter_source(self.study.base, source))

    def keep_what_is_there(self) -> list[str]:
        """Leave out of the study what would have to be drawn.

        Returns:
            The arms that are left out, wholly or some of their training seeds.

        Raises:
            ArgumentError: The baseline is left out.
        """
        arms, left_out = [], []
        for arm in self.study.arms:
            sources = range(len(arm.sources))
            # readings are numbered by training seed: those before the first that is missing
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
        except IpdiverseError:  # its adapter is not there
            return False

    def anchors(self) -> list[Measured]:
        """What bounds every arm, where it is known."""
        known = self.oracle is not None
        pipe = self.base.pipe
        side = pipe.unet.config.sample_size * pipe.vae_scale_factor
        found = anchors(self.pairs, self.references, self.study.images, known, side)
        measured = []
        for arm, chunks in found:
            parts, seen, images = self._scored(chunks)
            sets = None if seen is None else self._sets([seen])
            measured.append(Measured(arm, [parts], images, sets))
        return measured

    def _run(
        self, arm: Arm, number: int
    ) -> tuple[dict[str, Parts], Readings | None, np.ndarray | None]:
        """Scores, readings and images of an arm with one of its adapters."""
        if (known := self._known(arm, number)) is not None:
            self._advance(len(self.pairs))
            scores = set_parts(self._sets([known]))
            seen, images = known, self._first_kept(arm, arm.sources[number])
        else:
            chunks = self._images.chunks(arm, arm.sources[number], self._advance)
            scores, seen, images = self._scored(chunks)
        if seen is not None:  # those that were known stay beside those that are new
            folder = ensure_writable_folder(self.out / FOLDER)
            about = seen.about or self._about(arm, number)
            replace(seen, about=about).save(file_of(folder, arm.name, number))
        return scores, seen, images

    def _known(self, arm: Arm, number: int) -> Readings | None:
        """Published readings, if they are of this study, these settings, weights and oracle."""
        if self.known is None or self.oracle is None or self.encoders:
            return None
        found = load_readings(file_of(self.known, arm.name, number))
        if found is None:
            return None
        wanted = json.loads(json.dumps(self._about(arm, number)))
        wanted |= {k: found.about.get(k) for k in ("adapter", "levers") if wanted[k] is None}
        return found if found.about == wanted else None

    def _about(self, arm: Arm, number: int) -> dict[str, Any]:
        """What decides readings; what only an adapter that is not here could tell is None."""
        study = self.study
        numbers = {name: getattr(study, name) for name in ("pairs", "images", "seed")}
        decides = what_decides(self._images.request(arm), self._file_here(arm.sources[number]))
        shown = hashlib.sha256(json.dumps(self._images.decides).encode()).hexdigest()
        return {**decides, **numbers, "base": shown, "oracle": self._oracle_hash}

    def _file_here(self, source: str) -> Path | None:
        """An adapter's file, if it is on this machine: published readings do not need it."""
        try:
            return local_file(adapter_source(self.study.base, source), local_files_only=True)
        except IpdiverseError:
            return None

    def _scored(
        self, chunks: Iterable[np.ndarray]
    ) -> tuple[dict[str, Parts], Readings | None, np.ndarray | None]:
        """Scores, readings and images to show, of `CHUNK` pairs' images at a time."""
        read, features = list[Readings](), list[dict[str, Parts]]()
        shown, done = None, 0
        for images in chunks:
            sets = images.reshape(-1, self.study.images, *images.shape[1:])
            shown = _shown(sets) if shown is None else shown
            pairs = slice(done, done := done + len(sets))
            features.append(self._features(sets, pairs))
            if self.oracle is not None:
                read.append(read_sets(self.oracle, sets))
        seen = together(read) if read else None
        exact = {} if seen is None else set_parts(self._sets([seen]))
        return exact | joined(features), seen, shown

    def _sets(self, read: list[Readings]) -> Sets:
        """What was read in the images of every training seed, those of a pair together."""
        seen = together(read, axis=1)
        return critters_sets(seen.attributes, seen.invalid, self.pairs)

    def _features(self, sets: np.ndarray, pairs: slice) -> dict[str, Parts]:
        """Every encoder's scores of some pairs, (pairs, images, height, width, 3)."""
        parts: dict[str, Parts] = {}
        pictures = [[Image.fromarray(image) for image in drawn] for drawn in sets]
        prompts = [pair.prompt for pair in self.pairs[pairs]]
        for encoder in self.encoders:
            parts |= feature_parts(encoder, pictures, self.references[pairs], prompts)
        return parts

    def _first_kept(self, arm: Arm, source: str) -> np.ndarray | None:
        """Images to show, if they were drawn here."""
        try:
            images = self._images.first(arm, source)
        except IpdiverseError:  # its adapter is not there
            return None
        if images is None:
            return None
        return _shown(images.reshape(-1, self.study.images, *images.shape[1:]))

    def _advance(self, pairs: int) -> None:
        if self._bar is not None:
            self._bar.update(pairs * self.study.images)


def _shown(sets: np.ndarray) -> np.ndarray:
    """What a report shows of them, and no view of the rest."""
    return sets[:SHOWN_PAIRS, :SHOWN_IMAGES].copy()


def _room(base: Base) -> str:
    """Where encoders that compare images run: beside the base, unless that has to wait for room."""
    return base.plan.device if base.plan is not None and base.plan.offload == "none" else "cpu"
