"""Shards: whole or absent, never stale, computed once."""

from __future__ import annotations

import pickle
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from ipdiverse.data import cache
from ipdiverse.data.cache import RowReader, Rows
from ipdiverse.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def rows(folder: Path, count: int = 10) -> Rows:
    return Rows(folder, "x", [f"content {i}" for i in range(count)], "settings", size=4)


def compute(
    rows: Rows,
    make: Callable[[range], dict[str, torch.Tensor]],
    progress: Callable[[int], object] = lambda _: None,
) -> int:
    """What is missing; how many shards that was."""
    missing = rows.missing()
    cache.compute(rows, make, missing, progress)
    return len(missing)


def make(span: range) -> dict[str, torch.Tensor]:
    values = torch.tensor([float(i) for i in span])
    return {"value": values, "square": (values**2)[:, None].repeat(1, 3)}


def test_rows_come_back_one_by_one(tmp_path: Path) -> None:
    seen: list[int] = []
    assert compute(rows(tmp_path), make, seen.append) == 3
    assert seen == [4, 4, 2]
    reader = RowReader(rows(tmp_path))
    for index in (9, 0, 5):
        assert reader[index]["value"] == index
        assert torch.equal(reader[index]["square"], torch.full((3,), float(index**2)))
    for index in (-1, 10):
        with pytest.raises(IndexError):
            reader[index]
    copy = pickle.loads(pickle.dumps(reader))  # noqa: S301 - as a worker process gets it
    assert copy[7]["value"] == 7


def test_an_interrupted_run_repeats_only_the_shard_it_was_in(tmp_path: Path) -> None:
    spans: list[range] = []

    def stops(span: range) -> dict[str, torch.Tensor]:
        spans.append(span)
        if span.start == 4 and len(spans) == 2:
            raise KeyboardInterrupt
        return make(span)

    with pytest.raises(KeyboardInterrupt):
        compute(rows(tmp_path), stops)
    assert compute(rows(tmp_path), stops) == 2
    assert [span.start for span in spans] == [0, 4, 4, 8]
    assert compute(rows(tmp_path), stops) == 0


def test_a_shard_of_other_content_or_settings_is_computed_again(tmp_path: Path) -> None:
    compute(rows(tmp_path), make)
    changed = replace(rows(tmp_path), contents=["other", *rows(tmp_path).contents[1:]])
    assert [changed.is_done(shard) for shard in range(3)] == [False, True, True]
    with pytest.raises(DataError, match=r"x-00000\.safetensors: is missing, broken, or of other"):
        RowReader(changed)
    assert compute(changed, make) == 1
    assert compute(replace(changed, settings="others"), make) == 3


def test_a_cut_off_shard_is_no_shard(tmp_path: Path) -> None:
    compute(rows(tmp_path), make)
    file = rows(tmp_path).file(1)
    file.write_bytes(file.read_bytes()[:60])
    assert not rows(tmp_path).is_done(1)
    with pytest.raises(DataError, match=r"x-00001.*Run `ipdiverse embed` again"):
        RowReader(rows(tmp_path))
    with pytest.warns(UserWarning, match="x-00001.safetensors: is damaged, and is computed again"):
        assert compute(rows(tmp_path), make) == 1
    assert RowReader(rows(tmp_path))[5]["value"] == 5


def test_any_flipped_bit_of_a_shard_is_found_and_only_that_shard_made_again(
    tmp_path: Path,
) -> None:
    compute(rows(tmp_path), make)
    file = rows(tmp_path).file(1)
    whole = file.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            missing = rows(tmp_path).missing()
        if missing != [1]:  # blanks that fill up the header hold nothing
            assert whole[place] == ord(" ")
            assert missing == []
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.warns(UserWarning, match="is damaged"):
        assert compute(rows(tmp_path), make) == 1
    assert file.read_bytes() == whole, "the same bytes, whenever it is made"


def test_a_shard_of_version_0_1_has_no_hash_and_is_kept(tmp_path: Path) -> None:
    for shard in range(3):
        tensors = make(rows(tmp_path).span(shard))
        save_file(tensors, rows(tmp_path).file(shard), {"key": rows(tmp_path).key(shard)})
    assert compute(rows(tmp_path), make) == 0
