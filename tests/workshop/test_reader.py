"""The reader of latents that is trained together with the UNet."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ipdiverse.critters.scene import ATTRIBUTES
from workshop.base import architecture
from workshop.base.clip import captions_and_labels
from workshop.base.corpus import Corpus, corpus
from workshop.base.reader import LatentReader, read_frozen, reading_loss
from workshop.base.unet import crowded, velocity_loss


def attributes(count: int) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.tensor(
        [[rng.integers(len(values)) for values in ATTRIBUTES.values()] for _ in range(count)]
    )


def test_frozen_reading_teaches_the_latents_and_not_the_reader() -> None:
    reader, latents = LatentReader(), torch.randn(3, 16, 8, 8, requires_grad=True)
    reading_loss(read_frozen(reader, latents), attributes(3)).backward()
    assert latents.grad is not None
    assert latents.grad.abs().amax((1, 2, 3)).min() > 0
    assert all(parameter.grad is None for parameter in reader.parameters())
    reading_loss(reader(latents.detach()), attributes(3)).backward()
    assert all(parameter.grad is not None for parameter in reader.parameters())


def test_knowing_nothing_costs_the_entropy_of_a_uniform_guess() -> None:
    sizes = [len(values) for values in ATTRIBUTES.values()]
    blank = [torch.zeros(5, size) for size in sizes]
    assert float(reading_loss(blank, attributes(5))) == pytest.approx(np.log(sizes).mean())
    true = attributes(5)
    sure = [1e4 * torch.eye(size)[true[:, i]] for i, size in enumerate(sizes)]
    assert float(reading_loss(sure, true)) == pytest.approx(0, abs=1e-4)


def test_the_reader_learns_what_latents_show() -> None:
    """Two kinds of latents, told apart within a few steps."""
    torch.manual_seed(0)
    reader, kinds = LatentReader(), torch.randn(2, 16, 8, 8)
    true = torch.tensor([[0] * len(ATTRIBUTES), [1] * len(ATTRIBUTES)]).repeat(8, 1)
    optimizer = torch.optim.AdamW(reader.parameters(), 1e-3)
    for _ in range(20):
        loss = reading_loss(reader(kinds.repeat(8, 1, 1, 1) + torch.randn(16, 16, 8, 8)), true)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seen = torch.stack([head.argmax(1) for head in reader(kinds)], dim=1)
    assert (seen == true[:2]).float().mean() > 0.8


def test_the_guess_of_a_perfect_prediction_is_the_clean_latents() -> None:
    scheduler = architecture.noise_schedule()
    clean, noise = torch.randn(2, 4, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 300, 700, 999])
    velocity = scheduler.get_velocity(clean, noise, timesteps)
    loss, guess = velocity_loss(lambda _: velocity, scheduler, clean, timesteps, noise)
    assert float(loss) == 0
    torch.testing.assert_close(guess, clean, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return corpus(tmp_path_factory.mktemp("corpus"), "train", 4)


def test_a_chance_of_one_states_every_attribute(scenes: Corpus) -> None:
    chances: list[float | None] = [1.0, 1.0, 0.0, None]
    _, labels = captions_and_labels(scenes, np.arange(4), [1, 2, 3, 4], chances)
    assert (labels[:2] > 0).all()
    assert (labels[2] == 0).all()
    assert torch.equal(labels[:2] - 1, torch.from_numpy(scenes.attributes[:2]))


def test_weights_of_images_count_in_the_reading() -> None:
    logits = [torch.randn(5, len(values)) for values in ATTRIBUTES.values()]
    true = attributes(5)
    alone = reading_loss([head[:1] for head in logits], true[:1])
    weights = torch.tensor([1.0, 0, 0, 0, 0])
    assert float(reading_loss(logits, true, weights)) == pytest.approx(float(alone) / 5)


def test_timesteps_crowd_in_the_middle_and_still_come_from_everywhere() -> None:
    drawn = torch.cat([crowded(64, 1000, torch.Generator().manual_seed(s)) for s in range(200)])
    assert drawn.min() >= 0
    assert drawn.max() <= 999
    counts = torch.histc(drawn.float(), 10, 0, 1000) / len(drawn)
    assert counts[4:6].sum() > 0.25
    assert counts.min() > 0.02
    assert float(drawn.float().mean()) == pytest.approx(500, abs=5)
