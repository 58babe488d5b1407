"""Flux Redux: image tokens behind the text's, with the strength that stock has not.

Redux has no layers of its own: what it makes of a picture is more text. Its users complain that a
picture of 729 tokens drowns a prompt; so its scale is a weight of those tokens in every attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ipdiverse.adapter.attention import BOTH
from ipdiverse.adapter.scale import Layer
from ipdiverse.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ipdiverse.adapter.attention import Slot

TEXT_LAYER = Layer(-1, "text", 0, 1)
"""Stands for the text, where a scale asks for a layer."""


def with_image_tokens(
    given: dict[str, Any], slots: Sequence[Slot], layout: Sequence[str]
) -> dict[str, Any]:
    """A call of Flux with image tokens behind its text.

    A scale s multiplies the tokens' share of every attention before it is normalised: log s is
    added to their logits. At 1 nothing is added, at 0 the tokens are left out, both exactly.

    Args:
        given: The call's arguments by name.
        slots: Of adapters that are Redux.
        layout: The branches of its rows; only those with an image see the tokens.
    """
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
    if not parts:
        return given
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
        extended["joint_attention_kwargs"] = _biased(given, bias.to(text)[:, None, None])
    return given | extended


def _by_row(scale: float | Tensor, layout: Sequence[str], text: Tensor) -> Tensor:
    """The scale of each row of a call, 0 where its branch has no image, (batch,)."""
    rows = torch.as_tensor(scale, dtype=torch.float32, device=text.device).expand(len(text))
    if bool((rows < 0).any()) or not bool(rows.isfinite().all()):
        raise ArgumentError("must not be negative with Flux Redux", where="scale")
    acts = torch.tensor([float(branch == BOTH) for branch in layout], device=text.device)
    return rows * acts.repeat_interleave(len(text) // len(layout))


def _biased(given: dict[str, Any], bias: Tensor) -> dict[str, Any]:
    """The arguments of every attention, with a bias of its logits."""
    own = given.get("joint_attention_kwargs") or {}
    mask = own.get("attention_mask")
    if mask is not None:
        what = "is given by the pipeline already, and Flux Redux needs one"
        raise ArgumentError(what, where="attention_mask", fix="Set the scale to 1.")
    return {**own, "attention_mask": bias}
