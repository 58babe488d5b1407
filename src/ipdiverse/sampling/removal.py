"""Removal of what the prompt states: directions of the text, taken out of the image's embeddings.

Pooled embeddings lie in the space that text and image encoder share, so directions of the text are
subtracted there. Hidden states do not; they are read by the encoder's own projection into that
space (arXiv:2310.05916), so what it reads in a direction is taken out of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ipdiverse.errors import ModelError
from ipdiverse.sampling.levers import remove_subspace, stated_subspace

if TYPE_CHECKING:
    from ipdiverse.adapter.attach.attach import Attachment

_BREAKS = re.compile(r",|\b(?:with|in|on|at|holding|wearing|and|to)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Removal:
    """Takes a text's directions out of embeddings.

    Args:
        basis: Orthonormal rows for each name of an embedding, `pooled` and `hidden`.
        strength: 0..1.
    """

    basis: dict[str, Tensor]
    strength: float

    def __call__(self, name: str, embeds: Tensor) -> Tensor:
        """Embeddings without them; other kinds (faces) as they are."""
        return (
            remove_subspace(embeds, self.strength, self.basis[name])
            if name in self.basis
            else (embeds)
        )


def phrases(prompt: str) -> list[str]:
    """The statements of a prompt: it whole, and its parts between commas and small words."""
    parts = [part.strip(" .") for part in _BREAKS.split(prompt)]
    return list(dict.fromkeys([prompt, *[part for part in parts if part]]))


@torch.no_grad()
def stated_basis(attachment: Attachment, prompt: str, rank: int) -> dict[str, Tensor]:
    """Directions that a prompt states, in each space that an adapter may read.

    Args:
        attachment: Whose pipeline's text encoder reads it.
        prompt: The text; "" states nothing.
        rank: Directions at most.

    Raises:
        ModelError: Text and image encoder share no space.
    """
    encoder: Any = attachment.image_encoder
    width = encoder.config.projection_dim
    said = joint_text(attachment.pipe, [*phrases(prompt), ""], width)
    if said is None:
        raise ModelError(
            "shares no space with the image encoder",
            where="text encoder",
            expected=f"one that projects to a width of {width}",
            fix="Leave remove_stated out with this base.",
        )
    rows = stated_subspace(said[:-1] - said[-1:], rank)
    # (width, hidden); an offloaded encoder's weights wait elsewhere
    projection = encoder.visual_projection.weight.to(rows)
    read = torch.linalg.qr((rows @ projection).T).Q.T if len(rows) else rows @ projection
    return {"pooled": rows, "hidden": read}


def joint_text(pipe: Any, texts: list[str], width: int) -> Tensor | None:
    """Text embeddings in the space of an image encoder, (texts, width).

    Args:
        pipe: Whose text encoders are asked.
        texts: What is read.
        width: Of the space. Encoders without a projection are not in it, whatever their width,
            unless their config says `pooled_in_image_space`, as the embedded one's does.

    Returns:
        None where no text encoder is in that space.
    """
    for suffix in ("", "_2"):
        encoder = getattr(pipe, f"text_encoder{suffix}", None)
        if encoder is None:
            continue
        projects = hasattr(encoder, "text_projection")
        if not projects and not getattr(encoder.config, "pooled_in_image_space", False):
            continue
        found = _pooled(encoder, getattr(pipe, f"tokenizer{suffix}"), texts)
        if found.shape[1] == width:
            return found
    return None


def _pooled(encoder: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    tokens = tokenizer(
        texts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    output = encoder(tokens.input_ids.to(encoder.device))
    projected = getattr(output, "text_embeds", None)
    return (output.pooler_output if projected is None else projected).float()
