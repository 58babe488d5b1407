"""Pipelines for tasks that a base has none for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from ipdiverse.base.bases import Base
from ipdiverse.errors import ArgumentError, ModelError
from ipdiverse.sampling.request import Request
from ipdiverse.sampling.task import LastBase, task_for
from tests import models

if TYPE_CHECKING:
    from pathlib import Path


def test_a_task_that_a_base_has_no_pipeline_for_is_one_line(tmp_path: Path) -> None:
    base = Base("mine", models.pipeline("sd1", "LatentConsistencyModel"), 8.0, 4)
    file = tmp_path / "start.png"
    pictures = {str(file): models.picture(1)}
    start = Request(init_image=str(file))
    assert type(task_for(base, start, pictures).base.pipe).__name__.endswith("Img2ImgPipeline")
    with pytest.raises(ModelError, match=r"^mine: has no pipeline for inpainting; found ") as told:
        task_for(base, Request(init_image=str(file), mask_image=str(file)), pictures)
    assert "\n" not in str(told.value)


def test_a_strength_that_redoes_no_step_is_refused(tmp_path: Path) -> None:
    base = Base("mine", models.pipeline("sd1"), 8.0, 4, steps=4)
    file = tmp_path / "start.png"
    pictures = {str(file): models.picture(1)}
    refused = r"strength: redoes none of 4 steps; expected 1/4 or more; found 0\.2\. Raise"
    with pytest.raises(ArgumentError, match=refused):
        task_for(base, Request(init_image=str(file), strength=0.2), pictures)
    least = task_for(base, Request(init_image=str(file), strength=0.25), pictures)
    made = least.base.pipe("", num_inference_steps=4, output_type="latent", **least.arguments(1))
    assert len(made.images) == 1
    task_for(base, Request(strength=0), {})  # nothing is redone where there is no picture


def test_the_last_base_stays_open_for_requests_that_can_share_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[str] = []

    def opens(request: Request) -> Any:
        opened.append(request.adapter)
        return object()

    monkeypatch.setattr("ipdiverse.sampling.task.open_base", opens)
    bases = LastBase()
    first = bases.open(Request(adapter="plus"))
    assert bases.open(Request(adapter="base", n=2, steps=7)) is first
    assert bases.open(Request(dtype="float32")) is not first
    assert bases.open(Request(adapter="plus")) is not first, "one is kept, not two"
    assert len(opened) == 3
