"""Which reference prompts which target, and how one is changed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ipdiverse.data.manifest import Record
from ipdiverse.data.references import Choice, References, augment, parse_references
from ipdiverse.errors import ArgumentError, DataError


def record(name: str, subject: str | None, sha: str | None = None, **rest: Any) -> Record:
    made = Record(f"images/{name}.png", "", subject, None, sha or name, 8, 8, name)
    return replace(made, **rest)


RECORDS = [
    record("a", "dog"),
    record("b", "dog"),
    record("c", "dog"),
    record("a2", "dog", sha="a"),
    record("d", "cat"),
    record("e", None),
    record("f", "cat", reference="images/own.png"),
]


def chosen(weights: dict[str, float], index: int, count: int = 300) -> Counter[Choice]:
    references, rng = References(RECORDS, weights), np.random.default_rng(0)
    return Counter(references.choose(index, rng) for _ in range(count))


def test_self_is_the_target_and_augmented_the_target_changed() -> None:
    assert set(chosen({"self": 1}, 0)) == {Choice("images/a.png", augment=False)}
    assert set(chosen({"augmented": 1}, 0)) == {Choice("images/a.png", augment=True)}


def test_a_pair_is_another_image_of_the_subject_and_never_a_copy() -> None:
    drawn = chosen({"paired": 1}, 0)
    assert set(drawn) == {
        Choice("images/b.png", augment=False),
        Choice("images/c.png", augment=False),
    }
    assert min(drawn.values()) > 100, "each partner about as often"
    assert set(chosen({"paired": 1}, 4)) == {Choice("images/f.png", augment=False)}


def test_a_reference_column_comes_first() -> None:
    assert set(chosen({"paired": 1}, 6)) == {Choice("images/own.png", augment=False)}


def test_without_a_partner_a_pair_is_the_image_augmented() -> None:
    assert set(chosen({"paired": 1}, 5)) == {Choice("images/e.png", augment=True)}
    assert References(RECORDS, {"paired": 1}).paired_share == pytest.approx(6 / 7)


def test_mixed_takes_each_kind_by_its_weight() -> None:
    drawn = chosen({"self": 1, "augmented": 3}, 0, count=4000)
    assert drawn[Choice("images/a.png", augment=True)] == pytest.approx(3000, abs=120)


def test_only_pairs_of_nothing_are_refused() -> None:
    with pytest.raises(DataError, match="no image has a reference, or another image"):
        References([record("a", "x"), record("b", None)], {"paired": 1})
    References([record("a", "x")], {"paired": 1, "self": 1})


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("self", {"self": 1}),
        ("paired", {"paired": 1}),
        ("mixed:paired=0.7, augmented=0.3", {"augmented": 0.3, "paired": 0.7}),
        ("mixed:self=0,paired=2", {"paired": 2}),
    ],
)
def test_references_are_said_in_one_word_or_mixed(text: str, weights: dict[str, float]) -> None:
    assert parse_references(text) == weights


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("other", "is not a kind of reference; expected self, augmented, paired or mixed"),
        ("mixed", "is not a kind of reference"),
        ("mixed:paired", "is not a kind of reference"),
        (
            "mixed:pairs=1",
            "is not a kind of reference; expected self, augmented, paired; found pairs",
        ),
        ("mixed:self=-1", "needs weights of 0 or more"),
        ("mixed:self=nan", "needs weights of 0 or more"),
        ("mixed:self=0", "needs weights of 0 or more"),
    ],
)
def test_what_is_no_reference_is_refused(text: str, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        parse_references(text)


def test_augmenting_repeats_and_always_changes() -> None:
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (48, 40, 3), np.uint8)
    ).resize((40, 48), Image.Resampling.BICUBIC)
    results = [np.asarray(augment(image, np.random.default_rng(seed))) for seed in range(30)]
    again = np.asarray(augment(image, np.random.default_rng(3)))
    np.testing.assert_array_equal(again, results[3])
    for result in results:
        assert result.shape == (48, 40, 3)
        assert np.abs(result.astype(int) - np.asarray(image)).mean() > 3
    assert len({result.tobytes() for result in results}) == 30
