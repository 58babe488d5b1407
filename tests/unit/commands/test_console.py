"""What commands print."""

from __future__ import annotations

import pytest

from ipdiverse.commands.console import note, say


def test_names_in_what_is_printed_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]):
    say("  a\x1b[2J.png\n\n    b\r\u202e.png" + "x" * 6000)
    first, empty, last = capsys.readouterr().out.splitlines()
    assert (first, empty) == (r"  a\x1b[2J.png", "")
    assert last == r"    b\r\u202e.png" + "x" * 6000


def test_a_note_is_one_line_that_ends(capsys: pytest.CaptureFixture[str]):
    note("a\x1b]0;title\x07.png\n" + "x" * 6000)
    line = capsys.readouterr().err
    assert line.startswith(r"note: a\x1b]0;title\x07.png x")
    assert line.count("\n") == 1
    assert len(line) < 1100
