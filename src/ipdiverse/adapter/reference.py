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

    ImageLike = Image.Image | str | Path | np.ndarray | Tensor

Combine = Literal["concat", "average", "weighted", "subtract"]
COMBINES: tuple[str, ...] = get_args(Combine)


@dataclass(frozen=True)
class Reference:
    """The image prompt of one item.

    Args:
        images: One or several, as `as_reference` takes them; they go through the image encoder.
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

    images: Sequence[Any] = ()
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
        # a photograph that Pillow opened lies as the camera was held; one by its path does not
        object.__setattr__(self, "images", [upright(image) for image in _images(self.images)])
        count = self.count()
        if count == 0:
            raise ArgumentError("is empty", where="reference", fix="Give at least one image.")
        check_parts(count, self.combine, self.weights, self.masks)
        for mask in self.masks or ():
            if not isinstance(mask, Image.Image):
                raise _no_image(mask, "masks", "PIL images; image_io.load_mask opens files")

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
    """One image, or several together, as a reference.

    An image is a PIL image, a file, or an array or tensor: (H, W), (H, W, channels) or (channels,
    H, W), and a batch of these; of fractions in 0..1, or of numbers in 0..255.

    Raises:
        ArgumentError: Not an image, or one whose axes or range cannot be told.
        ImageError: A file cannot be read.
    """
    return item if isinstance(item, Reference) else Reference(item)  # type: ignore[arg-type]


def split_batch(given: Any) -> list[Any]:
    """A list's entries, an array's images, or the one thing that was given."""
    if isinstance(given, (np.ndarray, Tensor)) and given.ndim == 4:
        return [*given]
    return [*given] if isinstance(given, (list, tuple)) else [given]


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
    held = tensor.layout is torch.strided and not tensor.is_meta
    if not held or not tensor.is_floating_point() or not tensor.isfinite().all():
        found = "NaN or infinity" if tensor.is_floating_point() else tensor.dtype
        found = found if held else f"a tensor of {tensor.layout} on {tensor.device}"
        expected = "finite floating-point numbers"
        raise ArgumentError("holds no embeddings", where=where, expected=expected, found=found)
    return tensor


def _images(given: Any) -> list[Image.Image]:
    """All images of what may hold files, arrays and batches of them."""
    found = []
    for one in split_batch(given):
        if isinstance(one, (np.ndarray, Tensor)):
            found += [_of_array(part) for part in split_batch(one)]
        elif isinstance(one, (str, Path)):
            found.append(load_image(Path(one)))
        elif isinstance(one, Image.Image):
            if not all(one.size):
                raise ArgumentError("has no pixels", where="reference", found=one.size)
            found.append(one)
        else:
            raise _no_image(one, "reference", "a PIL image, an image's file, an array, a Reference")
    return found


def _no_image(item: Any, where: str, expected: str) -> ArgumentError:
    return ArgumentError(
        "is not an image", where=where, expected=expected, found=type(item).__name__
    )


def _of_array(given: Any) -> Image.Image:
    """A picture of numbers, whose axes and range are told by the numbers themselves."""
    if isinstance(given, Tensor):
        given = given.detach().cpu()
        given = (given.float() if given.is_floating_point() else given).numpy()
    if given.ndim == 2:
        given = given[..., None]
    first, last = (given.ndim == 3 and given.shape[axis] in (1, 3, 4) for axis in (0, -1))
    if first == last or not given.size:  # both: three rows or three columns, nobody knows
        raise ArgumentError(
            "has axes that are not an image's",
            where="reference",
            expected="(H, W), (H, W, channels) or (channels, H, W), or a batch of these",
            found=given.shape,
            fix="Give embeddings as Reference(embeds=[…]).",
        )
    pixels = _eight_bits(np.moveaxis(given, 0, -1) if first else given)
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels))


def _eight_bits(given: np.ndarray) -> np.ndarray:
    """Pixels in 0..255, of fractions or of numbers."""
    low, high = (given.min(), given.max()) if given.dtype.kind in "buif" else (np.nan, np.nan)
    fractions = given.dtype.kind in "bf" and high <= 1
    # 3 of 255 is a black picture, while CLIP's preparation ends at 2.2: nothing to guess between
    numbers = high == 0 or (3 if given.dtype.kind == "f" else 1) < high <= 255
    if not (low >= 0 and (fractions or numbers)):
        raise ArgumentError(
            "does not say which number is white",
            where="reference",
            expected="fractions in 0..1, or numbers in 0..255",
            found=f"{given.dtype}, {low:.6g} to {high:.6g}",
            fix="Undo what prepared it for a model, so that 0 is black and 1 or 255 is white.",
        )
    return np.round(given.astype(np.float32) * (255 if fractions else 1)).astype(np.uint8)


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


@dataclass(eq=False)
class ReferenceTokens:
    """Projected tokens of every item's references that share one attention, before fusion."""

    positive: Tensor  # (items, references, tokens, width)
    negative: Tensor  # of the unconditional branch; one entry serves every item
    mask: RegionMask | None = None  # where they act; None is everywhere
    # what a fusion drew, and of what: drawing costs more than what levers change at every step
    drawn: tuple[Any, tuple[Tensor, Tensor], Tensor] | None = None
