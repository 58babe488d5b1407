"""Muon for a network's hidden matrices, AdamW for everything else.

Muon (Jordan et al., 2024; https://kellerjordan.github.io/posts/muon) replaces a matrix's momentum
by the nearest orthogonal one. `torch.optim.Muon` takes matrices only, so it gets a convolution as
the matrix (out, in·height·width) that shares its memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Iterable

FIRST_AND_LAST = (
    "unet.conv_in",
    "unet.conv_out",
    "unet.time_embedding",
    "unet.add_embedding",
    "vae.encoder.conv_in",
    "vae.encoder.conv_out",
    "vae.decoder.conv_in",
    "vae.decoder.conv_out",
    "vae.quant_conv",
    "vae.post_quant_conv",
    "alignment.head.2",
    "reader.conv_in",
    "reader.heads",
)
"""Layers on data or timesteps rather than hidden features; AdamW trains them."""


def as_matrix(tensor: Tensor) -> Tensor:
    """A weight or its gradient as (out, rest); a view wherever the memory layout allows."""
    return tensor.permute(0, 2, 3, 1).flatten(1) if tensor.ndim == 4 else tensor


class MuonAdamW:
    """Two optimizers that step as one, under one learning rate.

    Args:
        named: Parameters by name; their gradients must be there before each step.
        learning_rate: Of both; Muon's steps are scaled to AdamW's size (arXiv:2502.16982).
        weight_decay: Of both.

    Raises:
        ValueError: A convolution's weight is not in channels-last memory.
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], learning_rate: float, weight_decay: float
    ) -> None:
        named = list(named)
        hidden = [(n, p) for n, p in named if p.ndim > 1 and not n.startswith(FIRST_AND_LAST)]
        chosen = {name for name, _ in hidden}
        self.views = [(parameter, _view(name, parameter)) for name, parameter in hidden]
        self.muon = torch.optim.Muon(
            [view for _, view in self.views],
            lr=learning_rate,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        self.adamw = torch.optim.AdamW(
            [parameter for name, parameter in named if name not in chosen],
            lr=learning_rate,
            weight_decay=weight_decay,
            betas=(0.9, 0.99),
            fused=True,
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of both, for a schedule to set `lr` in."""
        return [*self.muon.param_groups, *self.adamw.param_groups]

    def step(self) -> None:
        """Update every parameter from its gradient."""
        for parameter, view in self.views:
            view.grad = None if parameter.grad is None else as_matrix(parameter.grad)
        self.muon.step()
        self.adamw.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        for parameter, view in self.views:
            parameter.grad = view.grad = None
        self.adamw.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The state of both, for `load_state_dict`."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


def _view(name: str, parameter: nn.Parameter) -> nn.Parameter:
    matrix = as_matrix(parameter.detach())
    if matrix.data_ptr() != parameter.data_ptr():
        raise ValueError(f"{name}: Muon needs channels-last memory, found {parameter.stride()}")
    return nn.Parameter(matrix)
