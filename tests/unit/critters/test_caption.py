from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipdiverse.critters.scene import (
    ATTRIBUTES,
    NOUNS,
    WORDINGS,
    caption,
    mentioned,
    sample_scene,
    with_article,
)
from tests.captions import parse

STATED = st.fixed_dictionaries(
    {}, optional={name: st.sampled_from(values) for name, values in ATTRIBUTES.items()}
)


@given(STATED, st.integers(0, 2**31))
def test_a_caption_parses_back_to_exactly_what_it_states(stated: dict[str, str], seed: int) -> None:
    assert parse(caption(stated, seed)) == {n: stated[n] for n in ATTRIBUTES if n in stated}


@given(st.integers(0, 2**31))
def test_what_is_mentioned_belongs_to_the_scene(seed: int) -> None:
    scene = sample_scene(np.random.default_rng(seed))
    known = scene.as_dict()
    assert all(known[name] == value for name, value in mentioned(scene, seed).items())
    stated = mentioned(scene, seed)
    assert parse(caption(stated, seed)) == stated


def test_mentions_range_from_nothing_to_everything() -> None:
    scene = sample_scene(np.random.default_rng(0))
    counts = {len(mentioned(scene, seed)) for seed in range(400)}
    assert min(counts) <= 1
    assert max(counts) == len(ATTRIBUTES)
    assert mentioned(scene, 0, chance=0.0) == {}
    assert len(mentioned(scene, 0, chance=1.0)) == len(ATTRIBUTES)


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("orange critter", "an orange critter"),
        ("one-eyed critter", "a one-eyed critter"),
        ("unpatterned critter", "an unpatterned critter"),
        ("elongated monster", "an elongated monster"),
        ("umbrella", "an umbrella"),
        ("red gift", "a red gift"),
    ],
)
def test_articles_follow_the_sound(phrase: str, expected: str) -> None:
    assert with_article(phrase) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a critter in the snow", {"place": "snow"}),
        ("A RED critter, one eye, on the MOON!", {"colour": "red", "eyes": "one", "place": "moon"}),
        (
            "a critter wearing a hat holding a red balloon",
            {"headgear": "hat", "item": "balloon", "item_colour": "red"},
        ),
        ("a blue critter carrying something green", {"colour": "blue", "item_colour": "green"}),
        ("something else entirely", {}),
        ("", {}),
    ],
)
def test_prompts_that_people_write_are_read(prompt: str, expected: dict[str, str]) -> None:
    assert parse(prompt) == expected


def test_wordings_differ_and_every_one_is_used() -> None:
    scene = sample_scene(np.random.default_rng(2))
    texts = {caption(mentioned(scene, 0, 1.0), seed) for seed in range(300)}
    assert len(texts) > 250
    joined = " ".join(texts)
    assert all(noun in joined for noun in NOUNS)
    for name, values in WORDINGS.items():
        assert all(wording in joined for wording in values[getattr(scene, name)])


def test_wording_does_not_depend_on_what_is_mentioned() -> None:
    scene = sample_scene(np.random.default_rng(2))
    second = WORDINGS["pattern"][scene.pattern][1]
    texts = [
        caption(stated, seed)
        for seed in range(600)
        if {"shape", "pattern"} <= (stated := mentioned(scene, seed, 0.5)).keys()
    ]
    share = sum(second in text for text in texts) / len(texts)
    assert 0.3 < share < 0.7
