from __future__ import annotations

import itertools

import numpy as np
import pytest

from ipdiverse.critters import scene as world
from ipdiverse.critters.scene import ATTRIBUTES, IDENTITY, SCENE, Scene, conditional, marginal


def draw(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [world.sample_scene(rng) for _ in range(count)]


def test_the_world_is_as_large_as_promised() -> None:
    sizes = {name: len(values) for name, values in ATTRIBUTES.items()}
    assert np.prod([sizes[n] for n in IDENTITY]) >= 5 * 8 * 3 * 3 * 4
    assert np.prod([sizes[n] for n in SCENE]) >= 6 * 3 * 4 * 8


def test_a_value_that_does_not_exist_is_refused_by_name() -> None:
    known = draw(1)[0].as_dict() | {"colour": "mauve"}
    with pytest.raises(ValueError, match=r"colour is 'mauve'; expected one of red, orange"):
        Scene(**known)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_drawn_frequencies_follow_the_closed_form(name: str) -> None:
    count = 6000
    drawn = [getattr(s, name) for s in draw(count)]
    share = np.array([drawn.count(value) / count for value in ATTRIBUTES[name]])
    expected = marginal(name)
    # five standard deviations of a binomial share
    assert np.all(np.abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / count))


def test_the_prior_is_not_uniform_everywhere_and_sums_to_one() -> None:
    assert any(np.ptp(marginal(name)) > 0.05 for name in ATTRIBUTES)
    for name in ATTRIBUTES:
        assert marginal(name).sum() == pytest.approx(1)


def test_place_and_item_are_drawn_together_as_their_joint_prior_says() -> None:
    scenes = draw(6000)
    for (row, place), item in itertools.product(enumerate(ATTRIBUTES["place"]), ATTRIBUTES["item"]):
        column = ATTRIBUTES["item"].index(item)
        expected = marginal("place")[row] * conditional("item", {"place": place})[column]
        found = np.mean([(s.place, s.item) == (place, item) for s in scenes])
        assert found == pytest.approx(expected, abs=0.015), (place, item)


def test_place_and_item_inform_each_other_by_bayes_rule() -> None:
    joint = np.stack(
        [
            marginal("place")[i] * conditional("item", {"place": p})
            for i, p in enumerate(ATTRIBUTES["place"])
        ]
    )
    for column, item in enumerate(ATTRIBUTES["item"]):
        expected = joint[:, column] / joint[:, column].sum()
        np.testing.assert_allclose(conditional("place", {"item": item}), expected)
    assert not np.allclose(conditional("item", {"place": "moon"}), marginal("item"))


def test_splits_hold_out_identities_and_never_share_one() -> None:
    subjects: dict[str, set[str]] = {split: set() for split in world.SPLITS}
    for scene in draw(3000):
        subjects[world.split_of(scene)].add(scene.subject)
    for one, other in itertools.combinations(subjects.values(), 2):
        assert not one & other
    share = {split: len(s) / sum(map(len, subjects.values())) for split, s in subjects.items()}
    assert 0.06 < share["test"] < 0.14
    assert 0.06 < share["pairs"] < 0.17


def test_training_never_shows_two_values_of_split_pairs_together() -> None:
    drawn = {s.subject: (set(s.subject.split("-")), world.split_of(s)) for s in draw(6000)}
    holds = [
        (split, any(values >= set(p) for p in world.NEW_PAIRS)) for values, split in drawn.values()
    ]
    assert {new for split, new in holds if split == "train"} == {False}
    assert {new for split, new in holds if split == "pairs"} == {True}


def test_every_value_of_every_attribute_appears_in_each_split() -> None:
    for split in world.SPLITS:
        rng = np.random.default_rng(1)
        scenes = [world.sample_scene(rng, split=split) for _ in range(600)]
        for name, values in ATTRIBUTES.items():
            assert {getattr(s, name) for s in scenes} == set(values)


def test_a_split_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="split is 'tset'; expected one of train"):
        world.sample_scene(np.random.default_rng(0), split="tset")


def test_a_pair_keeps_the_identity_and_draws_the_scene_afresh() -> None:
    rng = np.random.default_rng(0)
    scene = draw(1)[0]
    others = [world.pair_of(scene, rng) for _ in range(50)]
    assert {other.subject for other in others} == {scene.subject}
    assert len({other.place for other in others}) > 3


def test_fixed_attributes_stay_fixed() -> None:
    rng = np.random.default_rng(0)
    scenes = [world.sample_scene(rng, {"item": "gift", "colour": "red"}) for _ in range(20)]
    assert {(s.item, s.colour) for s in scenes} == {("gift", "red")}


def test_one_attribute_is_changed_and_the_split_is_kept() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = world.sample_scene(rng, split="train")
        name, changed = world.edited(scene, rng, "train")
        assert [n for n in ATTRIBUTES if getattr(scene, n) != getattr(changed, n)] == [name]
        assert name in IDENTITY
        assert world.split_of(changed) == "train"
