"""Errors a user can cause. Each says in one line what, where, expected, found and the fix."""

from __future__ import annotations


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
        parts = [f"{where}: {what}" if where is not None else what]
        if expected is not None:
            parts.append(f"expected {expected}")
        if found is not None:
            parts.append(f"found {found}")
        line = "; ".join(parts)
        super().__init__(" ".join(f"{line}. {fix}".split()) if fix else " ".join(line.split()))


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
    """Raised when a signal asked a run to stop; everything up to the last step is saved.

    Args:
        number: The signal's number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by signal {number}")
        self.number = number


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Refuse a number outside its range.

    Raises:
        ArgumentError: It is outside, NaN, or not a number.
    """
    usable = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not usable or not low <= value <= high:
        raise ArgumentError("is out of range", where=name, expected=f"{low} to {high}", found=value)


def check_whole(name: str, value: object) -> None:
    """Refuse anything but an int; a bool is not one here.

    Raises:
        ArgumentError: It is not an int.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentError(
            "is not a whole number", where=name, expected="an int", found=repr(value)
        )
