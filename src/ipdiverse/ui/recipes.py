"""How to repeat what the page drew: as a command, as Python, and as a set to download."""

from __future__ import annotations

import io
import textwrap
import zipfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ipdiverse.sampling.request import Request


def as_commands(requests: Mapping[str, Request]) -> str:
    """A line of shell for each request."""
    return "\n".join(request.command(folder) for folder, request in requests.items())


def as_python(requests: Mapping[str, Request]) -> str:
    """A program that draws the same images."""
    (folder, first), *others = requests.items()
    given = f"    {_one_or_list(first.image)},\n    {_one_or_list(first.prompt)},\n"
    if not others:
        listed = _listed(_arguments(first), "    ")
        return (
            f"import ipdiverse\n\nresult = ipdiverse.generate(\n{given}{listed})\n"
            f"result.save({folder!r})\n"
        )
    each = {out: _arguments(request) for out, request in requests.items()}
    shared = {
        name: value
        for name, value in each[folder].items()
        if all(name in own and own[name] == value for own in each.values())
    }
    varied = "".join(
        f"    {out!r}: { ({k: v for k, v in own.items() if k not in shared})!r},\n"
        for out, own in each.items()
    )
    body = textwrap.indent(f"{given}{_listed(shared, '    ')}", "    ")
    return (
        f"import ipdiverse\n\ncells = {{\n{varied}}}\nfor out, cell in cells.items():\n"
        f"    result = ipdiverse.generate(\n{body}        **cell,\n    )\n    result.save(out)\n"
    )


_STATED = ("n", "seed", "base", "adapter", "scale", "steps", "guidance_scale")
"""Arguments that a program states even when they are at their default."""


def _arguments(request: Request) -> dict[str, Any]:
    stated = request.stated(*_STATED).items()
    return {name: value for name, value in stated if name not in ("image", "prompt")}


def _listed(arguments: Mapping[str, Any], indent: str) -> str:
    return "".join(f"{indent}{name}={value!r},\n" for name, value in arguments.items())


def _one_or_list(values: tuple[str, ...]) -> str:
    return repr(values[0]) if len(values) == 1 else repr(list(values))


def packed(
    folder: Path, references: Mapping[str, Path], requests: Mapping[str, Request], stem: str
) -> bytes:
    """A zip of images with their records, the references, and both recipes.

    Unpacked, either recipe run in its folder draws the same images into the same places.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, file in references.items():
            archive.write(file, f"{stem}/{name}")
        for inside in requests:
            for file in sorted((folder / inside).iterdir()):
                archive.write(file, f"{stem}/{inside}/{file.name}")
        archive.writestr(f"{stem}/command.sh", as_commands(requests) + "\n")
        archive.writestr(f"{stem}/repeat.py", as_python(requests))
    return buffer.getvalue()
