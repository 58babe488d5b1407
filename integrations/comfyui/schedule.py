"""Progress of sampling by the noise level, as ComfyUI means it: over the model's whole schedule."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

_STEPS = 999
"""ComfyUI counts a whole schedule in so many parts, one for each pair of trained timesteps."""


class Schedule:
    """Where in its schedule a model is, and whether a prompt acts there.

    Told by the noise level alone, so that a sampler that takes a part of the steps (advanced
    samplers, image to image) is where it is in the whole, and not at a beginning of its own.

    Args:
        sampling: The model's `model_sampling`, which knows the noise level of each share.
        start_at: Share of the schedule from which a prompt acts.
        end_at: Share up to which it acts, itself included, as in ComfyUI's own nodes.
    """

    def __init__(self, sampling: Any, start_at: float = 0.0, end_at: float = 1.0) -> None:
        self.start, self.end = (float(sampling.percent_to_sigma(at)) for at in (start_at, end_at))
        self.always = (start_at, end_at) == (0.0, 1.0)
        # at the very ends percent_to_sigma gives "any" and 0, not what the schedule has there
        shares = np.arange(_STEPS + 1) / _STEPS
        inside = [float(sampling.percent_to_sigma(share)) for share in shares[1:-1]]
        sigmas = [float(sampling.sigma_max), *inside, float(sampling.sigma_min)]
        self._shares, self._quiet = shares, -np.log(np.maximum(sigmas, 1e-30))
        self._now: tuple[Any, float] | None = None

    def sigma(self, options: Mapping[str, Any]) -> float:
        """The noise level of a call."""
        # all layers of a call get the same tensor: it is read from the device once
        sigmas = options["sigmas"]
        if self._now is None or self._now[0] is not sigmas:
            self._now = (sigmas, float(sigmas.flatten()[0]))
        return self._now[1]

    def acts(self, options: Mapping[str, Any]) -> bool:
        """Whether a call lies in the prompt's share of the schedule."""
        return self.always or self.end <= self.sigma(options) <= self.start

    def progress(self, options: Mapping[str, Any]) -> float:
        """Share of the schedule that is behind a call: 0 at pure noise."""
        return float(
            np.interp(-math.log(max(self.sigma(options), 1e-30)), self._quiet, self._shares)
        )
