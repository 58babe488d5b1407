"""What guides say of the command line exists, and their TOML is read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ipdiverse.bases import ADAPTERS
from ipdiverse.cli import main
from ipdiverse.evaluation.study import read_study
from ipdiverse.training.arms import ARMS

DOCS = Path(__file__).parents[2] / "docs"
ROOT = DOCS.parent


@pytest.mark.parametrize("name", ["variety.md", "train.md"])
def test_flags_of_commands_exist(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```\n(ipdiverse .*?)```", (DOCS / name).read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    assert lines
    for line in lines:
        words = line.split()
        flags = {word for word in words if word.startswith("--")}
        with pytest.raises(SystemExit):
            main([words[1], "--help"])
        shown = capsys.readouterr().out
        known = set(re.findall(r"--[a-z][a-z0-9-]*", shown))
        assert flags <= known, line


def test_the_shipped_study_is_one(tmp_path: Path) -> None:
    study = read_study(ROOT / "studies" / "variety.toml")
    families = {arm.family for arm in study.arms}
    assert {"plain, λ × guidance", "adapters", "dial", "cads"} <= families
    assert study.baseline_arm.request(25, 7.5).guidance_scale == 3
    assert (study.pairs, study.images) == (200, 16)
    recipe = (ROOT / "Makefile").read_text().partition("--seeds 1 2 --arms")[2].partition("\n\n")[0]
    several = recipe.replace("\\", " ").split()
    assert set(several) <= set(ARMS)
    runs = [(arm, seed) for arm in ARMS for seed in ((0, 1, 2) if arm in several else (0,))]
    made = {f"runs/adapters/{arm}-seed{seed}/adapter.safetensors" for arm, seed in runs}
    named = {source for arm in study.arms for source in arm.sources}
    assert named <= made | set(ADAPTERS), "what `make adapters` makes, or what ships"


def test_a_study_in_a_guide_is_one(tmp_path: Path) -> None:
    (block,) = re.findall(r"```toml\n# study.toml\n(.*?)```", (DOCS / "train.md").read_text(), re.S)
    (tmp_path / "study.toml").write_text(block)
    study = read_study(tmp_path / "study.toml")
    assert [arm.family for arm in study.arms] == ["before"] * 4 + ["mine"] * 2
