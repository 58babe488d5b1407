from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ipdiverse.data.manifest import Record
from ipdiverse.data.references import References
from ipdiverse.training.build import Samples
from ipdiverse.training.config import TrainConfig


class _OneImage:
    """Data of one image, all of it zeros."""

    records = (Record("a.png", "a cat", "cat", None, "0", 8, 8, "a.png"),)
    no_text: dict[str, Any] = {"states": torch.zeros(2, 3)}  # noqa: RUF012
    no_image: dict[str, Any] = {"pooled": torch.zeros(3)}  # noqa: RUF012

    def text(self, index: int) -> dict[str, Any]:
        return self.no_text

    def target(self, index: int, variant: int) -> dict[str, Any]:
        return {"mean": torch.zeros(1, 2, 2), "std": torch.zeros(1, 2, 2)}

    def reference(self, file_name: str, change: int) -> dict[str, Any]:
        return self.no_image


def timesteps(kind: Any, count: int = 4000) -> np.ndarray:
    data: Any = _OneImage()
    config = TrainConfig(data="d", out="o", timesteps=kind, steps=count, batch=1)
    samples = Samples(
        data, [0], References(data.records, {"self": 1}), config, "pooled", (1.0, 0.0), 1000
    )
    return np.array([int(samples[number]["timestep"]) for number in range(count)])


@pytest.mark.parametrize(
    ("kind", "above"),
    [("uniform", lambda t: 1 - t), ("cubic", lambda t: (1 - t) ** (1 / 3))],
)
def test_timesteps_have_the_distribution_that_is_asked_for(kind: str, above: Any) -> None:
    drawn = timesteps(kind)
    assert drawn.min() >= 0
    assert drawn.max() <= 999
    for share in (0.1, 0.5, 0.7, 0.9):
        assert np.mean(drawn >= 1000 * share) == pytest.approx(above(share), abs=0.03)


def test_a_timestep_belongs_to_its_sample() -> None:
    assert np.array_equal(timesteps("cubic", 50), timesteps("cubic", 60)[:50])


def test_draws_are_the_same_while_another_thread_loads_in_half_precision() -> None:
    data: Any = _OneImage()
    config = TrainConfig(data="d", out="o", timesteps="cubic")
    references = References(data.records, {"self": 1})
    samples = Samples(data, [0], references, config, "pooled", (1.0, 0.0), 1000)
    before = [samples[number] for number in range(4)]
    usual = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float16)
        meanwhile = [samples[number] for number in range(4)]
    finally:
        torch.set_default_dtype(usual)
    for one, other in zip(before, meanwhile, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_latents_are_drawn_from_the_posterior_and_scaled() -> None:
    class _Posterior(_OneImage):
        def target(self, index: int, variant: int) -> dict[str, Any]:
            return {"mean": torch.full((4, 64, 64), 2.0), "std": torch.full((4, 64, 64), 0.5)}

    data: Any = _Posterior()
    config = TrainConfig(data="d", out="o")
    references = References(data.records, {"self": 1})
    samples = Samples(data, [0], references, config, "pooled", (0.25, 1.5), 1000)
    sample = samples[0]
    drawn = sample["latents"]
    assert float(drawn.mean()) == pytest.approx(0.25 * (2 - 1.5), abs=0.005)
    assert float(drawn.std()) == pytest.approx(0.25 * 0.5, abs=0.005)
    assert float(sample["noise"].std()) == pytest.approx(1, abs=0.02)
    together = torch.stack([drawn.flatten(), sample["noise"].flatten()])
    assert abs(float(torch.corrcoef(together)[0, 1])) < 0.05, "the noise is another draw"
