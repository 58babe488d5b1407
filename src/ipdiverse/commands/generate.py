"""`generate` and `demo`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from ipdiverse.commands.console import agree, note, say, say_json
from ipdiverse.sampling.request import Request

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Generate:
    """Make images from a reference and a prompt.

    Args:
        request: What to make.
        out: Folder for images, contact sheet and generation.json.
        batch: File of JSON lines, one job each; a line's own fields override the flags. Images are
            written as they finish, and the same command continues a run that was stopped.
        json: Print the record, which holds the exact command, as JSON.
        yes: Download what a preset needs without asking.
    """

    # every --image, --prompt, --mask and --weights adds one
    request: tyro.conf.UseAppendAction[Request]
    out: str = "out"
    batch: str = ""
    json: bool = False
    yes: bool = False

    def run(self) -> None:
        """Generate and write."""
        if self.batch:
            self._batch()
            return
        from ipdiverse.sampling.draw import drawn

        record = drawn(self.request, before_opening=self._may_open).save(self.out)
        for one in record["notes"]:
            note(one)
        if self.json:
            say_json(record)
        else:
            written = len(record["image_sha256"])
            say(f"wrote {written} images and {Path(self.out) / 'contact_sheet.png'}")

    def _may_open(self, request: Request) -> None:
        from ipdiverse.writing import ensure_writable_folder

        ensure_writable_folder(Path(self.out))
        self._agree([request])

    def _agree(self, requests: Sequence[Request]) -> None:
        from ipdiverse.base.presets import PRESETS
        from ipdiverse.sampling.task import needed_files

        files = [file for request in requests for file in needed_files(request)]
        named = [name for r in requests for name in (r.base, r.adapter) if name in PRESETS]
        agree(", ".join(dict.fromkeys(named)), list(dict.fromkeys(files)), self.yes)

    def _batch(self) -> None:
        import json

        from ipdiverse.image_io import load_image, load_mask
        from ipdiverse.sampling.batch import read_jobs, run_batch
        from ipdiverse.sampling.task import needed_files

        jobs = read_jobs(Path(self.batch), self.request)
        if any(needed_files(job) for job in jobs.values()):
            # a broken picture is named before gigabytes are downloaded
            for file in dict.fromkeys(file for job in jobs.values() for file in job.picture_files):
                load_image(Path(file))
            for file in dict.fromkeys(file for job in jobs.values() for file in job.mask_files):
                load_mask(Path(file))
        self._agree(list(jobs.values()))
        tell = (lambda line: say(json.dumps(line))) if self.json else (lambda _: None)
        drawn = run_batch(jobs, Path(self.out), tell)
        if not self.json:
            say(f"wrote {drawn} images of {len(jobs)} jobs into {self.out}")


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
