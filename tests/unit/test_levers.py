"""Levers as mathematics, and the registry that they come from."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from ipdiverse.dial import Levers, between
from ipdiverse.errors import ArgumentError
from ipdiverse.levers import LEVERS, Lever, StepContext, cads, register_lever

START = StepContext((3, 4, 5, 6))


def tokens(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 8, 16, generator=torch.Generator().manual_seed(0))


def test_strength_0_gives_back_the_very_tensor() -> None:
    value = tokens()
    assert cads(value, 0.0, START) is value


def test_an_item_is_the_same_alone() -> None:
    whole = cads(tokens(), 0.5, START)
    alone = cads(tokens()[2:3], 0.5, replace(START, seeds=(5,)))
    torch.testing.assert_close(whole[2:3], alone, rtol=0, atol=0)


def test_seeds_decide_and_equal_seeds_agree() -> None:
    same = tokens()[:1].repeat(3, 1, 1)
    moved = cads(same, 0.5, replace(START, seeds=(1, 1, 2)))
    assert torch.equal(moved[0], moved[1])
    assert not torch.equal(moved[0], moved[2])


def test_cads_anneals_keeps_the_statistics_and_never_replaces_what_it_was_given() -> None:
    given = tokens()
    late, middle, early = (cads(given, 0.25, replace(START, progress=p)) for p in (0.5, 0.25, 0.0))
    assert late is given, "no noise once t is below τ1"
    distances = [float((moved - given).norm()) for moved in (middle, early)]
    assert 0 < distances[0] < distances[1]
    # ψ = 1 and γ = 0: in the paper's form even a small s is all noise
    cosine = torch.nn.functional.cosine_similarity(early.flatten(1), given.flatten(1))
    assert (cosine > 0.95).all()
    torch.testing.assert_close(early.mean((1, 2)), given.mean((1, 2)))
    torch.testing.assert_close(early.std((1, 2)), given.std((1, 2)))


def test_cads_of_strength_1_is_pure_noise_at_first() -> None:
    given = tokens()
    correlation = torch.corrcoef(
        torch.stack([cads(given, 1.0, START)[0].flatten(), given[0].flatten()])
    )[0, 1]
    assert abs(float(correlation)) < 0.25  # 128 numbers


def test_the_interval_is_open_below_and_closed_above() -> None:
    def weights(sigma: float, levers: Levers) -> Any:
        return levers.change("guidance", (5.0, 5.0), StepContext((), sigma=sigma))

    on = Levers(interval=(0.5, 2.0))
    guided = [weights(sigma, on) != (1.0, 1.0) for sigma in (0.4, 0.5, 0.6, 2.0, 2.1)]
    assert guided == [False, False, True, True, False]
    assert weights(math.inf, Levers()) == (5.0, 5.0)
    assert weights(math.inf, Levers(interval=(0.0, 14.0))) == (1.0, 1.0)


def test_image_guidance_weighs_the_image_alone_and_the_interval_has_the_last_word() -> None:
    levers = Levers(image_guidance=1.5, interval=(1.0, 2.0))
    assert levers.change("guidance", (5.0, 5.0), StepContext((), sigma=1.5)) == (5.0, 1.5)
    assert levers.change("guidance", (5.0, 5.0), StepContext((), sigma=3.0)) == (1.0, 1.0)


def test_levers_that_are_off_are_not_called() -> None:
    value = tokens()
    assert Levers().change("tokens", value, START) is value
    acting = Levers(cads=0.2, interval=(0.0, 4.0)).acting("tokens")
    assert [(lever.name, strength) for lever, strength in acting] == [("cads", 0.2)]


def test_noise_is_the_same_while_another_thread_loads_in_half_precision() -> None:
    like = torch.zeros(2, 3, 4)
    before, usual = StepContext((1, 2)).noise("a", like), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float16)
        meanwhile = StepContext((1, 2)).noise("a", like)
    finally:
        torch.set_default_dtype(usual)
    assert torch.equal(meanwhile, before)


def flat(value: torch.Tensor, strength: float, _: StepContext) -> torch.Tensor:
    return value.lerp(value.mean(1, keepdim=True), strength)


CALM = Lever("calm", "Flattens image tokens.", "tokens", flat, high=0.9)


def test_a_lever_that_is_registered_is_one_like_the_others() -> None:
    with pytest.raises(ArgumentError, match="unknown lever"):
        Levers(calm=0.5)
    assert register_lever(CALM) is CALM
    assert list(LEVERS)[-1] == "calm"
    on = Levers(calm=0.5, cads=0.1)
    assert between(Levers(), on, 0.5).calm == pytest.approx(0.25)
    torch.testing.assert_close(
        Levers(calm=0.5).change("tokens", tokens(), START).mean(1), tokens().mean(1)
    )
    with pytest.raises(ArgumentError, match=r"calm: is out of range; expected 0\.0 to 0\.9"):
        Levers(calm=1.0)
    assert register_lever(CALM) is CALM, "again is no mistake"


@pytest.mark.parametrize(
    ("lever", "message"),
    [
        (replace(CALM, name="cads"), "lever: is another lever's name; found cads"),
        (replace(CALM, name="a b"), "lever: is not a name; found 'a b'"),
        (replace(CALM, off=2.0), "calm: is out of range"),
    ],
)
def test_what_is_not_a_lever_is_refused(lever: Lever, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        register_lever(lever)
    assert "calm" not in LEVERS


def test_ladders_begin_at_a_strength_that_changes_nothing_or_is_the_adapters_start() -> None:
    for lever in LEVERS.values():
        for rung in lever.ladder:
            lever.check(rung)
        assert not lever.ladder or lever.off in lever.ladder
