from __future__ import annotations

import json
from pathlib import Path

import pytest

from ipdiverse.base.adapters import DEFAULT_ADAPTER
from ipdiverse.errors import ArgumentError
from ipdiverse.evaluation import study as study_module
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
        ("nonsense = 1\n[[arm]]\nname='a'", "unknown key 'nonsense'"),
        ("[[arm]]\nscale = 1.0", "missing name"),
        ("[[arm]]\nname='a'\nscales = 1.0", "unknown key; found scales"),
        ("[[arm]]\nname='a'\n[[arm]]\nname='a'", "need different names"),
        ("pairs = 5", "are missing"),
        ("[[arm]]\nname='a'\ncads = -1", "cads"),
        ("[[sweep]]\nscale=[1.0]", "has no family"),
        ("baseline='b'\n[[arm]]\nname='a'", "not the name of an arm"),
        ("arm = 3", "is not a table"),
        ("pairs = 1\n[[arm]]\nname='a'", "pairs"),
        ("pairs = 2.5\n[[arm]]\nname='a'", "pairs is 2.5, expected a whole number"),
        ("base = 3\n[[arm]]\nname='a'", "base is 3, expected a text"),
        ("features = 'dino'\n[[arm]]\nname='a'", "features is 'dino', expected a list"),
        (
            "[[arm]]\nname='a'\nadapters='x.safetensors'",
            "adapters is 'x.safetensors'",
        ),
        ("[[arm]]\nname='a'\nat='x'", "at is 'x', expected a number"),
        ("[[arm]]\nname='a'\ninterval=[0.3]", "interval"),
        ("[[arm]]\nname='a'\ninterval=5", "interval"),
        ("[[sweep]]\nfamily='a'\nscale=[]", "is empty; found scale"),
        ("prompts='p.txt'\n[[arm]]\nname='a'", "prompts: needs references"),
        ("image_encoder=3\n[[arm]]\nname='a'", "image_encoder is 3"),
        ("base='owner/base'\n[[arm]]\nname='a'", "adapter: is missing"),
        ("steps=0\n[[arm]]\nname='a'", "steps"),
    ],
)
def test_a_bad_study_names_file_and_fault(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        read_study(written(text, tmp_path))
    assert "study.toml" in str(caught.value)


def test_settings_of_version_0_1_are_read_by_the_names_of_today(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_module, "RENAMED", {"shaking": "cads"})
    sweep = '[[sweep]]\nfamily = "f"\nshaking = [0.1, 0.2]\n'
    with pytest.warns(UserWarning, match="renamed shaking → cads") as told:
        arms = read_study(written(sweep, tmp_path)).arms
    assert len(told) == 1
    assert [(arm.name, arm.settings) for arm in arms] == [
        ("f: cads 0.1", {"cads": 0.1}),
        ("f: cads 0.2", {"cads": 0.2}),
    ]


def test_arms_of_levers_that_are_gone_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = dict.fromkeys(("gone", "lost", "cads"), "it is gone")
    monkeypatch.setattr(study_module, "DROPPED_LEVERS", gone)
    sweeps = '[[sweep]]\nfamily = "f"\ngone = [0.1, 0.2]\n[[arm]]\nname = "b"\nlost = 1\n'
    arms = '[[arm]]\nname = "a"\ncads = 0.1\n'
    with pytest.warns(UserWarning, match="left out 3 arms.* no longer exist: gone, lost$") as told:
        study = read_study(written(arms + sweeps, tmp_path))
    assert len(told) == 1
    assert [arm.name for arm in study.arms] == ["a"], "what registers a lever again keeps its arms"


def test_the_quick_study_sweeps_what_users_have_and_the_dial() -> None:
    families = [arm.family for arm in quick_study().arms]
    assert families.count("plain, λ sweep") == 5
    assert families.count("dial") == 5


def test_an_arm_without_adapters_takes_the_default() -> None:
    assert Arm("a", "a").sources == (DEFAULT_ADAPTER,)
    assert Study((Arm("a", "a"),)).baseline_arm.name == "a"


SCORES = {
    "prompt obeyed": "prompt_accuracy",
    "prompt": "prompt_accuracy",
    "where it contradicts the reference": "contradict_accuracy",
    "contradicting": "contradict_accuracy",
    "identity kept": "retention",
    "identity": "retention",
    "its worst attribute": "retention_worst",
    "asked for": "asked_for",
    "variety": "entropy",
    "leak": "leak",
    "copies": "copy_rate",
    "broken": "invalid_rate",
    "faulty": "invalid_rate",
}
"""Columns of the pages' tables."""
ANCHORS = {"text alone": "text only", "the renderer": "renderer", "pixel copies": "pixel copy"}
BEFORE = "docs/study/results.json"
IMAGINED = "docs/study/imagined/results.json"
ALONE = "docs/study/alone/results.json"
OF_ALONE = {
    "plain": "plain",
    "fusion alone, `gated`, paired": "fusion, paired, gated",
    "fusion alone, `blend`": "fusion, paired, blend",
    "fusion alone, `gated`, self": "fusion, self, gated",
    "the same": "fusion of shuffled text, paired",
    "projection alone": "projection, paired",
    "last attention": "last attention of the projection, paired",
}
OF_IMAGINED = {
    "text alone": "plain, scale: scale 0",
    "switched on after 20": "image prompt switched on late: start_at 0.2",
    "switched on after 40": "image prompt switched on late: start_at 0.4",
    "preset by block": "presets by block: style",
    "`cads` 0.8": "cads 0.8",
    "plain `base`": "base, plain",
    "`base`, `--diversity 1`": "base, dial 1",
    "`diverse`": "diverse, dial: diversity 1",
    "the renderer": "renderer",
}
"""Arms by how their rows begin; others are of `plus`, and end in a scale or a setting."""


def _arm_of(label: str, results: str) -> str:
    if results == ALONE:
        return next(name for start, name in OF_ALONE.items() if label.startswith(start))
    last = label.strip("`").split()[-1].strip("`")
    if results == BEFORE:
        arm = next((name for start, name in ANCHORS.items() if label.startswith(start)), "")
        plain = f"plain, λ × guidance: scale {last}, guidance_scale 3"
        return arm or (plain if "plain" in label else f"dial: diversity {last}")
    arm = next((name for start, name in OF_IMAGINED.items() if label.startswith(start)), "")
    plain = "plain" if last == "1" else f"plain, scale: scale {last}"
    return arm or (plain if "scale" in label else f"dial: diversity {last}")


@pytest.mark.parametrize(
    ("page", "heading", "results", "rows"),
    [
        ("README.md", "## Results", IMAGINED, 6),
        ("docs/study/index.md", "## Imagined references", IMAGINED, 15),
        ("docs/study/index.md", "## Fusion alone", ALONE, 7),
        ("docs/study/index.md", "## The dial in numbers", BEFORE, 12),
    ],
)
def test_pages_state_what_the_study_found(page: str, heading: str, results: str, rows: int) -> None:
    scores = {
        arm["name"]: arm["scores"] for arm in json.loads((ROOT / results).read_text())["arms"]
    }
    section = (ROOT / page).read_text().split(f"{heading}\n")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:2] == "| "]
    columns, *table = lines
    assert len(table) == rows
    for label, *cells in table:
        arm = _arm_of(label, results)
        expected = [round(scores[arm][SCORES[column]][0], 3) for column in columns]
        assert [float(cell) for cell in cells] == pytest.approx(expected, abs=5e-4), label


def test_the_page_states_what_pairs_share() -> None:
    folder = ROOT / "docs/study/dose"
    arms = json.loads((folder / "results.json").read_text())["arms"]
    scores = {arm["name"]: arm["scores"] for arm in arms}
    predicted = json.loads((folder / "predicted.json").read_text())["predicted"]
    copied, whole = scores["pixel copy"]["leak"][0], predicted[-1]["trained"]
    section = (ROOT / "docs/study/index.md").read_text().split("## What pairs share\n")[1]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:2] == "| "]
    for (shared, *cells), row in zip(lines[1:6], predicted, strict=True):
        percent = shared.removesuffix(" %")
        assert row["shared"] == int(percent) / 100
        space, trained = (
            scores[f"space, shared {percent}"],
            scores.get(f"trained on pairs, shared {percent}"),
        )
        expected = [
            row["trained"] / whole,
            trained and trained["leak"][0] / copied,
            row["space"] / whole,
            space["leak"][0] / copied,
            space["entropy"][0],
        ]
        found = [None if cell == "-" else float(cell) for cell in cells]
        for cell, number, digits in zip(found, expected, (2, 2, 2, 2, 3), strict=True):
            assert (cell is None) == (number is None)
            assert cell is None or cell == pytest.approx(number, abs=0.51 * 10**-digits)
    directions = [row["scene_directions"]["fitted"] for row in predicted]
    assert "{}, {}, {}, {} and {} directions".format(*directions) in section


def test_what_is_left_open_is_the_bases_own() -> None:
    arms = (Arm("a", "a"), Arm("b", "b", {"adapter": "x"}), Arm("c", "c", adapters=("y", "z")))
    study = Study(arms, base="sd15-plus")
    assert study.steps == 30
    assert [arm.sources for arm in study.arms] == [("sd15-plus",), ("x",), ("y", "z")]
    assert study.baseline_arm.settings == {}
    critters = Study(arms)
    assert (critters.steps, critters.arms) == (25, arms)


def test_a_study_made_in_python_checks_its_split() -> None:
    with pytest.raises(ArgumentError, match="split: is unknown; expected test or validation"):
        Study((Arm("a", "a"),), split="train")  # type: ignore[arg-type]
