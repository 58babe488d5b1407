"""A bit that flips in a file that a run reads is found before the file is used."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ipdiverse.data import prepare as preparing
from ipdiverse.data.manifest import read_manifest
from ipdiverse.data.prepare import PrepareOptions, prepare
from ipdiverse.errors import DataError
from ipdiverse.evaluation.images import is_whole


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "s"
    folder.mkdir()
    for number, letter in enumerate("abc"):
        Image.new("RGB", (96, 96), (40 * number, 80, 200)).save(folder / f"{letter}.png")
        (folder / f"{letter}.txt").write_text(f"a picture {letter}")
    return folder


def flipped(whole: bytes, place: int) -> bytes:
    damaged = bytearray(whole)
    damaged[place] ^= 1
    return bytes(damaged)


def test_a_flipped_bit_in_a_manifest_is_found_before_it_is_used(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "d"
    prepare(str(source), out, PrepareOptions())
    file = out / "metadata.jsonl"
    whole = file.read_bytes()
    for place in range(0, len(whole), 40):
        file.write_bytes(flipped(whole, place))
        with pytest.raises(DataError, match=r"metadata\.jsonl: is not as prepare wrote it.*again"):
            read_manifest(out)
        with pytest.raises(
            DataError, match=r"metadata\.jsonl: was edited .* is damaged.*delete it"
        ):
            prepare(str(source), out, PrepareOptions())
    file.write_bytes(whole[:-9])
    with pytest.raises(DataError, match="1 of 3 lines are broken"):
        prepare(str(source), out, PrepareOptions(keep_edits=True))
    file.unlink()  # to have the source's own again
    prepare(str(source), out, PrepareOptions())
    assert file.read_bytes() == whole
    assert len(read_manifest(out)) == 3


def test_a_damaged_journal_is_no_journal(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(preparing, "manifest_text", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare(str(source), tmp_path / "d", PrepareOptions())
    journal = tmp_path / "d" / preparing.JOURNAL
    whole = journal.read_bytes()
    lines = set(whole.decode().split("\n"))
    assert len(preparing._Journal(journal).lines) == 3
    for place in range(0, len(whole), 25):
        journal.write_bytes(flipped(whole, place))
        assert set(preparing._Journal(journal).lines.values()) < lines, "whole lines alone"
    journal.write_bytes(whole.replace(b"a picture b", b"a picture q"))
    prepare(str(source), tmp_path / "d", PrepareOptions())
    assert [r.text for r in read_manifest(tmp_path / "d")] == [f"a picture {n}" for n in "abc"]


@pytest.mark.parametrize("name", ["prepare.json", "report.json"])
def test_other_files_of_a_data_set_are_refused_or_made_again(
    name: str, source: Path, tmp_path: Path
) -> None:
    prepare(str(source), tmp_path / "d", PrepareOptions())
    file = tmp_path / "d" / name
    whole = file.read_bytes()
    file.write_bytes(flipped(whole, len(whole) // 2))
    if name == "prepare.json":
        with pytest.raises(DataError, match=r"prepare\.json: was not written by prepare"):
            prepare(str(source), tmp_path / "d", PrepareOptions())
    else:
        prepare(str(source), tmp_path / "d", PrepareOptions())
        assert file.read_bytes() == whole


def test_damaged_images_of_a_study_are_drawn_again(tmp_path: Path) -> None:
    buffer, file = BytesIO(), tmp_path / "0.npz"
    images = np.random.default_rng(0).integers(0, 255, (4, 8, 8, 3), np.uint8)
    np.savez_compressed(buffer, images=images)
    whole = buffer.getvalue()
    found = 0
    for place in range(len(whole)):
        file.write_bytes(flipped(whole, place))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            if is_whole(file):  # a date or a flag that nobody reads
                assert np.array_equal(np.load(file)["images"], images)
            else:
                assert "0.npz: is damaged, and is drawn again" in str(said[0].message)
                found += 1
    assert found > 0.8 * len(whole)
    file.write_bytes(whole)
    assert is_whole(file)
    assert not is_whole(tmp_path / "1.npz")
