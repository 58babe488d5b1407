"""The page of benchmarks holds what was measured, and every number of it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ipdiverse.adapter.model import layer_widths

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A benchmark by its name; those that it imports are beside it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))

    def load(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def page(script: Callable[[str], Any]) -> Any:
    return script("page")


def test_the_page_is_what_the_reports_say(page: Any) -> None:
    found = page.collected(DOCS / "benchmarks")
    assert json.loads((DOCS / "benchmarks.json").read_text()) == found
    assert (DOCS / "benchmarks.md").read_text() == page.page(found)
    assert all(row["peer"] and row["machine"] and row["rounds"] for row in found)


def test_the_table_of_fast_mode_is_what_was_measured(page: Any) -> None:
    report = json.loads((DOCS / "benchmarks" / "fast.json").read_text())
    assert page.fast_table(report) in (DOCS / "inference.md").read_text()
    losses = report["losses"]["changes"]
    for name, sign in (("prompt_accuracy", -1), ("retention", -1), ("invalid_rate", 1)):
        assert all(sign * change["scores"][name][0] <= 0.01 for change in losses), name


def test_a_ratio_is_found_wherever_it_stands(page: Any) -> None:
    cell = {"ratio": 2.0, "low": 1.5, "high": 2.5, "size": 64}
    report = {"machine": "here", "rounds": 3, "cells": {"a": cell | {"operations": 0.5}}}
    (row,) = page.rows(report, "dial", {"peer": "stock"})
    assert (row["name"], row["operations_ratio"], row["peer"]) == ("cells a", 2.0, "stock")
    assert "| dial: cells a: 64 px | 2.00 | 1.50 to 2.50 | 2.00 | 3 | stock | here |" in page.page(
        [row]
    )


def test_the_same_script_measures_on_any_device(
    script: Callable[[str], Any], tmp_path: Path
) -> None:
    out = tmp_path / "inference.json"
    words = [
        "--small",
        "--device",
        "cpu",
        "--rounds",
        "2",
        "--steps",
        "1",
        "--cells",
        "repeated",
        "--out",
    ]
    script("inference").main([*words, str(out)])
    report = json.loads(out.read_text())
    assert (report["device"], report["dtype"], report["rounds"]) == ("cpu", "float32", 2)
    (cell,) = report["cells"]
    assert cell["architecture"] == "critters"
    assert cell["ours_gflop"] < cell["stock_gflop"]
    assert cell["ours_images_a_second"] == pytest.approx(1 / cell["after_seconds"])
    assert cell["ours_memory_gb"] is None, "of a GPU alone"


def test_the_architectures_have_the_published_sizes(script: Callable[[str], Any]) -> None:
    inference = script("inference")
    for name, layers, weights in (("sd15", 16, 859_520_964), ("sdxl", 70, 2_567_463_684)):
        with torch.device("meta"):
            unet = inference.BASES[name]().unet
        assert len(layer_widths(unet)) == layers
        assert sum(one.numel() for one in unet.parameters()) == weights


def test_peers_are_measured_where_they_are_at_hand(
    script: Callable[[str], Any], page: Any, tmp_path: Path
) -> None:
    """A module in the place of the original's, with stock processors under its names."""
    peers = script("peers")
    module = tmp_path / "ip_adapter" / "attention_processor.py"
    module.parent.mkdir()
    module.write_text(
        "from diffusers.models.attention_processor import AttnProcessor2_0\n"
        "class IPAttnProcessor2_0(AttnProcessor2_0):\n"
        "    def __init__(self, *_, num_tokens):\n"
        "        assert num_tokens == 16\n"
    )
    places = {peers.ORIGINAL: str(tmp_path), peers.COMFYUI: ""}
    stock, original, absent = peers.measured(64, 10, 2, places)
    assert (stock["peer"], original["peer"]) == (peers.STOCK, peers.ORIGINAL)
    assert stock["operations_ratio"] > 1
    assert absent["not_at_hand"] == "ImportError: no folder of ComfyUI was named"
    report = {"machine": "here", "rounds": 2, "what": "a step", "cells": [stock, original, absent]}
    shown = page.page(list(page.rows(report, "peers", {})))
    row = "| peers: a step | not at hand | ImportError: no folder of ComfyUI was named |"
    assert row in shown
    places = {peers.ORIGINAL: str(tmp_path / "nowhere"), peers.COMFYUI: ""}
    *_, original, _ = peers.measured(64, 10, 1, places)
    assert original["not_at_hand"].startswith("FileNotFoundError")
    assert str(tmp_path / "nowhere") not in original["not_at_hand"]
