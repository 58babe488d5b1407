"""Studies from recorded readings: what the oracle read in an arm's images, small and published.

A study that is published with its readings can be scored again, with other intervals or other
scores, without an image being drawn.

OUT/readings/ARM-0.npz      what was read in the images of one arm with its first adapter
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from ipdiverse.base.adapters import adapter_file
from ipdiverse.base.bases import CRITTERS_ORACLE
from ipdiverse.critters.oracle import Reading
from ipdiverse.errors import DataError, IpdiverseError
from ipdiverse.evaluation.images import is_whole, kept, what_decides
from ipdiverse.evaluation.running import Runner, shown
from ipdiverse.evaluation.sets import pair_sums
from ipdiverse.evaluation.study import RENAMED
from ipdiverse.writing import ensure_writable_folder, file_hash, write_bytes_atomic

if TYPE_CHECKING:
    from pathlib import Path

    from ipdiverse.evaluation.running import Scored
    from ipdiverse.evaluation.study import Arm, Study

FOLDER = "readings"


@dataclass(frozen=True)
class Recorded:
    """What the oracle read in the images of one arm with one of its adapters.

    Args:
        seen: Of every pair and image; those of before 0.3 lack placement.
        about: What decided it: settings, numbers of the study, hashes of base, adapter and oracle.
    """

    seen: Reading
    about: dict[str, Any]

    def save(self, file: Path) -> None:
        """Write atomically; attributes have few values, so one byte holds each."""
        buffer = BytesIO()
        arrays = {"attributes": self.seen.attributes.astype(np.uint8)}
        if self.seen.invalid is not None:
            arrays["invalid"] = np.packbits(self.seen.invalid)
        if self.seen.placement is not None:
            arrays["placement"] = self.seen.placement.astype(np.uint8)
        about = np.frombuffer(json.dumps(self.about, sort_keys=True).encode(), np.uint8)
        np.savez_compressed(buffer, allow_pickle=False, **arrays, about=about)
        write_bytes_atomic(file, buffer.getvalue())


def load_recorded(file: Path) -> Recorded | None:
    """Saved readings, with settings as they are called now; None where there is no file.

    Raises:
        DataError: The file is broken.
    """
    if not file.is_file():
        return None
    try:
        # published readings may come from anybody: no pickles, and no header that exhausts memory
        with np.load(file, allow_pickle=False, max_header_size=4096) as stored:
            attributes = stored["attributes"].astype(int)
            about = json.loads(stored["about"].tobytes())
            invalid = placement = None
            if "invalid" in stored:
                bits = np.unpackbits(stored["invalid"], count=attributes[..., 0].size)
                invalid = bits.astype(bool).reshape(attributes.shape[:2])
            if "placement" in stored:
                placement = stored["placement"].astype(int)
        seen = Reading(attributes, invalid, placement)
        for kind in ("settings", "levers"):
            if about.get(kind) is not None:
                about[kind] = {RENAMED.get(name, name): v for name, v in about[kind].items()}
    except Exception as error:  # whatever NumPy and zipfile raise on a broken file
        raise DataError("are not readings", where=file, found=error, fix="Remove it.") from error
    return Recorded(seen, about)


def find_recorded(folder: Path, arm: str, seed: int) -> Recorded | None:
    """Readings of an arm, saved under its name or under the name that it had in 0.1.

    Args:
        folder: Of all of them.
        arm: Its name.
        seed: Which of its adapters, from 0.

    Raises:
        DataError: The file is broken.
    """
    former = arm
    for old, new in RENAMED.items():  # a sweep's arm has the setting in its name
        former = former.replace(f"{new} ", f"{old} ")
    for name in dict.fromkeys((arm, former)):
        if (found := load_recorded(recorded_file(folder, name, seed))) is not None:
            return found
    return None


def recorded_file(folder: Path, arm: str, seed: int) -> Path:
    """Where readings of an arm are saved (arguments as `find_recorded`).

    The name is cut down to what a file's may hold; a hash tells arms apart whose names differ in
    the rest.
    """
    plain = "".join(c if c.isascii() and c.isalnum() else " " for c in arm.lower()).split()
    told = hashlib.sha256(arm.encode()).hexdigest()[:6]
    return folder / f"{'-'.join(plain)[:60]}-{told}-{seed}.npz"


def publish(out: Path, target: Path) -> None:
    """Copy a study's numbers, pictures and readings, without its images, to another folder.

    Args:
        out: A finished study's folder.
        target: The folder to write to; files in it with other names stay.
    """
    folder = ensure_writable_folder(target)
    for file in (out / "results.json", *sorted(out.glob("*.svg")), *sorted(out.glob("*.png"))):
        write_bytes_atomic(folder / file.name, file.read_bytes())
    for file in sorted((out / FOLDER).glob("*.npz")):
        write_bytes_atomic(ensure_writable_folder(folder / FOLDER) / file.name, file.read_bytes())


class RecordedRunner(Runner):
    """Writes readings of every arm, and takes published ones instead of drawing.

    Readings are taken where settings and weights are the same, and where an adapter is not on this
    machine, so that its weights cannot be compared.

    Args:
        study: As `Runner` takes it.
        out: The same.
        known: Folder of published readings.
        progress: As `Runner` takes it.
        partial: Nothing is drawn (`leave_out_undrawn`).
    """

    def __init__(
        self,
        study: Study,
        out: Path,
        known: Path | None = None,
        progress: bool | None = None,
        partial: bool = False,
    ) -> None:
        super().__init__(study, out, progress)
        self.known, self.partial = known, partial
        self._oracle_hash = file_hash(CRITTERS_ORACLE) if self.oracle is not None else None

    def check_sources(self) -> None:
        """Refuse adapters that are missing, unless their images were read."""
        for arm in self.study.arms:
            for number, source in enumerate(arm.sources):
                if self.recorded(arm, number) is None:
                    adapter_file(self.study.base, source)

    def measure_seed(self, arm: Arm, number: int) -> Scored:
        """An arm with one of its adapters, drawn only if it was not read."""
        found = self.recorded(arm, number)
        if found is None:
            scored = super().measure_seed(arm, number)
        else:
            self.advance(len(self.pairs))
            sums = pair_sums(self.sets_of([found.seen]))
            scored = sums, found.seen, self._first_drawn(arm, number)
        if (seen := scored[1]) is not None:  # known readings too: one folder has those of every arm
            about = self._about(arm, number) if found is None else found.about
            folder = ensure_writable_folder(self.out / FOLDER)
            Recorded(seen, about).save(recorded_file(folder, arm.name, number))
        return scored

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

    def recorded(self, arm: Arm, number: int) -> Recorded | None:
        """Published readings, if they are of this study, these settings, weights and oracle.

        Where nothing is drawn another oracle's attributes are as good. What it called invalid is
        not comparable, and reports show a dash.
        """
        if self.known is None or self.oracle is None or self.encoders:
            return None  # encoders need the images themselves
        found = find_recorded(self.known, arm.name, number)
        if found is None:
            return None
        wanted = json.loads(json.dumps(self._about(arm, number)))
        # without the adapter's file neither its weights nor its dial can be compared
        wanted |= {k: found.about.get(k) for k in ("adapter", "levers") if wanted[k] is None}
        if self.partial and found.about.get("oracle") != wanted["oracle"]:
            found = replace(found, seen=Reading(found.seen.attributes))
            wanted["oracle"] = found.about.get("oracle")
        return found if found.about == wanted else None

    def _is_there(self, arm: Arm, number: int) -> bool:
        files = self._files(arm, number)
        return self.recorded(arm, number) is not None or bool(
            files and all(is_whole(file) for file in files)
        )

    def _first_drawn(self, arm: Arm, number: int) -> np.ndarray | None:
        """Images for the report, if some were drawn here."""
        file = next(iter(self._files(arm, number)), None)
        if file is None or not is_whole(file):
            return None
        images = kept(file)
        return shown(images.reshape(-1, self.study.images, *images.shape[1:]))

    def _files(self, arm: Arm, number: int) -> list[Path]:
        """Where an arm's images are kept; none where its adapter is missing."""
        weights = self._weights(arm, number)
        return [] if weights is None else list(self.images.files(arm, weights))

    def _about(self, arm: Arm, number: int) -> dict[str, Any]:
        """Everything that decides readings; None where only a missing adapter could tell."""
        numbers = {name: getattr(self.study, name) for name in ("pairs", "images", "seed")}
        decides = what_decides(self.images.request(arm), self._weights(arm, number))
        base = hashlib.sha256(json.dumps(self.images.decides).encode()).hexdigest()
        return {**decides, **numbers, "base": base, "oracle": self._oracle_hash}

    def _weights(self, arm: Arm, number: int) -> Path | None:
        """The adapter's file; None where it is not on this machine: readings do not need it."""
        try:
            return adapter_file(self.study.base, arm.sources[number], local_files_only=True)
        except IpdiverseError:
            return None
