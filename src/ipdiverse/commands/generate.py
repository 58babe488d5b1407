"""`generate` and `demo`."""

from __future__ import annotations

import sys
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ipdiverse.commands.printing import say, say_json
from ipdiverse.dial import Levers
from ipdiverse.sampling.request import Request

if TYPE_CHECKING:
    from collections.abc import Sequence

Count = Annotated[int, tyro.conf.arg(aliases=["-n"])]
Texts = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
Numbers = Annotated[tuple[float, ...], tyro.conf.UseAppendAction]


@dataclass(frozen=True)
class Generate(Request):
    """Make images from a reference and a prompt.

    Args:
        batch: File of JSON lines, each with fields of its own that hold over the flags; images are
            written as they land, and a run that was killed goes on.
        out: Folder for images, contact sheet and generation.json.
        json: Print the record, from which the exact command can be repeated, as JSON.
        yes: Download what a preset needs without asking.
    """

    image: Texts = ()
    prompt: Texts = ()
    mask: Texts = ()
    weights: Numbers = ()
    n: Count = 4
    batch: str = ""
    out: str = "out"
    json: bool = False
    yes: bool = False

    def run(self) -> None:
        """Generate and write."""
        if self.batch:
            self._batch()
            return
        from ipdiverse.sampling.checks import check
        from ipdiverse.sampling.generate import generate
        from ipdiverse.writing import ensure_writable_folder

        check(self)
        ensure_writable_folder(Path(self.out))
        self._may_download([self])
        wanted = {f.name: getattr(self, f.name) for f in fields(Request)}
        record = generate(**wanted).save(self.out)
        for note in record["notes"]:
            sys.stderr.write(f"note: {note}\n")
        if self.json:
            say_json(record)
        else:
            written = len(record["image_sha256"])
            say(f"wrote {written} images and {Path(self.out) / 'contact_sheet.png'}")

    def _may_download(self, requests: Sequence[Request]) -> None:
        from ipdiverse.base.presets import PRESETS
        from ipdiverse.commands.consent import agree
        from ipdiverse.image_io import load_image
        from ipdiverse.sampling.drawing import needed_files

        files = [file for request in requests for file in needed_files(request)]
        if files:  # what is wrong with the pictures is said before gigabytes come
            for file in dict.fromkeys(file for r in requests for file in r.pictures if file):
                load_image(Path(file))
        named = [name for r in requests for name in (r.base, r.adapter) if name in PRESETS]
        agree(", ".join(dict.fromkeys(named)), list(dict.fromkeys(files)), self.yes)

    def _batch(self) -> None:
        import json

        from ipdiverse.sampling.batch import read_jobs, run_batch

        defaults = {f.name: getattr(self, f.name) for f in fields(Request)}
        jobs = read_jobs(Path(self.batch), defaults)
        self._may_download(list(jobs.values()))
        tell = (lambda line: say(json.dumps(line))) if self.json else (lambda _: None)
        drawn = run_batch(jobs, Path(self.out), tell)
        if not self.json:
            say(f"wrote {drawn} images of {len(jobs)} jobs into {self.out}")


def _listed_first(*names: str) -> dict[str, Field[Any]]:
    """Fields as `--help` lists them: these, the others, and levers last, which few begin with."""
    every, levers = Generate.__dataclass_fields__, [field.name for field in fields(Levers)]
    others = [name for name in every if name not in (*names, *levers)]
    return {name: every[name] for name in (*names, *others, *levers)}


Generate.__dataclass_fields__ = _listed_first("image", "prompt", "diversity", "n", "out")


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
