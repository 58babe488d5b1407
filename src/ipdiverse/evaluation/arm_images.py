"""An arm's images: drawn pair by pair, and kept, so that none is drawn twice."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from ipdiverse.adapter.files.checkpoint import load_adapter, weights_hash
from ipdiverse.adapter.files.sources import local_file
from ipdiverse.base.bases import CRITTERS, adapter_source
from ipdiverse.base.memory import autocast
from ipdiverse.base.pipelines import fingerprint
from ipdiverse.evaluation.sampling import sample_array
from ipdiverse.image_io import content_hash
from ipdiverse.levers import LEVERS
from ipdiverse.sampling.draw import versions
from ipdiverse.sampling.sample import Job, attached, levers_of, set_scale
from ipdiverse.writing import ensure_writable_folder, write_bytes_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from PIL import Image

    from ipdiverse.base.bases import Base
    from ipdiverse.evaluation.study import Arm, Study
    from ipdiverse.sampling.request import Request

CHUNK = 8
"""Pairs whose images are kept together."""


class ArmImages:
    """Draws and keeps images.

    Args:
        study: Its numbers; `pairs` is how many there are.
        base: Open.
        pairs: What is asked for.
        references: Of every pair.
        folder: Where images are kept.
        reader: The image encoder that adapters read with, and its preprocessing; None is the
            base's.
    """

    def __init__(
        self,
        study: Study,
        base: Base,
        pairs: Sequence[Any],
        references: Sequence[Image.Image],
        folder: Path,
        reader: tuple[Any, Any] | None = None,
    ) -> None:
        self.study, self.base, self.folder = study, base, folder
        self.pairs, self.references, self._reader = pairs, references, reader
        asked = [content_hash(image) for image in references]
        asked += [pair.prompt for pair in pairs]
        read = [] if reader is None else [fingerprint(reader[0]), str(reader[1])]
        self.decides = [*_models(base.pipe), *_placed(base), *read, *asked]

    def chunks(
        self, arm: Arm, source: str, progress: Callable[[int], None]
    ) -> Iterator[np.ndarray]:
        """All images of an arm with one adapter, `CHUNK` pairs at a time; what is there stays.

        Args:
            arm: Which.
            source: The adapter.
            progress: Told how many pairs are done.

        Yields:
            (pairs of the chunk · images, height, width, 3), uint8.
        """
        weights = adapter_source(self.study.base, source)
        chunks, files = self._files(arm, weights)
        missing = [(c, f) for c, f in zip(chunks, files, strict=True) if not f.exists()]
        progress(len(self.pairs) - sum(len(chunk) for chunk, _ in missing))
        if missing:
            ensure_writable_folder(files[0].parent)
            self._draw(arm, weights, missing, progress)
        for file in files:
            yield np.load(file)["images"]

    def request(self, arm: Arm) -> Request:
        """As a request, with what the arm leaves to the base."""
        return arm.request(self.study.steps, self.base.guidance_scale, self.base.scale)

    def all_there(self, arm: Arm, source: str) -> bool:
        """Whether nothing of an arm with one adapter is left to draw.

        Raises:
            IpdiverseError: The adapter is not on this machine.
        """
        _, files = self._files(arm, adapter_source(self.study.base, source), True)
        return all(file.exists() for file in files)

    def first(self, arm: Arm, source: str) -> np.ndarray | None:
        """The first chunk, as `chunks` gives it; None if they are not there.

        Raises:
            IpdiverseError: The adapter is not on this machine.
        """
        _, files = self._files(arm, adapter_source(self.study.base, source), True)
        return np.load(files[0])["images"] if files[0].exists() else None

    def _files(
        self, arm: Arm, weights: Path | str, local_files_only: bool = False
    ) -> tuple[list[range], list[Path]]:
        """The chunks of pairs, and the file of each."""
        folder = self.folder / self._key(
            arm, local_file(weights, local_files_only=local_files_only)
        )
        starts = range(0, len(self.pairs), CHUNK)
        chunks = [range(start, min(start + CHUNK, len(self.pairs))) for start in starts]
        return chunks, [folder / f"{number:05d}.npz" for number in range(len(chunks))]

    def _jobs(self, numbers: range) -> list[Job]:
        """Every image of some pairs; noise depends on pair and number alone, not on the arm."""
        seed = self.study.seed * 1_000_003
        return [
            Job(self.pairs[number].prompt, seed + number, index, self.references[number])
            for number in numbers
            for index in range(self.study.images)
        ]

    def _draw(
        self,
        arm: Arm,
        weights: Path | str,
        missing: list[tuple[range, Path]],
        progress: Callable[[int], None],
    ) -> None:
        request = self.request(arm)
        fast = autocast() if self.study.base == CRITTERS else nullcontext()
        with attached(self.base, weights, self._reader or "") as attachment:
            set_scale(attachment, self.base, request)
            for chunk, file in missing:
                with fast:
                    made = sample_array(self.base, self._jobs(chunk), request, attachment, False)
                _save(file, made)
                progress(len(chunk))

    def _key(self, arm: Arm, weights: Path) -> str:
        """What decides an arm's images, as 16 hexadecimal digits."""
        request = self.request(arm)
        study = [self.study.images, self.study.seed]
        decides = [what_decides(request, weights), study, self.decides, versions()]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def what_decides(request: Request, weights: Path | None) -> dict[str, Any]:
    """What of an arm decides its images: settings, levers, the adapter's weights.

    Where the dial is turned it is the levers that it stands for, so that a file may be calibrated
    anew: what stays as it was need not be drawn again.

    Args:
        request: The arm's, with what it leaves to the base.
        weights: The adapter's file; None where it is not here. Then its hash is None, and so are
            the levers of a dial, which is in it.
    """
    left_out = {"adapter", "diversity", *LEVERS}
    settings = {k: v for k, v in request.stated().items() if k not in left_out}
    turned = request.diversity is not None
    adapter = load_adapter(weights) if turned and weights is not None else None
    on = None if turned and adapter is None else _rounded(dict(levers_of(request, adapter)))
    hashed = None if weights is None else weights_hash(weights)
    return {"settings": settings, "levers": on, "adapter": hashed}


def _rounded(value: Any) -> Any:
    """Numbers to nine digits: between two settings of a dial the last ones are the machine's."""
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, tuple):
        return [_rounded(one) for one in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def _save(file: Path, images: np.ndarray) -> None:
    buffer = BytesIO()
    np.savez_compressed(buffer, images=images)
    write_bytes_atomic(file, buffer.getvalue())


def _placed(base: Base) -> list[str]:
    """How precisely it runs, and in tiles or not; nothing of one that was left as it was opened."""
    return [] if base.plan is None else [base.plan.dtype, f"tiling {base.plan.tiling}"]


def _models(pipe: Any) -> list[str]:
    """What decides images, of a base: every model's weights, and the scheduler."""
    names = ("unet", "vae", "text_encoder", "text_encoder_2", "image_encoder")
    modules = [getattr(pipe, name, None) for name in names]
    scheduler = json.dumps(dict(pipe.scheduler.config), sort_keys=True, default=str)
    return [*(fingerprint(module) for module in modules if module is not None), scheduler]
