"""Muon for hidden matrices, AdamW for the rest."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from workshop.base.optimizer import MuonAdamW, as_matrix


class Small(nn.Module):
    """One layer of each sort."""

    def __init__(self, channels_last: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unet = nn.ModuleDict({"conv_in": nn.Conv2d(3, 8, 3), "hidden": nn.Conv2d(8, 12, 3)})
        self.linear = nn.Linear(12, 6)
        if channels_last:
            self.to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.unet["hidden"](torch.relu(self.unet["conv_in"](x)))
        return self.linear(x.mean((2, 3)))


def step(model: Small, optimizer: MuonAdamW, seed: int) -> None:
    x = torch.randn(64, 3, 9, 9, generator=torch.Generator().manual_seed(seed))
    model(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def spread(singular: torch.Tensor) -> float:
    return float(singular.max() / singular.median())


def test_hidden_matrices_move_orthogonally_and_the_rest_as_adamw_does() -> None:
    model, plain = Small(), Small()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, MuonAdamW(model.named_parameters(), 0.01, 0.0), seed=0)
    adamw = torch.optim.AdamW(plain.parameters(), 0.01, betas=(0.9, 0.99), weight_decay=0.0)
    x = torch.randn(64, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    plain(x).square().sum().backward()
    adamw.step()
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        moved = as_matrix(mine.detach() - before[name])
        if name in ("unet.hidden.weight", "linear.weight"):
            singular = torch.linalg.svdvals(moved) / (0.01 * 0.2 * max(moved.shape) ** 0.5)
            of_gradient = torch.linalg.svdvals(as_matrix(theirs.grad))
            assert singular.max() < 1.3, name
            assert spread(singular) < 0.5 * spread(of_gradient), name
        else:
            assert torch.allclose(mine, theirs, atol=1e-7), name


def test_a_state_goes_on_where_it_stopped() -> None:
    whole, first, second = Small(), Small(), Small()
    optimizer = MuonAdamW(whole.named_parameters(), 0.01, 0.1)
    for seed in range(4):
        step(whole, optimizer, seed)
    optimizer = MuonAdamW(first.named_parameters(), 0.01, 0.1)
    for seed in range(2):
        step(first, optimizer, seed)
    second.load_state_dict(first.state_dict())
    resumed = MuonAdamW(second.named_parameters(), 0.01, 0.1)
    resumed.load_state_dict(optimizer.state_dict())
    for seed in range(2, 4):
        step(second, resumed, seed)
    for mine, theirs in zip(second.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_learning_rate_of_zero_set_in_the_groups_moves_nothing() -> None:
    model = Small()
    optimizer = MuonAdamW(model.named_parameters(), 0.01, 0.1)
    before = [p.detach().clone() for p in model.parameters()]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step(model, optimizer, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_memory_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unet.hidden.weight: Muon needs channels-last memory"):
        MuonAdamW(Small(channels_last=False).named_parameters(), 0.01, 0.0)
