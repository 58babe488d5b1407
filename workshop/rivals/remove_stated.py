"""Removal of what the prompt states: directions of the text, taken out of the image's embeddings.

Pooled embeddings lie in the space that text and image encoder share, so directions of the text are
subtracted there. Hidden states do not; they are read by the encoder's own projection into that
space (arXiv:2310.05916), so what it reads in a direction is taken out of them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ipdiverse.errors import ArgumentError, ModelError
from ipdiverse.levers import Lever, StepContext
from ipdiverse.sampling.selection import joint_text

if TYPE_CHECKING:
    from ipdiverse.adapter.attach.attach import Attachment

_BREAKS = re.compile(r",|\b(?:with|in|on|at|holding|wearing|and|to)\b", re.IGNORECASE)
_RANK = 4
"""Directions it may take out."""


def remove_stated(embeds: Tensor, strength: float, context: StepContext) -> Tensor:
    """Embeddings without the directions that the item's prompt states; faces stay as they are.

    Args:
        embeds: Of one item.
        strength: 0..1.
        context: Its prompt, and the attachment whose encoders read it.

    Raises:
        ArgumentError: The prompt is not known.
        ModelError: Text and image encoder share no space.
    """
    if not context.prompts:
        raise ArgumentError("needs the prompts", where="remove_stated")
    basis = stated_basis(context.attachment, context.prompts[0], _RANK)
    return (
        remove_subspace(embeds, strength, basis[context.embedding])
        if context.embedding in basis
        else embeds
    )


def remove_subspace(
    embeds: Float[Tensor, "batch *patches width"],
    strength: float,
    basis: Float[Tensor, "rank width"],
) -> Float[Tensor, "batch *patches width"]:
    """E' = e − strength · e P, P the projection onto a subspace (IP-Composer, arXiv:2502.13951).

    With one direction this is InstantStyle's subtraction (arXiv:2404.02733).

    Args:
        embeds: Image embeddings.
        strength: 0 keeps them, 1 removes the subspace.
        basis: Orthonormal rows (`stated_subspace`).
    """
    if strength == 0:
        return embeds
    rows = basis.to(embeds)
    return embeds - strength * (embeds @ rows.T) @ rows


def stated_subspace(
    statements: Float[Tensor, "count width"], rank: int
) -> Float[Tensor, "rank width"]:
    """Orthonormal directions in which statements differ from saying nothing, strongest first.

    Args:
        statements: Embeddings of texts less that of no text.
        rank: How many directions at most.
    """
    _, sizes, rows = torch.linalg.svd(statements.float(), full_matrices=False)
    kept = int((sizes[:rank] > 1e-4 * sizes[0].clamp_min(1e-12)).sum())
    return rows[:kept]


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


REMOVE_STATED = Lever(
    "remove_stated",
    "Strength of taking out of the image's embedding what the prompt states.",
    "embeddings",
    remove_stated,
)
