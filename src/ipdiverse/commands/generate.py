"""`generate` and `demo`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro

from ipdiverse.commands.printing import say, say_json
from ipdiverse.sampling.request import Request

Count = Annotated[int, tyro.conf.arg(aliases=["-n"])]
Texts = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
Numbers = Annotated[tuple[float, ...], tyro.conf.UseAppendAction]


@dataclass(frozen=True)
class Generate(Request):
    """Make images from a reference and a prompt.

    Args:
        out: Folder for images, contact sheet and generation.json.
        json: Print the record, from which the exact command can be repeated, as JSON.
    """

    image: Texts = ()
    prompt: Texts = ()
    mask: Texts = ()
    weights: Numbers = ()
    n: Count = 4
    out: str = "out"
    json: bool = False

    def run(self) -> None:
        """Generate and write."""
        from ipdiverse.provenance import ensure_writable_folder
        from ipdiverse.sampling.generate import generate

        ensure_writable_folder(Path(self.out))
        wanted = {f.name: getattr(self, f.name) for f in fields(Request)}
        record = generate(**wanted).save(self.out)
        for note in record["notes"]:
            sys.stderr.write(f"note: {note}\n")
        if self.json:
            say_json(record)
        else:
            written = len(record["image_sha256"])
            say(f"wrote {written} images and {Path(self.out) / 'contact_sheet.png'}")


@dataclass(frozen=True)
class Demo:
    """Show at a glance what a plain image prompt does: three scales, and its numbers.

    Args:
        out: Folder for the page.
    """

    out: str = "out/demo"

    def run(self) -> None:
        """Make the page and say which file to open."""
        from ipdiverse.evaluation.demo import make_demo

        say(f"open {make_demo(Path(self.out))}")
