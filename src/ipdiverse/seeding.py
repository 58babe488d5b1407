"""Seeds: image i is the same alone or among n, and the step number decides the seed of a step."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed from any numbers and words, the same for all versions and machines.

    Not Python's `hash`, which differs from one process to the next.
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, image_index: int) -> torch.Generator:
    """The random source of one image, independent of the others of its set.

    Args:
        seed: The user's seed.
        image_index: The image's number in the set.

    Returns:
        A CPU generator, so that a seed gives the same noise on every device.
    """
    import torch

    return torch.Generator("cpu").manual_seed(derived_seed(seed, image_index))


def noise(name: str, seeds: Iterable[int], shape: Sequence[int]) -> torch.Tensor:
    """Standard normal noise, (seeds, *shape), each row of its own seed and a name alone."""
    import torch

    drawn = [
        torch.randn(
            tuple(shape),
            # on the CPU: other devices draw other numbers from the same seed
            generator=torch.Generator().manual_seed(derived_seed(seed, name)),
            # transformers changes the default dtype while another thread loads a model
            dtype=torch.float32,
        )
        for seed in seeds
    ]
    return torch.stack(drawn)
