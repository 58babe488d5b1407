"""Levers as mathematics: nothing at 0, each by itself, known answers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ipdiverse.dial import Levers
from ipdiverse.sampling.levers import (
    Moment,
    cads,
    drop_tokens,
    kernel_entropy,
    latent_levers,
    particle_guidance,
    remove_subspace,
    repel_tokens,
    shield,
    sparke,
    stated_subspace,
    token_levers,
)

TOKEN_LEVERS = (drop_tokens, cads, repel_tokens)
LATENT_LEVERS = (shield, particle_guidance, sparke)
START = Moment(0.0, (3, 4, 5, 6))


def tokens(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 8, 16, generator=torch.Generator().manual_seed(0))


def latents(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 4, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("lever", [*TOKEN_LEVERS, *LATENT_LEVERS])
def test_strength_0_gives_back_the_very_tensor(lever) -> None:
    value = tokens() if lever in TOKEN_LEVERS else latents()
    assert lever(value, 0.0, replace(START, protected=latents()[:, None])) is value


@pytest.mark.parametrize("lever", [drop_tokens, cads])
def test_an_item_is_the_same_alone(lever) -> None:
    whole = lever(tokens(), 0.5, START)
    alone = lever(tokens()[2:3], 0.5, replace(START, seeds=(5,)))
    torch.testing.assert_close(whole[2:3], alone, rtol=0, atol=0)


@pytest.mark.parametrize("lever", [drop_tokens, cads])
def test_seeds_decide_and_equal_seeds_agree(lever) -> None:
    same = tokens()[:1].repeat(3, 1, 1)
    moved = lever(same, 0.5, replace(START, seeds=(1, 1, 2)))
    assert torch.equal(moved[0], moved[1])
    assert not torch.equal(moved[0], moved[2])


def test_dropped_tokens_are_the_mean_of_all() -> None:
    given = tokens()
    dropped = drop_tokens(given, 0.25, START)
    changed = (dropped != given).any(-1)
    assert changed.sum(1).tolist() == [2, 2, 2, 2]
    expected = given.mean(1, keepdim=True).expand_as(given)[changed]
    torch.testing.assert_close(dropped[changed], expected)


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


def test_repulsion_raises_the_entropy_of_a_set_in_early_steps_alone() -> None:
    centre, offsets = tokens(1), tokens()
    given = centre + 0.1 * offsets
    before = kernel_entropy(given.flatten(1))
    moved = [repel_tokens(given, strength, START) for strength in (0.2, 0.5)]
    after = [kernel_entropy(each.flatten(1)) for each in moved]
    assert before < after[0] < after[1] <= math.log(4) + 1e-6
    assert repel_tokens(given, 0.5, replace(START, progress=0.3)) is given
    assert repel_tokens(given[:1], 0.5, START).shape == (1, 8, 16)


def test_entropy_of_known_sets() -> None:
    same = torch.ones(5, 7)
    assert float(kernel_entropy(same)) == pytest.approx(0, abs=1e-5)
    assert float(kernel_entropy(torch.eye(5))) == pytest.approx(math.log(5), rel=1e-5)


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


def test_the_shield_moves_what_is_too_close_straight_away_and_leaves_the_rest() -> None:
    far = latents(1)
    z = far + 0.1 * latents(2)[1:]
    moment = replace(START, protected=z[:, None])
    moved = shield(far, 1.0, moment)
    direction = (far - z).flatten()
    step = (moved - far).flatten()
    assert float(torch.nn.functional.cosine_similarity(step, direction, dim=0)) > 0.999
    assert (moved - z).norm() > (far - z).norm()
    away = replace(START, protected=z[:, None] + 100)
    torch.testing.assert_close(shield(far, 1.0, away), far)


@pytest.mark.parametrize("lever", [particle_guidance, sparke])
@pytest.mark.parametrize("count", [2, 4])
def test_guesses_of_a_set_part_by_the_length_asked_for(lever, count: int) -> None:
    given = latents(1) + 0.3 * latents(count)
    moved = lever(given, 0.1, replace(START, prompts=torch.ones(count, 3)))
    assert torch.isfinite(moved).all()
    assert torch.pdist(moved.flatten(1)).mean() > torch.pdist(given.flatten(1)).mean()
    lengths = (moved - given).flatten(1).norm(dim=1) / math.sqrt(given[0].numel())
    assert float(lengths.max()) == pytest.approx(0.1, rel=1e-4)
    assert lever(given[:1], 0.1, START).shape == (1, 4, 6, 6)


def test_sparke_lets_items_of_other_prompts_alone() -> None:
    given = latents(1) + 0.3 * latents(4)
    prompts = torch.eye(2).repeat_interleave(2, 0)
    moved = sparke(given, 0.1, replace(START, prompts=prompts))
    pairs = given.flatten(1)
    step = (moved - given).flatten(1)
    for i, j in ((0, 1), (2, 3)):
        along = torch.nn.functional.cosine_similarity(step[i], pairs[i] - pairs[j], dim=0)
        assert float(along) > 0.999, "only its own prompt's item pushes it"


def test_levers_that_are_off_are_not_called() -> None:
    off = Levers()
    assert token_levers(off) == []
    assert latent_levers(off) == []
    on = Levers(drop=0.1, cads=0.2, shield=0.3)
    assert [strength for _, strength in token_levers(on) + latent_levers(on)] == [0.1, 0.2, 0.3]


def test_noise_is_the_same_while_another_thread_loads_in_half_precision() -> None:
    like = torch.zeros(2, 3, 4)
    before, usual = Moment(0.0, (1, 2)).noise("a", like), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float16)
        meanwhile = Moment(0.0, (1, 2)).noise("a", like)
    finally:
        torch.set_default_dtype(usual)
    assert torch.equal(meanwhile, before)
