"""Pairs of a study: which are drawn on critters, how they are scored, and files of users' own."""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ipdiverse.critters.oracle import Reading
from ipdiverse.critters.scene import IDENTITY
from ipdiverse.errors import DataError
from ipdiverse.evaluation import pairs as pairs_module
from ipdiverse.evaluation.pairs import critters_sets, pictures, read_prompts, study_pairs
from ipdiverse.evaluation.sets import pair_sums
from tests.captions import parse

if TYPE_CHECKING:
    from pathlib import Path


def test_a_study_asks_for_edits_and_scores_them_apart() -> None:
    pairs = study_pairs(30, 3, edits=True)
    for pair in pairs:
        stated = [name for name in pair.stated if name in IDENTITY]
        assert len(stated) == 1
        assert pair.stated[stated[0]] != getattr(pair.reference, stated[0])
        assert parse(pair.prompt) == {k: pair.stated[k] for k in parse(pair.prompt)}
    references = np.array([[pair.reference.indices()] * 4 for pair in pairs])
    seen = Reading(references, np.zeros((30, 4), bool))
    parts = pair_sums(critters_sets(seen, pairs))
    assert parts["edit_accuracy"].estimate == 0, "the reference itself shows no edit"
    assert parts["retention"].estimate == 1
    plain = study_pairs(30, 3)
    assert "edit_accuracy" not in pair_sums(critters_sets(seen, plain))


TEXT = "# a note\r\na café \r\n\r\n日本 a\u2028b\r\n"


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        TEXT.replace("\r\n", "\r").encode(),
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
        TEXT.encode("utf-32"),
    ],
)
def test_prompts_are_read_as_any_editor_saves_them(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes(data)
    assert read_prompts(tmp_path / "p.txt") == ["a café", "日本 a\u2028b"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            "a café\n".encode("latin-1"),
            "cannot be read; expected a text file in UTF-8; found",
        ),
        ("a cat\n".encode("utf-16-le"), "NUL characters, as UTF-16 without a byte order mark"),
        (b"a cat\n" * 20, "is too large; expected 64 bytes"),
        (b"\xef\xbb\xbf\n# none\n", "holds no prompts"),
    ],
)
def test_prompts_that_cannot_be_read_are_one_line(
    data: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs_module, "MAX_PROMPTS_BYTES", 64)
    (tmp_path / "p.txt").write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        read_prompts(tmp_path / "p.txt")
    assert "p.txt" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["absent", "a\0b", "loop", "p" * 300])
def test_a_folder_or_file_that_cannot_be_opened_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for reads in (pictures, read_prompts):
        with pytest.raises(DataError) as caught:
            reads(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_pictures_that_cannot_be_decoded_are_not_left_out_in_silence(tmp_path: Path) -> None:
    for name in ("b.HEIC", "a.jfif", "notes.txt"):
        (tmp_path / name).touch()
    assert [file.name for file in pictures(tmp_path)] == ["a.jfif", "b.HEIC"]
