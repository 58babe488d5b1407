"""Image prompts in transformers, where text and latents share one attention: Flux.1 and SD 3."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor
from torch.nn import functional as F

from ipdiverse.adapter.attention import (
    BOTH,
    ImageBranch,
    Once,
    acting_groups,
    add_image,
    split_heads,
)
from ipdiverse.adapter.model import attention_layers, check_layers, layer_widths
from ipdiverse.adapter.scale import Layer
from ipdiverse.errors import ArgumentError, ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ipdiverse.adapter.attention import Slot, TokenGroup
    from ipdiverse.adapter.model import ImagePromptAdapter, LayerWeights

TEXT_LAYER = Layer(-1, "text", 0, 1)
"""Stands for the text, where a scale asks for a layer."""


def with_image_tokens(
    given: dict[str, Any], slots: Sequence[Slot], layout: Sequence[str], own: int = 0
) -> dict[str, Any]:
    """A call of Flux with image tokens behind its text.

    A scale s multiplies the tokens' share of every attention before it is normalised: log s is
    added to their logits. At 1 nothing is added, at 0 the tokens are left out, both exactly.

    Args:
        given: The call's arguments by name.
        slots: Of adapters that are Redux.
        layout: The branches of its rows; only those with an image see the tokens.
        own: How many tokens at the text's end are image tokens as they came, to be replaced.
    """
    if own:
        text, ids = given["encoder_hidden_states"][:, :-own], given["txt_ids"][..., :-own, :]
        given = given | {"encoder_hidden_states": text, "txt_ids": ids}
    text, parts, weights = given["encoder_hidden_states"], [], []
    for slot in slots:
        scale = _by_row(slot.scales.get(TEXT_LAYER.number, 1.0), layout, text)
        if not scale.any():
            continue
        for group in slot.groups:
            if group.mask is not None:
                fix = "Leave the masks out, or use an adapter of XLabs or InstantX."
                raise ArgumentError("have no place in Flux Redux", where="masks", fix=fix)
            parts.append(group.tokens.to(text))
            weights.append(scale[:, None].expand(-1, group.tokens.shape[1]))
    others = given.get("joint_attention_kwargs") or {}
    if not parts:
        return given
    if others.get("attention_mask") is not None:
        what, fix = "is given already, and has no place for Redux", "Detach Flux Redux, or drop it."
        raise ArgumentError(what, where="attention_mask", fix=fix)
    ids = given["txt_ids"]
    more = torch.cat(parts, dim=1)
    places = ids.new_zeros(*ids.shape[:-2], more.shape[1], ids.shape[-1])  # as the text's own
    extended: dict[str, Any] = {
        "encoder_hidden_states": torch.cat([text, more], dim=1),
        "txt_ids": torch.cat([ids, places], dim=-2),
    }
    weight = torch.cat(weights, dim=1)
    if not bool((weight == 1).all()):
        after = given["hidden_states"].shape[1]
        bias = torch.nn.functional.pad(weight.log(), (text.shape[1], after))
        mask = {"attention_mask": bias.to(text)[:, None, None]}
        extended["joint_attention_kwargs"] = {**others, **mask}
    return given | extended


def _by_row(scale: float | Tensor, layout: Sequence[str], text: Tensor) -> Tensor:
    """The scale of each row of a call, 0 where its branch has no image, (batch,)."""
    rows = torch.as_tensor(scale, dtype=torch.float32, device=text.device).expand(len(text))
    if bool((rows < 0).any()) or not bool(rows.isfinite().all()):
        raise ArgumentError("must not be negative with Flux Redux", where="scale")
    acts = torch.tensor([float(branch == BOTH) for branch in layout], device=text.device)
    return rows * acts.repeat_interleave(len(text) // len(layout))


# by name: importing a transformer's class costs a second, and most pipelines have none
_STYLES = {
    "FluxTransformer2DModel": ("xlabs", "instantx", "redux"),
    "SD3Transformer2DModel": ("sd3",),
}
_BLOCKS = {"transformer_blocks": "double", "single_transformer_blocks": "single"}


def attended(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, backend: Any = None
) -> Tensor:
    """Attention by diffusers' backend, None is the active one, which wants heads third."""
    query, key, value = (one.transpose(1, 2) for one in (query, key, value))
    return dispatch_attention_fn(query, key, value, attn_mask, backend=backend).transpose(1, 2)


class JointAttention:
    """Attention processor of one layer: stock's own attention, then each adapter's image branch.

    Stock's processor stays inside, with its masks and backends; only the query is computed again.

    Args:
        before: The processor that was there.
        text_first: Whether latents come behind the text in one sequence, as in Flux's single
            blocks.
    """

    def __init__(self, number: int, slots: list[Slot], before: Any, *, text_first: bool) -> None:
        self.number, self.slots, self.before = number, slots, before
        self.text_first = text_first
        self._images: dict[tuple[int, int], Once] = {}

    def forget(self) -> None:
        """Drop what was kept: weights changed."""
        self._images = {}

    @property
    def _attention_backend(self) -> Any:  # where `set_attention_backend` looks for it
        return self.before._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.before._attention_backend = backend

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        """What stock's processor gives, and what the images add; nothing where the scale is 0."""
        rotary = {} if image_rotary_emb is None else {"image_rotary_emb": image_rotary_emb}
        found = self.before(attn, hidden_states, encoder_hidden_states, attention_mask, **rotary)
        inside, outside = self._added(attn, hidden_states)
        if inside is not None:
            # the layer is affine, so what is added before it may be projected by itself
            if not getattr(attn, "pre_only", False):
                layer = attn.to_out[0]
                projected = layer(inside)
                inside = projected if layer.bias is None else projected - layer.bias
            several = isinstance(found, tuple)
            found = (found[0] + inside, *found[1:]) if several else found + inside
        # Flux's blocks add a third output behind their gates
        return found if outside is None else (*found, outside)

    def _added(self, attn: Any, states: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Before the output projection, and beside the block: (batch, tokens, width) each."""
        sums: dict[bool, Tensor] = {}
        projected: Tensor | None = None
        for place, slot, weights, group, scale in acting_groups(self.slots, self.number):
            if projected is None:
                projected = split_heads(attn, attn.to_q(states))
            key, value = self._key_value(attn, states, place, slot, weights, group)
            norm = weights.norm_q if weights.joint.style == "sd3" else attn.norm_q
            query = norm(projected)
            region = self._region(group, slot, query.shape[2])
            outside = weights.joint.style == "xlabs"
            mixed = sums.get(outside)
            mixed = torch.zeros_like(query) if mixed is None else mixed
            attend = partial(attended, backend=getattr(self.before, "_attention_backend", None))
            branch = ImageBranch(key, value, scale, region)
            sums[outside] = add_image(mixed, query, branch, attend)
        merged = {where: t.transpose(1, 2).flatten(2).to(states) for where, t in sums.items()}
        return merged.get(False), merged.get(True)

    def _key_value(
        self,
        attn: Any,
        states: Tensor,
        place: tuple[int, int],
        slot: Slot,
        weights: Any,
        group: TokenGroup,
    ) -> tuple[Tensor, Tensor]:
        tokens = group.for_layer(self.number in slot.opposed)
        if weights.joint.style == "sd3":  # its tokens differ at every step: nothing to keep
            return _sd3_key_value(attn, states, weights, tokens, slot.time)
        kept = self._images.setdefault(place, Once())
        return kept.get(tokens, lambda: _flux_key_value(attn, weights, tokens))

    def _region(self, group: TokenGroup, slot: Slot, tokens: int) -> Tensor | None:
        """Weights of the sequence's tokens; text and Kontext's pictures take the mean."""
        if group.mask is None:
            return None
        height, width = slot.latents
        if tokens < height * width:  # SD 3 gives its latents before they are cut into patches
            return group.mask.at(tokens, slot.latents)
        region = group.mask.at(height * width, slot.latents)
        before = slot.text_length if self.text_first else 0
        after = tokens - before - height * width
        mean = region.mean(1, keepdim=True)
        return torch.cat([mean.expand(-1, before), region, mean.expand(-1, after)], dim=1)


def _flux_key_value(attn: Any, weights: LayerWeights, tokens: Tensor) -> tuple[Tensor, Tensor]:
    layers: Any = weights
    key = split_heads(attn, layers.to_k_ip(tokens))
    value = split_heads(attn, layers.to_v_ip(tokens))
    if layers.joint.style == "instantx":  # which normalises values too, without weights
        shape = key.shape[-1:]
        key, value = F.rms_norm(key, shape, eps=1e-5), F.rms_norm(value, shape, eps=1e-5)
    return key, value


def _sd3_key_value(
    attn: Any, states: Tensor, weights: Any, tokens: Tensor, time: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Latents and image tokens side by side: the image branch attends to both."""
    normed = weights.norm_ip(tokens, time)
    own = weights.norm_k(split_heads(attn, attn.to_k(states)))
    key = weights.norm_ip_k(split_heads(attn, weights.to_k_ip(normed)))
    value = split_heads(attn, weights.to_v_ip(normed))
    own_value = split_heads(attn, attn.to_v(states))
    return torch.cat([own, key], dim=2), torch.cat([own_value, value], dim=2)


def is_transformer(denoiser: Any) -> bool:
    """Whether it is one of those that image prompts know."""
    return bool(styles_of(denoiser))


def styles_of(denoiser: Any) -> tuple[str, ...]:
    """The kinds of adapters (`model.Joint`) that fit its architecture; none for a UNet."""
    inner = getattr(denoiser, "_orig_mod", denoiser)
    names = [kind.__name__ for kind in type(inner).__mro__]
    return next((_STYLES[name] for name in names if name in _STYLES), ())


def checked_transformer(pipe: Any) -> Any:
    """The transformer of a pipeline, of a kind that adapters can be attached to."""
    model = pipe.transformer
    if not is_transformer(model):
        raise ModelError(
            "has a denoiser that image prompts do not know",
            where=type(pipe).__name__,
            expected="a pipeline of Stable Diffusion 1.x, 2.x, XL or 3.x, or of Flux.1",
            found=type(model).__name__,
        )
    return model


def check_fits(adapter: ImagePromptAdapter, model: Any) -> None:
    """Refuse an adapter for another architecture, or with layers of other sizes."""
    known, style = styles_of(model), None if adapter.joint is None else adapter.joint.style
    if not known:  # a UNet
        check_layers(adapter, layer_widths(model))
        return
    wanted, found = " or ".join(known), str(style or "an adapter for a UNet")
    if style == "redux" and style in known:  # it has no layers
        width = model.config.joint_attention_dim
        if adapter.token_width == width:
            return
        wanted, found = f"tokens of width {width}, as its text has", str(adapter.token_width)
    if style not in known or style == "redux":
        what, fix = "does not fit this transformer", "It was trained for another base model."
        raise ModelError(what, where="adapter", expected=wanted, found=found, fix=fix)
    names = attention_layers(model)
    if style == "xlabs":
        names = {n: name for n, name in names.items() if not name.startswith("single")}
    # the width of its tokens is the adapter's own: nothing of the transformer reads them
    width = adapter.token_width
    theirs = {n: (width, model.get_submodule(name).to_q.out_features) for n, name in names.items()}
    check_layers(adapter, theirs, "this transformer")


def transformer_layers(model: Any, slots: list[Slot]) -> list[Layer]:
    """The layers that adapters act in, in the order in which the transformer runs them.

    Redux, which has none, acts in the text.
    """
    touched = {number for slot in slots for number in slot.weights}
    names = {n: name for n, name in attention_layers(model).items() if n in touched}
    homes = {n: tuple(name.split(".")[:2]) for n, name in names.items()}  # attn2 shares a block
    blocks = list(dict.fromkeys(homes.values()))
    text = [TEXT_LAYER] if any(not slot.weights for slot in slots) else []
    return text + [
        Layer(n, f"{_BLOCKS[home[0]]}.{home[1]}", blocks.index(home), len(blocks))
        for n, home in homes.items()
    ]


def latent_grid(img_ids: Tensor) -> tuple[int, int]:
    """Height and width of what is drawn, of Flux's positions (tokens, 3) for the rotary bands."""
    ids = img_ids[0] if img_ids.ndim == 3 else img_ids
    ids = ids[ids[:, 0] == 0]  # the first column numbers Kontext's pictures from 1
    height, width = (int(n) + 1 for n in ids[:, 1:].amax(0))
    return height, width
