"""An image prompt: one image or several, as pictures or as embeddings, each with a region."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

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
COMBINES: tuple[str, ...] = get_args(Combine)


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
            in its order, each (count, ...); or what stock diffusers takes as
            `ip_adapter_image_embeds`, (2 · items, count, ...), the negative ones first.

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
        if self.embeds is not None:
            given = self.embeds
            given = [given] if isinstance(given, (Tensor, np.ndarray)) else given
            checked = [as_embeds(one, "reference: embeds") for one in given]
            object.__setattr__(self, "embeds", checked)
        if self.faces is not None:
            object.__setattr__(self, "faces", as_embeds(self.faces, "reference: faces"))
        count = self.count()
        if count == 0:
            raise ArgumentError("is empty", where="reference", fix="Give at least one image.")
        check_parts(count, self.combine, self.weights, self.masks)
        for image in (*self.images, *(self.masks or ())):
            _checked_image(image, "PIL images", "Open files with image_io.load_image.")
        # a photograph that Pillow opened lies as the camera was held; one by its path does not
        object.__setattr__(self, "images", [upright(image) for image in self.images])

    def count(self) -> int | None:
        """How many images or faces; None for embeddings whose axes only an adapter can tell."""
        if self.embeds is None:
            return len(self.images or (() if self.faces is None else self.faces))
        if not self.embeds:
            return 0
        return len(self.embeds[0]) if self.embeds[0].ndim == 2 else None


def check_parts(
    count: int | None,
    combine: str,
    weights: Sized | None,
    masks: Sized | None,
    mask_name: str = "masks",
) -> None:
    """Refuse parts of a reference that do not fit together."""
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
    """One image, or several, as a reference; images or their files."""
    if isinstance(item, Reference):
        return item
    if isinstance(item, str) or not isinstance(item, Sequence):
        item = [item]
    return Reference([_image(one) for one in item])


def as_embeds(given: Any, where: str) -> Tensor:
    """Embeddings as a tensor of finite numbers with two axes or more."""
    tensor = torch.from_numpy(given) if isinstance(given, np.ndarray) else given
    if not isinstance(tensor, Tensor):
        raise ArgumentError(
            "is not a tensor", where=where, expected="embeddings", found=type(given).__name__
        )
    if tensor.ndim < 2 or not tensor.numel():
        raise ArgumentError(
            "has the wrong shape",
            where=where,
            expected="(count, width), or (count, patches, width) of hidden states",
            found=tuple(tensor.shape),
        )
    if not tensor.is_floating_point() or not tensor.isfinite().all():
        found = "NaN or infinity" if tensor.is_floating_point() else tensor.dtype
        expected = "finite floating-point numbers"
        raise ArgumentError("holds no embeddings", where=where, expected=expected, found=found)
    return tensor


def _image(item: Any) -> Image.Image:
    if isinstance(item, (str, Path)):
        return load_image(Path(item))
    fix = "Give embeddings as Reference(embeds=[…])." if isinstance(item, Tensor) else None
    return _checked_image(item, "a PIL image, an image's file, or a Reference", fix)


def _checked_image(item: Any, expected: str, fix: str | None) -> Image.Image:
    if isinstance(item, Image.Image):
        return item
    found = type(item).__name__
    what = "is not an image"
    raise ArgumentError(what, where="reference", expected=expected, found=found, fix=fix)


def combine_embeds(
    embeds: Tensor, combine: Combine, weights: Sequence[float] | None = None
) -> Tensor:
    """Several references' embeddings to one's, (1, ...), or as they are for `concat`."""
    if combine == "concat" or len(embeds) == 1:
        return embeds
    if combine == "average":
        return embeds.mean(0, keepdim=True)
    if combine == "subtract":
        return embeds[:1] - embeds[1:].mean(0, keepdim=True)
    share = torch.tensor(list(weights or ()), dtype=embeds.dtype, device=embeds.device)
    if len(share) != len(embeds):
        what, expected = "have the wrong length", len(embeds)
        raise ArgumentError(what, where="weights", expected=expected, found=len(share))
    if not float(share.sum()) or not share.isfinite().all():
        raise ArgumentError("sum to 0, or are not finite", where="weights")
    return torch.tensordot(share / share.sum(), embeds, dims=1)[None]


class RegionMask:
    """Weights in 0..1 over an image, (batch or 1, height, width), stretched to a layer's grid."""

    def __init__(self, weights: Tensor, mode: str = "area") -> None:
        self.weights, self._mode = weights, mode
        self._shrunk: dict[tuple[int, int], Tensor] = {}

    def at(self, pixels: int, latents: tuple[int, int]) -> Tensor:
        """Weights over a layer's pixels in row order, (batch, pixels)."""
        grid = layer_grid(pixels, latents)
        if grid not in self._shrunk:
            shrunk = F.interpolate(self.weights[:, None].float(), grid, mode=self._mode)
            self._shrunk[grid] = shrunk[:, 0].flatten(1)
        return self._shrunk[grid]

    def repeated(self, branches: int, each: int = 1) -> RegionMask:
        """The same for several images of each item, and for every guidance branch."""
        if len(self.weights) == 1:
            return self
        repeated = self.weights.repeat_interleave(each, 0).repeat(branches, 1, 1)
        return RegionMask(repeated, self._mode)


def mask_weights(image: Image.Image) -> Tensor:
    """A picture as weights, (height, width): white acts, black does not."""
    return torch.from_numpy(np.asarray(as_mask(image), dtype=np.float32) / 255)


def layer_grid(pixels: int, latents: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a layer with so many pixels: the latents', halved so often."""
    height, width = latents
    while height * width > pixels:
        # a convolution of stride 2 rounds up
        height, width = -(-height // 2), -(-width // 2)
    if height * width != pixels:
        raise ArgumentError(
            "does not fit a layer of this UNet",
            where="mask",
            expected=f"latents of {latents[0]}x{latents[1]}, halved some times",
            found=f"{pixels} pixels",
            fix="Leave the masks out.",
        )
    return height, width
