"""Inputs of the nodes, in the form that the adapter reads: embeddings of images, masks of words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ipdiverse.adapter.model import ImagePromptAdapter


def encode(
    adapter: ImagePromptAdapter, clip_vision: Any, image: Tensor, negative: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Embeddings of images for an adapter, and of the negative image or of none.

    Args:
        adapter: It reads the pooled embedding (base) or the penultimate hidden states (plus).
        clip_vision: ComfyUI's CLIP_VISION.
        image: (images, height, width, 3), 0..1.
        negative: The same; None takes zeros (base) or the states of an image of zeros (plus), as in
            training.

    Raises:
        ModelError: The adapter reads faces, or embeddings of another width.
    """
    from ipdiverse.adapter.model import check_embeddings
    from ipdiverse.errors import ModelError

    if adapter.reads not in (("pooled",), ("hidden",)):
        raise ModelError(
            "reads faces, which these nodes do not support",
            where=f"a {adapter.kind} adapter",
            fix="Use it from Python.",
        )
    name = {"pooled": "image_embeds", "hidden": "penultimate_hidden_states"}[adapter.reads[0]]
    embeds = _embeds(clip_vision.encode_image(image)[name])
    check_embeddings(adapter, embeds.shape[-1], "this CLIP vision model")
    if negative is not None:
        return embeds, _embeds(clip_vision.encode_image(negative)[name][:1])
    if name == "image_embeds":
        return embeds, torch.zeros_like(embeds[:1])
    size = getattr(clip_vision, "image_size", 224)
    nothing = torch.zeros(1, 3, size, size, device=clip_vision.load_device)
    states = clip_vision.model(pixel_values=nothing, intermediate_output=-2)[1]
    return embeds, _embeds(states)


def _embeds(tensor: Tensor) -> Tensor:
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
