"""References that contradict the prompt in one attribute of identity."""

from __future__ import annotations

import numpy as np

from ipdiverse.critters.make import example
from ipdiverse.critters.scene import IDENTITY, edited, sample_scene, split_of
from ipdiverse.evaluation.pairs import study_pairs
from ipdiverse.evaluation.readings import critters_sets
from ipdiverse.evaluation.sets import pair_sums
from tests.captions import parse


def different(one: object, other: object) -> list[str]:
    """Attributes of identity in which two scenes differ."""
    return [name for name in IDENTITY if getattr(one, name) != getattr(other, name)]


def test_one_attribute_is_changed_and_the_split_is_kept() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = sample_scene(rng, split="train")
        name, changed = edited(scene, rng, "train")
        assert different(scene, changed) == [name]
        assert split_of(changed) == "train"


def test_a_share_of_examples_states_what_the_reference_has_not() -> None:
    made = [example(index, 0, "train", 0.5) for index in range(200)]
    changed = [one for one in made if different(one.scene, one.other)]
    assert 70 < len(changed) < 130
    for one in changed:
        (name,) = different(one.scene, one.other)
        assert parse(one.text)[name] == getattr(one.scene, name)
    same = [example(index, 0, "train") for index in range(200)]
    assert not any(different(one.scene, one.other) for one in same)
    kept = [a.text == b.text for a, b in zip(made, same, strict=True) if a not in changed]
    assert all(kept), "the others stay as they were"


def test_a_study_asks_for_edits_and_scores_them_apart() -> None:
    pairs = study_pairs(30, 3, edits=True)
    for pair in pairs:
        stated = [name for name in pair.stated if name in IDENTITY]
        assert len(stated) == 1
        assert pair.stated[stated[0]] != getattr(pair.reference, stated[0])
        assert parse(pair.prompt) == {k: pair.stated[k] for k in parse(pair.prompt)}
    references = np.array([[pair.reference.indices()] * 4 for pair in pairs])
    valid = np.zeros((30, 4), bool)
    parts = pair_sums(critters_sets(references, valid, pairs))
    assert parts["edit_accuracy"].estimate == 0, "the reference itself shows no edit"
    assert parts["retention"].estimate == 1
    plain = study_pairs(30, 3)
    assert "edit_accuracy" not in pair_sums(critters_sets(references, valid, plain))
