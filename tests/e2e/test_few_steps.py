"""Distilled LoRAs by name: with their scheduler, steps and guidance, and off again exactly."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants

import ipdiverse
from ipdiverse.base import bases
from ipdiverse.base.memory import Device
from ipdiverse.base.presets import FEW_STEPS, PRESETS
from ipdiverse.cli import main
from ipdiverse.errors import ArgumentError, ModelError
from ipdiverse.sampling import fast
from ipdiverse.sampling.request import Request
from ipdiverse.sampling.task import needed_files
from tests import hub, models

if TYPE_CHECKING:
    from collections.abc import Iterator

ON = [
    (name, base)
    for name, loras in FEW_STEPS.items()
    for base in ("sd15", "sdxl")
    if PRESETS[base].base.id in loras
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The hub's cache with small bases, and with random LoRAs where the published ones belong."""
    home = tmp_path_factory.mktemp("hub")
    hub.fill(home, tmp_path_factory.mktemp("scratch"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(home))
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.setattr(bases, "this_device", lambda: Device("cpu", 16 * 2**30))
        for name, base in ON:
            _publish(home, FEW_STEPS[name][PRESETS[base].base.id].lora, base)
        yield home


def _publish(home: Path, file: Any, base: str) -> None:
    from peft import LoraConfig, get_peft_model_state_dict

    torch.manual_seed(9)
    pipe: Any = ipdiverse.load_base(base).pipe
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=layers, init_lora_weights=False))
    at = hub.place(home, file)
    state = get_peft_model_state_dict(pipe.unet)
    pipe.save_lora_weights(at.parent, unet_lora_layers=state, weight_name=at.name)


@pytest.fixture
def reference(tmp_path: Path) -> str:
    models.picture(5).save(tmp_path / "reference.png")
    return str(tmp_path / "reference.png")


def pixels(made: ipdiverse.Generation) -> np.ndarray:
    return np.stack([np.asarray(image) for image in made.images])


@pytest.mark.parametrize(("name", "base"), ON)
def test_lora_scheduler_steps_and_guidance_come_together(
    name: str, base: str, cache: Path, reference: str
) -> None:
    opened = ipdiverse.load_base(base)
    given: dict[str, Any] = {"n": 1, "seed": 3}
    usual, pipe = opened.pipe.scheduler, opened.pipe
    before = pixels(ipdiverse.generate(reference, "a cat", loaded=opened, **{**given, "steps": 2}))
    seen: list[Any] = []

    def note(module: Any, _: Any) -> None:
        wrapped = any("lora" in layer for layer, _ in module.named_modules())
        seen.append((type(pipe.scheduler).__name__, wrapped))

    handle = pipe.unet.register_forward_pre_hook(note)
    made = ipdiverse.generate(reference, "a cat", loaded=opened, few_steps=name, **given)
    handle.remove()
    chosen = FEW_STEPS[name][PRESETS[base].base.id]
    assert seen == [(chosen.scheduler, True)] * chosen.steps, "one call a step: no guidance"
    assert (made.request.steps, made.request.guidance_scale) == (4, 1.0)
    assert pipe.scheduler is usual
    assert not any("lora" in layer for layer, _ in pipe.unet.named_modules())
    after = ipdiverse.generate(reference, "a cat", loaded=opened, **{**given, "steps": 2})
    np.testing.assert_array_equal(pixels(after), before, "off again, to the bit")


def test_the_lora_acts_and_the_record_repeats_it(
    cache: Path, reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {"base": "sd15", "n": 2, "few_steps": "hyper"}
    made = ipdiverse.generate(reference, "a cat", **given)
    command = made.request.command(str(tmp_path / "again"))
    assert "--few-steps=hyper" in command
    assert main(shlex.split(command)[1:]) == 0
    from PIL import Image

    for number, image in enumerate(made.images):
        again = Image.open(sorted((tmp_path / "again").glob("0*.png"))[number])
        np.testing.assert_array_equal(np.asarray(again), np.asarray(image))
    one = ipdiverse.generate(reference, "a cat", **{**given, "n": 1})
    np.testing.assert_array_equal(pixels(one)[0], pixels(made)[0], "image i never depends on n")
    monkeypatch.setattr(fast, "LEVELS", (None, fast.Level(2)))
    quicker = ipdiverse.generate(reference, "a cat", **given, fast=1)
    assert (pixels(quicker) != pixels(made)).any(), "fast mode acts on top of it"


def test_its_file_is_among_those_that_are_downloaded() -> None:
    request = Request.of({"image": "a.png", "base": "sdxl", "few_steps": "lightning"})
    names = [file.name for file in needed_files(request)]
    assert names[-1] == "sdxl_lightning_4step_lora.safetensors"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "sd15", "few_steps": "turbo"}, r"few_steps: is unknown.*lcm \| lightning"),
        ({"base": "sd15", "few_steps": "lightning"}, r"base sd15: has no LoRA of lightning.*sdxl"),
        ({"few_steps": "lcm"}, r"base critters: has no LoRA of lcm.*--fast 1 to 3"),
    ],
)
def test_what_nobody_published_is_refused_in_one_line(
    options: dict[str, Any], message: str, reference: str
) -> None:
    with pytest.raises(ArgumentError, match=message) as raised:
        ipdiverse.generate(reference, "a cat", **options)
    assert "\n" not in str(raised.value)


def test_another_lora_is_refused_and_stays(cache: Path, reference: str) -> None:
    opened = ipdiverse.load_base("sd15")
    lora = hub.place(cache, FEW_STEPS["lcm"][PRESETS["sd15"].base.id].lora)
    opened.pipe.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name="mine")
    with pytest.raises(ModelError, match="sd15: has a LoRA already") as raised:
        ipdiverse.generate(reference, "a cat", loaded=opened, few_steps="lcm", n=1)
    assert "\n" not in str(raised.value)
    assert opened.pipe.get_active_adapters() == ["mine"]


def test_a_file_of_another_base_is_one_line_and_leaves_nothing(
    cache: Path, reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = ipdiverse.load_base("sd15")
    usual = opened.pipe.scheduler
    other = FEW_STEPS["lcm"][PRESETS["sdxl"].base.id]
    monkeypatch.setitem(FEW_STEPS["lcm"], PRESETS["sd15"].base.id, other)
    with pytest.raises(ModelError, match="cannot be put on this base") as raised:
        ipdiverse.generate(reference, "a cat", loaded=opened, few_steps="lcm", n=1)
    assert "\n" not in str(raised.value)
    assert opened.pipe.scheduler is usual
    assert not any("lora" in layer for layer, _ in opened.pipe.unet.named_modules())
