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
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ipdiverse.data.cache import RowReader, Rows, compute
from ipdiverse.data.manifest import Record, inside, read_manifest
from ipdiverse.image_io import load_image
from ipdiverse.writing import only_one, write_bytes_atomic

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from PIL import Image

    from ipdiverse.training.frozen import FrozenEncoders, Preprocessing

FOLDER, REPORT = "embedded", "embedded.json"
_BATCH = 8
"""Images encoded together."""


@dataclass(frozen=True)
class Stored:
    """Which embeddings are stored: `pooled` for base adapters, `hidden` for plus; and their type.

    float16 halves the disk and changes the loss in its fourth digit.
    """

    images: Literal["pooled", "hidden", "both"] = "both"
    dtype: Literal["float32", "float16"] = "float32"

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
        return load_image(inside(self.folder, file_name))

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

    @cached_property
    def no_text(self) -> dict[str, Tensor]:
        """The text of a dropped caption."""
        return _only(self.encoders.text([""]))

    @cached_property
    def no_image(self) -> dict[str, Tensor]:
        """The embeddings of a dropped image."""
        return _only(self.encoders.no_image())


class _Layout:
    """The shards of a data set, each with a key of everything that its rows depend on."""

    def __init__(
        self,
        folder: Path,
        records: list[Record],
        encoders: str,
        shown: Preprocessing,
        stored: Stored,
    ) -> None:
        home = folder / FOLDER
        pictures = [name for r in records for name in (r.file_name, r.reference) if name]
        self.files, self.stored = list(dict.fromkeys(pictures)), stored
        words: list[object] = [encoders, stored.dtype]
        targets = [*words, shown.resolution, shown.variants, shown.flip, shown.seed]
        images = [*words, stored.images]
        self.texts = Rows(home, "texts", [r.text for r in records], json.dumps(words))
        self.targets = Rows(home, "targets", [r.sha256 for r in records], json.dumps(targets))
        changes = json.dumps([*images, shown.changed, shown.seed])
        self.references = Rows(home, "references", self.files, changes)
        self.constants = Rows(home, "constants", ["no text, no image"], json.dumps(images))
        # under another name, so that neither cache replaces the other
        self.pictures = Rows(home, "pictures", self.files, json.dumps(images))

    @property
    def serves(self) -> bool:
        """Whether every shard that depends on `stored.images` is done."""
        return self.constants.done and self.references.done


def _layout(
    folder: Path, records: list[Record], encoders: str, shown: Preprocessing, stored: Stored
) -> _Layout:
    """The layout asked for, or that of both embeddings if it is done: it serves either reader."""
    both = _Layout(folder, records, encoders, shown, replace(stored, images="both"))
    return both if both.serves else _Layout(folder, records, encoders, shown, stored)


class Embedded:
    """What a training step reads, as `embed` stored it."""

    def __init__(
        self, folder: Path, encoders: str, preprocessing: Preprocessing, stored: Stored
    ) -> None:
        self.records = read_manifest(folder)
        layout = _layout(folder, self.records, encoders, preprocessing, stored)
        self._rows = {name: index for index, name in enumerate(layout.files)}
        self._targets, self._texts = RowReader(layout.targets), RowReader(layout.texts)
        self._references = RowReader(layout.references)
        constants = RowReader(layout.constants)[0].items()
        self.no_text, self.no_image = (
            _floats({n.removeprefix(kind): row for n, row in constants if n.startswith(kind)})
            for kind in ("text.", "image.")
        )

    def target(self, index: int, variant: int) -> dict[str, Tensor]:
        """As of `Online`."""
        return _floats({name: rows[variant] for name, rows in self._targets[index].items()})

    def text(self, index: int) -> dict[str, Tensor]:
        """As of `Online`."""
        return _floats(self._texts[index])

    def reference(self, file_name: str, change: int) -> dict[str, Tensor]:
        """As of `Online`."""
        rows = self._references[self._rows[file_name]]
        return _floats({name: each[change] for name, each in rows.items()})


TrainingData = Online | Embedded


class EmbeddedPictures:
    """Image embeddings of every picture of a data set, as `embed` stored them for either use."""

    def __init__(
        self, folder: Path, encoders: FrozenEncoders, preprocessing: Preprocessing, stored: Stored
    ) -> None:
        records, known = read_manifest(folder), encoders.fingerprint()
        made = [
            _Layout(folder, records, known, preprocessing, one)
            for one in (replace(stored, images="both"), stored)
        ]
        found = [rows for one in made for rows in (one.references, one.pictures) if rows.done]
        if not found:
            embed(folder, encoders, preprocessing, stored, only_images=True)
        layout, rows = made[1], found[0] if found else made[1].pictures
        self.records, self._read = records, RowReader(rows)
        self._rows = {name: index for index, name in enumerate(layout.files)}

    def __getitem__(self, file_name: str) -> dict[str, Tensor]:
        """A picture's embeddings: `pooled` (clip_dim,), `hidden` (patches, clip_dim)."""
        return _floats({n: rows[0] for n, rows in self._read[self._rows[file_name]].items()})


def embed(
    folder: Path,
    encoders: FrozenEncoders,
    preprocessing: Preprocessing,
    stored: Stored,
    *,
    only_images: bool = False,
) -> dict[str, Any]:
    """Compute the missing shards of a data set's cache; a finished one is never computed again.

    Random crops, flips and changes are stored variants: training draws among these. With
    `only_images`, the VAE and the text encoders stay idle.

    Returns:
        Counts, settings and bytes, as written to `embedded.json`, and how many were `computed` now.
    """
    from tqdm import tqdm

    online, home = Online(folder, encoders, preprocessing), folder / FOLDER
    fingerprint = encoders.fingerprint()
    layout = _layout(folder, online.records, fingerprint, preprocessing, stored)
    layout = (
        _Layout(folder, online.records, fingerprint, preprocessing, stored)
        if only_images
        else layout
    )
    stored = layout.stored
    work = [
        (layout.constants, lambda _: _constants(online, stored)),
        (layout.texts, lambda span: _texts(online, span, stored)),
        (layout.targets, lambda span: _targets(online, span, stored)),
        (layout.references, lambda span: _references(online, layout.files, span, stored)),
    ]
    if only_images:
        plain = Online(folder, encoders, replace(preprocessing, changed=0))
        work = [(layout.pictures, lambda span: _references(plain, layout.files, span, stored))]
    shards = [rows.file(number) for rows, _ in work for number in range(rows.shards)]

    def report() -> bytes:
        found = {
            "images": len(online.records),
            "pictures": len(layout.files),
            "shards": len(shards),
            "bytes": sum(file.stat().st_size for file in shards),
            "encoders": fingerprint,
            "preprocessing": asdict(preprocessing),
            "stored": asdict(stored),
        }
        return (json.dumps(found, indent=2) + "\n").encode()

    file, todo = home / REPORT, [(rows, make, rows.missing()) for rows, make in work]
    computed = sum(len(missing) for _, _, missing in todo)
    # a finished cache is only read: runs that share it do not hold each other up
    if computed or not file.is_file() or file.read_bytes() != report():
        with only_one(home), tqdm(unit="row", disable=None) as progress:
            file.unlink(missing_ok=True)  # so that a run after a kill holds and tidies the folder
            progress.total = sum(len(rows.span(n)) for rows, _, missing in todo for n in missing)
            for rows, make, missing in todo:
                progress.set_description(rows.name)
                compute(rows, make, missing, progress.update)
            write_bytes_atomic(file, report())
    return json.loads(report()) | {"computed": computed}


def _only(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor[0] for name, tensor in batch.items()}


def _floats(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Numbers in single precision; masks stay masks."""
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def _packed(tensors: dict[str, Tensor], stored: Stored) -> dict[str, Tensor]:
    dtype = getattr(torch, stored.dtype)
    kept = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in kept.items()}


def _constants(online: Online, stored: Stored) -> dict[str, Tensor]:
    text = {f"text.{name}": tensor[None] for name, tensor in online.no_text.items()}
    image = {f"image.{name}": online.no_image[name][None] for name in stored.image_names}
    return _packed(text | image, stored)


def _texts(online: Online, span: range, stored: Stored) -> dict[str, Tensor]:
    captions = [online.records[index].text for index in span]
    return _packed(_in_batches(captions, online.encoders.text), stored)


def _targets(online: Online, span: range, stored: Stored) -> dict[str, Tensor]:
    variants = online.preprocessing.variants
    wanted = [(index, variant) for index in span for variant in range(variants)]
    moments = _in_batches(
        wanted,
        lambda part: online.encoders.moments(torch.stack([online.target_pixels(*w) for w in part])),
    )
    return _packed({n: t.unflatten(0, (-1, variants)) for n, t in moments.items()}, stored)


def _references(online: Online, files: list[str], span: range, stored: Stored) -> dict[str, Tensor]:
    changes = 1 + online.preprocessing.changed
    wanted = [(files[row], change) for row in span for change in range(changes)]
    embeds = _in_batches(
        wanted,
        lambda part: online.encoders.image([online.reference_picture(*w) for w in part]),
    )
    kept = {name: embeds[name].unflatten(0, (-1, changes)) for name in stored.image_names}
    return _packed(kept, stored)


def _in_batches(
    wanted: list[Any], encode: Callable[[list[Any]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    parts = [encode(wanted[i : i + _BATCH]) for i in range(0, len(wanted), _BATCH)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
