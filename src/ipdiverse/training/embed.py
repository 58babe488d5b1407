"""Everything frozen, computed once (`ipdiverse embed`), and what a training step reads of it.

DIR/embedded/targets-00000.safetensors     posterior of each target's latents, per variant
DIR/embedded/texts-00000.safetensors       text states of each caption
DIR/embedded/references-00000.safetensors  image embeddings of each picture, and changed
DIR/embedded/constants-00000.safetensors   no text, no image
DIR/embedded/pictures-00000.safetensors    image embeddings alone, all that `fit` needs
DIR/embedded/embedded.json                 counts and settings, to read; nothing depends on it
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ipdiverse.data.cache import RowReader, Rows, compute
from ipdiverse.data.files import picture_below
from ipdiverse.data.manifest import Record, read_manifest
from ipdiverse.errors import DataError
from ipdiverse.parts import (
    WHOLE,
    Part,
    forget_parts,
    holding_parts,
    part_folders,
    part_of,
)
from ipdiverse.training.frozen import Preprocessing
from ipdiverse.writing import only_one, write_bytes_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from PIL import Image

    from ipdiverse.training.frozen import FrozenEncoders

FOLDER, REPORT = "embedded", "embedded.json"
_BATCH = 8
"""Images encoded together."""


@dataclass(frozen=True)
class Stored:
    """Which image embeddings are stored, `pooled` for base adapters or `hidden` for plus; how.

    `rows` are the kinds of shards; `targets` alone need the VAE, and `texts` the text encoders.
    """

    images: Literal["pooled", "hidden", "both"] = "both"
    dtype: Literal["float32", "float16"] = "float32"
    rows: tuple[str, ...] = ("constants", "texts", "targets", "references")

    @property
    def image_names(self) -> tuple[str, ...]:
        """The image embeddings that are stored."""
        return ("pooled", "hidden") if self.images == "both" else (self.images,)


class Online:
    """What a training step reads, encoded at every call."""

    def __init__(
        self, folder: Path, encoders: FrozenEncoders, preprocessing: Preprocessing
    ) -> None:
        self.folder, self.encoders, self.preprocessing = folder, encoders, preprocessing
        self.records = read_manifest(folder)

    def image(self, file_name: str) -> Image.Image:
        """A stored picture."""
        return picture_below(self.folder, file_name)

    def target_pixels(self, index: int, variant: int) -> Tensor:
        """A target as the VAE sees it, (3, height, width)."""
        record = self.records[index]
        return self.preprocessing.target(self.image(record.file_name), record.sha256, variant)

    def reference_picture(self, file_name: str, change: int) -> Image.Image:
        """A reference as the image encoder sees it, before its own preprocessing."""
        # a stored file's name is the hash of its bytes
        return self.preprocessing.reference(self.image(file_name), file_name, change)

    def target(self, index: int, variant: int) -> dict[str, Tensor]:
        """Posterior of a target's latents: `mean` and `std`, (channels, h, w)."""
        return _only(self.encoders.moments(self.target_pixels(index, variant)[None]))

    def text(self, index: int) -> dict[str, Tensor]:
        """Text `states` (tokens, width), `mask` (tokens,), and for SDXL `pooled` (width,)."""
        return _only(self.encoders.text([self.records[index].text]))

    def reference(self, file_name: str, change: int) -> dict[str, Tensor]:
        """Image embeddings of a picture: `pooled` (clip_dim,), `hidden` (patches, clip_dim)."""
        return _only(self.encoders.image([self.reference_picture(file_name, change)]))

    def __getitem__(self, file_name: str) -> dict[str, Tensor]:
        """A picture's image embeddings, unchanged."""
        return self.reference(file_name, 0)

    @cached_property
    def no_text(self) -> dict[str, Tensor]:
        """The text of a dropped caption."""
        return _only(self.encoders.text([""]))

    @cached_property
    def no_image(self) -> dict[str, Tensor]:
        """The embeddings of a dropped image."""
        return _only(self.encoders.no_image())


def _rows_of(
    home: Path, records: list[Record], encoders: str, shown: Preprocessing, stored: Stored
) -> dict[str, Rows]:
    """The shards of a data set by name, each with a key of everything that its rows depend on."""
    pictures = dict.fromkeys(name for r in records for name in (r.file_name, r.reference) if name)
    words: list[object] = [encoders, stored.dtype]
    targets = [*words, shown.resolution, shown.variants, shown.flip, shown.seed]
    images = [*words, stored.images]
    changes = [*images, shown.changed, shown.seed]
    contents: dict[str, tuple[list[str], list[object]]] = {
        "constants": (["no text, no image"], images),
        "texts": ([r.text for r in records], words),
        "targets": ([r.sha256 for r in records], targets),
        "references": (list(pictures), changes),
        # under another name, so that neither cache replaces the other
        "pictures": (list(pictures), images),
    }
    return {name: Rows(home, name, of, json.dumps(by)) for name, (of, by) in contents.items()}


def _layout(
    folder: Path, records: list[Record], encoders: str, shown: Preprocessing, stored: Stored
) -> tuple[dict[str, Rows], Stored]:
    """The shards asked for, or those of both embeddings if they are done: they serve either."""
    both, home = replace(stored, images="both"), folder / FOLDER
    rows = _rows_of(home, records, encoders, shown, both)
    if rows["constants"].done and rows["references"].done:
        return rows, both
    return _rows_of(home, records, encoders, shown, stored), stored


class Embedded:
    """What a training step reads, as `embed` stored it."""

    def __init__(
        self, folder: Path, encoders: str, preprocessing: Preprocessing, stored: Stored
    ) -> None:
        self.records = read_manifest(folder)
        rows, _ = _layout(folder, self.records, encoders, preprocessing, stored)
        self._rows = {name: index for index, name in enumerate(rows["references"].contents)}
        self._targets = RowReader(rows["targets"]) if "targets" in stored.rows else None
        self._texts = RowReader(rows["texts"])
        self._references = RowReader(rows["references"])
        constants = RowReader(rows["constants"])[0].items()
        self.no_text, self.no_image = (
            _floats({n.removeprefix(kind): row for n, row in constants if n.startswith(kind)})
            for kind in ("text.", "image.")
        )

    def target(self, index: int, variant: int) -> dict[str, Tensor]:
        """As of `Online`."""
        if self._targets is None:
            raise LookupError("embedded without targets")
        return _floats({name: rows[variant] for name, rows in self._targets[index].items()})

    def text(self, index: int) -> dict[str, Tensor]:
        """As of `Online`."""
        return _floats(self._texts[index])

    def reference(self, file_name: str, change: int) -> dict[str, Tensor]:
        """As of `Online`."""
        rows = self._references[self._rows[file_name]]
        return _floats({name: each[change] for name, each in rows.items()})

    def __getitem__(self, file_name: str) -> dict[str, Tensor]:
        """As of `Online`."""
        return self.reference(file_name, 0)


TrainingData = Online | Embedded


def embedded_pictures(
    folder: Path, records: list[Record], encoders: str, shown: Preprocessing, stored: Stored
) -> Rows:
    """Shards of every picture's embeddings: finished ones, for whichever use, or those to make."""
    made = [
        _rows_of(folder / FOLDER, records, encoders, shown, one)
        for one in (replace(stored, images="both"), stored)
    ]
    found = [one[n] for one in made for n in ("references", "pictures") if one[n].done]
    return found[0] if found else made[1]["pictures"]


class EmbeddedPictures:
    """Image embeddings of every picture of a data set, as `embed` stored them for either use."""

    def __init__(
        self, folder: Path, encoders: FrozenEncoders, preprocessing: Preprocessing, stored: Stored
    ) -> None:
        self.records, known = read_manifest(folder), encoders.fingerprint()
        rows = embedded_pictures(folder, self.records, known, preprocessing, stored)
        if not rows.done:
            embed(folder, encoders, preprocessing, replace(stored, rows=("pictures",)))
        self._read = RowReader(rows)
        self._rows = {name: index for index, name in enumerate(rows.contents)}

    def __getitem__(self, file_name: str) -> dict[str, Tensor]:
        """A picture's embeddings: `pooled` (clip_dim,), `hidden` (patches, clip_dim)."""
        return _floats({n: rows[0] for n, rows in self._read[self._rows[file_name]].items()})


def embed(
    folder: Path,
    encoders: FrozenEncoders,
    preprocessing: Preprocessing,
    stored: Stored,
    part: Part = WHOLE,
    about: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Compute the missing shards of a cache; what `embedded.json` says, and how many were.

    A part computes the shards that it takes, says how many, and leaves `embedded.json` to
    `merge_embedded`; `about` is what its statement says besides.
    """
    online, home = Online(folder, encoders, preprocessing), folder / FOLDER
    cache = _Cache(folder, online.records, encoders.fingerprint(), preprocessing, stored)
    if not part.whole:
        with part_of(home, part, {**cache.about(), **about}):
            return {"part": str(part), "computed": _compute(online, cache, cache.missing(part))}
    file, todo = home / REPORT, cache.missing()
    computed = sum(len(missing) for _, missing in todo)
    # a finished cache is only read: runs that share it do not hold each other up
    is_reported = file.is_file() and file.read_bytes() == cache.report()
    if computed or not is_reported or part_folders(home):
        with only_one(home), holding_parts(home):
            file.unlink(missing_ok=True)  # so that a run after a kill holds and tidies the folder
            _compute(online, cache, todo)
            write_bytes_atomic(file, cache.report())
            forget_parts(home)
    return json.loads(cache.report()) | {"computed": computed}


def merge_embedded(folder: Path, about: Mapping[str, Any]) -> None:
    """Check that parts computed every shard, and write `embedded.json`; no model is opened.

    Args:
        about: What the parts say of themselves (`parts.finished`).

    Raises:
        DataError: Shards are missing; the error names the first.
    """
    home, stored = folder / FOLDER, about["stored"]
    asked = Stored(stored["images"], stored["dtype"], tuple(stored["rows"]))
    shown = Preprocessing(**about["preprocessing"])
    with only_one(home), holding_parts(home):
        cache = _Cache(folder, read_manifest(folder), about["encoders"], shown, asked)
        lost = [rows.file(number) for rows, missing in cache.missing() for number in missing]
        if lost:
            fix = "Run the parts of `ipdiverse embed` again; finished shards are kept."
            what = f"lacks {len(lost)} shards, or they are of other data or encoders"
            raise DataError(what, where=home, found=lost[0].name, fix=fix)
        if not cache.is_of_others:
            write_bytes_atomic(home / REPORT, cache.report())
        forget_parts(home)


class _Cache:
    """The shards of a data set that were asked for, and their report."""

    def __init__(
        self,
        folder: Path,
        records: list[Record],
        encoders: str,
        shown: Preprocessing,
        asked: Stored,
    ) -> None:
        layout, self.stored = _layout(folder, records, encoders, shown, asked)
        self.pictures = layout["references"].contents
        self.rows = [layout[name] for name in asked.rows]
        self.is_of_others = False
        if asked.rows == ("pictures",):  # of `fit`, which any other use of the cache serves
            own, found = self.rows[0], embedded_pictures(folder, records, encoders, shown, asked)
            self.rows, self.is_of_others = [found], found != own
        self.records, self.encoders, self.shown, self.asked = records, encoders, shown, asked

    def about(self) -> dict[str, Any]:
        """What is computed, for the statement of a part."""
        about = {"encoders": self.encoders, "preprocessing": asdict(self.shown)}
        return {"kind": "embed", **about, "stored": asdict(self.asked)}

    def missing(self, part: Part = WHOLE) -> list[tuple[Rows, list[int]]]:
        """The shards to compute, of those that a part takes."""
        return [(rows, rows.missing(part)) for rows in self.rows]

    def report(self) -> bytes:
        """What `embedded.json` says of shards that are all there."""
        shards = [rows.file(number) for rows in self.rows for number in range(rows.shards)]
        found = {
            "images": len(self.records),
            "pictures": len(self.pictures),
            "shards": len(shards),
            "bytes": sum(file.stat().st_size for file in shards),
            "encoders": self.encoders,
            "preprocessing": asdict(self.shown),
            "stored": {"images": self.stored.images, "dtype": self.stored.dtype},
        }
        return (json.dumps(found, indent=2) + "\n").encode()


def _compute(online: Online, cache: _Cache, todo: list[tuple[Rows, list[int]]]) -> int:
    """Compute shards; returns how many."""
    from tqdm import tqdm

    with tqdm(unit="row", disable=None) as progress:
        progress.total = sum(len(rows.span(n)) for rows, missing in todo for n in missing)
        for rows, missing in todo:
            progress.set_description(rows.name)
            make = partial(_encoded, online, rows.name, cache.pictures, cache.stored)
            compute(rows, make, missing, progress.update)
    return sum(len(missing) for _, missing in todo)


def _only(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor[0] for name, tensor in batch.items()}


def _floats(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Numbers in single precision; masks stay masks."""
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def _encoded(
    online: Online, name: str, pictures: Sequence[str], stored: Stored, span: range
) -> dict[str, Tensor]:
    """The tensors of a shard's rows, as they are stored."""
    shown, encoders, each = online.preprocessing, online.encoders, 1
    if name == "constants":
        found = {f"text.{n}": tensor[None] for n, tensor in online.no_text.items()}
        found |= {f"image.{n}": online.no_image[n][None] for n in stored.image_names}
    elif name == "texts":
        captions = [online.records[index].text for index in span]
        found = _in_batches(captions, encoders.text)
    elif name == "targets":
        each = shown.variants
        wanted = [(index, variant) for index in span for variant in range(each)]
        found = _in_batches(
            wanted,
            lambda part: encoders.moments(torch.stack([online.target_pixels(*w) for w in part])),
        )
    else:
        each = 1 + (shown.changed if name == "references" else 0)
        wanted = [(pictures[row], change) for row in span for change in range(each)]
        found = _in_batches(
            wanted, lambda part: encoders.image([online.reference_picture(*w) for w in part])
        )
        found = {n: found[n] for n in stored.image_names}
    if name in ("targets", "references", "pictures"):
        found = {n: tensor.unflatten(0, (-1, each)) for n, tensor in found.items()}
    dtype = getattr(torch, stored.dtype)
    kept = {n: tensor.detach().cpu() for n, tensor in found.items()}
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in kept.items()}


def _in_batches(
    wanted: list[Any], encode: Callable[[list[Any]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    parts = [encode(wanted[i : i + _BATCH]) for i in range(0, len(wanted), _BATCH)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
