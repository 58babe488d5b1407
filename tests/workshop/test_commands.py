"""`python -m workshop`: its commands, without the hours of work behind them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from workshop import gates
from workshop.__main__ import TrainBase, main
from workshop.base import shipping

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

REPORT = {
    "images": 64,
    "steps": 25,
    "guidance": 3.0,
    "gates": {"vae_psnr": {"value": 31.0, "gate": ">= 30.0", "holds": True}},
    "figures": {"vae_psnr": 31.0},
    "details": {"faults": {"valid": {"render": 0.0}, "no eyes": {"render": 0.5}}},
}


def test_an_unknown_arm_is_one_line_and_nothing_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs"
    words = ["train-adapters", "--arms", "plain", "selfless", "--folder", str(folder)]
    assert main(words) == 2
    out, error = capsys.readouterr()
    assert not out
    assert error.startswith("workshop: selfless: unknown arm; expected plain, ")
    assert error.count("\n") == 1
    assert not folder.exists()


def test_gates_are_printed_written_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    provenance = tmp_path / "provenance.json"
    provenance.write_text('{"command": "kept"}')
    asked: list[tuple[int, float | None]] = []
    monkeypatch.setattr(gates, "check_base", lambda *given: asked.append(given) or REPORT)
    monkeypatch.setattr(shipping, "CRITTERS_PROVENANCE", provenance)
    out = tmp_path / "gates.json"
    assert main(["gates", "--images", "64", "--out", str(out), "--ship"]) == 0
    assert asked == [(64, None)]
    shown = capsys.readouterr().out
    assert "| vae_psnr | 31 | >= 30.0 | yes |" in shown
    assert "| no eyes | 0.500 |" in shown
    assert json.loads(out.read_text()) == REPORT
    made = json.loads(provenance.read_text())
    assert made["command"] == "kept"
    assert made["gates"] == {name: REPORT[name] for name in REPORT if name != "details"}


def test_the_recorded_command_has_what_differs_from_the_defaults() -> None:
    assert TrainBase()._command() == "python -m workshop train-base"
    changed = TrainBase(
        folder="/a/path", stages=("vae", "unet"), seed=3, compile=False, start="shipped"
    )
    assert changed._command() == (
        "python -m workshop train-base --seed 3 --no-compile --stages vae unet --start shipped"
    )
