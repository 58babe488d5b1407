"""Encoders that compare images of any kind, and what each is blind to.

| name | what | score | blind to |
|---|---|---|---|
| `clip` | CLIP ViT-L/14 | CLIP-I, CLIP-T | layout, counts; circular where an adapter reads CLIP |
| `dino` | DINOv2 ViT-B/14, self-supervised | DINO-I | what only language tells apart |
| `base` | the base's own image encoder | as CLIP | what its adapters are trained on: circular |

Any other name is a folder or hub id of a CLIP or of a vision model that transformers opens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from ipdiverse.errors import ModelError
from ipdiverse.evaluation.sets import Parts
from ipdiverse.evaluation.variety import mean_pairwise_distance, vendi
from ipdiverse.loading import loading

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from PIL import Image

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
    """Images, and for CLIP texts, to unit vectors.

    Args:
        name: As the report calls it.
        model: A CLIP model, or a vision model.
        processor: PIL images to pixel values.
        tokenizer: For texts; None where there are none.
    """

    name: str
    model: Any
    processor: Any
    tokenizer: Any = None

    @property
    def reads_text(self) -> bool:
        """Whether texts can be compared with images."""
        return self.tokenizer is not None

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """(images, width), of length 1 each."""
        rows = []
        for start in range(0, len(images), _BATCH):
            part = list(images[start : start + _BATCH])
            pixels = self.processor(part, return_tensors="pt").pixel_values
            rows.append(self._embed(pixels))
        return _unit(torch.cat(rows))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """(texts, width), of length 1 each."""
        limit = min(self.tokenizer.model_max_length, 77)
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt"
        )
        found = self.model.get_text_features(**tokens.to(self.model.device))
        return _unit(getattr(found, "pooler_output", found))

    def _embed(self, pixels: torch.Tensor) -> torch.Tensor:
        pixels = pixels.to(self.model.device, self.model.dtype)
        if hasattr(self.model, "get_image_features"):
            found = self.model.get_image_features(pixel_values=pixels)
            return getattr(found, "pooler_output", found)
        output = self.model(pixel_values=pixels)
        embeds = getattr(output, "image_embeds", None)
        return output.last_hidden_state[:, 0] if embeds is None else embeds


def _unit(rows: torch.Tensor) -> np.ndarray:
    return F.normalize(rows.float(), dim=1).cpu().numpy()


def open_encoder(name: str, base_pipe: Any = None, device: str = "cpu") -> FeatureEncoder:
    """An encoder by name, folder or hub id.

    Args:
        name: One of `ENCODERS`, `base`, a folder, or a hub id.
        base_pipe: The pipeline whose image encoder `base` is.
        device: Where any other runs, in float32.

    Raises:
        ModelError: It cannot be opened.
    """
    if name == "base":
        encoder = getattr(base_pipe, "image_encoder", None)
        if encoder is None:
            raise ModelError("has no image encoder", where="base", fix="Name another encoder.")
        return FeatureEncoder(name, encoder.eval(), base_pipe.feature_extractor)
    source = ENCODERS.get(name, name)
    with loading():
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        try:
            model = AutoModel.from_pretrained(source, use_safetensors=True).eval()
            processor = AutoImageProcessor.from_pretrained(source, use_fast=False)
            reads = hasattr(model, "get_text_features")
            tokenizer = AutoTokenizer.from_pretrained(source) if reads else None
        except Exception as error:  # whatever the libraries raise on an absent source
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise ModelError(
                "cannot be opened as an encoder of images",
                where=name,
                found=said[0][:300],
                fix=f"Known by name: {', '.join(ENCODERS)}, base; else give a folder or a hub id.",
            ) from error
    return FeatureEncoder(name, model.to(device), processor, tokenizer)


def feature_parts(
    encoder: FeatureEncoder,
    sets: Iterable[Sequence[Image.Image]],
    references: Sequence[Image.Image],
    prompts: Sequence[str],
) -> dict[str, Parts]:
    """Variety and fidelity of sets of images, as an encoder sees them.

    Args:
        encoder: What sees.
        sets: The images of each pair, two or more.
        references: One for each.
        prompts: One for each.

    Returns:
        `vendi` and `distance` of each set, `image` (mean cosine to the reference), `copies` (share
        above `COPY`), and where the encoder reads text `text` (mean cosine to the prompt); each
        name ends in the encoder's.
    """
    distinct = list({id(image): image for image in references}.values())
    place = {id(image): row for row, image in enumerate(distinct)}
    given = encoder.images(distinct)
    said = encoder.texts(prompts) if encoder.reads_text else None
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
        if said is not None:
            found["text"] = float((seen @ said[number]).mean())
        for name, value in found.items():
            rows.setdefault(f"{name} ({encoder.name})", []).append(value)
    return {name: Parts(np.array(v), np.ones(len(v))) for name, v in rows.items()}
