"""Seeds: image i is the same alone or among n, and the step number decides the seed of a step."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
