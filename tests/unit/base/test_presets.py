"""What the presets pin."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ipdiverse.base.presets import PRESETS, Preset, as_size, total
from ipdiverse.commands.checkpoints import reads

NAMES = [
    *(f"sd15{end}" for end in ("", "-light", "-vit-g", "-plus", "-plus-face", "-full-face")),
    *(f"sd15-faceid{end}" for end in ("", "-plus", "-plusv2", "-portrait")),
    *(f"sdxl{end}" for end in ("", "-vit-g", "-plus", "-plus-face")),
    *(f"sdxl-faceid{end}" for end in ("", "-plusv2", "-portrait")),
    "kolors",
    *(f"flux-{end}" for end in ("dev", "dev-v2", "dev-instantx", "dev-redux", "schnell")),
    *("sd35-large", "sd35-medium"),
]
UNPINNED = {
    "Kwai-Kolors/Kolors-IP-Adapter-Plus": "refs/pr/4",
    "XLabs-AI/flux-ip-adapter": "main",
    "XLabs-AI/flux-ip-adapter-v2": "main",
    "InstantX/FLUX.1-dev-IP-Adapter": "main",
}
"""Of these no commit is known, which the guide says too."""


DOCUMENTED = (
    "h94/IP-Adapter/models/ip-adapter_sd15_light_v11.bin",
    "h94/IP-Adapter-FaceID/ip-adapter-faceid-portrait-v11_sd15.bin",
    "h94/IP-Adapter-FaceID/ip-adapter-faceid-portrait_sdxl_unnorm.bin",
    "Kwai-Kolors/Kolors-IP-Adapter-FaceID-Plus/ipa-faceid-plus.bin",
)
"""Published, and no preset."""


def test_each_is_found_by_the_name_that_it_says() -> None:
    assert [preset.name for preset in PRESETS.values()] == list(PRESETS) == NAMES


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_everything_is_pinned_to_a_commit(preset: Preset) -> None:
    for repository in preset.repositories():
        pinned = UNPINNED.get(repository.id, "[0-9a-f]{40}")
        assert re.fullmatch(pinned, repository.revision), repository.id
        assert repository.license
        assert repository.link == f"https://huggingface.co/{repository.id}"


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_weights_are_safetensors_wherever_they_are_published_so(preset: Preset) -> None:
    weights = [file.name for file in preset.all_files() if file.size > 2_000_000]
    pickled = [name for name in weights if not name.endswith(".safetensors")]
    alone = preset.faces or (preset.adapter and preset.adapter.id.startswith("InstantX/"))
    assert pickled == ([preset.weights[0]] if alone else [])
    assert len(weights) >= 4


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_files_fit_their_repositories(preset: Preset) -> None:
    files = preset.all_files()
    assert len({(file.repository.id, file.name) for file in files}) == len(files)
    assert files[0].name == "model_index.json", "the folder of the base is found by it"
    assert preset.name.startswith("sd15") == (preset.resolution == 512)
    shown = (preset.encoder is not None, preset.faces)
    assert any(shown) == (preset.adapter is not None)
    assert all(shown) == ("-plus" in preset.name and preset.faces)
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
    rows = [line for line in guide.splitlines() if re.match(r"\| `(sd|flux|kolors)", line)]
    assert len(rows) == len(PRESETS)
    for row, preset in zip(rows, PRESETS.values(), strict=True):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        numbers = (preset.resolution, preset.steps, preset.guidance_scale, preset.scale)
        size = as_size(total(preset.all_files()))
        assert cells[0] == f"`{preset.name}`"
        assert cells[2] == reads(preset)
        assert cells[3:] == [size, *(f"{number:g}" for number in numbers)]
        for repository in preset.repositories():
            stated = f"[{repository.id}]({repository.link}) | {repository.license} | "
            assert f"{stated}`{repository.revision[:12]}`" in guide

    for file in DOCUMENTED:
        assert f"`{file}`" in guide
