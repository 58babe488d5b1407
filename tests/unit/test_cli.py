"""What the command line changes in the process is as before when it has ended."""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING

import pytest

from ipdiverse.cli import main
from ipdiverse.commands.bases import Bases
from ipdiverse.errors import ArgumentError, Interrupted

if TYPE_CHECKING:
    from collections.abc import Callable


def passes() -> None:
    pass


def fails() -> None:
    raise ArgumentError("is wrong", where="x")


def is_stopped() -> None:
    raise Interrupted(15)


def is_interrupted() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("ends", "status"), [(passes, 0), (fails, 2), (is_stopped, 143), (is_interrupted, 130)]
)
def test_warnings_are_notes_for_as_long_as_a_command_runs(
    ends: Callable[[], None],
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(_: Bases) -> None:
        sys.stderr.write(warnings.formatwarning("too long", UserWarning, "file.py", 7))
        ends()

    monkeypatch.setattr(Bases, "run", run)
    before = warnings.formatwarning
    assert main(["bases"]) == status
    assert capsys.readouterr().err.startswith("note: too long\n")
    assert warnings.formatwarning is before


def test_a_word_that_is_no_command_leaves_no_trace_either() -> None:
    before = warnings.formatwarning
    with pytest.raises(SystemExit):
        main(["no-such-command"])
    assert warnings.formatwarning is before
