from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tests.conftest import random_pipeline

from ipdiverse.adapter.attach import attach
from ipdiverse.adapter.model import new_adapter
from ipdiverse.critters.training.corpus import Corpus, corpus
from ipdiverse.critters.training.unet import Latents, cache_latents
from ipdiverse.training.plain import PlainObjective, cache_image_embeds

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return corpus(tmp_path_factory.mktemp("corpus"), "train", 12)


def objective(kind: Any, scenes: Corpus, folder: Path) -> PlainObjective:
    pipe = random_pipeline()
    sizes = {"width": 64, "depth": 1} if kind == "plus" else {}
    adapter = new_adapter(kind, pipe.unet, pipe.image_encoder, **sizes)
    attach(pipe, adapter)
    moments = cache_latents(pipe.vae, scenes, folder)
    embeds = cache_image_embeds(pipe.image_encoder, scenes, kind, folder)
    return PlainObjective(adapter, pipe, scenes, Latents(moments, 1.0), embeds, batch=8)


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_every_adapter_parameter_moves_and_nothing_else(
    kind: str, scenes: Corpus, tmp_path: Path
) -> None:
    stage = objective(kind, scenes, tmp_path)
    mine = {id(p) for p in stage.module.parameters()}
    frozen = [p for p in stage.pipe.unet.parameters() if id(p) not in mine]
    before = {name: p.detach().clone() for name, p in stage.module.named_parameters()}
    optimizer = torch.optim.AdamW(stage.module.parameters(), lr=1e-2)
    for step in range(2):
        stage.loss(torch.Generator().manual_seed(step))[0].backward()
        optimizer.step()
    assert [n for n, p in stage.module.named_parameters() if torch.equal(p, before[n])] == []
    assert all(p.grad is None for p in frozen)
    assert not any(p.requires_grad for p in frozen)


def test_the_same_step_gives_the_same_loss(scenes: Corpus, tmp_path: Path) -> None:
    stage = objective("base", scenes, tmp_path)
    losses = [float(stage.loss(torch.Generator().manual_seed(4))[0].detach()) for _ in range(2)]
    assert losses[0] == losses[1]
    assert float(stage.loss(torch.Generator().manual_seed(5))[0].detach()) != losses[0]


def test_the_cache_holds_what_the_encoder_gives(scenes: Corpus, tmp_path: Path) -> None:
    stage = objective("plus", scenes, tmp_path)
    with torch.no_grad():
        direct = stage.pipe.image_encoder(
            scenes.pixels(np.array([3])), output_hidden_states=True
        ).hidden_states[-2]
    cached = torch.from_numpy(stage.embeds[3:4].astype(np.float32))
    assert (direct - cached).abs().max() < 0.05 * direct.abs().max()  # bf16, then fp16
