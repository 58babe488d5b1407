"""The command line's reference: the --help of every command, asked at each build."""

from __future__ import annotations

import io
import os
import re
from contextlib import redirect_stdout
from typing import Any

MARK = "<!-- commands -->"
_COLUMNS = "80"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put every command's help where the mark is."""
    return markdown.replace(MARK, reference()) if MARK in markdown else markdown


def reference() -> str:
    """A heading and the help of `ipdiverse` and of every command below it, as Markdown."""
    parts = []
    for command in commands():
        name = " ".join(("ipdiverse", *command))
        parts.append(f"## {name}\n\n```text\n{help_of(command)}\n```\n")
    return "\n".join(parts)


def commands(above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """`above` and every command below it, in the order of its help."""
    found = [above]
    for name in _names(help_of(above)):
        found += commands((*above, name))
    return found


def help_of(command: tuple[str, ...]) -> str:
    """What `ipdiverse COMMAND --help` prints, at a fixed width."""
    from ipdiverse.cli import main

    printed, columns = io.StringIO(), os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = _COLUMNS
    try:
        with redirect_stdout(printed):
            main([*command, "--help"])
    except SystemExit:
        pass
    finally:
        os.environ.pop("COLUMNS") if columns is None else os.environ.update(COLUMNS=columns)
    return "\n".join(line.rstrip() for line in printed.getvalue().strip().splitlines())


def _names(text: str) -> list[str]:
    """The commands that a help text lists: the choices that end its usage, under `subcommands`."""
    usage = re.search(r"\{([\w,\s-]+)\}\s*$", text.partition("\n\n")[0])
    lists = re.search(r"^\W*subcommands\b", text, re.MULTILINE)
    return re.findall(r"[\w-]+", usage[1]) if usage and lists else []
