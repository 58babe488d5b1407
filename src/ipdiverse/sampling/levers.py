"""Levers: pure functions that change sampling to gain variety. Plain torch.

All have one signature, `lever(value, strength, moment)`. Token levers change an item's fused image
tokens, (items, tokens, width); latent levers change the guesses at the clean latents, (items,
channels, height, width). At strength 0 each returns what it was given. Each treats an item by
itself, except those that say they act on the set.

Order, where several are on: embeddings (`remove_subspace`, noise-conditioning), fusion, then on
tokens `drop_tokens`, `cads`, `repel_tokens`; after guidance, on latents `shield`,
`particle_guidance`, `sparke`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ipdiverse.dial import Levers
from ipdiverse.seeding import derived_seed

Tokens = Float[Tensor, "items tokens width"]
Latents = Float[Tensor, "items channels height width"]

SHIELD_GAIN = 1.6
"""Overcompensation of the shield (SPELL, arXiv:2410.06025)."""
REPULSION_STEPS = 50
"""Gradient steps of token repulsion."""
EARLY = 0.3
"""Share of the steps in which the layout is decided, and token repulsion acts."""


@dataclass(frozen=True)
class Moment:
    """When a lever acts, and on what.

    Args:
        progress: Share of the steps done, 0 at the first.
        seeds: One for each item; everything random about it comes from there.
        protected: Latents of the references, (items or 1, references, channels, height, width),
            which the shield keeps away from.
        prompts: Something of each item's text, (items, width), by which SPARKE tells prompts apart.
    """

    progress: float
    seeds: tuple[int, ...]
    protected: Tensor | None = None
    prompts: Tensor | None = None

    def noise(self, name: str, like: Tensor) -> Tensor:
        """Standard normal, the same for an item whatever stands beside it, and at every step."""
        drawn = [
            torch.randn(
                row.shape,
                generator=torch.Generator().manual_seed(derived_seed(seed, name)),
                dtype=torch.float32,  # whatever another thread that loads has as default
            )
            for seed, row in zip(self.seeds, like, strict=True)
        ]
        return torch.stack(drawn).to(like)


Lever = Callable[[Tensor, float, Moment], Tensor]


def remove_subspace(
    embeds: Float[Tensor, "batch *patches width"],
    strength: float,
    basis: Float[Tensor, "rank width"],
) -> Float[Tensor, "batch *patches width"]:
    """E' = e − strength · e P, P the projection onto a subspace (IP-Composer, arXiv:2502.13951).

    With one direction this is InstantStyle's subtraction (arXiv:2404.02733).

    Args:
        embeds: Image embeddings.
        strength: 0 keeps them, 1 removes the subspace.
        basis: Orthonormal rows (`stated_subspace`).
    """
    if strength == 0:
        return embeds
    rows = basis.to(embeds)
    return embeds - strength * (embeds @ rows.T) @ rows


def stated_subspace(
    statements: Float[Tensor, "count width"], rank: int
) -> Float[Tensor, "rank width"]:
    """Orthonormal directions in which statements differ from saying nothing, strongest first.

    Args:
        statements: Embeddings of texts less that of no text.
        rank: How many directions at most.
    """
    _, sizes, rows = torch.linalg.svd(statements.float(), full_matrices=False)
    kept = int((sizes[:rank] > 1e-4 * sizes[0].clamp_min(1e-12)).sum())
    return rows[:kept]


def drop_tokens(tokens: Tokens, strength: float, moment: Moment) -> Tokens:
    """Set a random share of an item's tokens to the mean of its tokens, the same at every step.

    Args:
        tokens: Fused image tokens.
        strength: Share of the tokens, 0..1.
        moment: When.
    """
    if strength == 0:
        return tokens
    order = moment.noise("token dropout", tokens[..., 0]).argsort(-1).argsort(-1)
    dropped = order < round(strength * tokens.shape[1])
    return torch.where(dropped[..., None], tokens.mean(1, keepdim=True), tokens)


def cads(
    tokens: Tokens,
    strength: float,
    moment: Moment,
    start: float = 0.6,
    end: float = 0.9,
    mixing: float = 1.0,
) -> Tokens:
    """Condition-annealed noise on image tokens (CADS, arXiv:2310.17347, algorithm 1).

    ŷ = √γ y + s √(1 − γ) n, rescaled to y's mean and deviation and mixed with ŷ by ψ; γ falls from
    1 to 0 as t rises from τ1 to τ2, and t = 1 is noise. The paper's ψ = 1 rescales fully, so any s
    above 0 means pure noise where γ = 0; here s also scales 1 − γ, so that small strengths are
    small changes.

    Args:
        tokens: Fused image tokens.
        strength: s, in deviations of the tokens.
        moment: When.
        start: τ1.
        end: τ2.
        mixing: ψ.
    """
    if strength == 0:
        return tokens
    gamma = 1 - min(1.0, strength) * (1 - annealing(moment.progress, start, end))
    if gamma == 1:
        return tokens
    mean, std = tokens.mean((1, 2), keepdim=True), tokens.std((1, 2), keepdim=True)
    drawn = strength * std * moment.noise("cads", tokens)
    noised = math.sqrt(gamma) * tokens + math.sqrt(1 - gamma) * drawn
    centred = noised - noised.mean((1, 2), keepdim=True)
    rescaled = centred / noised.std((1, 2), keepdim=True).clamp_min(1e-8) * std + mean
    return mixing * rescaled + (1 - mixing) * noised


def annealing(progress: float, start: float = 0.6, end: float = 0.9) -> float:
    """γ of CADS: 0 while t = 1 − progress is at least τ2, then rising to 1 at τ1."""
    return min(1.0, max(0.0, (end - (1 - progress)) / (end - start)))


def repel_tokens(tokens: Tokens, strength: float, moment: Moment) -> Tokens:
    """Move the tokens of a *set* apart: T += (η/M) ∇ H, M times, in early steps alone.

    H is the entropy of the eigenvalues of the cosine kernel over the set, divided by its size; no
    network is differentiated. Items in which anything of the seed differs are pushed by a little
    noise first, as equal tokens have no direction to part in.

    Args:
        tokens: Fused image tokens of the whole set.
        strength: η, in deviations of the tokens.
        moment: When.
    """
    if strength == 0 or len(tokens) < 2 or moment.progress >= EARLY:
        return tokens
    with torch.inference_mode(False), torch.enable_grad():
        tokens = tokens.detach().clone()
        std = tokens.std((1, 2), keepdim=True)
        moved = tokens + 1e-2 * std * moment.noise("token repulsion", tokens)
        for _ in range(REPULSION_STEPS):
            moved = moved.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(kernel_entropy(moved.flatten(1)), moved)
            size = gradient.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None]
            length = math.sqrt(tokens[0].numel()) * std
            moved = moved + strength / REPULSION_STEPS * length * gradient / size
    return moved.detach().to(tokens)


def kernel_entropy(rows: Float[Tensor, "items width"]) -> Float[Tensor, ""]:
    """Entropy of the eigenvalues of the cosine kernel over its size: 0 if equal, log n if apart."""
    unit = F.normalize(rows.float(), dim=1)
    values = torch.linalg.eigvalsh(unit @ unit.T / len(unit)).clamp_min(1e-8)
    return -(values * values.log()).sum()


def shield(guess: Latents, strength: float, moment: Moment) -> Latents:
    """Keep clean-latent guesses out of a ball around the reference's own latents.

    Δ = 1.6 · Σ ReLU(r / ‖x̂ − z‖ − 1)(x̂ − z) (SPELL, arXiv:2410.06025, equation 6).

    Args:
        guess: x̂, of unit deviation.
        strength: r over the root of a latent's number of elements, so about the deviation per
            element that is kept at least.
        moment: When; its `protected` are z.
    """
    if strength == 0 or moment.protected is None:
        return guess
    protected = moment.protected.to(guess)
    protected = protected.repeat_interleave(len(guess) // len(protected), 0)
    away = guess[:, None] - protected
    distance = away.flatten(2).norm(dim=2).clamp_min(1e-6)
    radius = strength * math.sqrt(guess[0].numel())
    push = F.relu(radius / distance - 1)[..., None, None, None] * away
    return guess + SHIELD_GAIN * push.sum(1)


def particle_guidance(guess: Latents, strength: float, moment: Moment) -> Latents:  # noqa: ARG001
    """Push the guesses of a *set* apart by a Gaussian kernel (arXiv:2310.13102, section 5.2).

    The paper's bandwidth, median² / log(n − 1), is not defined for two; log n takes its place.

    Args:
        guess: Clean-latent guesses of the whole set.
        strength: Length of the largest push, in deviations per element.
        moment: Unused.
    """
    if strength == 0 or len(guess) < 2:
        return guess
    away, squared, median = _apart(guess)
    kernel = (-squared * math.log(len(guess)) / median).exp()
    return _pushed(guess, (kernel[..., None] * away).sum(1), strength)


def sparke(guess: Latents, strength: float, moment: Moment) -> Latents:
    """Raise the Rényi kernel entropy of a *set*, items weighed by how alike their prompts are.

    Gradient of −log Σ (k(x_i, x_j) · k(p_i, p_j))² (conditional RKE of SPARKE, arXiv:2506.10173).

    Args:
        guess: Clean-latent guesses of the whole set.
        strength: Length of the largest push, in deviations per element.
        moment: Its `prompts`; None takes all prompts as equal.
    """
    if strength == 0 or len(guess) < 2:
        return guess
    away, squared, median = _apart(guess)
    kernel = (-squared / median).exp()
    if moment.prompts is not None:
        unit = F.normalize(moment.prompts.float(), dim=1)
        kernel = kernel * (unit @ unit.T).clamp_min(0)
    return _pushed(guess, (kernel.square()[..., None] * away).sum(1), strength)


def _apart(guess: Latents) -> tuple[Tensor, Tensor, Tensor]:
    """Differences of all pairs, their squared lengths, and the median of these."""
    rows = guess.flatten(1).float()
    away = rows[:, None] - rows[None]
    squared = away.square().sum(-1)
    others = ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    return away, squared, squared[others].median().clamp_min(1e-12)


def _pushed(guess: Latents, push: Tensor, strength: float) -> Latents:
    """Move along `push`, scaled so that the largest of the set has the length asked for."""
    longest = push.norm(dim=1).max().clamp_min(1e-12)
    length = strength * math.sqrt(push.shape[1])
    return guess + (length * push / longest).view_as(guess).to(guess)


def token_levers(levers: Levers) -> list[tuple[Lever, float]]:
    """Token levers that are on, in order."""
    chosen = [(drop_tokens, levers.drop), (cads, levers.cads), (repel_tokens, levers.repulsion)]
    return [(lever, strength) for lever, strength in chosen if strength]


def token_phase(levers: Levers, progress: float) -> tuple[float, bool]:
    """What changed tokens depend on besides the item: as long as it is equal, so are they."""
    noised = annealing(progress) if levers.cads else 1.0
    return noised, bool(levers.repulsion) and progress < EARLY


def latent_levers(levers: Levers) -> list[tuple[Lever, float]]:
    """Latent levers that are on, in order."""
    chosen: list[tuple[Lever, float]] = [
        (shield, levers.shield),
        (particle_guidance, levers.particle),
        (sparke, levers.sparke),
    ]
    return [(lever, strength) for lever, strength in chosen if strength]
