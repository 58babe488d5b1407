"""The adapter: a projection, perhaps a fusion, and keys and values for each layer of one UNet."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ipdiverse.adapter.fusion import Fusion
from ipdiverse.adapter.projection import LinearProjection, Projection, ResamplerProjection
from ipdiverse.errors import ModelError, check_range

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from diffusers import UNet2DConditionModel
    from transformers import CLIPVisionModelWithProjection

Kind = Literal["base", "plus"]

LoraShapes = dict[str, tuple[int, int, int]]
"""Projection name (`to_q_lora`, …) to its (input width, rank, output width)."""


class Joint(NamedTuple):
    """How an adapter's layers act in a transformer, where text and latents share one attention.

    Args:
        style: `xlabs`, `instantx` and `redux` of Flux.1, `sd3` of Stable Diffusion 3.
        time_width: Of the time embedding that `sd3` normalises image tokens by.
        head_dim: Of one head, whose keys and queries `sd3` normalises.
    """

    style: Literal["xlabs", "instantx", "redux", "sd3"]
    time_width: int = 0
    head_dim: int = 0


class TimeNorm(nn.Module):
    """Normalises tokens, then scales and shifts them by the time (AdaLN, arXiv:2212.09748)."""

    def __init__(self, time_width: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(time_width, 2 * width)

    def forward(self, tokens: Tensor, time: Tensor) -> Tensor:
        """Tokens (batch, tokens, width) by a time embedding (1 or batch, time_width)."""
        shift, scale = self.linear(F.silu(time))[:, None].chunk(2, dim=-1)
        return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale) + shift


class LowRank(nn.Module):
    """A low-rank change of a projection: up(down(x)) (LoRA, arXiv:2106.09685), of weight 1."""

    def __init__(self, width_in: int, rank: int, width_out: int) -> None:
        super().__init__()
        self.down = nn.Linear(width_in, rank, bias=False)
        self.up = nn.Linear(rank, width_out, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """What to add to the projection of these states."""
        return self.up(self.down(states))


class LayerWeights(nn.Module):
    """What an adapter adds to one attention layer: an image branch, and changes of the layer.

    Self-attention has no image branch (`widths` of tokens and queries are None); only FaceID
    changes a layer's own projections (`lora`).
    """

    to_k_ip: nn.Linear | None
    to_v_ip: nn.Linear | None
    to_q_lora: LowRank | None
    to_k_lora: LowRank | None
    to_v_lora: LowRank | None
    to_out_lora: LowRank | None

    def __init__(
        self,
        widths: tuple[int, int] | None,
        lora: LoraShapes | None = None,
        joint: Joint | None = None,
    ) -> None:
        super().__init__()
        self.joint = joint
        bias = joint is not None and joint.style == "xlabs"
        self.to_k_ip = None if widths is None else nn.Linear(*widths, bias=bias)
        self.to_v_ip = None if widths is None else nn.Linear(*widths, bias=bias)
        if widths is not None and joint is not None and joint.style == "sd3":
            self.norm_ip = TimeNorm(joint.time_width, widths[0])
            for name in ("norm_q", "norm_k", "norm_ip_k"):
                setattr(self, name, nn.RMSNorm(joint.head_dim, eps=1e-6))
        for name in ("to_q_lora", "to_k_lora", "to_v_lora", "to_out_lora"):
            shape = (lora or {}).get(name)
            setattr(self, name, None if shape is None else LowRank(*shape))


class ImagePromptAdapter(nn.Module):
    """An image prompt for a pretrained text-to-image model (IP-Adapter, arXiv:2308.06721).

    Args:
        projection: Image embeddings to image tokens.
        widths: For each cross-attention layer, by its number in `unet.attn_processors`: the width
            of its tokens and of its queries.
        fusion: Lets image tokens attend to the text; None is plain IP-Adapter.
        lora: Low-rank changes by layer number, self-attention included (FaceID).
        joint: How it acts in a transformer; None is for a UNet.
    """

    def __init__(
        self,
        projection: Projection,
        widths: dict[int, tuple[int, int]],
        fusion: Fusion | None = None,
        lora: Mapping[int, LoraShapes] | None = None,
        joint: Joint | None = None,
    ) -> None:
        super().__init__()
        changes = lora or {}
        self.image_proj, self.joint = projection, joint
        self.ip_adapter = nn.ModuleDict()
        for number in sorted(widths.keys() | changes.keys()):
            layer = LayerWeights(widths.get(number), changes.get(number), joint)
            self.ip_adapter[str(number)] = layer
        self.fusion = fusion
        self.spec: dict[str, Any] = {}
        # of the adapter that this one was fine-tuned from; empty if they are not known. A plain
        # dict, as parameters would be trained, and moved to a device before they are needed
        self.base_weights: dict[str, Tensor] = {}

    def layers(self) -> dict[int, LayerWeights]:
        """Each layer's weights by its number in `unet.attn_processors`."""
        layers: Any = self.ip_adapter.items()
        return {int(number): layer for number, layer in layers}

    def widths(self) -> dict[int, tuple[int, int]]:
        """Token and query width of each layer with an image branch."""
        return {
            number: (layer.to_k_ip.in_features, layer.to_k_ip.out_features)
            for number, layer in self.layers().items()
            if layer.to_k_ip is not None
        }

    @property
    def kind(self) -> str:
        """The projection's: `base`, `plus`, `faceid` (Portrait too) and others."""
        return self.image_proj.kind

    @property
    def reads(self) -> tuple[str, ...]:
        """What the projection takes, in order: `pooled`, `hidden`, `face`."""
        return self.image_proj.reads

    @property
    def token_width(self) -> int:
        """Width of the image tokens; a UNet's is its `cross_attention_dim`."""
        widths = self.widths()
        return next(iter(widths.values()))[0] if widths else self.image_proj.token_width

    @property
    def clip_dim(self) -> int | None:
        """Width of the image encoder's output that it reads; None when it reads faces alone."""
        return self.image_proj.clip_dim

    @property
    def draws(self) -> bool:
        """Whether its fusion draws tokens: anew for each image, and only for images."""
        return self.fusion is not None and self.fusion.kind == "generative"

    def tokens(self, *embeds: Tensor) -> Tensor:
        """Embeddings, in the order of `reads`, to image tokens, (batch, tokens, width)."""
        return self.image_proj(*embeds)

    def fuse(
        self,
        tokens: Tensor,
        text: Tensor,
        text_mask: Tensor | None = None,
        strength: float = 1.0,
        seeds: Sequence[int] | None = None,
    ) -> Tensor:
        """Let the image tokens of one reference attend to the text; without a fusion, as given.

        `seeds` of the rows are for a fusion that draws; None numbers them.
        """
        if self.fusion is None or strength == 0:
            return tokens
        if self.draws:
            return self.fusion(tokens, text, text_mask, strength, seeds)
        return self.fusion(tokens, text, text_mask, strength)


def attention_layers(unet: Any) -> dict[int, str]:
    """Number in `unet.attn_processors` to module name, for every attention layer."""
    names = (name.removesuffix(".processor") for name in unet.attn_processors)
    return dict(enumerate(names))


def cross_attention_layers(unet: Any) -> dict[int, str]:
    """Those that attend to the text."""
    return {n: name for n, name in attention_layers(unet).items() if name.endswith("attn2")}


def layer_widths(unet: UNet2DConditionModel) -> dict[int, tuple[int, int]]:
    """Token and query width of each cross-attention layer, read from the layers themselves."""
    return {
        number: (attention.to_k.in_features, attention.to_q.out_features)
        for number, attention in _cross_attentions(unet).items()
    }


def _cross_attentions(unet: UNet2DConditionModel) -> dict[int, Any]:
    return {n: unet.get_submodule(name) for n, name in cross_attention_layers(unet).items()}


def new_adapter(
    kind: Kind,
    unet: UNet2DConditionModel,
    image_encoder: CLIPVisionModelWithProjection,
    fusion: Fusion | None = None,
    **projection_sizes: int,
) -> ImagePromptAdapter:
    """An untrained adapter that fits a UNet and an image encoder."""
    widths = layer_widths(unet)
    token_width = next(iter(widths.values()))[0]
    clip = image_encoder.config
    if kind == "base":
        projection = LinearProjection(clip.projection_dim, token_width, **projection_sizes)
    else:
        projection = ResamplerProjection(clip.hidden_size, token_width, **projection_sizes)
    adapter = ImagePromptAdapter(projection, widths, fusion)
    layers = adapter.layers()
    for number, attention in _cross_attentions(unet).items():  # as the original starts
        keys, values = attention.to_k.weight, attention.to_v.weight
        layers[number].load_state_dict({"to_k_ip.weight": keys, "to_v_ip.weight": values})
    return adapter


def shared_parts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that an adapter has in common with its base weights: all but the fusion."""
    return {
        n: tensor for n, tensor in tensors.items() if n.startswith(("image_proj.", "ip_adapter."))
    }


def remember_base_weights(adapter: ImagePromptAdapter, base: ImagePromptAdapter) -> None:
    """Keep the weights of the adapter that another was fine-tuned from."""
    mine, theirs = shared_parts(adapter.state_dict()), base.state_dict()
    wrong = sorted(theirs.keys() - mine.keys()) or [
        name
        for name, tensor in mine.items()
        if name not in theirs or theirs[name].shape != tensor.shape
    ]
    if wrong:
        raise ModelError(
            "cannot be what this adapter was fine-tuned from",
            where="base weights",
            expected="an adapter of the same kind and sizes, without fusion",
            found=f"{wrong[0]}, which differs",
        )
    adapter.base_weights = {name: theirs[name].detach().clone() for name in mine}


def interpolated(adapter: ImagePromptAdapter, share: float) -> ImagePromptAdapter:
    """The adapter between its base weights and its own: W = (1 − share) · W_base + share · W.

    Weights before and after one fine-tuning lie on a path along which a model stays good. Here the
    path leads from an adapter that copies to one that does not. A fusion's weights stay as they
    are; what it adds is multiplied by the share (`hook.ActiveAdapter.strength`).

    Args:
        share: 0 is exactly the base adapter, without fusion; 1 is `adapter` itself.

    Source:
        WiSE-FT, arXiv:2109.01903; model soups, arXiv:2203.05482.
    """
    check_range("interpolation", share, 0, 1)
    if share == 1:
        return adapter
    if not adapter.base_weights:
        raise ModelError(
            "does not hold its base weights",
            where="adapter",
            fix="Leave the lever `interpolation` out, or store the weights that the adapter was "
            "fine-tuned from: ipdiverse calibrate --plain FILE.",
        )
    between = deepcopy(adapter)  # `adapter` may be trained or attached elsewhere meanwhile
    between.base_weights = {}
    if share == 0:
        between.fusion = None
    own = between.state_dict()  # shares memory with the copy
    with torch.no_grad():
        for name, tensor in adapter.base_weights.items():
            # in float32: half precision would round each weight twice
            base = tensor.to(own[name].device, torch.float32)
            own[name].copy_(base if share == 0 else base.lerp(own[name].float(), share))
    return between


def placed(
    adapter: ImagePromptAdapter, device: torch.device, dtype: torch.dtype
) -> ImagePromptAdapter:
    """The adapter on a device and in a type: itself where it is so already, else a copy."""
    if all(one.device == device and one.dtype == dtype for one in adapter.parameters()):
        return adapter
    copies = {
        id(one): nn.Parameter(one.detach().to(device, dtype), requires_grad=False)
        for one in adapter.parameters()
    }
    # the memo of deepcopy: what is in it is taken in place of a copy of the original
    return deepcopy(adapter, {**copies, id(adapter.base_weights): {}}).eval()


def state_of(adapter: ImagePromptAdapter) -> tuple[tuple[int, int], ...]:
    """Equal as long as no weight was replaced or changed in place."""
    return tuple((id(p), 0 if p.is_inference() else p._version) for p in adapter.parameters())


def check_layers(
    adapter: ImagePromptAdapter, theirs: Mapping[int, tuple[int, int]], named: str = "this UNet"
) -> None:
    """Refuse an adapter whose layers have other sizes than a model's, given by number."""
    mine = adapter.widths()
    if mine == theirs:
        return
    first = min(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))
    raise ModelError(
        f"layer {first} does not fit {named}",
        where="adapter",
        expected=f"(tokens, hidden) {theirs.get(first, 'no such layer')}",
        found=mine.get(first, "no such layer"),
        fix="It was trained for another base model.",
    )


def check_embeddings(
    adapter: ImagePromptAdapter, width: int, named: str = "this image encoder"
) -> None:
    """Refuse an adapter that reads embeddings of another width than an encoder gives."""
    if adapter.clip_dim != width:
        raise ModelError(
            f"does not fit {named}",
            where="adapter",
            expected=f"embeddings of width {width}",
            found=adapter.clip_dim,
            fix="It was trained for another image encoder.",
        )


def check_encoder(adapter: ImagePromptAdapter, encoder: Any) -> None:
    """Refuse an image encoder whose embeddings have not the adapter's width; None always fits."""
    if encoder is None or adapter.clip_dim is None:
        return
    config = encoder.config
    projected = getattr(config, "projection_dim", None)  # SigLIP has none: it pools its states
    width = (projected or config.hidden_size) if "pooled" in adapter.reads else config.hidden_size
    check_embeddings(adapter, width)
