"""The samples of a run: number j is the same in every process, worker and micro-batch.

Everything random about a sample (image, crop, reference, drop, latents, noise, timestep) comes from
the run's seed and j alone. So a run that is resumed, or spread over processes, sees the same.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from ipdiverse.errors import ArgumentError
from ipdiverse.seeding import derived_seed

if TYPE_CHECKING:
    from torch import Tensor

    from ipdiverse.data.references import References
    from ipdiverse.training.config import TrainConfig
    from ipdiverse.training.embed import TrainingData


class Samples(Dataset[dict[str, Any]]):
    """Sample number to tensors: `latents`, `noise`, `timestep`, text and image embeddings.

    With `drawn`, (tokens, width) of what a generative fusion draws, there are no latents but the
    embeddings of a `target`; `noise` and `timestep` are the flow's.
    """

    def __init__(
        self,
        data: TrainingData,
        trained: list[int],
        references: References,
        config: TrainConfig,
        reads: str,
        scaling: tuple[float, float],
        timesteps: int,
        drawn: tuple[int, int] | None = None,
    ) -> None:
        if not config.changed and references.may_augment:
            raise ArgumentError(
                "has no changed references to take",
                where=f"reference {config.reference!r}",
                expected="changed of 1 or more",
                fix="Run `ipdiverse embed --changed 4`, and train with --changed 4.",
            )
        self.data, self.trained, self.references = data, trained, references
        self.config, self.reads = config, reads
        self.scaling, self.timesteps, self.drawn = scaling, timesteps, drawn

    def __len__(self) -> int:
        return self.config.steps * self.config.batch

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Sample `number`, from 0 at the first step."""
        config = self.config
        rng = np.random.default_rng(derived_seed(config.seed, "sample", number))
        noise = torch.Generator().manual_seed(derived_seed(config.seed, "noise", number))
        epoch, position = divmod(number, len(self.trained))
        place = int(_order(config.seed, epoch, len(self.trained))[position])
        index = self.trained[place]
        # the change is drawn even where none is wanted: the draws after it must not depend on that
        variant, change_number = (int(rng.integers(n)) for n in (config.variants, 1 << 30))
        choice = self.references.choose(place, rng)
        change = 1 + change_number % config.changed if choice.augment else 0
        no_text, no_image = self._drops(rng.random())
        text = self.data.no_text if no_text else self.data.text(index)
        words = {f"text_{name}": tensor for name, tensor in text.items()}
        if self.drawn is not None:
            return self._flow(index, choice.file_name, noise) | words
        picture = self.data.no_image if no_image else self.data.reference(choice.file_name, change)
        moments = self.data.target(index, variant)
        mean, std = moments["mean"].cpu(), moments["std"].cpu()
        scale, shift = self.scaling
        # one generator for three draws: their order is part of what a seed means
        return {
            "latents": (mean + std * _normal(mean.shape, noise) - shift) * scale,
            "noise": _normal(mean.shape, noise),
            "timestep": self._timestep(noise),
            "image": picture[self.reads],
            **words,
        }

    def _flow(self, index: int, reference: str, rng: torch.Generator) -> dict[str, Any]:
        """A pair of pictures, the flow's noise and the reference's, and a time in 0..1."""
        target = self.data.records[index].file_name
        pair = (self.data.reference(name, 0)[self.reads] for name in (reference, target))
        image, other = pair
        return {
            "image": image,
            "target": other,
            "noise": _normal(torch.Size((2, *(self.drawn or ()))), rng),
            # logit-normal: the middle of the way is hardest (arXiv:2403.03206, section 3.1)
            "timestep": torch.sigmoid(_normal(torch.Size(()), rng)),
        }

    def _timestep(self, rng: torch.Generator) -> Tensor:
        """Uniform, or T(1 − u³) for a uniform u ("cubic sampling", arXiv:2302.08453)."""
        if self.config.timesteps == "uniform":
            return torch.randint(self.timesteps, (), generator=rng)
        uniform = torch.rand((), generator=rng, dtype=torch.float32)
        # u may be 0, and there is no timestep T
        return (self.timesteps * (1 - uniform**3)).long().clamp(max=self.timesteps - 1)

    def _drops(self, u: float) -> tuple[bool, bool]:
        """Whether text and image are dropped, from one uniform number."""
        text, image, both = self.config.drop_text, self.config.drop_image, self.config.drop_both
        dropped = u < text + image + both
        return dropped and not text <= u < text + image, dropped and u >= text


def _normal(shape: torch.Size, rng: torch.Generator) -> Tensor:
    """Standard normal in float32: a thread that loads a model may have changed the default type."""
    return torch.randn(shape, generator=rng, dtype=torch.float32)


@lru_cache(maxsize=4)  # one order serves all samples of an epoch
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of an epoch: every image once."""
    return np.random.default_rng(derived_seed(seed, "epoch", epoch)).permutation(size)
