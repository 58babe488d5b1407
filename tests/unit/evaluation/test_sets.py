"""Scores of sets against samplers whose behaviour is known."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ipdiverse.errors import ArgumentError, ShapeError
from ipdiverse.evaluation import sets as m
from ipdiverse.evaluation.metrics import entropy_miller_madow, expected_entropy, jensen_shannon

UNIFORM = np.full(4, 0.25)
SKEWED = np.array([0.5, 0.3, 0.2])
N_VALUES = (3, 4, 3, 4)  # one identity attribute, three of the scene
PRIORS = [np.full(3, 1 / 3), UNIFORM, SKEWED, np.array([0.4, 0.3, 0.2, 0.1])]


def entropy(prior: np.ndarray) -> float:
    return float(-(prior * np.log(prior)).sum())


def world(
    groups: int = 300, images: int = 8, copier: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Prompts that state identity or the first scene attribute, and a sampler without faults."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return np.stack([rng.choice(len(p), size=shape, p=p) for p in PRIORS], axis=-1)

    references, wanted, outputs = draw(groups), draw(groups), draw(groups, images)
    stated = rng.random((groups, 4)) < [0.5, 0.5, 0, 0]
    if copier:
        outputs[:] = references[:, None]
    else:
        outputs[:, :, 0] = references[:, None, 0]
        outputs = np.where(stated[:, None], wanted[:, None], outputs)
    return {
        "outputs": outputs,
        "invalid": np.zeros((groups, images), dtype=bool),
        "references": references,
        "stated": stated,
        "wanted": wanted,
        "identity": np.array([True, False, False, False]),
        "n_values": N_VALUES,
        "priors": [PRIORS] * groups,
    }


def score(sets: dict[str, Any]) -> m.SetScores:
    return m.score_sets(m.Sets(**sets))


class TestScoreSets:
    @pytest.mark.parametrize("images", [2, 8, 32])
    def test_perfect_sampler(self, images: int):
        scores = score(world(images=images))
        assert scores.prompt_accuracy == scores.agree_accuracy == scores.contradict_accuracy == 1
        assert scores.retention == 1
        assert scores.entropy == pytest.approx(1, abs=0.05)
        assert scores.pooled_entropy == pytest.approx(1, abs=0.02)
        assert scores.js < 0.06
        assert scores.leak == pytest.approx(0, abs=0.01)
        assert scores.copy_rate == pytest.approx(0, abs=0.03)
        assert (scores.invalid_rate, scores.n) == (0, 300 * images)

    def test_copier(self):
        scores = score(world(groups=1000, copier=True))
        assert (scores.retention, scores.agree_accuracy, scores.contradict_accuracy) == (1, 1, 0)
        assert scores.entropy == 0
        assert scores.leak == pytest.approx(np.mean([entropy(p) for p in PRIORS[1:]]), abs=0.03)
        assert scores.copy_rate > 0.85
        assert scores.pooled_entropy == pytest.approx(1, abs=0.02)

    def test_spreading_out_more_than_the_world_shows_in_js(self):
        sets, rng = world(), np.random.default_rng(3)
        for attribute in (2, 3):
            sets["outputs"][:, :, attribute] = rng.integers(N_VALUES[attribute], size=(300, 8))
        assert score(sets).entropy > 1
        assert score(sets).js > 0.1

    def test_order_of_groups_is_irrelevant(self):
        sets = world(groups=40)
        turned = {k: v if k in ("identity", "n_values") else v[::-1] for k, v in sets.items()}
        one, other = score(sets), score(turned)
        for name in ("prompt_accuracy", "retention", "entropy", "js", "copy_rate"):
            assert getattr(one, name) == pytest.approx(getattr(other, name))

    def test_conditionals_that_differ_are_not_pooled(self):
        sets = world(groups=200, images=16)
        ends = [[*PRIORS[:2], np.eye(3)[g % 2], PRIORS[3]] for g in range(200)]
        sets["outputs"][:, :, 2] = (np.arange(200) % 2)[:, None]
        right = score(sets | {"priors": ends})
        wrong = score(sets | {"priors": ends[1:] + ends[:1]})
        assert right.js < 0.06
        assert wrong.js > 0.3
        assert right.entropy == pytest.approx(1, abs=0.05)

    def test_what_nothing_defines_is_nan(self):
        sets = world(groups=5)
        sets |= {"stated": np.ones((5, 4), dtype=bool), "wanted": sets["references"]}
        undefined = ("contradict_accuracy", "retention", "entropy", "js", "leak", "copy_rate")
        assert all(math.isnan(getattr(score(sets), name)) for name in undefined)

    def test_invalid_images_are_reported_and_still_counted(self):
        sets = world(groups=10)
        clean = score(sets)
        scores = score(sets | {"invalid": np.arange(80).reshape(10, 8) % 4 == 0})
        assert scores.invalid_rate == 0.25
        assert (scores.entropy, scores.retention) == (clean.entropy, clean.retention)

    def test_identity_is_told_by_attribute_and_by_its_worst(self):
        sets = world(groups=30) | {"identity": np.array([True, True, False, False])}
        found = m.pair_sums(m.Sets(**sets, names=("a", "b", "c", "d")))
        by = {name: part.estimate for name, part in found.items() if name.startswith("retention ")}
        scores = m.score_sets(m.Sets(**sets, names=("a", "b", "c", "d")))
        assert {f"retention {name}": v for name, v in scores.retention_by.items()} == by
        assert by["retention a"] == 1, "the sampler keeps the first attribute"
        assert scores.retention_worst == by["retention b"] < scores.retention < 1

    def test_what_was_asked_for_needs_prompt_identity_and_validity_at_once(self):
        sets = world(groups=10)
        whole = sets | {"outputs": sets["references"][:, None].repeat(8, 1)}
        whole |= {"wanted": sets["references"], "invalid": np.zeros((10, 8), bool)}
        assert score(whole).asked_for == 1
        broken = whole | {"invalid": np.arange(80).reshape(10, 8) % 4 == 0}
        assert score(broken).asked_for == 0.75
        assert math.isnan(score(whole | {"invalid": None}).asked_for)
        other = whole["outputs"].copy()
        kept = int(np.flatnonzero(np.asarray(sets["identity"]))[0])
        other[:, ::2, kept] = (other[:, ::2, kept] + 1) % sets["n_values"][kept]
        assert score(whole | {"outputs": other}).asked_for == 0.5

    def test_a_copier_of_placement_leaks_and_a_free_sampler_does_not(self):
        rng, sets = np.random.default_rng(0), world(groups=200)
        references = rng.integers(4, size=(200, 2))
        free = rng.integers(4, size=(200, 8, 2))
        leaks = [
            score(sets | {"placement": m.Placement(outputs, references, (4, 4))}).placement_leak
            for outputs in (references[:, None].repeat(8, 1), free)
        ]
        assert leaks[0] > 0.9 * math.log(4)
        assert abs(leaks[1]) < 0.01
        assert math.isnan(score(sets).placement_leak)


class TestPairSums:
    """Three groups of two images, two scene attributes and one of identity, counted by hand."""

    SETS = m.Sets(
        outputs=np.array([[[0, 1, 2], [0, 0, 2]], [[2, 2, 0], [1, 1, 0]], [[0, 0, 1], [0, 0, 0]]]),
        invalid=np.array([[0, 0], [0, 1], [0, 0]]),
        references=np.array([[0, 1, 2], [2, 0, 1], [0, 0, 1]]),
        stated=np.array([[False, False, False], [False, True, False], [True, True, True]]),
        wanted=np.array([[9, 9, 9], [9, 2, 9], [0, 1, 0]]),
        identity=np.array([False, False, True]),
        n_values=(3, 3, 3),
        priors=[[[0.2, 0.3, 0.5], [0.5, 0.5, 0.0], []], [[0.4, 0.3, 0.3], [], []], [[], [], []]],
    )

    def test_what_each_pair_adds_and_how_much_it_weighs(self):
        found = m.pair_sums(self.SETS)
        two = entropy_miller_madow([1, 1, 0])  # the first pair's other attribute shows one value
        first, second = (
            two / expected_entropy(prior, 2) for prior in ((0.5, 0.5, 0.0), (0.4, 0.3, 0.3))
        )
        assert {name: (list(p.total), list(p.weight)) for name, p in found.items()} == {
            "edit_accuracy": ([0, 0, 1], [0, 0, 2]),
            "prompt_accuracy": ([0, 1, 3], [0, 2, 6]),
            "agree_accuracy": ([0, 0, 2], [0, 0, 2]),
            "contradict_accuracy": ([0, 1, 1], [0, 2, 4]),
            "retention": ([2, 0, 0], [2, 2, 0]),
            "retention 2": ([2, 0, 0], [2, 2, 0]),
            "asked_for": ([2, 0, 0], [2, 2, 2]),
            "entropy": (pytest.approx([first, second, 0]), [2, 1, 0]),
            "copy_rate": (pytest.approx([1 / 2 - 0.2 * 0.5, 1 / 2 - 0.3, 0]), [1, 1, 0]),
            "invalid_rate": ([0, 1, 0], [2, 2, 2]),
        }

    def test_every_score_of_a_set_is_its_parts_over_their_weight(self):
        scores, found = m.score_sets(self.SETS), m.pair_sums(self.SETS)
        for name, part in found.items():
            by = scores.retention_by.get(name.removeprefix("retention "))
            assert (
                getattr(scores, name, by) == part.estimate == part.total.sum() / part.weight.sum()
            )

    def test_parts_of_pairs_that_follow_each_other_are_joined(self):
        one = m.pair_sums(self.SETS)
        found = m.concatenated([one, one])
        assert found.keys() == one.keys()
        for name, part in found.items():
            assert part.weight.tolist() == [*one[name].weight, *one[name].weight]
            assert part.estimate == pytest.approx(one[name].estimate)
        assert m.concatenated([]) == {}

    def test_pools_hold_groups_of_one_conditional_and_weights_draw_them(self):
        found = m.pools(self.SETS)
        assert [pool.groups for pool in found] == [[0], [0], [1]]
        assert np.array([p.counts for p in found]).tolist() == [
            [[2, 0, 0]],
            [[1, 1, 0]],
            [[0, 1, 1]],
        ]
        first, other = self.SETS.priors[0][:2]
        same = replace(self.SETS, priors=[self.SETS.priors[0], [first, [], []], [[], [], []]])
        found = m.pools(same)
        assert [pool.groups for pool in found] == [[0, 1], [0]]
        apart = jensen_shannon([2, 3, 3], first), jensen_shannon([1, 1, 0], other)
        assert m.distance(found, np.array([1, 3, 0])) == pytest.approx(
            (4 * apart[0] + apart[1]) / 5
        )
        assert m.distance(found, np.array([0, 1, 0])) == jensen_shannon([0, 1, 1], first)
        assert math.isnan(m.distance(found, np.array([0, 0, 1])))

    def test_a_group_that_is_drawn_twice_counts_as_two(self):
        kept, once = ("identity", "n_values"), world(groups=4, copier=True)
        twice: dict[str, Any] = {k: v if k in kept else [*v, *v] for k, v in once.items()}
        drawn = np.tile(np.arange(4), 2)
        assert m.leaked(m.Sets(**once), drawn) == pytest.approx(score(twice).leak)


class TestAgreement:
    def test_splits_what_is_stated(self):
        agree, differ = m.agreement_masks([[0, 1, 2]], [[0, 0, 2]], [[True, True, False]])
        assert agree.tolist() == [[True, False, False]]
        assert differ.tolist() == [[False, True, False]]


def scored(**change: Any) -> Any:
    return lambda: score(world(groups=5) | change)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (scored(invalid=np.zeros((5, 3))), ShapeError, r"invalid: shapes .*\(5, 8\)"),
        (scored(identity=[True]), ShapeError, r"identity: shapes .* \(4,\); found \(1,\)"),
        (scored(priors=[]), ShapeError, r"priors: shapes do not fit; expected \(5,\)"),
        (scored(outputs=np.zeros((5, 4))), ShapeError, "outputs: dimensions; expected 3; found 2"),
        (scored(outputs=np.full((5, 8, 4), 3)), ArgumentError, "outputs: value out of range"),
        (scored(references=np.zeros((5, 4))), ArgumentError, r"references: value .* indices 0..2"),
        (scored(wanted=np.full((5, 4), 9)), ArgumentError, "wanted: value out of range"),
        (scored(priors=[[UNIFORM] * 4] * 5), ShapeError, "prior: shapes do not fit"),
    ],
)
def test_errors_say_what_and_where(call: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        call()
