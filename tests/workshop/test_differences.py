"""`studies/differences.py`: what the study's page says of fusion, from its readings."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from ipdiverse.errors import DataError

ROOT = Path(__file__).parents[2]


def table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arms: str) -> str:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["differences.py", *arms, "--seeds", "1"])
    runpy.run_module("studies.differences", run_name="__main__")
    return capsys.readouterr().out


def test_differences_are_drawn_pair_by_pair(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = table(monkeypatch, capsys, "paired-none", "paired-none", "paired-blend-random")
    *_, same, other = said.strip().splitlines()
    assert set(re.findall(r"[+-]\d\.\d+", same)) == {"+0.000"}
    assert other.split(" | ")[1].startswith("-0.037 * (-0.048 to -0.02"), "holds beside the other"


def test_an_arm_that_was_not_read_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match="nobody: has no readings"):
        table(monkeypatch, capsys, "paired-none", "nobody")
