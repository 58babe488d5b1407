"""The stages' loop and objectives, on a few dozen scenes and a few steps."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from ipdiverse.critters.oracle import AttributeReader, Inspector, placement_of
from ipdiverse.critters.render import Jitter, render
from ipdiverse.critters.scene import sample_scene
from ipdiverse.errors import ModelError
from workshop.base import architecture, stages
from workshop.base.clip import (
    ClipObjective,
    TextModules,
    TextObjective,
    VisionModules,
)
from workshop.base.corpus import Corpus, corpus, draw, to_pixels
from workshop.base.faults import KINDS as FAULTS
from workshop.base.inspector import KINDS, Inspected, InspectorObjective, scene_with
from workshop.base.loop import Schedule, StageRun
from workshop.base.oracle import OracleObjective
from workshop.base.stages import STAGES, BaseRecipe
from workshop.base.tokenizer import build_tokenizer
from workshop.base.unet import (
    Alignment,
    Latents,
    UnetModules,
    UnetObjective,
    cache_latents,
    cache_patches,
)
from workshop.base.vae import VaeModules, VaeObjective, latent_scale, psnr

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return corpus(tmp_path_factory.mktemp("corpus"), "train", 24)


class Line:
    """Fit y = 2x: the smallest objective."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = torch.nn.Linear(1, 1)

    def loss(self, rng: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        x = torch.randn(16, 1, generator=rng)
        return ((self.module(x) - 2 * x) ** 2).mean(), {}


def run(folder: Path, steps: int, stop: int | None = None) -> StageRun:
    folder.mkdir(exist_ok=True)
    stage = StageRun(Line(), Schedule(steps, 0.05, warmup=5, save_every=10), folder, seed=1)
    while stop is not None and stage.step < stop:
        stage._one_step()
    if stop is None:
        stage.train()
    else:
        stage.save()
    return stage


def test_a_resumed_run_ends_with_the_same_weights_to_the_bit(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", 60)
    for stop in (7, 23, 24):
        run(tmp_path / "parts", 60, stop)
    parts = run(tmp_path / "parts", 60)
    for one, other in zip(whole.average, parts.average, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(whole.objective.module.weight, parts.objective.module.weight)


def test_training_learns_and_reports(tmp_path: Path) -> None:
    stage = run(tmp_path / "line", 300)
    assert stage.objective.module.weight.item() == pytest.approx(2, abs=0.05)
    lines = [json.loads(line) for line in (tmp_path / "line" / "log.jsonl").open()]
    assert lines[-1]["step"] == lines[-1]["of"] == 300
    assert lines[-1]["minutes_left"] == 0
    assert not list(tmp_path.rglob("*.partial"))


def test_the_rate_warms_up_holds_and_decays() -> None:
    schedule = Schedule(1000, 1.0, warmup=100)
    rates = [schedule.rate(step) for step in (0, 49, 100, 700, 875, 999)]
    assert rates == pytest.approx([0.01, 0.5, 1.0, 1.0, 0.5, 0.05])


def test_a_corpus_is_rendered_once_and_is_the_same_again(tmp_path: Path, scenes: Corpus) -> None:
    again = corpus(tmp_path, "train", 24)
    np.testing.assert_array_equal(again.images, scenes.images)
    scene, _ = draw("train", 0, 5)
    assert scenes.scene(5) == scene
    assert scenes.pixels(np.array([0, 1])).shape == (2, 3, 64, 64)
    assert float(scenes.pixels(np.arange(24)).min()) >= -1


def moved(objective: Any, module: torch.nn.Module | None = None) -> dict[str, bool]:
    module = module or objective.module
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
    for step in range(2):
        optimizer.zero_grad()
        objective.loss(torch.Generator().manual_seed(step))[0].backward()
        optimizer.step()
    return {name: not torch.equal(p, before[name]) for name, p in module.named_parameters()}


def still(changes: dict[str, bool]) -> list[str]:
    return [name for name, has_moved in changes.items() if not has_moved]


def test_the_vae_learns_with_every_parameter(scenes: Corpus) -> None:
    assert still(moved(VaeObjective(VaeModules(architecture.vae()), scenes, batch=2))) == []


def test_the_text_encoder_learns_with_every_parameter_that_counts(scenes: Corpus) -> None:
    tokenizer = build_tokenizer()
    modules = TextModules(architecture.text_encoder(len(tokenizer)))
    changes = moved(TextObjective(modules, tokenizer, scenes, batch=8))
    assert [n for n in still(changes) if "k_proj.bias" not in n] == []  # softmax ignores it


def test_the_image_encoder_learns_and_the_text_stays(scenes: Corpus) -> None:
    tokenizer = build_tokenizer()
    text = architecture.text_encoder(len(tokenizer))
    objective = ClipObjective(
        VisionModules(architecture.image_encoder()), text, tokenizer, scenes, 8
    )
    before = {name: t.clone() for name, t in text.state_dict().items()}
    changes = moved(objective)
    assert [n for n in still(changes) if "k_proj.bias" not in n] == []
    assert all(torch.equal(t, before[name]) for name, t in text.state_dict().items())


def test_the_unet_learns_from_cached_latents(scenes: Corpus, tmp_path: Path) -> None:
    vae, tokenizer = architecture.vae().eval(), build_tokenizer()
    moments = cache_latents(vae, scenes, tmp_path)
    assert moments.shape == (24, 32, 8, 8)
    assert len(list(tmp_path.glob("latents-train-0-64-24-*.npy"))) == 1
    latents = Latents(moments, latent_scale(vae, scenes, 24))
    sampled = latents.sample(np.arange(24), torch.Generator().manual_seed(0))
    assert sampled.std() == pytest.approx(1, abs=0.15)
    patches = cache_patches(architecture.image_encoder().eval(), scenes, tmp_path)
    assert patches.shape == (24, 64, 128)
    objective = UnetObjective(
        UnetModules(architecture.unet(), Alignment(patches, width=192)),
        architecture.text_encoder(len(tokenizer)),
        tokenizer,
        architecture.noise_schedule(),
        scenes,
        latents,
        batch=2,
        compiled=False,
    )
    assert [n for n in still(moved(objective)) if "to_k.bias" not in n] == []
    _, figures = objective.loss(torch.Generator().manual_seed(0))
    assert 0.5 < figures["misaligned"] < 1.5, "one minus a cosine that nothing has trained"


def test_alignment_is_zero_for_the_features_themselves() -> None:
    patches = np.random.default_rng(0).normal(size=(10, 64, 16)).astype(np.float16)
    alignment = Alignment(patches, width=16)
    alignment.head = torch.nn.Identity()
    indices = np.array([3, 5])
    seen = (torch.from_numpy(patches[indices]).float() - alignment.mean) / alignment.std
    hidden = seen.transpose(1, 2).unflatten(2, (8, 8))
    assert float(alignment(hidden, indices)) == pytest.approx(0, abs=1e-4)
    assert float(alignment(hidden, indices[::-1].copy())) > 0.5


def test_the_oracle_learns_attributes(scenes: Corpus) -> None:
    vae = architecture.vae().eval()
    objective = OracleObjective(AttributeReader(), scenes, vae, batch=8, round_trips=8)
    _, details = objective.loss(torch.Generator().manual_seed(0))
    assert details.keys() == {"accuracy", "worst"}
    # a convolution's bias before group norm over its own channels may cancel; heads may not
    assert not [n for n in still(moved(objective)) if n.startswith(("heads", "hidden"))]


def test_the_inspector_learns_every_head_and_sets_its_threshold() -> None:
    rng, kinds = np.random.default_rng(0), np.arange(4 * len(KINDS)) // 4
    seen = Inspected(
        rng.integers(0, 256, (len(kinds), 64, 64, 3), dtype=np.uint8),
        kinds,
        rng.random((len(kinds), 5), dtype=np.float32),
        np.arange(len(kinds)) % 2 == 0,
    )
    objective = InspectorObjective(Inspector(len(KINDS)), seen, seen, batch=8)
    assert not [
        n
        for n in still(moved(objective))
        if n.startswith(("valid", "kinds", "placement", "hidden"))
    ]
    objective.set_threshold()
    logits = objective.module(to_pixels(seen.images[kinds == 0])).valid
    assert (logits < 0).sum() <= 1


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_can_be_seen_repeats_and_leaves_the_rest_alone(kind: str) -> None:
    scene, seed, image = scene_with(kind, "train", 0)
    np.testing.assert_array_equal(image, scene_with(kind, "train", 0)[2])
    changed = np.abs(image.astype(int) - render(scene, seed)).max(-1) > 40
    assert changed.sum() >= 24
    everywhere = {"ghost", "blur", "melted", "scrambled", "two places"}
    assert kind in everywhere or changed.mean() < 0.5


def test_placement_is_what_the_renderer_drew() -> None:
    scene = sample_scene(np.random.default_rng(0))
    found = np.array([placement_of(scene, seed) for seed in range(400)])
    assert ((found >= 0) & (found <= 1)).all()
    assert np.abs(found[:, :4].mean(0) - 0.5).max() < 0.06
    low, high = int(found[:, 1].argmin()), int(found[:, 1].argmax())
    assert Jitter.from_seed(low).y < Jitter.from_seed(high).y, "0 is at the top, as in the picture"


def test_psnr_of_a_known_error() -> None:
    assert psnr(4.0) == pytest.approx(0)
    assert psnr(0.004) == pytest.approx(30)


def test_a_stage_without_its_predecessor_says_which_to_run(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"stage vae has not been trained.*--stages vae"):
        stages.stage_model(tmp_path, "vae")


def test_stages_finish_in_order_and_are_not_repeated(tmp_path: Path) -> None:
    recipe = BaseRecipe(
        images=24,
        vae_steps=1,
        text_steps=1,
        clip_steps=1,
        unet_steps=1,
        oracle_steps=1,
        inspector_steps=1,
        faults=4,
        compile=False,
    )
    for stage in STAGES:
        stages.train_stage(stage, tmp_path, recipe)
        assert stages.stage_model(tmp_path, stage).is_dir()
        runs = [json.loads(line) for line in (tmp_path / stage / "recipe.jsonl").open()]
        assert [(run["from_step"], run["steps"], run["seed"]) for run in runs] == [(0, 1, 0)]
    log = (tmp_path / "vae" / "log.jsonl").read_text()
    stages.train_stage("vae", tmp_path, recipe)
    assert (tmp_path / "vae" / "log.jsonl").read_text() == log

    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    from workshop.base.shipping import assemble, continue_from, ship_oracle, stage_history

    assemble(tmp_path, tmp_path / "base")
    ship_oracle(tmp_path, tmp_path / "oracle.safetensors")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "base", safety_checker=None)
    assert pipe("a critter", num_inference_steps=1).images[0].size == (64, 64)
    index = json.loads((tmp_path / "base" / "model_index.json").read_text())
    assert index["feature_extractor"] == ["transformers", "CLIPImageProcessor"]

    for config in (tmp_path / "base").rglob("*.json"):
        assert str(tmp_path) not in config.read_text(), config

    history = stage_history(tmp_path)
    shipped_files = tmp_path / "base", tmp_path / "oracle.safetensors"
    continue_from(*shipped_files, tmp_path / "more", history)
    continue_from(*shipped_files, tmp_path / "more", history)  # a second call changes nothing
    with pytest.raises(ModelError, match="holds another training already"):
        continue_from(*shipped_files, tmp_path / "vae", history)
    with pytest.raises(ModelError, match="no base was shipped"):
        continue_from(tmp_path / "none", tmp_path / "none", tmp_path / "new", history)
    stages.train_stage("unet", tmp_path / "more", recipe)
    for stage in STAGES:
        assert stages.stage_model(tmp_path / "more", stage).is_dir()
    shipped, further = (
        UNet2DConditionModel.from_pretrained(path).state_dict()
        for path in (tmp_path / "base" / "unet", tmp_path / "more" / "unet" / "model")
    )
    distances = [float((shipped[name] - further[name]).abs().max()) for name in shipped]
    assert 0 < max(distances) < 0.01, "one step from where the shipped weights are"
    further_history = stage_history(tmp_path / "more")
    assert {stage: len(runs) for stage, runs in further_history.items()} == {
        stage: 2 if stage == "unet" else 1 for stage in STAGES
    }
