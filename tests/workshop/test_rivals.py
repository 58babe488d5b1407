"""Rivals: known answers, and that they are levers like the product's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ipdiverse.adapter.scale import Layer, resolve_scale
from ipdiverse.dial import Levers, current_names
from ipdiverse.errors import ArgumentError
from ipdiverse.levers import StepContext
from ipdiverse.sampling.request import Request
from workshop.rivals.drop import drop_tokens
from workshop.rivals.late_layout import without_layout_until
from workshop.rivals.remove_stated import phrases, remove_subspace, stated_subspace

START = StepContext((3, 4, 5, 6))


def tokens(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 8, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.usefixtures("rivals")
def test_importing_them_makes_them_levers() -> None:
    assert Request.of({"drop": 0.5, "late_layout": 0.2, "remove_stated": 1.0}).levers == Levers(
        drop=0.5, late_layout=0.2, remove_stated=1.0
    )
    assert current_names({"drop": 0.5}, "study") == {"drop": 0.5}, "it acts, so nothing is said"


def test_without_them_they_are_not() -> None:
    with pytest.raises(ArgumentError, match="unknown lever"):
        Levers(drop=0.5)


def test_dropout_is_the_same_for_an_item_alone_and_for_equal_seeds() -> None:
    whole = drop_tokens(tokens(), 0.5, START)
    alone = drop_tokens(tokens()[2:3], 0.5, replace(START, seeds=(5,)))
    torch.testing.assert_close(whole[2:3], alone, rtol=0, atol=0)
    same = tokens()[:1].repeat(3, 1, 1)
    moved = drop_tokens(same, 0.5, replace(START, seeds=(1, 1, 2)))
    assert torch.equal(moved[0], moved[1])
    assert not torch.equal(moved[0], moved[2])
    assert drop_tokens(same, 0.0, START) is same


def test_dropped_tokens_are_the_mean_of_all() -> None:
    given = tokens()
    dropped = drop_tokens(given, 0.25, START)
    changed = (dropped != given).any(-1)
    assert changed.sum(1).tolist() == [2, 2, 2, 2]
    expected = given.mean(1, keepdim=True).expand_as(given)[changed]
    torch.testing.assert_close(dropped[changed], expected)


def test_a_subspace_is_taken_out_and_nothing_else() -> None:
    statements = torch.zeros(3, 6)
    statements[0, 1], statements[1, 1], statements[2, 4] = 2.0, -1.0, 1.0
    basis = stated_subspace(statements, rank=4)
    assert basis.shape == (2, 6), "what is not there is no direction"
    given = torch.randn(2, 3, 6)
    cleaned = remove_subspace(given, 1.0, basis)
    assert cleaned[..., [1, 4]].abs().max() < 1e-5
    torch.testing.assert_close(cleaned[..., [0, 2, 3, 5]], given[..., [0, 2, 3, 5]])
    assert remove_subspace(given, 0.0, basis) is given
    half = remove_subspace(given, 0.5, basis)
    torch.testing.assert_close(half[..., 1], given[..., 1] / 2)
    assert stated_subspace(statements, rank=1).shape == (1, 6)


def test_statements_are_a_prompt_and_its_parts() -> None:
    assert phrases("a red cat in the snow, holding a kite.") == [
        "a red cat in the snow, holding a kite.",
        "a red cat",
        "the snow",
        "a kite",
    ]


def test_layers_of_the_layout_wait_and_the_others_do_not() -> None:
    """SDXL's: the layout is in transformer 3 of its 11."""
    parts = {0: "down.1", 3: "down.2", 5: "mid", 6: "up.0"}
    layers = [Layer(t, parts.get(t, "up.1"), t, 11) for t in range(11)]
    context = StepContext((), layers=layers)
    scale = resolve_scale(0.8, layers)
    assert without_layout_until(scale, 0.0, context) is scale
    late = without_layout_until(scale, 0.4, context)
    assert late.by_step
    for layer in layers:
        assert late.at(layer, 0.3) == (0.0 if layer.transformer == 3 else 0.8)
        assert late.at(layer, 0.5) == 0.8
