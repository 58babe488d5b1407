"""Connections and uploads: what is given up when there is too much."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("gradio", reason="the page needs gradio")

from ipdiverse.ui.safety import MAX_UPLOAD, Refused
from ipdiverse.ui.server import least_useful
from ipdiverse.ui.visitors import MAX_UPLOADS, Uploads

if TYPE_CHECKING:
    from pathlib import Path

MIB = 2**20


def connection(number: int, stage: int = 0, host: str = "10.0.0.1") -> Any:
    return SimpleNamespace(number=number, stage=stage, client=(host, 1))


def test_who_waits_for_an_answer_is_kept() -> None:
    resting, sending, waiting = connection(3), connection(2, 1), connection(1, 2)
    assert least_useful([waiting, resting, sending]) is resting
    assert least_useful([waiting, sending]) is sending


def test_a_crowd_at_one_address_loses_its_oldest_first() -> None:
    alone = connection(0, host="10.0.0.2")
    crowd = [connection(number) for number in range(1, 5)]
    assert least_useful([alone, *crowd]) is crowd[0]
    assert least_useful([SimpleNamespace(number=9, stage=0, client=None), alone]) is not None


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    return Uploads(tmp_path)


def sent(uploads: Uploads, folder: Path, owner: str | None, name: str, mib: int) -> Path:
    """An upload of a sparse file, whole."""
    ticket = uploads.begin(owner, mib * MIB)
    file = folder / name
    with file.open("wb") as opened:
        opened.truncate(mib * MIB)
    uploads.end(ticket, [file])
    return file


def test_a_visitor_loses_their_own_oldest_upload(uploads: Uploads, tmp_path: Path) -> None:
    other = sent(uploads, tmp_path, "other", "other.png", 60)
    files = [sent(uploads, tmp_path, "me", f"{n}.png", 60) for n in range(20)]
    assert other.exists()
    kept = [file for file in files if file.exists()]
    assert kept == files[-8:]
    assert sum(file.stat().st_size for file in kept) <= MAX_UPLOAD


def test_the_largest_loses_when_all_have_too_much(uploads: Uploads, tmp_path: Path) -> None:
    small = sent(uploads, tmp_path, "small", "small.png", 1)
    for owner in range(8):
        for n in range(8):
            sent(uploads, tmp_path, f"large {owner}", f"{owner}-{n}.png", 60)
    assert small.exists()
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= MAX_UPLOADS


def test_many_small_files_count_too(uploads: Uploads, tmp_path: Path) -> None:
    for n in range(2100):
        sent(uploads, tmp_path, None, f"{n}.png", 0)
    assert len(list(tmp_path.iterdir())) == 2048


def test_what_is_broken_off_still_counts_and_its_pieces_go(
    uploads: Uploads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    piece = tmp_path / "tmpx"
    piece.touch()
    for _ in range(8):
        uploads.end(uploads.begin("me", 64 * MIB), [])
    with pytest.raises(Refused, match="too many uploads are on their way"):
        uploads.begin("me", MIB)
    uploads.begin("other", MIB)
    assert piece.exists(), "it may still grow"
    os.utime(piece, (0, 0))
    monkeypatch.setattr("ipdiverse.ui.visitors.KEPT", -1.0)
    uploads.begin("me", MIB)
    assert not piece.exists()


def test_what_nobody_uses_goes_with_time(
    uploads: Uploads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = sent(uploads, tmp_path, "me", "a.png", 1)
    uploads.sweep()
    assert file.exists()
    monkeypatch.setattr("ipdiverse.ui.visitors.KEPT", -1.0)
    uploads.sweep()
    assert not file.exists()
