"""Decoupled cross-attention: a pure function, and a thin processor that calls it in the UNet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ipdiverse.errors import ShapeError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ipdiverse.adapter.model import LayerWeights
    from ipdiverse.adapter.reference import RegionMask

Attend = Callable[..., Tensor]
"""PyTorch's `scaled_dot_product_attention`, or what stands in for it."""
NOTHING, TEXT, BOTH = "nothing", "text", "both"
"""Branches of guidance: neither prompt, the text alone, text and image."""


class ImageBranch(NamedTuple):
    """What one group of image tokens brings to a layer."""

    key: Float[Tensor, "batch heads image head_dim"]
    value: Float[Tensor, "batch heads image head_dim"]
    scale: float | Float[Tensor, "*batch"]  # weight of the branch, dimensionless
    region: Float[Tensor, "#batch pixels"] | None = None  # of each pixel; None is 1 everywhere


def decoupled_cross_attention(
    query: Float[Tensor, "batch heads pixels head_dim"],
    text_key: Float[Tensor, "batch heads text head_dim"],
    text_value: Float[Tensor, "batch heads text head_dim"],
    images: Iterable[ImageBranch],
    text_mask: Tensor | None = None,
    attend: Attend = F.scaled_dot_product_attention,
) -> Float[Tensor, "batch heads pixels head_dim"]:
    """Attend to the text and to each group of image tokens separately, then add.

    Args:
        images: The image branches; without any, or at a scale of 0, the text result exactly.
        text_mask: Added to the text branch's attention logits; None attends to every token.
        attend: What computes one attention.

    Source:
        arXiv:2308.06721, section 3.2 (λ is a branch's `scale`).
    """
    mixed = attend(query, text_key, text_value, attn_mask=text_mask)
    for image in images:
        mixed = add_image(mixed, query, image, attend)
    return mixed


def add_image(
    mixed: Float[Tensor, "batch heads pixels head_dim"],
    query: Float[Tensor, "batch heads pixels head_dim"],
    branch: ImageBranch,
    attend: Attend = F.scaled_dot_product_attention,
) -> Float[Tensor, "batch heads pixels head_dim"]:
    """Add one image branch to what the text, and other images, gave."""
    key, value, scale, region = branch
    if key.shape[0] != query.shape[0]:
        raise ShapeError(
            "image and text batch sizes differ",
            where="decoupled cross-attention",
            expected=f"{query.shape[0]} image prompts",
            found=key.shape[0],
            fix="Give one reference, or one per item.",
        )
    if not isinstance(scale, Tensor) and scale == 0:
        return mixed  # to the bit; 0 · NaN would not be
    if isinstance(scale, Tensor):
        scale = scale.to(query.device, query.dtype).view(-1, 1, 1, 1)
    image = attend(query, key, value)
    if region is not None:
        image = image * region.to(query.device, query.dtype)[:, None, :, None]
    return mixed + scale * image


@dataclass(eq=False)
class TokenGroup:
    """Image tokens that share one attention: the references of an item, or one with a mask."""

    tokens: Tensor  # (batch, tokens, width), fused, both guidance branches
    mask: RegionMask | None = None  # where it acts; None is everywhere
    # for layers that lead away from the image: its tokens in the unconditional branch, zeros (whose
    # keys and values are zero) in the other; None is `tokens`
    opposed: Tensor | None = None

    def for_layer(self, opposed: bool) -> Tensor:
        """The tokens that a layer reads."""
        return self.opposed if opposed and self.opposed is not None else self.tokens


def opposed_tokens(tokens: Tensor, layout: Sequence[str]) -> Tensor:
    """Image tokens where there were none, and none where they were: (branches × items) again."""
    if BOTH not in layout:
        return torch.zeros_like(tokens)
    positive = tokens.chunk(len(layout))[layout.index(BOTH)]
    rows = [positive if branch == NOTHING else torch.zeros_like(positive) for branch in layout]
    return torch.cat(rows)


@dataclass(eq=False)
class Slot:
    """One adapter on a UNet, as its layers see it during a call.

    The original puts image tokens behind the text's and cuts them off by a fixed count. Apart, they
    need no count, and the text may have any length.
    """

    weights: dict[int, LayerWeights]  # by layer number
    groups: list[TokenGroup] = field(default_factory=list)  # this call's image tokens
    scales: dict[int, float | Tensor] = field(default_factory=dict)  # a missing layer takes 1
    opposed: frozenset[int] = frozenset()  # layers that lead away from the image
    latents: tuple[int, int] = (1, 1)  # height and width, of this call; Flux's are patches
    text_length: int = 0  # tokens of the text, of this call
    time: Tensor | None = None  # of this call, (1, width), for layers that normalise by it


Acting = tuple[tuple[int, int], Slot, Any, TokenGroup, "float | Tensor"]


def acting_groups(slots: list[Slot], number: int) -> Iterator[Acting]:
    """A layer's groups of image tokens whose scale is not 0.

    Each with its adapter's and its own place, its slot, the layer's weights and its scale.
    """
    for index, slot in enumerate(slots):
        weights: Any = slot.weights.get(number)
        scale = slot.scales.get(number, 1.0)
        off = not isinstance(scale, Tensor) and scale == 0
        if weights is None or weights.to_k_ip is None or off:
            continue
        for position, group in enumerate(slot.groups):
            yield (index, position), slot, weights, group, scale


class DecoupledAttention:
    """Attention processor of one layer, for any number of adapters.

    What does not change during a call is computed once: keys and values of the text, and of each
    group of image tokens. They are recognised by identity, as pipelines pass the same tensor at
    every step; nothing is kept while gradients are recorded or `torch.compile` traces.

    Args:
        attend: Takes a `backend` too, which diffusers' `set_attention_backend` sets.
    """

    def __init__(self, number: int, slots: list[Slot], attend: Attend) -> None:
        self.number, self.slots, self.attend = number, slots, attend
        self._attention_backend: Any = None
        self._text = Once()
        self._images: dict[tuple[int, int], Once] = {}
        self.outputs: Any = None  # fast mode's `Kept`, while it keeps whole outputs

    def forget(self) -> None:
        """Drop what was kept: weights changed."""
        self._text, self._images = Once(), {}

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend to the text, add each adapter's image tokens."""

        def compute() -> Tensor:
            return self._attend(attn, hidden_states, encoder_hidden_states, attention_mask)

        scales = tuple(slot.scales.get(self.number, 1.0) for slot in self.slots)
        if self.outputs is None or encoder_hidden_states is None or torch.compiler.is_compiling():
            return compute()
        if any(isinstance(scale, Tensor) for scale in scales):  # made anew at each step
            return compute()
        return self.outputs.get(self.number, scales, compute)

    def _attend(
        self, attn: Any, hidden_states: Tensor, text: Tensor | None, attention_mask: Tensor | None
    ) -> Tensor:
        layers = [slot.weights.get(self.number) for slot in self.slots]
        query = split_heads(attn, _project(attn.to_q, hidden_states, layers, "to_q_lora"))
        if text is None:  # self-attention: new at every step, nothing to keep
            text = hidden_states
            key, value = self._key_value(attn, text, layers)
        else:
            key, value = self._text.get(text, lambda: self._key_value(attn, text, layers))
        mask = _mask(attn, attention_mask, text)
        images = self._branches(attn, pixels=query.shape[2])
        attend = partial(self.attend, backend=self._attention_backend)
        mixed = decoupled_cross_attention(query, key, value, images, mask, attend)
        merged = mixed.transpose(1, 2).flatten(2)
        # no residual: transformer blocks add it themselves; to_out is a linear layer and a dropout
        return attn.to_out[1](_project(attn.to_out[0], merged, layers, "to_out_lora"))

    def _branches(self, attn: Any, pixels: int) -> Iterator[ImageBranch]:
        """What each adapter's groups of image tokens bring; nothing where the scale is 0."""
        for place, slot, weights, group, scale in acting_groups(self.slots, self.number):
            kept = self._images.setdefault(place, Once())
            tokens = group.for_layer(self.number in slot.opposed)
            key, value = kept.get(  # bound now: a loop's lambdas share its variables
                tokens,
                lambda w=weights, t=tokens: (
                    split_heads(attn, w.to_k_ip(t)),
                    split_heads(attn, w.to_v_ip(t)),
                ),
            )
            region = None if group.mask is None else group.mask.at(pixels, slot.latents)
            yield ImageBranch(key, value, scale, region)

    def _key_value(
        self, attn: Any, states: Tensor, layers: list[LayerWeights | None]
    ) -> tuple[Tensor, Tensor]:
        return (
            split_heads(attn, _project(attn.to_k, states, layers, "to_k_lora")),
            split_heads(attn, _project(attn.to_v, states, layers, "to_v_lora")),
        )


_KEPT = 3
"""Inputs that are remembered: guidance may call the UNet with as many sets of branches."""


class Once:
    """Two tensors for an input, kept for as long as it comes back."""

    def __init__(self) -> None:
        self._known: list[tuple[Tensor, int, tuple[Tensor, Tensor]]] = []

    def get(
        self, given: Tensor, compute: Callable[[], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """What `compute` gives, or gave for this very tensor."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return compute()
        version = 0 if given.is_inference() else given._version
        for known, its_version, output in self._known:
            if known is given and its_version == version:
                return output
        output = compute()
        self._known = [(given, version, output), *self._known[: _KEPT - 1]]
        return output


def _project(layer: Any, states: Tensor, adapters: list[LayerWeights | None], name: str) -> Tensor:
    """The UNet's own projection, plus the low-rank change of each adapter that has one."""
    projected = layer(states)
    for weights in adapters:
        change = None if weights is None else getattr(weights, name)
        if change is not None:
            projected = projected + change(states)
    return projected


def split_heads(attn: Any, states: Tensor) -> Tensor:
    """(batch, tokens, heads·head_dim) to (batch, heads, tokens, head_dim)."""
    return states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def _mask(attn: Any, mask: Tensor | None, text: Tensor) -> Tensor | None:
    if mask is None:
        return None
    # diffusers folds the heads into the batch; attention here keeps them apart
    prepared = attn.prepare_attention_mask(mask, text.shape[1], text.shape[0])
    return prepared.view(text.shape[0], attn.heads, -1, prepared.shape[-1])
