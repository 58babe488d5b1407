"""The command line: parses into one of the commands and turns errors into exit codes."""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from ipdiverse.commands.bases import Bases
from ipdiverse.commands.checkpoints import Convert, Inspect, Push
from ipdiverse.commands.critters import Critters
from ipdiverse.commands.evaluate import Calibrate, Evaluate
from ipdiverse.commands.generate import Demo, Generate
from ipdiverse.commands.parsing import in_one_line
from ipdiverse.commands.train import Embed, Prepare, Train, as_flags
from ipdiverse.commands.ui import Ui
from ipdiverse.errors import Interrupted, IpdiverseError

if TYPE_CHECKING:
    from collections.abc import Iterator

Command = (
    Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Bases, tyro.conf.subcommand("bases")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Prepare, tyro.conf.subcommand("prepare")]
    | Annotated[Embed, tyro.conf.subcommand("embed")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Calibrate, tyro.conf.subcommand("calibrate")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Push, tyro.conf.subcommand("push")]
    | Annotated[Critters, tyro.conf.subcommand("critters")]
    | Annotated[Ui, tyro.conf.subcommand("ui")]
)

_SWITCHES = {"--tiling": "--tiling=True", "--no-tiling": "--tiling=False"}
"""Short forms of a switch that has a third state: left to the device."""


_SIGPIPE = 13  # which ends other programs there; Windows does not name it


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; 0 when it worked, 2 for bad input, 128 + its number when a signal stopped it.

    Args:
        arguments: Without the program's name; None takes the process's own.
    """
    try:
        with _short_warnings(), _all_written():
            _run(sys.argv[1:] if arguments is None else arguments)
    except IpdiverseError as error:
        sys.stderr.write(f"ipdiverse: {error}\n")
        return 2
    except Interrupted as stop:
        sys.stderr.write(f"ipdiverse: {stop}; the same command goes on from there\n")
        return 128 + stop.number
    except BrokenPipeError:  # as of `| head` when it has enough
        return 128 + _SIGPIPE
    except KeyboardInterrupt:
        sys.stderr.write("ipdiverse: interrupted\n")
        return 130
    return 0


def _run(arguments: list[str]) -> None:
    if arguments[:1] == ["train"]:
        arguments = ["train", *as_flags(arguments[1:])]
    arguments = [_SWITCHES.get(word, word) for word in arguments]
    with in_one_line(Command, arguments):
        command = tyro.cli(
            Command,  # type: ignore[arg-type]
            prog="ipdiverse",
            args=arguments,
            description="Image prompts with variety, without losing what you asked for.",
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        )
    command.run()


@contextmanager
def _all_written() -> Iterator[None]:
    """What is printed is out at the end, or nobody reads it; then Python's own last try is quiet.

    Raises:
        BrokenPipeError: Nobody reads it.
    """
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
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before
