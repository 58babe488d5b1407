"""The adapter: a projection, and keys and values for each cross-attention layer of one UNet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from ipdiverse.adapter.attention import DecoupledAttention
from ipdiverse.adapter.projection import LinearProjection, ResamplerProjection

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPVisionModelWithProjection

Kind = Literal["base", "plus"]


class ImagePromptAdapter(nn.Module):
    """An image prompt for a pretrained text-to-image model (IP-Adapter, arXiv:2308.06721).

    Args:
        projection: Image embeddings to image tokens.
        widths: For each cross-attention layer, by its number in `unet.attn_processors`: the width
            of its tokens and of its queries.
    """

    def __init__(
        self,
        projection: LinearProjection | ResamplerProjection,
        widths: dict[int, tuple[int, int]],
    ) -> None:
        super().__init__()
        self.image_proj = projection
        self.ip_adapter = nn.ModuleDict(
            {str(number): DecoupledAttention(*pair) for number, pair in widths.items()}
        )

    def layers(self) -> dict[int, DecoupledAttention]:
        """Each layer by its number in `unet.attn_processors`."""
        return {
            int(number): layer
            for number, layer in self.ip_adapter.items()
            if isinstance(layer, DecoupledAttention)
        }

    @property
    def kind(self) -> str:
        """`base` (pooled embedding) or `plus` (penultimate hidden states)."""
        return self.image_proj.kind

    @property
    def clip_dim(self) -> int:
        """Width of the image embeddings that it reads."""
        projection = self.image_proj
        first = projection.proj if isinstance(projection, LinearProjection) else projection.proj_in
        return first.in_features

    def tokens(self, image_embeds: Tensor) -> Tensor:
        """Image embeddings, (batch, clip_dim) or (batch, patches, clip_dim), to image tokens."""
        return self.image_proj(image_embeds)


def cross_attention_layers(unet: UNet2DConditionModel) -> dict[int, str]:
    """Number in `unet.attn_processors` to processor name, for each cross-attention layer."""
    return {
        number: name
        for number, name in enumerate(unet.attn_processors)
        if name.endswith("attn2.processor")
    }


def layer_widths(unet: UNet2DConditionModel) -> dict[int, tuple[int, int]]:
    """Token and query width of each cross-attention layer, read from the layers themselves."""
    return {
        number: (attention.to_k.in_features, attention.to_q.out_features)
        for number, attention in _cross_attentions(unet).items()
    }


def _cross_attentions(unet: UNet2DConditionModel) -> dict[int, Any]:
    return {
        number: unet.get_submodule(name.removesuffix(".processor"))
        for number, name in cross_attention_layers(unet).items()
    }


def new_adapter(
    kind: Kind,
    unet: UNet2DConditionModel,
    image_encoder: CLIPVisionModelWithProjection,
    **projection_sizes: int,
) -> ImagePromptAdapter:
    """An untrained adapter that fits a UNet and an image encoder.

    Args:
        kind: `base` or `plus`.
        unet: The model to prompt; keys and values start as copies of its text projections, as in
            the original.
        image_encoder: What gives the image embeddings.
        projection_sizes: `num_tokens`, and for plus `width` and `depth`.
    """
    widths = layer_widths(unet)
    token_width = next(iter(widths.values()))[0]
    if kind == "base":
        projection = LinearProjection(
            image_encoder.config.projection_dim, token_width, **projection_sizes
        )
    else:
        projection = ResamplerProjection(
            image_encoder.config.hidden_size, token_width, **projection_sizes
        )
    adapter = ImagePromptAdapter(projection, widths)
    layers = adapter.layers()
    for number, attention in _cross_attentions(unet).items():
        layer = layers[number]
        layer.to_k_ip.weight.data.copy_(attention.to_k.weight.data)
        layer.to_v_ip.weight.data.copy_(attention.to_v.weight.data)
    return adapter
