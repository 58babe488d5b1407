"""Text-image fusion: image tokens attend to the text before the decoupled cross-attention.

Queries come from the image, keys and values from the text: the text decides what the image may
still say. Fusion does not depend on the timestep, so a call computes it once. `gated` and `blend`
add what they read to the tokens, in both guidance branches, each with its own text; `generative`
draws other tokens of the same subject, for each image its own, and leaves "no image" alone.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from ipdiverse.adapter.generative import GenerativeFusion


class GatedFusion(nn.Module):
    """T' = T + tanh(g) ⊙ W_o·MultiHead(LN(T), LN(C), LN(C)), with a gate for each token.

    The gates start at 0: an untrained fusion is plain IP-Adapter, bit for bit. Gating as in
    Flamingo (arXiv:2204.14198, section 2.2).

    Args:
        token_width: Width of image and text tokens.
        num_tokens: Image tokens of one reference.
        heads: Attention heads.
        width: Width inside, a multiple of `heads`; None takes `token_width`.

    Raises:
        ValueError: The width is not a multiple of the heads.
    """

    kind = "gated"

    def __init__(
        self, token_width: int, num_tokens: int, heads: int = 8, width: int | None = None
    ) -> None:
        super().__init__()
        inner = width or token_width
        if inner % heads:
            raise ValueError(f"fusion: {heads} heads do not divide a width of {inner}")
        self.heads = heads
        self.norm_image = nn.LayerNorm(token_width)
        self.norm_text = nn.LayerNorm(token_width)
        self.to_q = nn.Linear(token_width, inner, bias=False)
        self.to_k = nn.Linear(token_width, inner, bias=False)
        self.to_v = nn.Linear(token_width, inner, bias=False)
        self.to_out = nn.Linear(inner, token_width, bias=False)
        self.gate = nn.Parameter(torch.zeros(num_tokens))

    def forward(
        self,
        image_tokens: Float[Tensor, "batch tokens width"],
        text: Float[Tensor, "batch text width"],
        text_mask: Bool[Tensor, "batch text"] | None = None,
        strength: float = 1.0,
    ) -> Float[Tensor, "batch tokens width"]:
        """Fuse."""
        query = self._split(self.to_q(self.norm_image(image_tokens)))
        normed = self.norm_text(text)
        mixed = attend(
            query, self._split(self.to_k(normed)), self._split(self.to_v(normed)), text_mask
        )
        added = self.to_out(mixed.transpose(1, 2).flatten(2))
        return image_tokens + strength * torch.tanh(self.gate)[:, None] * added

    def _split(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class BlendFusion(nn.Module):
    """T' = a·T + (1 − a)·softmax(Q(T) K(C)ᵀ / √d) V(C): one head, biases, one weight a.

    The fusion that this project's ancestor published. Its code left Q, K and V out of the
    optimizer, used a = 0.5 in training and 0.8 afterwards, and never fused the negative branch.
    Here they are trained, a is one number that is stored, and both branches are fused.

    Args:
        token_width: Width of image and text tokens.
        blend: a, the weight of the image's own tokens.
    """

    kind = "blend"

    def __init__(self, token_width: int, blend: float = 0.8) -> None:
        super().__init__()
        self.query = nn.Linear(token_width, token_width)
        self.key = nn.Linear(token_width, token_width)
        self.value = nn.Linear(token_width, token_width)
        self.blend = nn.Parameter(torch.tensor(float(blend)))

    def forward(
        self,
        image_tokens: Float[Tensor, "batch tokens width"],
        text: Float[Tensor, "batch text width"],
        text_mask: Bool[Tensor, "batch text"] | None = None,
        strength: float = 1.0,
    ) -> Float[Tensor, "batch tokens width"]:
        """Fuse (arguments as `GatedFusion.forward`; strength 0 keeps the tokens, exactly)."""
        query, key, value = (
            layer(states)[:, None]
            for layer, states in ((self.query, image_tokens), (self.key, text), (self.value, text))
        )
        mixed = attend(query, key, value, text_mask)[:, 0]
        return image_tokens + strength * (1 - self.blend) * (mixed - image_tokens)


Fusion = GatedFusion | BlendFusion | GenerativeFusion


def attend(
    query: Float[Tensor, "batch heads tokens head_dim"],
    key: Float[Tensor, "batch heads text head_dim"],
    value: Float[Tensor, "batch heads text head_dim"],
    mask: Bool[Tensor, "batch text"] | None,
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Softmax attention that leaves out what the mask says is padding."""
    shaped = None if mask is None else mask[:, None, None, :].to(query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=shaped)
