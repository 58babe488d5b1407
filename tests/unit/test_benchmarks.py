"""The page of benchmarks holds what was measured, and every number of it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def page() -> Any:
    spec = importlib.util.spec_from_file_location("page", ROOT / "benchmarks" / "page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
