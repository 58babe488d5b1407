"""An image prompt: one image or several, as pictures or as embeddings, each with a region."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ipdiverse.errors import ArgumentError
from ipdiverse.image_io import as_mask, load_image, upright

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
                raise _not_an_image(image, "PIL images", "Open files with image_io.load_image.")
        # a photograph that Pillow opened lies as the camera was held; one by its path does not
        object.__setattr__(self, "images", [upright(image) for image in self.images])

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
    raise _not_an_image(item, "a PIL image, an image's file, or a Reference")


def _not_an_image(item: object, expected: str, fix: str | None = None) -> ArgumentError:
    found = type(item).__name__
    return ArgumentError(
        "is not an image", where="reference", expected=expected, found=found, fix=fix
    )


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


class RegionMask:
    """Weights in 0..1 over an image, shrunk once for each resolution that asks.

    Args:
        weights: (batch, height, width); one entry serves every item. Its aspect ratio is the
            output's.
    """

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights
        self._shrunk: dict[int, Tensor] = {}

    def at(self, pixels: int) -> Tensor:
        """Weights over that many pixels in row order, (batch, pixels).

        Raises:
            ArgumentError: No grid of the mask's aspect ratio has so many pixels.
        """
        if pixels not in self._shrunk:
            grid = _grid(pixels, self.weights.shape[-1] / self.weights.shape[-2])
            shrunk = F.interpolate(self.weights[:, None].float(), grid, mode="area")
            self._shrunk[pixels] = shrunk[:, 0].flatten(1)
        return self._shrunk[pixels]

    def repeated(self, branches: int) -> RegionMask:
        """The same for every guidance branch."""
        if len(self.weights) == 1 or branches == 1:
            return self
        return RegionMask(self.weights.repeat(branches, 1, 1))


def mask_weights(image: Image.Image) -> Tensor:
    """A picture as weights, (height, width): white acts, black does not."""
    return torch.from_numpy(np.asarray(as_mask(image), dtype=np.float32) / 255)


def _grid(pixels: int, ratio: float) -> tuple[int, int]:
    """Height and width of a layer with so many pixels in an image of this aspect ratio."""
    best = min(
        (h for h in range(1, pixels + 1) if pixels % h == 0),
        key=lambda h: abs(math.log(pixels / h / h / ratio)),
    )
    height, width = best, pixels // best
    if abs(math.log(width / height / ratio)) > math.log(1.5):
        raise ArgumentError(
            "does not have the output's aspect ratio",
            where="mask",
            expected=f"width/height near {width / height:.2f}",
            found=f"{ratio:.2f}",
            fix="Draw the mask at the output's size.",
        )
    return height, width
