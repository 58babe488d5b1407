"""What guides say of the command line exists, and their TOML is read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ipdiverse.cli import main
from ipdiverse.evaluation.study import read_study

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


def test_a_study_in_a_guide_is_one(tmp_path: Path) -> None:
    (block,) = re.findall(r"```toml\n# study.toml\n(.*?)```", (DOCS / "train.md").read_text(), re.S)
    (tmp_path / "study.toml").write_text(block)
    study = read_study(tmp_path / "study.toml")
    assert [arm.family for arm in study.arms] == ["before"] * 4 + ["mine"] * 2
