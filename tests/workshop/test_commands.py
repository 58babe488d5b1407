"""`python -m workshop`: its commands, without the hours of work behind them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from workshop import gates
from workshop.__main__ import TrainBase, main
from workshop.base import shipping

if TYPE_CHECKING:
    from pathlib import Path

REPORT = {
    "images": 64,
    "steps": 25,
    "guidance": 3.0,
    "gates": {"vae_psnr": {"value": 31.0, "gate": ">= 30.0", "holds": True}},
    "figures": {"vae_psnr": 31.0},
    "details": {},
}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("gates --images 8", "images: is out of range; expected 64 to 1000000; found 8"),
        ("gates --guidance -1", "guidance: is out of range"),
        ("train-base --vae-steps 0", "vae_steps: is out of range"),
        ("train-adapters --arms selfless", "selfless: unknown arm"),
        ("copier --pairs 1", "pairs: is out of range"),
    ],
)
def test_bad_input_is_one_line_and_starts_nothing(
    words: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    out, error = capsys.readouterr()
    assert not out
    assert error.startswith(f"workshop: {line}")
    assert error.count("\n") == 1


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
    assert "| vae_psnr | 31 | >= 30.0 | yes |" in capsys.readouterr().out
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
