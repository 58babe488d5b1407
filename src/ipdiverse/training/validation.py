"""Images drawn while a run trains, so that copying is seen when it begins, not at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ipdiverse.adapter.attach.attach import Attachment
from ipdiverse.contact_sheet import contact_sheet
from ipdiverse.data.files import picture_below
from ipdiverse.data.manifest import Record
from ipdiverse.data.references import References
from ipdiverse.provenance import generator, save_png
from ipdiverse.training.config import TrainConfig
from ipdiverse.training.frozen import FrozenEncoders
from ipdiverse.writing import ensure_writable_folder

FOLDER = "validation"
_GRID = 16


@dataclass(frozen=True)
class Case:
    """A held-out image, its caption and its image prompt: a partner, or itself without one."""

    text: str
    target: Image.Image
    reference: Image.Image


class Validation:
    """Draws held-out cases with the adapter in its present state; measures how much it copies."""

    def __init__(
        self,
        config: TrainConfig,
        records: Sequence[Record],
        held_out: Sequence[int],
        encoders: FrozenEncoders,
        attachment: Attachment | None,
    ) -> None:
        self.config, self.encoders, self.attachment = config, encoders, attachment
        # a trace of `self`, as `paired` alone refuses data in which nothing has a partner
        partners = References(records, {"paired": 1, "self": 1e-9})
        self.cases = list[Case]()
        for index in held_out:
            choice = partners.choose(index, np.random.default_rng(config.seed))
            names = (records[index].file_name, choice.file_name)
            shown = (picture_below(Path(config.data), name) for name in names)
            self.cases.append(Case(records[index].text, *shown))

    def run(self, step: int, out: Path) -> dict[str, float]:
        """Draw every case, write the sheet `OUT/validation/STEP.png`, and measure.

        Returns:
            `copy_layout` and `copy_clip`: how much closer outputs are to their reference than the
            true image is, as correlation of 16×16 pixels and as cosine of image embeddings; 0 is
            ideal. Only images of the image's own caption are measured, as the true image is known
            for no other text. `copy_clip` sees less: the adapter is conditioned on that encoder.
        """
        sheets, layout, clip = [], [], []
        for case in self.cases:
            prompts = (case.text, *self.config.validation_prompts)
            drawn = [self._draw(case, prompt) for prompt in prompts]
            for images, prompt in zip(drawn, prompts, strict=True):
                sheets.append(contact_sheet(case.reference, images, [""] * len(images), prompt))
            layout.append(_excess(drawn[0], case, layout_similarity))
            clip.append(_excess(drawn[0], case, self._clip_similarity))
        # one under the other: with the same number of images, all sheets have the same width
        whole = Image.fromarray(np.vstack([np.asarray(sheet) for sheet in sheets]))
        save_png(whole, ensure_writable_folder(out / FOLDER) / f"{step:08d}.png", {"step": step})
        return {"copy_layout": float(np.mean(layout)), "copy_clip": float(np.mean(clip))}

    @torch.no_grad()
    def _draw(self, case: Case, prompt: str) -> list[Image.Image]:
        pipe: Any = self.encoders.pipe
        count = self.config.num_images_per_prompt
        if self.attachment is None:
            raise AssertionError("whoever holds images out attaches the adapter")
        self.attachment.set_reference(case.reference)
        pipe.set_progress_bar_config(disable=True)
        return pipe(
            prompt,
            num_images_per_prompt=count,
            num_inference_steps=self.config.validation_steps,
            guidance_scale=self.config.validation_guidance,
            generator=[generator(self.config.seed, index) for index in range(count)],
        ).images

    def _clip_similarity(self, one: Image.Image, other: Image.Image) -> float:
        embeds = self.encoders.image([one, other])["pooled"].float()
        return float(torch.nn.functional.cosine_similarity(embeds[0], embeds[1], dim=0))


def layout_similarity(one: Image.Image, other: Image.Image) -> float:
    """Correlation of two images shrunk to 16×16: high when the same things stand in one place."""
    shrunk = [
        np.asarray(image.resize((_GRID, _GRID), Image.Resampling.BOX), np.float64).ravel()
        for image in (one, other)
    ]
    with np.errstate(divide="ignore", invalid="ignore"):  # an even image correlates with nothing
        found: Any = np.corrcoef(shrunk)
    return float(np.nan_to_num(found[0, 1]))


def _excess(images: list[Image.Image], case: Case, similarity: Any) -> float:
    """Mean similarity of outputs to the reference, less that of the true image."""
    found = np.mean([similarity(image, case.reference) for image in images])
    return float(found - similarity(case.target, case.reference))
