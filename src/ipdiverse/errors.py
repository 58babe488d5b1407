"""Errors a user can cause. Each says in one line what, where, expected, found and the fix."""

from __future__ import annotations


class IpdiverseError(Exception):
    """Base of every error that bad input causes; the command line prints it and exits with 2.

    Args:
        what: What is wrong, a short sentence without a full stop.
        where: The file, argument or key at fault.
        expected: What would have been right.
        found: What was there.
        fix: What most likely mends it.
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
        self.what, self.where, self.expected, self.found, self.fix = (
            what,
            where,
            expected,
            found,
            fix,
        )
        parts = [f"{where}: {what}" if where is not None else what]
        if expected is not None:
            parts.append(f"expected {expected}")
        if found is not None:
            parts.append(f"found {found}")
        line = "; ".join(parts)
        super().__init__(" ".join(f"{line}. {fix}".split()) if fix else " ".join(line.split()))


class ImageError(IpdiverseError):
    """An image cannot be read or is not acceptable."""


class ArgumentError(IpdiverseError):
    """An argument or option has an impossible value."""


class OutputError(IpdiverseError):
    """A result cannot be written."""


class ModelError(IpdiverseError):
    """A base model or adapter is unknown, missing, or does not fit."""


class CheckpointError(ModelError):
    """A checkpoint file is broken, hostile, or of another layout."""


class DataError(IpdiverseError):
    """A data set is missing, broken, or leaves its folder."""


class ShapeError(IpdiverseError):
    """Tensors do not fit together."""


class Interrupted(Exception):  # noqa: N818 - what happened, not what went wrong
    """A signal asked the run to stop; everything up to the last step is saved.

    Args:
        number: The signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by signal {number}")
        self.number = number


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Refuse a number outside its range.

    Raises:
        ArgumentError: It is outside, not a number, or no number at all.
    """
    usable = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not usable or not low <= value <= high:
        raise ArgumentError("is out of range", where=name, expected=f"{low} to {high}", found=value)


def check_whole(name: str, value: object) -> None:
    """Refuse what is no whole number.

    Raises:
        ArgumentError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentError("is no whole number", where=name, expected="an int", found=repr(value))
