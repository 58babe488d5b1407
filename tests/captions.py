"""Read back what a caption says, or a prompt in the same words ("a critter in the snow")."""

from __future__ import annotations

import re

from ipdiverse.critters.scene import ATTRIBUTES, COLOURS, WORDINGS


def parse(text: str) -> dict[str, str]:
    """The attributes that a text states, in the order of `ATTRIBUTES`.

    Args:
        text: A caption, or a prompt in the same words; unknown words are ignored.
    """
    text = " ".join(re.findall(r"[a-z-]+", text.lower()))
    found: dict[str, str] = {}
    held = _HELD.search(text)
    if held:
        found |= {k: v for k, v in (("item_colour", held["colour"]), ("item", held["item"])) if v}
        text = text[: held.start()] + text[held.end() :]
    for name, pattern, value in _PATTERNS:
        if pattern.search(text):
            found.setdefault(name, value)
    return {name: found[name] for name in ATTRIBUTES if name in found}


def _wording_patterns() -> list[tuple[str, re.Pattern[str], str]]:
    patterns = [
        (name, re.compile(rf"(?<![\w-]){re.escape(wording)}(?![\w-])"), value)
        for name, values in WORDINGS.items()
        for value, wordings in values.items()
        for wording in wordings
    ]
    patterns += [("eyes", re.compile(rf"\b{count} eyes?\b"), count) for count in ATTRIBUTES["eyes"]]
    patterns += [
        ("headgear", re.compile(rf"\b(?:in|wearing|with) an? (?:top )?{word}\b"), word)
        for word in ("hat", "crown", "flower")
    ]
    patterns += [("colour", re.compile(rf"(?<![\w-]){c}(?![\w-])"), c) for c in COLOURS]
    return patterns


_PATTERNS = _wording_patterns()
_HELD = re.compile(
    r"\b(?:holding|carrying) (?:an? |something ?)"
    rf"(?:(?P<colour>{'|'.join(COLOURS)})\b ?)?(?P<item>{'|'.join(ATTRIBUTES['item'])})?"
)
