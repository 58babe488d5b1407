"""`python -m workshop study`: as `ipdiverse evaluate`, with the workshop's rivals."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from workshop.__main__ import main

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

STUDY = """
pairs = 2
images = 2
steps = 1
[[arm]]
name = "plain"
adapter = "plus"
[[arm]]
name = "rival"
adapter = "plus"
drop = 0.5
"""


def test_rivals_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "workshop.rivals", raising=False)  # importing registers them
    config, out, published = tmp_path / "study.toml", tmp_path / "out", tmp_path / "published"
    config.write_text(STUDY)
    words = ["study", str(config), "--out", str(out)]
    assert main([*words, "--publish", str(published)]) == 0
    names = {file.name for file in published.iterdir()}
    assert {"results.json", "sets.png", "entropy-retention.svg", "readings"} <= names
    assert not any("html" in name or name == "images" for name in names)
    arms = json.loads((out / "results.json").read_text())["arms"]
    assert [arm["settings"] for arm in arms[:2]] == [
        {"adapter": "plus"},
        {"adapter": "plus", "drop": 0.5},
    ]
    assert arms[0]["scores"] != arms[1]["scores"]
    assert main([*words, "--readings", str(published / "readings"), "--partial"]) == 0
    assert json.loads((out / "results.json").read_text())["left_out"] == []
