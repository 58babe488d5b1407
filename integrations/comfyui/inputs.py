"""Inputs of the nodes, in the form that the adapter reads: embeddings of images, masks of words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ipdiverse.adapter.model import ImagePromptAdapter

COMBINE = ("concat", "average", "subtract", "add", "norm average")
"""How several images become one reference: `concat` keeps the tokens of each, side by side."""
NO_IMAGE = ("zeros", "black")
_AXES = {"pooled": 2, "hidden": 3}  # of embeddings: (images, width), (images, patches, width)


class Encoded(NamedTuple):
    """What CLIP vision sees in images: what the adapter reads, and what scenes are found by."""

    embeds: Tensor
    pooled: Tensor


def encoded(adapter: ImagePromptAdapter, clip_vision: Any, image: Tensor) -> Encoded:
    """Images as an adapter reads them: pooled (base), or the penultimate hidden states (plus).

    Args:
        adapter: It must read images, not faces.
        clip_vision: ComfyUI's CLIP_VISION.
        image: (images, height, width, 3), 0..1.

    Raises:
        ModelError: The adapter reads faces, or embeddings of another width.
    """
    name = {"pooled": "image_embeds", "hidden": "penultimate_hidden_states"}[_reads(adapter)]
    seen = clip_vision.encode_image(image)
    embeds = checked_embeds(adapter, _cpu(seen[name]), "this CLIP vision model")
    return Encoded(embeds, _cpu(seen["image_embeds"]))


def no_image(adapter: ImagePromptAdapter, clip_vision: Any, kind: str) -> Tensor:
    """What the unconditional branch reads if there is no negative image.

    Base adapters read an embedding of zeros, as in training, whatever the kind. Plus adapters were
    trained on the states of zeros in place of pixels, which is mid-grey after CLIP's normalisation.
    `ComfyUI_IPAdapter_plus` gives them those of a black picture instead: with it, workflows of that
    pack draw what they drew.

    Args:
        adapter: Reads images.
        clip_vision: ComfyUI's CLIP_VISION.
        kind: `zeros` or `black`.
    """
    if _reads(adapter) == "pooled":
        return torch.zeros(1, adapter.clip_dim or 0)
    if kind == "black":
        size = getattr(clip_vision, "image_size", 224)
        return encoded(adapter, clip_vision, torch.zeros(1, size, size, 3)).embeds
    return _states_of_zeros(clip_vision)


def _states_of_zeros(clip_vision: Any) -> Tensor:
    """Hidden states of zeros in place of pixels, (1, patches, width)."""
    size = getattr(clip_vision, "image_size", 224)
    nothing = torch.zeros(1, 3, size, size, device=clip_vision.load_device)
    return _cpu(clip_vision.model(pixel_values=nothing, intermediate_output=-2)[1])


def checked_embeds(
    adapter: ImagePromptAdapter, embeds: Tensor, named: str = "these embeddings"
) -> Tensor:
    """Embeddings that an adapter can read, in float32 on the CPU.

    Raises:
        ModelError: The adapter reads faces, or embeddings of another width or other axes.
    """
    from ipdiverse.adapter.model import check_embeddings
    from ipdiverse.errors import ModelError

    axes = _AXES[_reads(adapter)]
    if getattr(embeds, "ndim", None) != axes:  # FaceID-Plus has two
        raise ModelError(
            f"a {adapter.kind} adapter cannot read them",
            where="embeddings",
            expected="(images, width)" if axes == 2 else "(images, patches, width)",
            found=tuple(getattr(embeds, "shape", ())) or "embeddings of FaceID-Plus",
            fix="Encode the images with ipdiverse Encode images and this adapter.",
        )
    check_embeddings(adapter, embeds.shape[-1], named)
    return _cpu(embeds)


def face_embeds(
    adapter: ImagePromptAdapter, faces: Tensor, clip_vision: Any, image: Tensor
) -> tuple[Any, Any]:
    """Faces as an adapter reads them, and no face: FaceID-Plus looks at their images too.

    Args:
        adapter: Reads faces.
        faces: Embeddings, (images, width).
        clip_vision: ComfyUI's CLIP_VISION; None where the adapter reads faces alone.
        image: (images, height, width, 3), 0..1.

    Raises:
        ModelError: The adapter reads images alone, or CLIP vision is missing or of another width.
    """
    from ipdiverse.errors import ModelError

    if "face" not in adapter.reads:
        raise ModelError(
            "reads images, not faces",
            where=f"a {adapter.kind} adapter",
            fix="Use ipdiverse Encode images.",
        )
    nobody = torch.zeros(1, faces.shape[-1])
    if adapter.reads == ("face",):
        return _parts(adapter, faces)[0], nobody
    if clip_vision is None:
        raise ModelError(
            "reads images too", where=f"a {adapter.kind} adapter", fix="Connect clip_vision."
        )
    states = _cpu(clip_vision.encode_image(image)["penultimate_hidden_states"])
    return _parts(adapter, (faces, states)), (nobody, _states_of_zeros(clip_vision))


def parts(adapter: ImagePromptAdapter, embeds: Any) -> tuple[Tensor, ...]:
    """Embeddings of all that an adapter reads, in its order.

    Raises:
        ModelError: The adapter reads others.
    """
    if "face" in adapter.reads:
        return _parts(adapter, embeds)
    return (checked_embeds(adapter, embeds),)


def _parts(adapter: ImagePromptAdapter, embeds: Any) -> tuple[Tensor, ...]:
    from ipdiverse.errors import ModelError

    given = embeds if isinstance(embeds, tuple) else (embeds,)
    known = {"face": (2, adapter.image_proj.face_dim), "hidden": (3, adapter.clip_dim)}
    wanted = [known[name] for name in adapter.reads]
    if [(one.ndim, one.shape[-1]) for one in given] != wanted:
        raise ModelError(
            f"a {adapter.kind} adapter cannot read them",
            where="embeddings",
            expected=" and ".join(
                f"{name} of width {width}"
                for name, (_, width) in zip(adapter.reads, wanted, strict=True)
            ),
            found=" and ".join(str(tuple(one.shape)) for one in given),
            fix="Encode the images with ipdiverse Encode faces and this adapter.",
        )
    return tuple(_cpu(one) for one in given)


def combined(embeds: Tensor, how: str) -> Tensor:
    """Embeddings of several images to one's, (1, …), or as they are for `concat`."""
    from ipdiverse.adapter.reference import combine_embeds

    if len(embeds) == 1 or how in ("concat", "average", "subtract"):
        return combine_embeds(embeds, how)  # pyright: ignore[reportArgumentType] - one of three
    if how == "add":
        return embeds.sum(0, keepdim=True)
    # over the images, not over the width: so does the pack that the name is from
    return (embeds / embeds.norm(dim=0, keepdim=True).clamp_min(1e-12)).mean(0, keepdim=True)


def _reads(adapter: ImagePromptAdapter) -> str:
    from ipdiverse.errors import ModelError

    if adapter.reads not in (("pooled",), ("hidden",)):
        raise ModelError(
            "reads faces, which these nodes do not look for in the image of this one",
            where=f"a {adapter.kind} adapter",
            fix="Use ipdiverse Encode faces, and Apply ipdiverse embeddings.",
        )
    return adapter.reads[0]


def _cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32)


def word_mask(clip: Any, text: str) -> Tensor:
    """True where a token of the text is a word or marks begin or end; False for padding.

    Args:
        clip: ComfyUI's CLIP.
        text: The text given to CLIP Text Encode; its chunks are concatenated.
    """
    tokens = clip.tokenize(text)
    words: list[bool] = []
    for chunk in tokens.get("l") or next(iter(tokens.values())):
        ids = [entry[0] if isinstance(entry[0], int) else -1 for entry in chunk]
        length = len(ids)
        while length > 1 and ids[length - 2] == ids[-1]:
            length -= 1
        # encoders that pad with 0 (OpenCLIP) have one end mark before the padding; the others pad
        # with the end mark itself
        length -= ids[-1] == 0
        words += [position < length for position in range(len(ids))]
    return torch.tensor(words)
