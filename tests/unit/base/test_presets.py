"""What the presets pin."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ipdiverse.base.presets import PRESETS, Preset, as_size, total

NAMES = ["sd15", "sd15-plus", "sd15-plus-face", "sd15-faceid", "sdxl", "sdxl-plus"]


def test_each_is_found_by_the_name_that_it_says() -> None:
    assert [preset.name for preset in PRESETS.values()] == list(PRESETS) == NAMES


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_everything_is_pinned_to_a_commit(preset: Preset) -> None:
    for repository in preset.repositories():
        assert re.fullmatch(r"[0-9a-f]{40}", repository.revision), repository.id
        assert repository.license
        assert repository.link == f"https://huggingface.co/{repository.id}"


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_weights_are_safetensors_wherever_they_are_published_so(preset: Preset) -> None:
    weights = [file.name for file in preset.all_files() if file.size > 2_000_000]
    pickled = [name for name in weights if not name.endswith(".safetensors")]
    assert pickled == (["ip-adapter-faceid_sd15.bin"] if preset.faces else [])
    assert len(weights) >= 4


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_files_fit_their_repositories(preset: Preset) -> None:
    files = preset.all_files()
    assert len({(file.repository.id, file.name) for file in files}) == len(files)
    assert files[0].name == "model_index.json", "the folder of the base is found by it"
    assert preset.name.startswith("sdxl") == (preset.resolution == 1024)
    assert (preset.encoder is None) == preset.faces
    without = preset.base_files(checker=False)
    assert total(preset.base_files()) - total(without) == sum(size for _, size in preset.checker)


def test_another_revision_is_for_the_base_alone() -> None:
    preset = PRESETS["sd15-plus"]
    assert {file.at for file in preset.base_files("main")} == {"main"}
    assert {file.at for file in preset.adapter_files()} == {preset.adapter.revision}


def test_sizes_for_people() -> None:
    assert [as_size(n) for n in (1000, 98_183_288, 5_400_000_000)] == ["1 MB", "98 MB", "5.4 GB"]


def test_the_guide_has_the_presets_as_they_are() -> None:
    guide = (Path(__file__).parents[3] / "docs" / "bases.md").read_text("utf-8")
    rows = [line for line in guide.splitlines() if line.startswith("| `sd")]
    assert len(rows) == len(PRESETS)
    for row, preset in zip(rows, PRESETS.values(), strict=True):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        numbers = (preset.resolution, preset.steps, preset.guidance_scale, preset.scale)
        size = as_size(total(preset.all_files()))
        assert cells[0] == f"`{preset.name}`"
        assert cells[2:] == [size, *(f"{number:g}" for number in numbers)]
        for repository in preset.repositories():
            stated = f"[{repository.id}]({repository.link}) | {repository.license} | "
            assert f"{stated}`{repository.revision[:12]}`" in guide
