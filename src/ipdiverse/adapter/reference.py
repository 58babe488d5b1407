"""What an image prompt is made of: one image or several, as pictures or as embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image
from torch import Tensor

from ipdiverse.errors import ArgumentError
from ipdiverse.image_io import load_image

if TYPE_CHECKING:
    from collections.abc import Sized

    ImageLike = Image.Image | str | Path

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
        check_parts(count, self.combine, self.weights, self.masks)
        for image in (*self.images, *(self.masks or ())):
            if not isinstance(image, Image.Image):
                raise _no_image(image, "PIL images", "Open files with image_io.load_image.")

    def count(self) -> int:
        """How many images or faces."""
        if self.embeds is not None:
            return len(self.embeds[0])
        return len(self.images) if self.images else 0 if self.faces is None else len(self.faces)


def check_parts(
    count: int | None,
    combine: str,
    weights: Sized | None,
    masks: Sized | None,
    mask_name: str = "masks",
) -> None:
    """Refuse parts of a reference that do not fit together.

    Args:
        count: How many images; None is not known yet.
        combine: As `Reference` takes it, and what follows too.
        weights: For `weighted`.
        masks: Regions.
        mask_name: What the user gave them as.

    Raises:
        ArgumentError: They do not.
    """
    if combine not in COMBINES:
        raise ArgumentError(
            "is unknown", where="combine", expected=" | ".join(COMBINES), found=combine
        )
    if (weights is not None) != (combine == "weighted"):
        raise ArgumentError("go together", where="combine='weighted' and weights", found=combine)
    for name, parts in (("weights", weights), (mask_name, masks)):
        if parts is not None and count is not None and len(parts) != count:
            raise ArgumentError(
                "has the wrong length", where=name, expected=f"{count}", found=len(parts)
            )
    if masks is not None and combine != "concat":
        raise ArgumentError(
            "cannot be masked apart once combined", where=mask_name, fix="Use combine='concat'."
        )


def as_reference(item: Reference | ImageLike | Sequence[ImageLike]) -> Reference:
    """One image, or several, as a reference; images or their files.

    Raises:
        ArgumentError: It is something else.
        ImageError: A file cannot be read.
    """
    if isinstance(item, Reference):
        return item
    if isinstance(item, str) or not isinstance(item, Sequence):
        item = [item]
    return Reference([_image(one) for one in item])


def _image(item: Any) -> Image.Image:
    if isinstance(item, Image.Image):
        return item
    if isinstance(item, (str, Path)):
        return load_image(Path(item))
    raise _no_image(item, "a PIL image, an image's file, or a Reference")


def _no_image(item: object, expected: str, fix: str | None = None) -> ArgumentError:
    found = type(item).__name__
    return ArgumentError("is no image", where="reference", expected=expected, found=found, fix=fix)


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
