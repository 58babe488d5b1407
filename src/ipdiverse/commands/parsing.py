"""What tyro refuses on the command line, in one line."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import dataclass, is_dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import tyro

from ipdiverse.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager


@dataclass(frozen=True)
class Place:
    """How far a command line was understood.

    Args:
        words: The command, `ipdiverse critters make`.
        commands: What may follow it.
        flags: What it takes.
        arguments: All that was given.
    """

    words: str
    commands: tuple[str, ...]
    flags: tuple[str, ...]
    arguments: Sequence[str]

    def help(self) -> str:
        """Where to read on."""
        return f"`{self.words} --help` lists all."


def in_one_line(commands: Any, arguments: Sequence[str]) -> AbstractContextManager[None]:
    """Raise what tyro refuses as `ArgumentError`, for the length of a `with` block.

    Args:
        commands: A union of commands, as tyro takes it.
        arguments: Without the program's name.
    """
    try:
        from tyro import _errors  # no public way; a tyro without it says the same in boxes
    except ImportError:
        return nullcontext()

    def refuse(event: Any) -> None:
        with suppress(AttributeError):  # its fields may be others one day: boxes again
            error = _error(type(event).__name__, event, _place(commands, arguments))
            if error is not None:
                raise error

    return _errors.on_parse_error(refuse)


def _error(kind: str, event: Any, place: Place) -> ArgumentError | None:
    """Of an event of a kind; None of those that never come up here."""
    unknown = event.tokens if kind == "UnrecognizedArgs" else None
    if kind == "MissingArgs":  # most likely what is missing, mistyped
        unknown = event.unrecognized_tokens
    if unknown:
        return _unrecognized(unknown, place)
    if kind == "MissingArgs":
        names = [one.arg.display_name() for one in event.missing_arguments]
        what = "is missing" if len(names) == 1 else "are missing"
        return ArgumentError(what, where=", ".join(names), fix=place.help())
    if kind == "MissingSubcommand":
        return ArgumentError(
            f"{place.words} needs a command", expected=" | ".join(place.commands), fix=place.help()
        )
    argument = getattr(event, "argument", None)
    return None if argument is None else _bad_value(kind, event, argument, place)


def _bad_value(kind: str, event: Any, argument: Any, place: Place) -> ArgumentError:
    lowered = argument.lowered
    what, expected = "cannot be read", str(lowered.metavar).replace("{None}|", "").strip("{}")
    found = _given(lowered.name_or_flags, place.arguments)
    if kind == "InvalidChoice":
        what, expected, found = "is unknown", " | ".join(event.choices), event.value
    elif not found:
        what, found = "has no value", None
        names = {word: word.partition("=")[0].replace("_", "-") for word in place.arguments}
        unknown = [w for w in names if w.startswith("--") and names[w] not in place.flags]
        if argument.is_positional() and unknown:  # which tyro takes for this one's value
            return _unrecognized(unknown, place)
    return ArgumentError(
        what, where=argument.display_name(), expected=expected, found=found, fix=place.help()
    )


def _unrecognized(tokens: Sequence[str], place: Place) -> ArgumentError:
    flags = [token for token in tokens if token.startswith("-")]
    word = (flags or tokens)[0].partition("=")[0]
    if flags:
        what, known = f"is no option of {place.words}", place.flags
    elif place.commands:
        what, known = f"is no command of {place.words}", place.commands
    else:
        what, known = "belongs to no option", ()
    by_letters = {name.lstrip("-"): name for name in known}
    close = get_close_matches(word.lstrip("-"), by_letters, 1)
    meant = f"Did you mean {by_letters[close[0]]}? " if close else ""
    return ArgumentError(what, where=word, fix=meant + place.help())


def _given(flags: Sequence[str], arguments: Sequence[str]) -> str | None:
    """What stands behind the last of some flags."""
    found = None
    for at, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in flags:
            found = value if equals else " ".join(arguments[at + 1 : at + 2])
    return found


def _place(commands: Any, arguments: Sequence[str]) -> Place:
    words, below, flags = ["ipdiverse"], _commands(commands), ("--help",)
    for word in arguments:
        if word not in below:
            break
        hints = get_type_hints(below[word], include_extras=True)
        words.append(word)
        flags = (*(flag for name, hint in hints.items() for flag in _flags(name, hint)), "--help")
        below = {name: kind for hint in hints.values() for name, kind in _commands(hint).items()}
    return Place(" ".join(words), tuple(below), flags, arguments)


def _commands(union: Any) -> dict[str, Any]:
    """Commands of a union by their names; none of any other type."""
    marked = [get_args(one) for one in get_args(union) if get_origin(one) is Annotated]
    named = [(getattr(mark, "name", None), kind) for kind, *marks in marked for mark in marks]
    return {name: kind for name, kind in named if name is not None}


def _flags(name: str, hint: Any) -> list[str]:
    if _commands(hint) or tyro.conf.Positional in get_args(hint):
        return []
    if is_dataclass(hint):  # a config that the command holds: its fields are flags of the command
        held = get_type_hints(hint, include_extras=True)
        return [flag for field, kind in held.items() for flag in _flags(field, kind)]
    flag = name.replace("_", "-")
    return [f"--{flag}", f"--no-{flag}"] if hint is bool else [f"--{flag}"]
