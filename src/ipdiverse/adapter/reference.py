"""What an image prompt is made of: one image or several, as pictures or as embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ipdiverse.errors import ArgumentError

if TYPE_CHECKING:
    from PIL import Image

Combine = Literal["concat", "average", "weighted", "subtract"]
COMBINES: tuple[str, ...] = ("concat", "average", "weighted", "subtract")


@dataclass(frozen=True)
class Reference:
    """The image prompt of one item.

    Args:
        images: One or several; they go through the image encoder.
        faces: Face embeddings, (count, face_dim), for adapters that read faces; one for each
            image where both are read.
        combine: `concat`: tokens of all, side by side. `average`, `weighted`: the mean of their
            embeddings. `subtract`: the first minus the mean of the others.
        weights: For `weighted`, one for each image.
        masks: Regions, one for each image, white where it acts; only with `concat`.
        embeds: Image embeddings in place of `images`, one tensor for each that the adapter reads,
            in its order, each (count, ...).

    Raises:
        ArgumentError: Parts that do not fit together.
    """

    images: Sequence[Image.Image] = ()
    faces: Tensor | None = None
    combine: Combine = "concat"
    weights: Sequence[float] | None = None
    masks: Sequence[Image.Image] | None = None
    embeds: Sequence[Tensor] | None = None

    def __post_init__(self) -> None:
        count = self.count()
        if not count:
            raise ArgumentError("is empty", where="reference", fix="Give at least one image.")
        if self.combine not in COMBINES:
            raise ArgumentError(
                "is unknown", where="combine", expected=" | ".join(COMBINES), found=self.combine
            )
        if (self.weights is not None) != (self.combine == "weighted"):
            raise ArgumentError(
                "go together", where="combine='weighted' and weights", found=self.combine
            )
        for name, parts in (("weights", self.weights), ("masks", self.masks)):
            if parts is not None and len(parts) != count:
                raise ArgumentError(
                    "has the wrong length", where=name, expected=f"{count}", found=len(parts)
                )
        if self.masks is not None and self.combine != "concat":
            raise ArgumentError(
                "cannot be masked apart once combined", where="masks", fix="Use combine='concat'."
            )

    def count(self) -> int:
        """How many images or faces."""
        if self.embeds is not None:
            return len(self.embeds[0])
        return len(self.images) if self.images else 0 if self.faces is None else len(self.faces)


def as_reference(item: Reference | Image.Image | Sequence[Image.Image]) -> Reference:
    """One image, or several, as a reference."""
    if isinstance(item, Reference):
        return item
    return Reference(list(item)) if isinstance(item, Sequence) else Reference([item])


def combine_embeds(
    embeds: Tensor, combine: Combine, weights: Sequence[float] | None = None
) -> Tensor:
    """Several references' embeddings to one's, or as they are for `concat`.

    Args:
        embeds: (references, ...).
        combine: See `Reference`.
        weights: For `weighted`; they need not sum to 1.

    Returns:
        (references, ...) for `concat`, else (1, ...).

    Raises:
        ArgumentError: The weights sum to 0.
    """
    if combine == "concat" or len(embeds) == 1:
        return embeds
    if combine == "average":
        return embeds.mean(0, keepdim=True)
    if combine == "subtract":
        return embeds[:1] - embeds[1:].mean(0, keepdim=True)
    share = torch.tensor(list(weights or ()), dtype=embeds.dtype, device=embeds.device)
    if not float(share.sum()):
        raise ArgumentError("sum to 0", where="weights")
    return torch.tensordot(share / share.sum(), embeds, dims=1)[None]
