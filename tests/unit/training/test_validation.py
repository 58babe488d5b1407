"""What is drawn while training, and what the copy figures say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ipdiverse.critters.render import render
from ipdiverse.critters.scene import sample_scene
from ipdiverse.data.prepare import PrepareOptions, prepare
from ipdiverse.errors import ArgumentError
from ipdiverse.training.config import TrainConfig
from ipdiverse.training.frozen import open_encoders
from ipdiverse.training.trainer import Trainer, train
from ipdiverse.training.validation import Case, Validation, _excess, layout_similarity
from tests import models

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    models.pipeline("sd1", fresh=True).save_pretrained(tmp_path / "base")
    prepare("critters", tmp_path / "data", PrepareOptions(n=8))
    return TrainConfig(
        data=str(tmp_path / "data"),
        out=str(tmp_path / "run"),
        base=str(tmp_path / "base"),
        resolution=64,
        steps=4,
        batch=2,
        tokens=3,
        width=64,
        depth=1,
        num_validation_images=2,
        validate_every=2,
        num_images_per_prompt=2,
        validation_steps=2,
    )


def critter(seed: int) -> Image.Image:
    return Image.fromarray(render(sample_scene(np.random.default_rng(seed)), seed))


def test_sheets_and_figures_come_while_training(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a pipeline that draws the reference: the figures of a perfect copier are known."""
    cases: list[Case] = []

    def copies(self: Validation, case: Case, prompt: str) -> list[Image.Image]:
        cases.append(case)
        return [case.reference] * 2

    monkeypatch.setattr(Validation, "_draw", copies)
    train(config)
    sheets = sorted(path.name for path in (Path(config.out) / "validation").iterdir())
    assert sheets == ["00000002.png", "00000004.png"]
    lines = [json.loads(line) for line in (Path(config.out) / "log.jsonl").open()]
    assert ["copy_layout" in line for line in lines] == [False, True, False, True]
    copied = np.mean([1 - layout_similarity(c.target, c.reference) for c in cases[:2]])
    assert copied > 0.01
    assert lines[1]["copy_layout"] == lines[3]["copy_layout"] == pytest.approx(copied)
    encoders = open_encoders(config.base)
    embeds = [encoders.image([c.target, c.reference])["pooled"].float() for c in cases[:2]]
    alike = [torch.nn.functional.cosine_similarity(e[0], e[1], dim=0).item() for e in embeds]
    assert lines[1]["copy_clip"] == pytest.approx(1 - np.mean(alike), abs=1e-5)


def test_each_reference_is_drawn_with_every_prompt(config: TrainConfig) -> None:
    train(config)
    several = replace(
        config, out=config.out + "-more", validation_prompts=("in the snow", "on the moon")
    )
    train(several)

    def height(run: TrainConfig) -> int:
        with Image.open(Path(run.out) / "validation" / "00000004.png") as sheet:
            return sheet.height

    assert height(several) == pytest.approx(3 * height(config), rel=0.1)
    lines = [
        json.loads((Path(run.out) / "log.jsonl").read_text().splitlines()[-1])
        for run in (config, several)
    ]
    assert lines[0]["copy_layout"] == lines[1]["copy_layout"], "measured on the caption alone"


def test_what_was_embedded_is_not_kept_in_memory(config: TrainConfig) -> None:
    """Only drawing needs the encoders again; without it their weights are gone."""
    drawing, blind = (
        Trainer(config),
        Trainer(replace(config, num_validation_images=0, out=config.out + "-2")),
    )
    for trainer, kind in ((drawing, "cpu"), (blind, "meta")):
        pipe = trainer.pipe
        parts = (pipe.vae, pipe.text_encoder, trainer.encoders.images.encoder)
        assert {next(part.parameters()).device.type for part in parts} == {kind}
        assert pipe.unet.device.type == "cpu"
    blind.run()


def test_frozen_weights_are_held_as_they_are_computed_in(config: TrainConfig) -> None:
    half = replace(config, mixed_precision="bf16", out=config.out + "-bf16")
    trainer = Trainer(half)
    unet = trainer.pipe.unet
    assert {unet.conv_in.weight.dtype, unet.time_embedding.linear_1.weight.dtype} == {
        torch.bfloat16
    }
    assert unet.conv_norm_out.weight.dtype == torch.float32
    assert {p.dtype for p in trainer.adapter.parameters()} == {torch.float32}
    trainer.run()
    train(config)
    losses = [
        [json.loads(line)["loss"] for line in (Path(run.out) / "log.jsonl").open()]
        for run in (config, half)
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.05)


def test_drawing_changes_nothing_of_the_training(config: TrainConfig) -> None:
    train(replace(config, ema=0.5))
    quiet = replace(config, ema=0.5, out=config.out + "-quiet", validate_every=100)
    train(quiet)
    drawn, plain = (load_file(Path(run.out) / "adapter.safetensors") for run in (config, quiet))
    assert all(torch.equal(drawn[name], plain[name]) for name in drawn)


def test_held_out_images_are_neither_targets_nor_references(config: TrainConfig) -> None:
    run = Trainer(config)
    assert len(run.samples.trained) == 6
    assert len(run.validation.cases) == 2
    held_out = set(range(8)) - set(run.samples.trained)
    records = run.samples.data.records
    assert [case.text for case in run.validation.cases] == [records[i].text for i in held_out]
    seen: set[str] = set()
    choose: Callable[..., object] = run.samples.references.choose
    for place in range(6):
        for seed in range(5):
            seen.add(choose(place, np.random.default_rng(seed)).file_name)  # type: ignore[attr-defined]
    forbidden = {n for i in held_out for n in (records[i].file_name, records[i].reference)}
    assert not seen & forbidden
    with pytest.raises(ArgumentError, match="leaves nothing to train on; expected fewer than 8"):
        Trainer(replace(config, out=config.out + "-2", num_validation_images=8))


def test_a_copy_scores_high_and_the_true_image_zero() -> None:
    case = Case("a critter", target=critter(1), reference=critter(2))
    assert layout_similarity(case.reference, case.reference) == pytest.approx(1)
    assert _excess([case.target], case, layout_similarity) == pytest.approx(0)
    copied = _excess([case.reference], case, layout_similarity)
    assert copied > 0.1
    half = _excess([case.reference, case.target], case, layout_similarity)
    assert half == pytest.approx(copied / 2)
    blank = Image.new("RGB", (64, 64))
    assert layout_similarity(blank, case.reference) == 0
