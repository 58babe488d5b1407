"""Token dropout: a random share of an item's image tokens says nothing of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ipdiverse.levers import Lever, StepContext

if TYPE_CHECKING:
    from torch import Tensor


def drop_tokens(tokens: Tensor, strength: float, context: StepContext) -> Tensor:
    """Set a random share of an item's tokens to the mean of its tokens, the same at every step.

    Args:
        tokens: Fused image tokens, (items, tokens, width).
        strength: Share of the tokens, 0..1.
        context: Its seeds decide which.
    """
    if strength == 0:
        return tokens
    order = context.noise("token dropout", tokens[..., 0]).argsort(-1).argsort(-1)
    dropped = order < round(strength * tokens.shape[1])
    return torch.where(dropped[..., None], tokens.mean(1, keepdim=True), tokens)


DROP = Lever("drop", "Share of image tokens dropped.", "tokens", drop_tokens)
