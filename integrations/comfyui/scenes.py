"""Prompts given once, and scenes that fit them: what a variation space asks of ComfyUI."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ipdiverse.adapter.imagine import VariationSpace
    from ipdiverse.adapter.model import ImagePromptAdapter


@dataclass(frozen=True, eq=False)
class Prompts:
    """The two texts of guidance, as ComfyUI's CLIP reads them.

    Args:
        words: Which tokens are words, of the positive and of the negative text.
        pooled: One embedding of the positive text, (width,); None where the CLIP gives none.
        text: The positive text.
    """

    words: tuple[Tensor, Tensor]
    pooled: Tensor | None
    text: str


class Scenes:
    """Scenes of a space for one prompt; the lever `recombine` asks it for each image's own.

    Args:
        space: The variation space.
        prompts: The prompt; without one, or with an empty text, any scene fits.

    Raises:
        ModelError: The space's pictures are found by another text encoder.
    """

    def __init__(self, space: VariationSpace, prompts: Prompts | None) -> None:
        self.space, self.query = space, None
        if prompts is None or not prompts.text.strip() or not space.bank.keys.shape[1]:
            return
        self.query = space.keys_of(self._checked(space, prompts.pooled), prompts=True)

    @staticmethod
    def _checked(space: VariationSpace, pooled: Tensor | None) -> Tensor:
        from ipdiverse.errors import ModelError

        width = space.key_means.shape[1]
        if pooled is None or len(pooled) != width:
            raise ModelError(
                "finds scenes with another text encoder than this CLIP",
                where="space",
                expected=f"embeddings of width {width}",
                found="none" if pooled is None else f"width {len(pooled)}",
                fix="Leave the input prompts out to draw any scene, or connect scenes of your own.",
            )
        return pooled

    @property
    def share(self) -> float:
        """How much of a scene may be imposed, as there are pictures near to the prompt."""
        return self.space.bank.candidates(self.query)[1]

    def recombined(
        self,
        tokens: Tensor,
        strength: float,
        _prompts: Sequence[str],
        seeds: Sequence[int],
    ) -> Tensor:
        """Each item's tokens, (items, references, tokens, width), in a scene of its own.

        The name and the arguments are what the lever calls in a diffusers pipeline.
        """
        rows = []
        for row, seed in zip(tokens, seeds, strict=True):
            scene, share = self.space.drawn(self.query, seed)
            rows.append(self.space.recombined(row, scene, strength * share))
        return torch.stack(rows)


def with_scenes(
    space: VariationSpace, adapter: ImagePromptAdapter, clip_vision: Any, images: Tensor
) -> VariationSpace:
    """A space whose scenes are those of other pictures.

    They are found by what they show where the space compares pictures with texts; a space that
    compares captions has none of them here, and any scene fits any prompt.

    Args:
        space: Fitted on this adapter.
        adapter: Reads the pictures.
        clip_vision: ComfyUI's CLIP_VISION.
        images: (pictures, height, width, 3), 0..1; two or more.

    Raises:
        ArgumentError: There is only one picture.
        ModelError: Space, adapter and encoder do not fit.
    """
    from dataclasses import replace

    from ipdiverse.adapter.imagine import SceneBank
    from ipdiverse.errors import ArgumentError

    from .inputs import encoded

    if len(images) < 2:
        raise ArgumentError("hold too little to vary", where="scenes", expected="2 or more images")
    space.check(adapter)
    scenes, keys = [], []
    for image in images:  # one by one: a batch of large photographs may not fit in memory
        seen = encoded(adapter, clip_vision, image[None])
        with torch.no_grad():
            scenes.append(space.reduce(adapter.tokens(seen.embeds).float()))
        keys.append(seen.pooled)
    width = space.key_directions.shape[1]
    compared = space.reads == "image" and width and keys[0].shape[-1] == len(space.key_directions)
    found = space.keys_of(torch.cat(keys), prompts=False) if compared else None
    empty = torch.zeros(len(images), 0)
    captions = ("",) * len(images)
    bank = SceneBank(torch.cat(scenes), empty if found is None else found, captions)
    return replace(space, bank=bank)
