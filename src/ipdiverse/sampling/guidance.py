"""Guidance as a sum of branches, of which only those with a weight are computed. Plain torch."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ipdiverse.adapter.attention import BOTH, NOTHING, TEXT

Latents = Float[Tensor, "items channels h w"]


def branch_weights(text: float, image: float) -> dict[str, float]:
    """Weights of ε(∅,∅), ε(T,∅) and ε(T,I) in the guided prediction, zero ones left out.

    ε = ε(∅,∅) + w_T [ε(T,∅) − ε(∅,∅)] + w_I [ε(T,I) − ε(T,∅)], the factorisation of
    InstructPix2Pix (arXiv:2211.09800, equation 3) with the text first. Equal weights need two
    passes, as does w_T = 1.

    Args:
        text: w_T.
        image: w_I.
    """
    weights = {NOTHING: 1 - text, TEXT: text - image, BOTH: image}
    return {branch: weight for branch, weight in weights.items() if weight}


def combine(weights: dict[str, float], predictions: dict[str, Tensor]) -> Tensor:
    """Weighted sum of the branches' predictions."""
    if list(weights) == [NOTHING, BOTH]:  # as pipelines write it, to the bit
        nothing, both = predictions[NOTHING], predictions[BOTH]
        return nothing + weights[BOTH] * (both - nothing)
    return torch.stack([w * predictions[b] for b, w in weights.items()]).sum(0)


def rescaled(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """A share of guidance rescaled to the conditional prediction's deviation (arXiv:2305.08891).

    Pipelines that do it themselves then find equal halves and change nothing.
    """
    axes = tuple(range(1, guided.ndim))
    ratio = conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    return share * guided * ratio + (1 - share) * guided


def sigma_of(alpha: float) -> float:
    """σ = √((1 − ᾱ) / ᾱ): noise over signal; infinite where nothing is left of the signal."""
    return math.inf if alpha <= 0 else math.sqrt((1 - alpha) / alpha)


def clean_guess(kind: str, sample: Latents, predicted: Latents, alpha: float) -> Latents:
    """x̂ from a prediction.

    Args:
        kind: The scheduler's `prediction_type`.
        sample: x_t, of unit variance together with its noise.
        predicted: ε, v or x̂ itself.
        alpha: ᾱ.

    Raises:
        ValueError: Another kind.
    """
    signal, noise = math.sqrt(alpha), math.sqrt(1 - alpha)
    if kind == "epsilon":
        return (sample - noise * predicted) / max(signal, 1e-3)
    if kind == "v_prediction":
        return signal * sample - noise * predicted
    if kind == "sample":
        return predicted
    raise ValueError(f"prediction type {kind!r}; expected epsilon, v_prediction or sample")
