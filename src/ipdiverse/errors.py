"""Errors a user can cause. Each says in one line what, where, expected, found and the fix."""

from __future__ import annotations

import re

MAX_QUOTED = 200
"""Characters of a name, caption or other value that a message shows."""
MAX_SENTENCE = 1000
"""Characters of a sentence of ours that may hold several such values."""


def quoted(value: object, most: int | None = MAX_QUOTED) -> str:
    """A value from a user or a file as one line that is safe to print: escaped, and cut.

    Escape sequences could steer a terminal, marks of direction could reorder a line, half a
    surrogate pair cannot be printed at all, and a name of a million characters hides the message.

    Args:
        value: Anything; line breaks and tabs, as in messages of libraries, become spaces.
        most: The longest result, in characters; what is left out in the middle becomes "…".
            None leaves nothing out.
    """
    text = _cut(str(value), most)
    text = re.sub(r"\s*[\n\t]\s*", " ", text).rstrip(" ")
    escaped = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return _cut(escaped, most)  # again, as an escape is longer than what it stands for


def _cut(text: str, most: int | None) -> str:
    if most is None or len(text) <= most:
        return text
    end = most // 3  # the last part of a path tells more than its middle
    return f"{text[: most - end - 1]}…{text[-end:]}"


class IpdiverseError(Exception):
    """Base of every error that bad input causes; the command line prints it and exits with 2.

    Args:
        what: What is wrong, a short sentence without a full stop.
        where: The file, argument or key at fault.
        expected: What would have been right.
        found: What was there.
        fix: The suggested fix, a sentence.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        found: object = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.where, self.fix = what, where, fix
        self.expected, self.found = expected, found
        said = quoted(what, MAX_SENTENCE)
        parts = [f"{quoted(where)}: {said}" if where is not None else said]
        if expected is not None:  # may list every choice
            parts.append(f"expected {quoted(expected, MAX_SENTENCE)}")
        if found is not None:
            parts.append(f"found {quoted(found)}")
        line = "; ".join(parts)
        super().__init__(f"{line}. {quoted(fix, MAX_SENTENCE)}" if fix else line)


class ImageError(IpdiverseError):
    """Raised when an image file or image cannot be read, is broken, or is outside the limits."""


class ArgumentError(IpdiverseError):
    """Raised when an argument, option or combination of options cannot be used."""


class OutputError(IpdiverseError):
    """Raised when a result cannot be written, or could not be where it is asked to go."""


class ModelError(IpdiverseError):
    """Raised when a base model or adapter is unknown, missing, or not compatible."""


class CheckpointError(ModelError):
    """Raised when a checkpoint file is broken, unsafe to open, or has an unknown layout."""


class DataError(IpdiverseError):
    """Raised when a data set is missing or broken, or names files outside its folder."""


class ShapeError(IpdiverseError):
    """Raised when the shapes of tensors do not match."""


class Interrupted(Exception):  # noqa: N818 - what happened, not what went wrong
    """Raised when a signal asked a run to stop; everything up to the last step is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by signal {number}")
        self.number = number


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Refuse what is outside a range, NaN, or not a number (`ArgumentError`)."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not usable or not low <= value <= high:
        raise ArgumentError("is out of range", where=name, expected=f"{low} to {high}", found=value)


def check_whole(name: str, value: object) -> None:
    """Refuse anything but an int (`ArgumentError`); a bool is not one here."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentError(
            "is not a whole number", where=name, expected="an int", found=repr(value)
        )
