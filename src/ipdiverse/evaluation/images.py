"""A study's images: drawn pair by pair and kept, so that none is drawn twice; and its anchors."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ipdiverse.adapter.attach.attach import Attachment
from ipdiverse.adapter.files.checkpoint import load_adapter, weights_hash
from ipdiverse.base.adapters import adapter_file
from ipdiverse.base.bases import CRITTERS, Base
from ipdiverse.base.memory import autocast
from ipdiverse.base.pipelines import fingerprint
from ipdiverse.critters.render import render
from ipdiverse.critters.scene import IDENTITY, sample_scene
from ipdiverse.dial import Levers
from ipdiverse.errors import DataError
from ipdiverse.evaluation.pairs import FolderPair, Pair
from ipdiverse.evaluation.study import Arm, Study
from ipdiverse.image_io import content_hash
from ipdiverse.levers import LEVERS
from ipdiverse.parts import WHOLE, Part
from ipdiverse.sampling import sample
from ipdiverse.sampling.draw import versions
from ipdiverse.sampling.request import Request
from ipdiverse.sampling.selection import chosen
from ipdiverse.sampling.task import Task
from ipdiverse.writing import ensure_writable_folder, write_bytes_atomic

CHUNK = 8
"""Pairs whose images are kept in one file."""
MEASURING_BATCH = 64
"""Images of critters that are denoised together when only statistics matter."""
RENDERER, COPY = "renderer", "pixel copy"


class StudyImages:
    """Draws images, keeps them in a folder, and knows which are there.

    `reader`: the image encoder that adapters read with, and its preprocessing; None is the base's.
    """

    def __init__(
        self,
        study: Study,
        base: Base,
        pairs: Sequence[Pair | FolderPair],
        references: Sequence[Image.Image],
        folder: Path,
        reader: tuple[Any, Any] | None = None,
    ) -> None:
        self.study, self.base, self.folder = study, base, folder
        self.pairs, self.references, self._reader = pairs, references, reader
        read = [] if reader is None else [fingerprint(reader[0]), str(reader[1])]
        asked = [content_hash(image) for image in references] + [pair.prompt for pair in pairs]
        self.decides = [*_models(base), *read, *asked]

    def chunks(
        self, arm: Arm, source: str, progress: Callable[[int], None]
    ) -> Iterator[np.ndarray]:
        """All images of an arm with one adapter, `CHUNK` pairs at a time; missing ones are drawn.

        Each part is uint8, (pairs · images, height, width, 3). `progress` is called with the number
        of pairs that are done since the last call.
        """
        for file in self.draw(arm, source, progress):
            yield kept(file)

    def draw(
        self, arm: Arm, source: str, progress: Callable[[int], None], part: Part = WHOLE
    ) -> list[Path]:
        """Draw what is missing of the files that a part takes, and name these; as `chunks`."""
        weights = adapter_file(self.study.base, source)
        every = self.files(arm, weights)
        files = {f: n for f, n in every.items() if part.takes(f"{f.parent.name}/{f.name}")}
        missing = {file: pairs for file, pairs in files.items() if not is_whole(file)}
        progress(sum(len(pairs) for file, pairs in files.items() if file not in missing))
        if missing:
            ensure_writable_folder(next(iter(missing)).parent)
            self._draw(arm, weights, missing, progress)
        return list(files)

    def request(self, arm: Arm) -> Request:
        """The arm as a request, completed with the base's defaults."""
        return arm.request(self.study.steps, self.base.guidance_scale, self.base.scale)

    def files(self, arm: Arm, weights: Path) -> dict[Path, range]:
        """The file of each chunk, with the numbers of its pairs."""
        study = [self.study.images, self.study.seed]
        # versions too: another diffusers or torch may draw other images
        decides = [what_decides(self.request(arm), weights), study, self.decides, versions()]
        key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
        every = range(len(self.pairs))
        return {
            self.folder / key / f"{number:05d}.npz": every[start : start + CHUNK]
            for number, start in enumerate(every[::CHUNK])
        }

    def _draw(
        self, arm: Arm, weights: Path, missing: dict[Path, range], progress: Callable[[int], None]
    ) -> None:
        request = self.request(arm)
        # other bases have the precision that their placement chose
        fast = autocast() if self.study.base == CRITTERS else nullcontext()
        with sample.attached(self.base, weights, self._reader or "") as attachment:
            sample.set_scale(attachment, self.base, request)
            sample.imagine(attachment, request)
            for file, numbers in missing.items():
                # noise depends on pair and number alone, not on the arm; two studies share no seed
                seed, each = self.study.seed * 1_000_003, request.candidates or self.study.images
                jobs = [
                    sample.Job(self.pairs[n].prompt, seed + n, index, self.references[n])
                    for n in numbers
                    for index in range(each)
                ]
                with fast:
                    if request.candidates is not None:
                        group = replace(request, n=self.study.images)
                        jobs = chosen(jobs, group, Task(self.base), attachment, None)
                    made = sample_array(self.base, jobs, request, attachment, False)
                # compressed: critters are flat colours, and a study keeps thousands of images
                buffer = BytesIO()
                np.savez_compressed(buffer, images=made)
                write_bytes_atomic(file, buffer.getvalue())
                progress(len(numbers))


def kept(file: Path) -> np.ndarray:
    """Images of a file that `StudyImages` wrote; DataError if zip's checksums say it is broken."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            return stored["images"]
    except Exception as error:  # whatever NumPy and zipfile raise on a broken file
        raise DataError(
            "is broken", where=file, found=error, fix="Remove it; its images are drawn again."
        ) from error


def sample_array(
    base: Base,
    jobs: list[sample.Job],
    request: Request,
    attachment: Attachment | None = None,
    progress: bool | None = None,
) -> np.ndarray:
    """Images of many jobs, uint8 (count, height, width, 3), in large batches on critters.

    Without an adapter the text alone is drawn. `progress` of None shows a bar on terminals only.
    """
    size = MEASURING_BATCH if base.name == CRITTERS else base.batch
    wide = replace(base, batch=min(size, len(jobs)))
    images = sample.sampled(Task(wide), jobs, request, attachment, progress=progress)
    return np.stack([np.asarray(image) for image in images])


def is_whole(file: Path) -> bool:
    """Whether images are there, by zip's checksum; damaged ones are warned of and drawn again."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            return stored["images"].ndim == 4
    except FileNotFoundError:
        return False
    except Exception as error:  # whatever NumPy and zipfile raise on a broken file
        warnings.warn(f"{file}: is damaged, and is drawn again ({error})", stacklevel=3)
        return False


def what_decides(request: Request, weights: Path | None) -> dict[str, Any]:
    """Everything about a complete request that decides images: settings, levers, adapter's hash.

    A dial is replaced by the levers that it stands for, so that an adapter can be calibrated again
    without drawing anew what stays the same. If the adapter is not on this machine, its hash is
    None, and so are the levers of a dial, which is in its file.
    """
    left_out = {"adapter", "diversity", "space", *LEVERS}
    settings = {name: value for name, value in request.stated().items() if name not in left_out}
    if weights is None:
        on = _rounded(sample.levers_of(request, None)) if request.diversity is None else None
        return {"settings": settings, "levers": on, "adapter": None}
    stat = weights.stat()
    on, hashed, space = _of_file(weights, request, stat.st_ino, stat.st_mtime_ns, stat.st_size)
    told = {"space": space} if space else {}  # a setting where it acts, and nothing where not
    return {"settings": settings | told, "levers": on, "adapter": hashed}


@lru_cache(maxsize=4096)
def _of_file(weights: Path, request: Request, *stamp: int) -> tuple[dict[str, Any], str, str]:
    """A request's levers with an adapter, the hash of its weights, and that of a space that acts.

    A study asks for both several times an arm, and an adapter may have gigabytes: `stamp`, the
    file's inode, time and size, has it read again only after it was written.
    """
    needed = request.diversity is not None or request.levers.recombine
    adapter = load_adapter(weights) if needed else None
    space = None if adapter is None else sample.space_of(request.space, adapter)
    levers = sample.levers_of(request, adapter, space is not None)
    acts = space.sha256 if space and levers.recombine else ""
    return _rounded(levers), _hash_of_file(weights, *stamp), acts


@lru_cache(maxsize=256)
def _hash_of_file(weights: Path, *_: int) -> str:
    return weights_hash(weights)


def _rounded(levers: Levers) -> dict[str, Any]:
    """Numbers to nine digits: between two points of a dial the last ones differ by machine."""
    text = json.dumps(dict(levers))
    return json.loads(text, parse_float=lambda number: float(f"{float(number):.9g}"))


def _models(base: Base) -> list[str]:
    """What of a base decides images: weights, scheduler, and where it was placed how precisely."""
    names = ("unet", "vae", "text_encoder", "text_encoder_2", "image_encoder")
    modules = [getattr(base.pipe, name, None) for name in names]
    scheduler = json.dumps(dict(base.pipe.scheduler.config), sort_keys=True, default=str)
    placed = [] if base.plan is None else [base.plan.dtype, f"tiling {base.plan.tiling}"]
    return [*(fingerprint(one) for one in modules if one is not None), scheduler, *placed]


def rendered(pairs: Sequence[Pair], images: int) -> Iterator[np.ndarray]:
    """What a perfect model would draw: identity and prompt kept, the rest from the prior."""
    rng = np.random.default_rng(0)  # one for all chunks, whose size then changes nothing
    for start in range(0, len(pairs), CHUNK):
        outputs = []
        for pair in pairs[start : start + CHUNK]:
            known = {name: getattr(pair.reference, name) for name in IDENTITY} | pair.stated
            drawn = [sample_scene(rng, known) for _ in range(images)]
            outputs += [render(scene, int(rng.integers(2**31))) for scene in drawn]
        yield np.stack(outputs)


def copied(references: Sequence[Image.Image], images: int, side: int) -> Iterator[np.ndarray]:
    """The reference again and again, at the height and width of the output."""
    for start in range(0, len(references), CHUNK):
        part = references[start : start + CHUNK]
        shown = [np.asarray(image.convert("RGB").resize((side, side))) for image in part]
        yield np.stack(shown).repeat(images, 0)
