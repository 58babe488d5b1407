"""The command line: parses into one of the commands and turns errors into exit codes.

What tyro refuses is one line, like every other error.
"""

from __future__ import annotations

import io
import os
import random
import sys
import warnings
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, is_dataclass
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import tyro

from ipdiverse.commands.checkpoints import Bases, Convert, Inspect, Push
from ipdiverse.commands.cluster import Merge
from ipdiverse.commands.console import say
from ipdiverse.commands.evaluate import MOVED, Calibrate, Evaluate, Fit, read_fit
from ipdiverse.commands.generate import Demo, Generate, Ui, renamed_flags
from ipdiverse.commands.train import Critters, Embed, Prepare, Train, as_flags, spelled_out
from ipdiverse.dial import DROPPED_LEVERS, OFF, Levers
from ipdiverse.errors import MAX_SENTENCE, ArgumentError, Interrupted, IpdiverseError, quoted
from ipdiverse.levers import LEVERS
from ipdiverse.sampling.request import RENAMED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

COMMANDS: dict[str, type[Any]] = {
    kind.__name__.lower(): kind
    for kind in (
        *(Generate, Bases, Demo, Prepare, Embed, Fit, Train, Evaluate, Calibrate),
        *(Merge, Inspect, Convert, Push, Critters, Ui),
    )
}
_SHORT = {"-n": "--n", "--tiling": "--tiling=True", "--no-tiling": "--tiling=False"}
"""Short forms; tiling has a third state, left to the device."""
_REGISTRY = tyro.constructors.ConstructorRegistry()
_SIGPIPE = 13  # what ends other programs in a pipe; Windows has no name for it


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; 0 if it worked, 2 for bad input, 128 + its number if a signal stopped it."""
    for stream in (sys.stdout, sys.stderr):
        # a λ must not end in a traceback where a console, a pipe or the C locale is not Unicode
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with _short_warnings(), _all_written():
            _run(sys.argv[1:] if arguments is None else arguments)
    except IpdiverseError as error:
        sys.stderr.write(f"ipdiverse: {error}\n")
        return 2
    except Interrupted as stop:
        sys.stderr.write(f"ipdiverse: {stop}; run the same command again to continue\n")
        return 128 + stop.number
    except BrokenPipeError:  # as of `| head` when it has enough
        return 128 + _SIGPIPE
    except KeyboardInterrupt:
        sys.stderr.write("ipdiverse: interrupted\n")
        return 130
    return 0


def _run(arguments: list[str]) -> None:
    if arguments == ["--version"]:
        say(f"ipdiverse {version('ipdiverse')}")
        return
    if arguments[:1] == ["train"]:
        arguments = ["train", *as_flags(arguments[1:])]
    if arguments[:1] == ["fit"]:
        arguments = ["fit", *spelled_out(arguments[1:], read_fit)]
    if arguments[:1] == ["generate"]:
        current = _without_dropped(renamed_flags(arguments[1:], RENAMED))
        arguments = ["generate", *_with_seed(current)]
    if arguments[:1] == ["calibrate"]:
        arguments = ["calibrate", *renamed_flags(arguments[1:], {"plain": "base_weights"})]
    arguments = [_SHORT.get(word, word) for word in arguments]
    with in_one_line(arguments):
        command = tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="ipdiverse",
            args=arguments,
            description="Image prompts with variety, without losing what you asked for. "
            "`ipdiverse --version` says which version this is.",
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
            registry=_REGISTRY,
        )
    out = getattr(command, "training", command)
    for name in ("out", "folder"):
        if "://" in (found := str(getattr(out, name, ""))):
            fix = "Several commands keep a copy there: --out out --to " + found
            what = "is an address, not a folder"
            raise ArgumentError(what, where=f"--{name}", found=found, fix=fix)
    command.run()


@_REGISTRY.struct_rule
def _lever_flags(
    asked: tyro.constructors.StructTypeInfo,
) -> tyro.constructors.StructConstructorSpec | None:
    """A flag for each registered lever."""
    if asked.type is not Levers:
        return None
    default = asked.default if isinstance(asked.default, Levers) else OFF
    flags = []
    for name, lever in LEVERS.items():
        kind: Any = tuple[float, float] if lever.is_range else float
        kind = kind | None if lever.off is None else kind
        value = getattr(default, name)
        flags.append(tyro.constructors.StructFieldSpec(name, kind, value, lever.help))
    return tyro.constructors.StructConstructorSpec(Levers, tuple(flags))


def _without_dropped(words: Sequence[str]) -> list[str]:
    """Flags without those of version 0.1 that no longer act; a note names each."""
    kept: list[str] = []
    left = iter(words)
    for word in left:
        flag, equals, _ = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name in DROPPED_LEVERS and name not in LEVERS:
            warnings.warn(f"{flag} no longer acts", stacklevel=1)
            if not equals:
                next(left, None)
        else:
            kept.append(word)
    return kept


def _with_seed(words: list[str]) -> list[str]:
    """A seed in place of `--seed random`, which other tools write as -1; a note tells it."""
    found = list(words)
    for at, word in enumerate(words):
        name, _, value = word.partition("=")
        value = value or " ".join(words[at + 1 : at + 2])
        if name == "--seed" and value in ("random", "-1"):
            seed = random.SystemRandom().randrange(2**32)
            sys.stderr.write(f"note: the seed is {seed}; --seed {seed} repeats this\n")
            found[at : at + (1 if "=" in word else 2)] = [f"--seed={seed}"]
    return found


@contextmanager
def _all_written() -> Iterator[None]:
    """Flush at the end. If nobody reads any more, Python's own flush at exit must stay quiet."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        with suppress(OSError), Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        raise


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Warnings are one line each, without the place in the code."""
    before = warnings.formatwarning  # the process may go on: tests and notebooks call `main`
    warnings.formatwarning = lambda message, *_, **__: f"note: {quoted(message, MAX_SENTENCE)}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


@dataclass(frozen=True)
class _Place:
    """How far a command line was understood."""

    words: str
    flags: tuple[str, ...]
    arguments: Sequence[str]

    @property
    def help(self) -> str:
        """Which help text lists more."""
        return f"`{self.words} --help` lists all."


def in_one_line(arguments: Sequence[str]) -> AbstractContextManager[None]:
    """Raise what tyro refuses as `ArgumentError`, for the length of a `with` block."""
    try:
        from tyro import _errors  # no public way; a tyro without it says the same in boxes
    except ImportError:
        return nullcontext()

    def refuse(event: Any) -> None:
        with suppress(AttributeError):  # its fields may be others one day: boxes again
            error = _error(type(event).__name__, event, _place(arguments))
            if error is not None:
                raise error

    return _errors.on_parse_error(refuse)


def _error(kind: str, event: Any, place: _Place) -> ArgumentError | None:
    """The error for an event of tyro's; None for kinds that never come up here."""
    unknown = event.tokens if kind == "UnrecognizedArgs" else None
    if kind == "MissingArgs":  # most likely a required flag, mistyped
        unknown = event.unrecognized_tokens
    if unknown:
        return _unrecognized(unknown, place)
    if kind == "MissingArgs":
        names = [one.arg.display_name() for one in event.missing_arguments]
        what = "is missing" if len(names) == 1 else "are missing"
        return ArgumentError(what, where=", ".join(names), fix=place.help)
    if kind == "MissingSubcommand":
        if any(not one.startswith("-") for one in place.arguments):
            return _unrecognized(place.arguments, place)
        what, expected = "ipdiverse needs a command", " | ".join(COMMANDS)
        return ArgumentError(what, expected=expected, fix=place.help)
    argument = getattr(event, "argument", None)
    return None if argument is None else _bad_value(kind, event, argument, place)


def _bad_value(kind: str, event: Any, argument: Any, place: _Place) -> ArgumentError:
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
        what, where=argument.display_name(), expected=expected, found=found, fix=place.help
    )


def _unrecognized(tokens: Sequence[str], place: _Place) -> ArgumentError:
    flags = [token for token in tokens if token.startswith("-")]
    at_top = place.words == "ipdiverse"
    if at_top and (words := [one for one in place.arguments if not one.startswith("-")]):
        tokens, flags = words, []  # a command that is mistyped takes no flags
    word = (flags or tokens)[0].partition("=")[0]
    if word in MOVED and place.words == "ipdiverse evaluate":
        return ArgumentError("has moved", where=word, fix="Use `python -m workshop study --help`.")
    if flags:
        what, known = f"is not an option of {place.words}", place.flags
    elif at_top:
        what, known = "is not a command of ipdiverse", tuple(COMMANDS)
    else:
        return _left_over(word, place)
    by_letters = {name.lstrip("-"): name for name in known}
    close = get_close_matches(word.lstrip("-"), by_letters, 1)
    meant = f"Did you mean {by_letters[close[0]]}? " if close else ""
    return ArgumentError(what, where=word, fix=meant + place.help)


def _left_over(word: str, place: _Place) -> ArgumentError:
    """The error for a value behind another: `*.png` as the shell spells it out, or no quotes."""
    before = place.arguments[: place.arguments.index(word)] if word in place.arguments else ()
    flag = next((one for one in reversed(before) if one.startswith("--")), None)
    repeat = (
        f"Repeat {flag} for each value, and put quotes around one with spaces. " if flag else ""
    )
    return ArgumentError("belongs to no option", where=word, fix=repeat + place.help)


def _given(flags: Sequence[str], arguments: Sequence[str]) -> str | None:
    """The value of the last of some flags."""
    found = None
    for at, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in flags:
            found = value if equals else " ".join(arguments[at + 1 : at + 2])
    return found


def _place(arguments: Sequence[str]) -> _Place:
    name = arguments[0] if arguments else ""
    if name not in COMMANDS:
        return _Place("ipdiverse", ("--help",), arguments)
    flags = (*_flags_of(COMMANDS[name]), "--help")
    return _Place(f"ipdiverse {name}", flags, arguments)


def _flags_of(kind: Any) -> list[str]:
    """Every flag of a dataclass and of those that it holds."""
    if kind is Levers:
        return [f"--{name.replace('_', '-')}" for name in LEVERS]
    found: list[str] = []
    for name, hint in get_type_hints(kind, include_extras=True).items():
        inner = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        flag = name.replace("_", "-")
        if inner is Levers or is_dataclass(inner):
            found += _flags_of(inner)
        elif tyro.conf.Positional not in get_args(hint):
            found += [f"--{flag}", f"--no-{flag}"] if hint is bool else [f"--{flag}"]
    return found
