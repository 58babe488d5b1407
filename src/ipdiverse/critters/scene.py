"""Scenes of critters: attributes, their prior in closed form, splits, pairs, and captions.

A scene is a value. Everything random about drawing or describing one comes from a seed that is
passed along with it, so the same (scene, seed) always gives the same image and the same caption.
"""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

WORLD: Mapping[str, Any] = MappingProxyType(
    tomllib.loads(Path(__file__).with_name("world.toml").read_text("utf-8"))
)
"""Every table of `world.toml`, which says what each is."""

ATTRIBUTES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {name: tuple(values) for name, values in WORLD["attributes"].items()}
)
"""Every attribute and its values, identity first. The order is the oracle's order of heads."""

COLOURS = ATTRIBUTES["colour"]

IDENTITY = ("shape", "colour", "pattern", "eyes", "headgear")
"""Attributes that the image prompt should keep."""

SCENE = ("place", "position", "item", "item_colour")
"""Attributes that a text can ask for, and that may vary when it does not."""

SPLITS = ("train", "validation", "test", "pairs")
"""`validation` and `test` hold out combinations whose values training has seen, also two by two;
`pairs` holds out identities with two values that training never sees together."""

NEW_PAIRS = (
    *(("round", "purple"), ("square", "yellow"), ("tall", "cyan"), ("star", "green")),
    ("triangular", "flower"),
)
"""Values of identity that no scene of split `train` shows together. `test` and `validation` are by
hash alone, so that they stay as they were published; a few of their identities have such a pair."""


@dataclass(frozen=True, slots=True)
class Scene:
    """One creature in one place, exactly known.

    Raises:
        ValueError: A field has a value that `ATTRIBUTES` does not list.
    """

    shape: str
    colour: str
    pattern: str
    eyes: str
    headgear: str
    place: str
    position: str
    item: str
    item_colour: str

    def __post_init__(self) -> None:
        for field in fields(self):
            value, allowed = getattr(self, field.name), ATTRIBUTES[field.name]
            if value not in allowed:
                raise ValueError(f"{field.name} is {value!r}; expected one of {', '.join(allowed)}")

    def as_dict(self) -> dict[str, str]:
        """Attribute name to value, in the order of `ATTRIBUTES`."""
        return asdict(self)

    def indices(self) -> tuple[int, ...]:
        """The value's index for each attribute, in the order of `ATTRIBUTES`."""
        return tuple(ATTRIBUTES[name].index(getattr(self, name)) for name in ATTRIBUTES)

    @property
    def subject(self) -> str:
        """The identity as one word, equal exactly for scenes of the same creature."""
        return "-".join(getattr(self, name) for name in IDENTITY)


def marginal(name: str) -> np.ndarray:
    """Prior probabilities of one attribute, (number of values,), in closed form.

    Every attribute is independent of the others, except `item`, which depends on `place`; its
    marginal is Σ_place P(place) P(item | place).
    """
    if name == "item":
        return marginal("place") @ np.array(
            [WORLD["prior_of_item"][p] for p in ATTRIBUTES["place"]]
        )
    count = len(ATTRIBUTES[name])
    return np.array(WORLD["prior"].get(name, (1 / count,) * count))


def conditional(name: str, given: Mapping[str, str]) -> np.ndarray:
    """Prior of one attribute when others are known, (number of values,), by Bayes' rule."""
    if name in given:
        return np.array([float(value == given[name]) for value in ATTRIBUTES[name]])
    if name == "item" and "place" in given:
        return np.array(WORLD["prior_of_item"][given["place"]])
    if name == "place" and "item" in given:
        column = ATTRIBUTES["item"].index(given["item"])
        joint = marginal("place") * [WORLD["prior_of_item"][p][column] for p in ATTRIBUTES["place"]]
        return joint / joint.sum()
    return marginal(name)  # of a scene's attributes, only place and item inform each other


def sample_scene(
    rng: np.random.Generator, given: Mapping[str, str] | None = None, split: str | None = None
) -> Scene:
    """Draw a scene from the prior; of a split's identities alone, by rejection."""
    if split is not None and split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    fixed = dict(given or {})
    for _ in range(10_000):  # about one draw in ten is of the rarest split
        known = dict(fixed)
        for name in ATTRIBUTES:
            if name not in known:
                cumulative = _cumulative(name, known.get("place"), known.get("item"))
                known[name] = ATTRIBUTES[name][cumulative.searchsorted(rng.random(), "right")]
        scene = Scene(**known)
        if split is None or split_of(scene) == split:
            return scene
    raise ValueError(f"no identity of split {split!r} agrees with {fixed}")


@cache
def _cumulative(name: str, place: str | None, item: str | None) -> np.ndarray:
    """Cumulative prior of one attribute; `rng.choice` would check and sum it for every draw."""
    known = {k: v for k, v in (("place", place), ("item", item)) if v is not None}
    total = conditional(name, known).cumsum()
    return total / total[-1]


@cache
def _split_of_subject(subject: str) -> str:
    # not `hash`, which differs from one process to the next
    bucket = hashlib.sha256(subject.encode()).digest()[0] % 10
    values = set(subject.split("-"))
    unseen = any(values.issuperset(pair) for pair in NEW_PAIRS)
    return {0: "test", 1: "validation"}.get(bucket, "pairs" if unseen else "train")


def split_of(scene: Scene) -> str:
    """The split of a scene's identity: about 10 % test, 10 % validation, 11 % pairs, else train.

    By hash of the identity, so it does not depend on library versions or the order of drawing.
    """
    return _split_of_subject(scene.subject)


def edited(scene: Scene, rng: np.random.Generator, split: str | None = None) -> tuple[str, Scene]:
    """Change one attribute of identity, within a split: its name, and the changed scene."""
    for _ in range(1000):
        name = str(rng.choice(IDENTITY))
        others = [value for value in ATTRIBUTES[name] if value != getattr(scene, name)]
        changed = replace(scene, **{name: str(rng.choice(others))})
        if split is None or split_of(changed) == split:
            return name, changed
    raise ValueError(f"no identity of split {split!r} is one attribute from {scene.subject}")


def pair_of(scene: Scene, rng: np.random.Generator) -> Scene:
    """Another scene of the same creature: identity kept, scene attributes drawn anew."""
    known = scene.as_dict()
    fresh = sample_scene(rng, {name: known[name] for name in IDENTITY})
    return replace(scene, **{name: getattr(fresh, name) for name in SCENE})


NOUNS = ("critter", "creature", "monster")

WORDINGS: Mapping[str, Mapping[str, list[str]]] = MappingProxyType(WORLD["wordings"])
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
