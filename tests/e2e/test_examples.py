"""Every example runs as its first lines say, offline, on the embedded model."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
NAMES = {
    "face",
    "inpainting",
    "one_line",
    "pose_controlnet",
    "scene_change",
    "two_references_with_masks",
    "variation",
}


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_it_draws_a_picture(
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = ["--n", "2"] if "--n" in file.read_text(encoding="utf-8") else []
    out = tmp_path / "out"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", [str(file), "--out", str(out), "--steps", "2", *few])
    runpy.run_path(str(file), run_name="__main__")
    written = Path(capsys.readouterr().out.removeprefix("wrote ").strip())
    assert written.parent == out
    with Image.open(written) as image:
        assert np.asarray(image.convert("L")).std() > 1


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_it_is_short_and_says_how_to_run_it(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    assert f"python examples/{file.name} --out " in text


def test_one_line_is_short_enough_to_read_at_a_glance() -> None:
    (file,) = (file for file in EXAMPLES if file.stem == "one_line")
    lines = file.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 20
    assert sum("diversify" in line for line in lines) == 1


def test_none_is_missing() -> None:
    assert {file.stem for file in EXAMPLES} == NAMES
