"""Write critters as a data set on disk, in the same format as users' own data sets.

`images/*.png` and `metadata.jsonl` with `file_name`, `text` and `subject` per line, and with
`reference` when pairs are asked for: what `datasets` calls an image folder.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ipdiverse.critters.render import render
from ipdiverse.critters.scene import (
    SPLITS,
    Scene,
    caption,
    edited,
    mentioned,
    pair_of,
    sample_scene,
)
from ipdiverse.errors import ArgumentError, OutputError, check_range
from ipdiverse.provenance import derived_seed
from ipdiverse.writing import ensure_writable_folder, only_one, write_text_atomic, writing

_CHUNK = 250  # scenes that a process is given at once: enough that handing them over costs little


def make_dataset(
    out: Path, n: int, pairs: bool = False, size: int = 64, seed: int = 0, split: str = "train"
) -> int:
    """Render, caption and write scenes of `size` pixels; the number of images written.

    Args:
        out: Target folder; a data set made in the same way is completed, other files stay.
    """
    check_range("n", n, 1, 10_000_000)
    check_range("size", size, 16, 2048)
    if split not in SPLITS:
        raise ArgumentError("is unknown", where="split", expected=", ".join(SPLITS), found=split)
    manifest = out / "metadata.jsonl"
    with only_one(out):
        before = _text(manifest)
        # the first line is enough to tell another data set, before anything is rendered
        if before and not before.startswith(_line(_row(example(0, seed, split), 0, pairs))):
            raise _another(manifest)
        ensure_writable_folder(out / "images")
        write = partial(_write_one, out, pairs=pairs, size=size, seed=seed, split=split)
        with writing(out):  # its locks are files too, in a small place on many machines
            # not multiprocessing's Pool, which waits for ever for a process that was killed
            pool = ProcessPoolExecutor(min(-(-n // _CHUNK), os.cpu_count() or 1))
        try:
            with pool:
                rows = list(pool.map(write, range(n), chunksize=_CHUNK))
        except BrokenProcessPool as error:
            what, fix = "a process that rendered was killed", "Run the same command again."
            raise OutputError(what, where=out, fix=fix) from error
        text = "".join(map(_line, rows))
        if not (text.startswith(before) or before.startswith(text)):
            raise _another(manifest)
        write_text_atomic(manifest, text)
        return n * (2 if pairs else 1)


@dataclass(frozen=True)
class Example:
    """An image with its caption, and its reference `other`: scenes, and seeds to render them."""

    scene: Scene
    seed: int
    other: Scene
    other_seed: int
    text: str


def example(index: int, seed: int, split: str, edits: float = 0.0) -> Example:
    """Example number `index` of a data set, from 0; it does not depend on the others."""
    key = (seed, split, index)
    rng = np.random.default_rng(derived_seed(*key))
    scene = sample_scene(rng, split=split)
    other = pair_of(scene, rng)
    words = derived_seed(*key, "caption")
    stated = mentioned(scene, words)
    # a random source apart, so that the other examples are the same whatever `edits` is
    choice = np.random.default_rng(derived_seed(*key, "edit"))
    if choice.random() < edits:
        name, other = edited(other, choice, split)
        stated |= {name: getattr(scene, name)}
    seeds = derived_seed(*key, "render"), derived_seed(*key, "pair")
    return Example(scene, seeds[0], other, seeds[1], caption(stated, words))


def png(scene: Scene, seed: int, size: int = 64) -> bytes:
    """A render as a PNG file."""
    buffer = BytesIO()
    # half the time of the default level, for files a little larger
    Image.fromarray(render(scene, seed, size)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _write_one(
    out: Path, index: int, pairs: bool, size: int, seed: int, split: str
) -> dict[str, Any]:
    made = example(index, seed, split)
    row = _row(made, index, pairs)
    _write(out / row["file_name"], png(made.scene, made.seed, size))
    if pairs:
        _write(out / row["reference"], png(made.other, made.other_seed, size))
    return row


def _row(made: Example, index: int, pairs: bool) -> dict[str, Any]:
    name = f"images/{index:07d}"
    row = {"file_name": f"{name}.png", "text": made.text, "subject": made.scene.subject}
    return row | {"reference": f"{name}-reference.png"} if pairs else row


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8") if os.path.lexists(file) else ""
    except (OSError, UnicodeError) as error:
        raise _another(file) from error


def _another(file: Path) -> OutputError:
    what, fix = "is there already, and is not of this data set", "Choose a new folder for --out."
    return OutputError(what, where=file, fix=fix)


def _write(file: Path, data: bytes) -> None:
    """Write a file whole or not at all; not synced to disk as `writing` does, which is far slower.

    A power cut can then lose images, but a new run makes the same ones.
    """
    with writing(file):
        if os.path.lexists(file):
            if not file.is_file() or file.read_bytes() != data:
                raise _another(file)
            return
        temporary = file.with_suffix(".partial")
        temporary.write_bytes(data)
        temporary.replace(file)
