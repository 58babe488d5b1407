"""Describe a scene in words: natural English in varied wording."""

from __future__ import annotations

import re
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from ipdiverse.critters.scene import ATTRIBUTES, COLOURS, Scene

if TYPE_CHECKING:
    from collections.abc import Mapping

NOUNS = ("critter", "creature", "monster")

WORDINGS: Mapping[str, Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "shape": {
            "round": ("round", "circular"),
            "square": ("square", "boxy"),
            "triangular": ("triangular", "triangle-shaped"),
            "tall": ("tall", "elongated"),
            "star": ("star-shaped", "starry"),
        },
        "pattern": {
            "plain": ("plain", "unpatterned"),
            "striped": ("striped", "stripy"),
            "spotted": ("spotted", "dotted"),
        },
        "eyes": {
            "one": ("one-eyed", "with one eye"),
            "two": ("two-eyed", "with two eyes"),
            "three": ("three-eyed", "with three eyes"),
        },
        "headgear": {
            "none": ("bareheaded", "with nothing on its head"),
            "hat": ("wearing a top hat", "in a hat"),
            "crown": ("wearing a crown", "with a crown on its head"),
            "flower": ("wearing a flower", "with a flower on its head"),
        },
        "place": {
            "meadow": ("in a meadow", "on the grass"),
            "desert": ("in the desert", "among sand dunes"),
            "snow": ("in the snow", "on a snowy field"),
            "beach": ("on the beach", "at the seaside"),
            "city": ("in the city", "on a city street"),
            "moon": ("on the moon", "in outer space"),
        },
        "position": {
            "left": ("on the left", "at the left edge"),
            "middle": ("in the middle", "at the center"),
            "right": ("on the right", "at the right edge"),
        },
    }
)
"""Wordings of each value. No wording is used for two values, so a caption can be parsed back."""

_OPENINGS = ("", "", "a photo of ", "a picture of ", "a drawing of ")
_LEADING_WORDS = ("one-eyed", "two-eyed", "three-eyed", "bareheaded")


def mentioned(scene: Scene, seed: int, chance: float | None = None) -> dict[str, str]:
    """The attributes that a caption states, each with `chance`; None draws that from 0.25..1."""
    rng = np.random.default_rng(seed)
    # people's prompts are short or long, so captions must be too
    probability = 0.25 + 0.75 * rng.random() if chance is None else chance
    kept = rng.random(len(ATTRIBUTES)) < probability
    stated = zip(scene.as_dict().items(), kept, strict=True)
    return {name: value for (name, value), keep in stated if keep}


def caption(stated: Mapping[str, str], seed: int) -> str:
    """Attributes in natural English, without a full stop; the seed decides wording and order."""
    # not the stream that `mentioned` draws from: the wording must not depend on the choice there
    rng = np.random.default_rng([seed, 1])
    words = {name: _say(name, value, rng) for name, value in stated.items()}
    subject, after = _subject(words, rng), _details(words, rng)
    place = words.get("place")
    if place and rng.random() < 0.2:
        return f"{place}, {subject}" + "".join(f" {part}" for part in after)
    opening = _OPENINGS[rng.integers(len(_OPENINGS))]
    parts = [*after, place] if place else after
    return opening + subject + "".join(f" {part}" for part in parts)


def _say(name: str, value: str, rng: np.random.Generator) -> str:
    choices = WORDINGS.get(name, {}).get(value, (value,))
    return choices[rng.integers(len(choices))]


def _subject(words: Mapping[str, str], rng: np.random.Generator) -> str:
    """Article, adjectives in any order, noun: "an orange spotted critter"."""
    adjectives = [words[name] for name in ("shape", "pattern", "colour") if name in words]
    adjectives += [words[n] for n in ("eyes", "headgear") if words.get(n) in _LEADING_WORDS]
    rng.shuffle(adjectives)
    return with_article(" ".join([*adjectives, NOUNS[rng.integers(len(NOUNS))]]))


def _details(words: Mapping[str, str], rng: np.random.Generator) -> list[str]:
    """The phrases after the noun, in any order."""
    names = [n for n in ("eyes", "headgear", "position") if n in words]
    parts = [words[n] for n in names if words[n] not in _LEADING_WORDS]
    if "item" in words or "item_colour" in words:
        verb = ("holding", "carrying")[rng.integers(2)]
        parts.append(f"{verb} {_held(words.get('item'), words.get('item_colour'))}")
    rng.shuffle(parts)
    return parts


def _held(item: str | None, colour: str | None) -> str:
    if item is None:
        return f"something {colour}"
    return with_article(f"{colour} {item}" if colour else item)


def with_article(phrase: str) -> str:
    """Put "a" or "an" before a phrase, by sound: "a one-eyed", "an unpatterned"."""
    sounds_open = phrase[0] in "aeiou" and not phrase.startswith("one")
    return f"{'an' if sounds_open else 'a'} {phrase}"


def vocabulary() -> set[str]:
    """Every word that a caption can hold, hyphens split off."""
    phrases = [w for values in WORDINGS.values() for wordings in values.values() for w in wordings]
    phrases += [*NOUNS, *COLOURS, *ATTRIBUTES["item"], *_OPENINGS]
    phrases += ["a an holding carrying something", ","]
    return {word for phrase in phrases for word in re.findall(r"[a-z]+|[^\sa-z]", phrase)}
