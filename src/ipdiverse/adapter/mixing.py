"""An adapter that remembers the weights it went on from, and the adapters between the two.

Weights that one training led from and to lie on a path along which a model stays good (WiSE-FT,
arXiv:2109.01903; model soups, arXiv:2203.05482). Here the path leads from an adapter that copies to
one that does not.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

import torch

from ipdiverse.errors import ModelError, check_range

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ipdiverse.adapter.model import ImagePromptAdapter

PLAIN = "plain."
"""Before the keys of the weights that an adapter went on from, in files."""
_PARTS = ("image_proj.", "ip_adapter.")


def mixable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of an adapter's tensors those that plain IP-Adapter has too: no fusion, no noise."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(_PARTS)}


def remember_plain(adapter: ImagePromptAdapter, plain: ImagePromptAdapter) -> None:
    """Keep beside an adapter's weights those that it went on from.

    Args:
        adapter: What was trained on; changed in place.
        plain: What it went on from: of the same kind and sizes, without fusion or
            noise-conditioning.

    Raises:
        ModelError: They are no such pair.
    """
    mine, theirs = mixable(adapter.state_dict()), plain.state_dict()
    extra = sorted(theirs.keys() - mine.keys())
    wrong = extra or [
        name
        for name, tensor in mine.items()
        if name not in theirs or theirs[name].shape != tensor.shape
    ]
    if wrong:
        raise ModelError(
            "cannot be what this adapter went on from",
            where="plain adapter",
            expected="the same kind and sizes, without fusion or noise-conditioning",
            found=f"{wrong[0]}, which differs",
        )
    adapter.plain = {name: theirs[name].detach().clone() for name in mine}


def mixed(adapter: ImagePromptAdapter, share: float) -> ImagePromptAdapter:
    """The adapter some way along its training: W = (1 − share) · W_plain + share · W.

    A fusion's weights stay as they are; what it adds is weighed by the share (`Prompt.strength`).

    Args:
        adapter: One that remembers what it went on from.
        share: 0 is exactly the plain adapter, without fusion and noise-conditioning; 1 is
            `adapter` itself.

    Raises:
        ArgumentError: The share is out of range.
        ModelError: It remembers nothing.
    """
    check_range("training", share, 0, 1)
    if share == 1:
        return adapter
    if not adapter.plain:
        raise ModelError(
            "does not hold the weights that it went on from",
            where="adapter",
            fix="Leave the lever `training` out, or store them: ipdiverse calibrate --plain FILE.",
        )
    between = deepcopy(adapter)
    between.plain = {}
    if share == 0:
        between.fusion = between.noise = None
    own = between.state_dict()  # shares memory with the copy
    with torch.no_grad():
        for name, plain in adapter.plain.items():
            before = plain.to(own[name].device, torch.float32)
            own[name].copy_(before if share == 0 else before.lerp(own[name].float(), share))
    return between
