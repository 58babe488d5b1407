from __future__ import annotations

import json
from pathlib import Path

import pytest

from ipdiverse.base.bases import DEFAULT_ADAPTER
from ipdiverse.errors import ArgumentError
from ipdiverse.evaluation.study import Arm, Study, quick_study, read_study

ROOT = Path(__file__).parents[3]
WHOLE = """
pairs = 10
images = 4
baseline = "plain"

[[arm]]
name = "plain"
family = "one"
scale = 1.0

[[arm]]
name = "levers"
adapters = ["a.safetensors", "b.safetensors"]
interval = [0.3, 5]
cads = 0.2

[[sweep]]
family = "grid"
adapter = "base"
scale = [0.0, 0.5]
guidance_scale = [1.0, 3.0, 7.5]

[[sweep]]
family = "dial"
diversity = [0.0, 0.5, 1.0]
"""


def written(text: str, folder: Path) -> Path:
    file = folder / "study.toml"
    file.write_text(text)
    return file


def test_arms_and_sweeps_are_read(tmp_path: Path) -> None:
    study = read_study(written(WHOLE, tmp_path))
    assert (study.pairs, study.images, study.steps) == (10, 4, 25)
    assert study.baseline_arm.name == "plain"
    assert len(study.arms) == 2 + 6 + 3
    levers = study.arms[1]
    assert levers.sources == ("a.safetensors", "b.safetensors")
    assert levers.family == "levers"
    request = levers.request(25, 3.0)
    assert request.levers == {"interval": (0.3, 5), "cads": 0.2}
    assert request.guidance_scale == 3.0
    grid = [arm for arm in study.arms if arm.family == "grid"]
    assert grid[1].name == "grid: scale 0, guidance_scale 3"
    assert grid[1].request(25, 9.0).guidance_scale == 3.0
    assert {arm.at for arm in grid} == {None}
    assert [arm.at for arm in study.arms if arm.family == "dial"] == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pairs = ", "cannot be read"),
        ("nonsense = 1\n[[arm]]\nname='a'", "unknown key; found nonsense"),
        ("[[arm]]\nscale = 1.0", "has no name"),
        ("[[arm]]\nname='a'\nscales = 1.0", "unknown key; found scales"),
        ("[[arm]]\nname='a'\n[[arm]]\nname='a'", "name of their own"),
        ("pairs = 5", "are missing"),
        ("[[arm]]\nname='a'\ncads = -1", "cads"),
        ("[[sweep]]\nscale=[1.0]", "has no family"),
        ("baseline='b'\n[[arm]]\nname='a'", "names no arm"),
        ("arm = 3", "is no table"),
        ("pairs = 1\n[[arm]]\nname='a'", "pairs"),
        ("pairs = 2.5\n[[arm]]\nname='a'", "of another type"),
        ("base = 3\n[[arm]]\nname='a'", "of another type"),
        ("features = 'dino'\n[[arm]]\nname='a'", "of another type"),
        ("[[arm]]\nname='a'\nadapters='x.safetensors'", "no list of texts"),
        ("[[arm]]\nname='a'\nat='x'", "is no number"),
        ("[[arm]]\nname='a'\ninterval=[0.3]", "interval"),
        ("[[arm]]\nname='a'\ninterval=5", "interval"),
        ("[[sweep]]\nfamily='a'\nscale=[]", "is empty; found scale"),
        ("prompts='p.txt'\n[[arm]]\nname='a'", "go with references alone"),
        ("image_encoder=3\n[[arm]]\nname='a'", "of another type"),
        ("base='owner/base'\n[[arm]]\nname='a'", "adapter: is missing"),
        ("steps=0\n[[arm]]\nname='a'", "steps"),
    ],
)
def test_a_bad_study_names_file_and_fault(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        read_study(written(text, tmp_path))
    assert "study.toml" in str(caught.value)


def test_the_quick_study_sweeps_what_users_have_and_the_dial() -> None:
    families = [arm.family for arm in quick_study().arms]
    assert families.count("plain, λ sweep") == 5
    assert families.count("dial") == 5


def test_an_arm_without_adapters_takes_the_default() -> None:
    assert Arm("a", "a").sources == (DEFAULT_ADAPTER,)
    assert Study((Arm("a", "a"),)).baseline_arm.name == "a"


def test_the_readme_states_what_the_study_found() -> None:
    found = json.loads((ROOT / "docs" / "study" / "results.json").read_text())["arms"]
    scores = {arm["name"]: arm["scores"] for arm in found}
    columns = ("prompt_accuracy", "contradict_accuracy", "retention", "entropy", "leak")
    columns += ("copy_rate", "invalid_rate")
    arms = {"text alone": "text only", "the renderer": "renderer", "pixel copies": "pixel copy"}
    sweep = "plain, λ × guidance: scale {}, guidance_scale 3"
    table = (ROOT / "README.md").read_text().split("## The copier and its remedy")[1]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line[:2] == "| "][1:]
    assert len(rows) == 12
    for label, *cells in rows:
        words = label.strip("`").split()
        arm = arms.get(label) or (
            sweep.format(words[-1]) if "plain" in words else f"dial: diversity {words[-1]}"
        )
        expected = [round(scores[arm][name][0], 3) for name in columns]
        assert [float(cell) for cell in cells] == pytest.approx(expected, abs=5e-4), label


def test_what_is_left_open_is_the_bases_own() -> None:
    arms = (Arm("a", "a"), Arm("b", "b", {"adapter": "x"}), Arm("c", "c", adapters=("y", "z")))
    study = Study(arms, base="sd15-plus")
    assert study.steps == 30
    assert [arm.sources for arm in study.arms] == [("sd15-plus",), ("x",), ("y", "z")]
    assert study.baseline_arm.settings == {}
    critters = Study(arms)
    assert (critters.steps, critters.arms) == (25, arms)
