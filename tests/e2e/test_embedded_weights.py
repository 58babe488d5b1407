"""What the package ships: it fits the limits, and stock diffusers makes the same images."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline

from ipdiverse.adapter.files.checkpoint import read_spec
from ipdiverse.adapter.files.layouts import PACKED
from ipdiverse.base.adapters import CRITTERS_ADAPTERS, SHIPPED_ADAPTERS, adapter_file
from ipdiverse.base.bases import CRITTERS_BASE, CRITTERS_PROVENANCE, load_base
from ipdiverse.critters.oracle import read
from ipdiverse.critters.render import render
from ipdiverse.evaluation.pairs import held_out_scenes, shipped_oracle
from ipdiverse.provenance import generator
from ipdiverse.sampling.request import Request
from ipdiverse.sampling.sample import Job, attached, sampled
from ipdiverse.sampling.task import Task

if TYPE_CHECKING:
    from PIL import Image


def test_sizes_stay_within_the_limits() -> None:
    files = [f for f in CRITTERS_BASE.parent.rglob("*") if f.is_file()]
    assert {"provenance.json", "oracle.safetensors", "model_index.json"} <= {f.name for f in files}
    assert sum(f.stat().st_size for f in files) < 40e6
    assert max(f.stat().st_size for f in files) < 16e6
    assert not [f for f in files if f.suffix in {".bin", ".pt", ".ckpt", ".pickle"}]


def test_weights_are_half_precision_or_less() -> None:
    from safetensors import safe_open

    for file in CRITTERS_BASE.parent.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            whole = {
                opened.get_slice(key).get_dtype()
                for key in opened.keys()  # noqa: SIM118
                if len(opened.get_slice(key).get_shape()) > 1
            }
            kinds = {
                opened.get_slice(key).get_dtype()
                for key in opened.keys()  # noqa: SIM118 - not a dict: it cannot be iterated
                if key != PACKED  # bytes: what differs of tensors in half precision
            }
        packed = file.name == "oracle.safetensors" or file.parent.name == "spaces"
        # whole numbers of eight bits, a scale for each row in float32, and text as bytes
        allowed = {"F16", "I64", *(("I8", "U8", "F32") if packed else ())}
        assert kinds <= allowed, file
        assert whole <= {"F16", "I64", "I8"}, f"{file}: only scales and deviations in float32"


def test_provenance_says_how_they_were_made() -> None:
    made = json.loads(CRITTERS_PROVENANCE.read_text())
    assert {"command", "stages", "git_revision", "versions", "data", "gates"} <= made.keys()
    for runs in made["stages"].values():
        assert runs
        assert all({"from_step", "steps", "learning_rate", "seed"} <= run.keys() for run in runs)
    adapters = {file.stem for file in CRITTERS_ADAPTERS.iterdir()}
    assert adapters == SHIPPED_ADAPTERS.keys()
    for name, arm in SHIPPED_ADAPTERS.items():
        spec = read_spec(CRITTERS_ADAPTERS / f"{name}.safetensors")
        assert spec["reference"] == ("paired" if arm == "diverse" else "self")
        assert spec["arm"] == arm
        assert spec["recipe"]["steps"] > 0
        assert "/" not in str(spec["recipe"].get("start")), "no path of a machine"


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_stock_diffusers_makes_the_same_image(kind: str, references: list[Image.Image]) -> None:
    base, file = load_base(), adapter_file("critters", kind)
    with attached(base, file) as attachment:
        attachment.set_scale(0.7)
        request = Request(image="", n=1, steps=4, guidance_scale=3.0)
        jobs = [Job("a critter in the snow", 0, 0, references[0])]
        ours = np.asarray(next(sampled(Task(base), jobs, request, attachment)))

    stock = StableDiffusionPipeline.from_pretrained(CRITTERS_BASE, safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    stock.load_ip_adapter(CRITTERS_ADAPTERS, subfolder="", weight_name=file.name)
    stock.set_ip_adapter_scale(0.7)
    theirs = stock(
        prompt="a critter in the snow",
        ip_adapter_image=references[0],
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=generator(0, 0),
    ).images[0]
    assert np.abs(ours.astype(int) - np.asarray(theirs)).max() <= 1  # rounding to 8 bits


def test_the_oracle_reads_held_out_renders() -> None:
    scenes = held_out_scenes(200, seed=5)
    reading = read(shipped_oracle(), np.stack([render(*scene) for scene in scenes]))
    truth = np.array([scene.indices() for scene, _ in scenes])
    assert (reading.attributes == truth).mean() > 0.97
    assert reading.invalid.mean() < 0.05


def test_the_oracle_rejects_what_is_no_scene() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (16, 64, 64, 3), dtype=np.uint8)
    grey = np.full((16, 64, 64, 3), 128, np.uint8)
    assert read(shipped_oracle(), np.concatenate([noise, grey])).invalid.mean() > 0.9
