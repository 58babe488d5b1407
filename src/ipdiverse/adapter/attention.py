"""Decoupled cross-attention: a pure function, and a thin processor that holds its weights."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ipdiverse.errors import ShapeError


def decoupled_cross_attention(
    query: Float[Tensor, "batch heads pixels head_dim"],
    text_key: Float[Tensor, "batch heads text head_dim"],
    text_value: Float[Tensor, "batch heads text head_dim"],
    image_key: Float[Tensor, "batch heads image head_dim"],
    image_value: Float[Tensor, "batch heads image head_dim"],
    scale: float | Float[Tensor, " batch"],
    text_mask: Tensor | None = None,
) -> Float[Tensor, "batch heads pixels head_dim"]:
    """Attend to text and to image separately, then add.

    Args:
        query: Latent queries, shared by both branches.
        text_key: Keys of the text tokens.
        text_value: Values of the text tokens.
        image_key: Keys of the image tokens.
        image_value: Values of the image tokens.
        scale: Weight of the image branch, dimensionless; 0 returns the text result exactly.
        text_mask: Added to the text branch's attention logits; None attends to every token.

    Raises:
        ShapeError: The image and text batch sizes differ.

    Source:
        arXiv:2308.06721, section 3.2 (λ is `scale`).
    """
    if image_key.shape[0] != text_key.shape[0]:
        raise ShapeError(
            "image and text batch sizes differ",
            where="decoupled cross-attention",
            expected=f"{text_key.shape[0]} image prompts",
            found=image_key.shape[0],
            fix="Give one reference, or one per item.",
        )
    text = F.scaled_dot_product_attention(query, text_key, text_value, attn_mask=text_mask)
    if isinstance(scale, Tensor):
        scale = scale.to(query.dtype).view(-1, 1, 1, 1)
    elif scale == 0:
        return text
    return text + scale * F.scaled_dot_product_attention(query, image_key, image_value)


class DecoupledAttention(nn.Module):
    """Attention processor of one cross-attention layer; diffusers calls it inside the UNet.

    Args:
        token_width: Width of text and image tokens, `attn.to_k.in_features`.
        hidden_width: Width of queries, keys and values, `attn.to_k.out_features`.
    """

    def __init__(self, token_width: int, hidden_width: int) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(token_width, hidden_width, bias=False)
        self.to_v_ip = nn.Linear(token_width, hidden_width, bias=False)
        self.scale: float | Tensor = 1.0

    def forward(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: tuple[Tensor, list[Tensor]] | Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend to `(text, [image_tokens])`, or to text alone when there are no image tokens.

        Args:
            attn: The diffusers `Attention` layer; its projections serve the text branch.
            hidden_states: Latent features, (batch, pixels, channels).
            encoder_hidden_states: Text (batch, text, width), and image tokens
                (batch, image, width) in a list, as stock diffusers passes them.
            attention_mask: Additive mask over text tokens.
            temb: Unused in transformer blocks; part of diffusers' interface.
        """
        text, image = _split(encoder_hidden_states)
        query = attn.head_to_batch_dim(attn.to_q(hidden_states), out_dim=4)
        key, value = (attn.head_to_batch_dim(f(text), out_dim=4) for f in (attn.to_k, attn.to_v))
        mask = _mask(attn, attention_mask, text)
        if image is None:
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        else:
            image_key = attn.head_to_batch_dim(self.to_k_ip(image), out_dim=4)
            image_value = attn.head_to_batch_dim(self.to_v_ip(image), out_dim=4)
            mixed = decoupled_cross_attention(
                query, key, value, image_key, image_value, self.scale, mask
            )
        merged = mixed.transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](merged))


def _split(states: tuple[Tensor, list[Tensor]] | Tensor | None) -> tuple[Tensor, Tensor | None]:
    if isinstance(states, tuple):
        text, images = states
        return text, torch.cat([_flat(tokens) for tokens in images], dim=1)
    if states is None:
        raise ShapeError("a cross-attention layer was called without text", where="attention")
    return states, None


def _flat(tokens: Tensor) -> Tensor:
    """Stock diffusers passes (batch, images, tokens, width): one item's images side by side."""
    return tokens.flatten(1, 2) if tokens.ndim == 4 else tokens


def _mask(attn: Any, mask: Tensor | None, text: Tensor) -> Tensor | None:
    if mask is None:
        return None
    prepared = attn.prepare_attention_mask(mask, text.shape[1], text.shape[0])
    return prepared.view(text.shape[0], attn.heads, -1, prepared.shape[-1])
