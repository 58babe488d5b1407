"""Encoders that compare images of any kind, and their scores of sets that any tool made.

| name | what | score | blind to |
|---|---|---|---|
| `clip` | CLIP ViT-L/14 | CLIP-I, CLIP-T | layout, counts; circular where an adapter reads CLIP |
| `dino` | DINOv2 ViT-B/14, self-supervised | DINO-I | what only language tells apart |
| `base` | the base's own image encoder | as CLIP | what its adapters are trained on: circular |

Any other name is a folder or hub id of a CLIP, or of a vision model that transformers opens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ipdiverse.errors import ArgumentError, DataError, ModelError
from ipdiverse.evaluation.metrics import mean_pairwise_distance, vendi
from ipdiverse.evaluation.pairs import (
    FolderPair,
    listed,
    open_references,
    pictures,
    read_prompts,
)
from ipdiverse.evaluation.sets import PairSums
from ipdiverse.image_io import load_image
from ipdiverse.loading import loading

ENCODERS = {
    "clip": "openai/clip-vit-large-patch14",
    "dino": "facebook/dinov2-base",
}
"""Names, and where they are on the hub."""
COPY = 0.9
"""Cosine to the reference above which an image counts as a copy."""
_BATCH = 32


@dataclass
class FeatureEncoder:
    """Maps images, and with CLIP texts, to unit vectors.

    Args:
        name: For reports.
        model: A CLIP model, or a vision model.
        processor: Turns PIL images into pixel values.
        tokenizer: For texts; None for a model that reads none.
    """

    name: str
    model: Any
    processor: Any
    tokenizer: Any = None

    @property
    def reads_text(self) -> bool:
        """Whether it can compare texts with images."""
        return self.tokenizer is not None

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """(images, width), of length 1 each.

        Raises:
            ModelError: It cannot encode them, or what it gives has no direction, as of NaN.
        """
        rows = []
        with _refused(self.name, "cannot encode images"):
            for start in range(0, len(images), _BATCH):
                part = list(images[start : start + _BATCH])
                pixels = self.processor(part, return_tensors="pt").pixel_values
                pixels = pixels.to(self.model.device, self.model.dtype)
                if hasattr(self.model, "get_image_features"):
                    found = self.model.get_image_features(pixel_values=pixels)
                    rows.append(getattr(found, "pooler_output", found))
                else:
                    output = self.model(pixel_values=pixels)
                    # without projected embeddings the class token, as DINO scores do
                    embeds = getattr(output, "image_embeds", None)
                    rows.append(output.last_hidden_state[:, 0] if embeds is None else embeds)
        return self._unit(torch.cat(rows))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """(texts, width), of length 1 each (errors as `images`)."""
        # CLIP reads 77 tokens; a tokenizer that was saved without its limit says 10^30
        limit = min(self.tokenizer.model_max_length, 77)
        with _refused(self.name, "cannot encode prompts"):
            tokens = self.tokenizer(
                list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt"
            )
            found = self.model.get_text_features(**tokens.to(self.model.device))
        # an output object in some versions of transformers, a tensor in others
        return self._unit(getattr(found, "pooler_output", found))

    def _unit(self, rows: torch.Tensor) -> np.ndarray:
        found = F.normalize(rows.float(), dim=1).cpu().numpy()
        if not np.isclose(np.linalg.norm(found, axis=1), 1, atol=1e-3).all():
            raise ModelError(
                "gives features that cannot be compared",
                where=self.name,
                expected="finite numbers, not all zero",
                fix="Its weights may be broken: name another encoder.",
            )
        return found


@contextmanager
def _refused(name: str, what: str) -> Iterator[None]:
    """One line for whatever the libraries raise: many types, for folders that hold anything."""
    try:
        yield
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        fix = f"Known by name: {', '.join(ENCODERS)}, base; else give a folder or a hub id."
        raise ModelError(what, where=name, found=said[0][:300], fix=fix) from error


def open_encoder(name: str, base_pipe: Any = None, device: str = "cpu") -> FeatureEncoder:
    """An encoder by name, folder or hub id.

    Args:
        name: One of `ENCODERS`, `base`, a folder, or a hub id.
        base_pipe: The pipeline that has the image encoder `base`.
        device: Where any other encoder runs, in float32.

    Raises:
        ModelError: It cannot be opened.
    """
    if name == "base":
        encoder = getattr(base_pipe, "image_encoder", None)
        if encoder is None:
            raise ModelError("has no image encoder", where="base", fix="Name another encoder.")
        return FeatureEncoder(name, encoder.eval(), base_pipe.feature_extractor)
    source = ENCODERS.get(name, name)
    with loading(), _refused(name, "cannot be opened as an encoder of images"):
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        model = AutoModel.from_pretrained(source, use_safetensors=True).eval()
        # the fast ones resize with torchvision: other pixels than those of published scores
        processor = AutoImageProcessor.from_pretrained(source, use_fast=False)
        reads = hasattr(model, "get_text_features")
        tokenizer = AutoTokenizer.from_pretrained(source) if reads else None
    return FeatureEncoder(name, model.to(device), processor, tokenizer)


def feature_sums(
    encoder: FeatureEncoder,
    sets: Iterable[Sequence[Image.Image]],
    references: Sequence[Image.Image],
    prompts: Sequence[str],
) -> dict[str, PairSums]:
    """Variety and fidelity of sets of images, as an encoder sees them.

    Args:
        encoder: The encoder.
        sets: The images of each pair, two or more.
        references: One for each pair.
        prompts: One for each pair.

    Returns:
        `vendi` and `distance` of each set, `image` (mean cosine to the reference), `copies` (share
        above `COPY`), and where the encoder reads text `text` (mean cosine to the prompt); each
        name ends in the encoder's.
    """
    # pairs share references, as the same object: each is encoded once
    distinct = list({id(image): image for image in references}.values())
    place = {id(image): row for row, image in enumerate(distinct)}
    given = encoder.images(distinct)
    texts = encoder.texts(prompts) if encoder.reads_text else None
    rows: dict[str, list[float]] = {}
    for number, images in enumerate(sets):
        seen = encoder.images(images)
        close = seen @ given[place[id(references[number])]]
        found = {
            "vendi": vendi(seen),
            "distance": mean_pairwise_distance(seen),
            "image": float(close.mean()),
            "copies": float((close > COPY).mean()),
        }
        if texts is not None:
            found["text"] = float((seen @ texts[number]).mean())
        for name, value in found.items():
            rows.setdefault(f"{name} ({encoder.name})", []).append(value)
    return {name: PairSums(np.array(v), np.ones(len(v))) for name, v in rows.items()}


@dataclass(frozen=True)
class MadeSet:
    """Images that a tool made from one pair."""

    pair: FolderPair
    files: tuple[Path, ...]


def made_sets(images: Path, references: Path, prompts: Path | None) -> list[MadeSet]:
    """Match images to references and prompts by the names of folders.

    `IMAGES/STEM/*.png` are made from the reference STEM, `IMAGES/STEM--2/*.png` from it with the
    second prompt. With one prompt for all, or one for each reference in order, no number is needed.

    Raises:
        DataError: A folder names no reference or prompt, or holds fewer than two images; or two
            references have the same name.
    """
    known: dict[str, Path] = {}
    for file in pictures(references):
        if (other := known.setdefault(file.stem, file)) is not file:
            fix = "Rename one: folders name references without the ending."
            raise DataError("has the name of another", where=file, found=other.name, fix=fix)
    texts = read_prompts(prompts) if prompts else [""]
    sets = []
    for folder in (path for path in listed(images) if path.is_dir()):
        stem, _, number = folder.name.rpartition("--")
        # a reference's own name may end like a number; isdigit() would let ² through, int() not
        if folder.name in known or not number.isdecimal():
            stem, number = folder.name, ""
        if stem not in known:
            raise DataError(
                "does not name a reference",
                where=folder,
                expected=f"STEM or STEM--NUMBER, STEM a file of {references.name}",
            )
        files = tuple(pictures(folder))
        if len(files) < 2:
            raise DataError("holds too few images", where=folder, expected="2 or more", found=1)
        sets.append(MadeSet(FolderPair(known[stem], _text(texts, number, stem, known)), files))
    if not sets:
        raise DataError("holds no sets", where=images, expected="a folder for each reference")
    return sets


def _text(texts: list[str], number: str, stem: str, known: dict[str, Path]) -> str:
    if number:
        if not 1 <= int(number) <= len(texts):
            raise DataError(
                "does not name a prompt", where=f"{stem}--{number}", expected=f"1 to {len(texts)}"
            )
        return texts[int(number) - 1]
    if len(texts) == 1:
        return texts[0]
    if len(texts) == len(known):
        return texts[sorted(known).index(stem)]
    raise DataError(
        "has several prompts to choose from",
        where=stem,
        fix=f"Name the folders {stem}--1 to {stem}--{len(texts)}.",
    )


def score_made(sets: Sequence[MadeSet], encoders: Sequence[FeatureEncoder]) -> dict[str, PairSums]:
    """Every encoder's scores of sets that a tool made.

    Raises:
        ImageError: An image cannot be read.
        ArgumentError: There are no encoders.
    """
    if not encoders:
        raise ArgumentError("are missing", where="features", fix="Name one: --features dino.")
    references = open_references([one.pair for one in sets])
    prompts = [one.pair.prompt for one in sets]
    sums: dict[str, PairSums] = {}
    for encoder in encoders:
        images = ([load_image(file) for file in one.files] for one in sets)  # one set in memory
        sums |= feature_sums(encoder, images, references, prompts)
    return sums
