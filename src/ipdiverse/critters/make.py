"""Write critters as a data set on disk, in the format that users' own data sets have.

`images/*.png` and `metadata.jsonl` with `file_name`, `text` and `subject` per line, and with
`reference` when pairs are asked for: what `datasets` calls an image folder.
"""

from __future__ import annotations

import json
import os
from io import BytesIO
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ipdiverse.critters.caption import caption_of
from ipdiverse.critters.render import render
from ipdiverse.critters.scene import SPLITS, pair_of, sample_scene
from ipdiverse.errors import ArgumentError
from ipdiverse.provenance import ensure_writable_folder, write_text_atomic
from ipdiverse.seeding import derived_seed

_CHUNK = 250


def make_dataset(
    out: Path, n: int, pairs: bool = False, size: int = 64, seed: int = 0, split: str = "train"
) -> int:
    """Render, caption and write scenes.

    Args:
        out: Target folder; files of the same names are replaced.
        n: How many scenes.
        pairs: Write a second image of the same creature for each, as its reference.
        size: Height and width in pixels, 16 to 2048.
        seed: Of everything.
        split: Whose identities.

    Returns:
        How many images were written.

    Raises:
        ArgumentError: A number is out of range or the split is unknown.
        OutputError: The folder cannot be written.
    """
    for name, value, low, high in (("n", n, 1, 10_000_000), ("size", size, 16, 2048)):
        if not low <= value <= high:
            raise ArgumentError(
                "is out of range", where=name, expected=f"{low} to {high}", found=value
            )
    if split not in SPLITS:
        raise ArgumentError("is unknown", where="split", expected=", ".join(SPLITS), found=split)
    ensure_writable_folder(out / "images")
    jobs = [
        (out, range(start, min(start + _CHUNK, n)), pairs, size, seed, split)
        for start in range(0, n, _CHUNK)
    ]
    with Pool(min(len(jobs), os.cpu_count() or 1)) as pool:
        rows = [row for chunk in pool.imap(_write_chunk, jobs) for row in chunk]
    write_text_atomic(out / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return n * (2 if pairs else 1)


def _write_chunk(job: tuple[Path, range, bool, int, int, str]) -> list[dict[str, Any]]:
    out, indices, pairs, size, seed, split = job
    return [_write_one(out, index, pairs, size, seed, split) for index in indices]


def _write_one(
    out: Path, index: int, pairs: bool, size: int, seed: int, split: str
) -> dict[str, Any]:
    rng = np.random.default_rng(derived_seed(seed, split, index))
    scene = sample_scene(rng, split=split)
    name = f"images/{index:07d}.png"
    _write_image(out / name, render(scene, derived_seed(seed, split, index, "render"), size))
    row = {
        "file_name": name,
        "text": caption_of(scene, derived_seed(seed, split, index, "caption")),
        "subject": scene.subject,
    }
    if pairs:
        row["reference"] = f"images/{index:07d}-reference.png"
        other = render(pair_of(scene, rng), derived_seed(seed, split, index, "pair"), size)
        _write_image(out / row["reference"], other)
    return row


def _write_image(file: Path, pixels: np.ndarray) -> None:
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    temporary = file.with_suffix(".partial")
    temporary.write_bytes(buffer.getvalue())
    temporary.replace(file)
