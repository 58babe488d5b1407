"""`generate`, `demo` and `ui`."""

from __future__ import annotations

import json
import os
import sys
import warnings
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from ipdiverse.base.downloads import missing
from ipdiverse.base.presets import PRESETS
from ipdiverse.commands.cluster import Copy, Spread, in_parts
from ipdiverse.commands.console import agree, check_installed, note, say, say_json
from ipdiverse.errors import ArgumentError
from ipdiverse.parts import WHOLE
from ipdiverse.sampling.request import Request
from ipdiverse.ui import Options

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from ipdiverse.parts import Part

PASSWORD = "IPDIVERSE_UI_PASSWORD"  # noqa: S105 - the variable's name


@dataclass(frozen=True)
class Generate:
    """Make images from a reference and a prompt.

    Args:
        request: What to make.
        out: Folder for images, contact sheet and generation.json.
        overwrite: Replace the run that is in `out`. Without it nothing is replaced: if `out` holds
            another run, the images go to `out-2`, `out-3`, and so on.
        batch: File of JSON lines, one job each; a line's own fields override the flags. Images are
            written as they finish, and the same command continues a run that was stopped. A job
            that fails is listed in `failed.jsonl`, and the same command tries it again.
        parquet: Write the record of a batch as `results.parquet` too.
        spread: How a batch is spread over processes.
        json: Print the record, which holds the exact command, as JSON.
        yes: Download what a preset needs without asking.
    """

    # every --image, --prompt, --mask and --weights adds one
    request: tyro.conf.UseAppendAction[Request]
    out: str = "out"
    overwrite: bool = False
    batch: str = ""
    parquet: bool = False
    spread: Spread = field(default_factory=Spread)
    json: bool = False
    yes: bool = False

    def run(self) -> None:
        """Generate and write."""
        if self.batch:
            from ipdiverse.sampling.batch import RECORDS

            alone = lambda: self.opened()(WHOLE)  # noqa: E731
            in_parts(self.spread, Path(self.out), self.opened, alone, RECORDS)
            return
        if self.spread != Spread() or self.parquet:
            raise ArgumentError("needs --batch", where="--part, --to, --ray, --parquet")
        from ipdiverse.sampling.draw import draw_into

        record = draw_into(
            Path(self.out),
            self.request,
            overwrite=self.overwrite,
            before_opening=lambda request: self._agree([request]),
            tell=note,
        )
        for one in record["notes"]:
            note(one)
        if self.json:
            say_json(record)
        else:
            sheet = Path(record["out"]) / "contact_sheet.png"
            sys.stdout.write(f"wrote {len(record['image_sha256'])} images and {sheet}\n")

    def _agree(self, requests: Sequence[Request]) -> None:
        named = [name for r in requests for name in (r.base, r.adapter) if name in PRESETS]
        if not named:  # nothing is on the hub
            return
        from ipdiverse.sampling.task import needed_files

        files = [file for request in requests for file in needed_files(request)]
        agree(", ".join(dict.fromkeys(named)), list(dict.fromkeys(files)), self.yes)

    def opened(self) -> Callable[[Part], Any]:
        """Read the jobs of a batch, and draw any part of them with models that stay open."""
        from ipdiverse.image_io import load_image, load_mask
        from ipdiverse.sampling.batch import read_jobs, run_batch
        from ipdiverse.sampling.task import LastBase, needed_files

        if self.parquet:
            check_installed("pyarrow", "--parquet")
        jobs, out = read_jobs(Path(self.batch), self.request), Path(self.out)
        # a job for each thing to open; there may be millions that share them
        named = {files: job for job in jobs.values() if (files := tuple(needed_files(job)))}
        if missing([file for files in named for file in files]):
            # a broken picture is named before gigabytes are downloaded
            image, mask = lru_cache(load_image), lru_cache(load_mask)
            for job in jobs.values():
                for file in job.picture_files:
                    image(Path(file))
                for file in job.mask_files:
                    mask(Path(file))
        self._agree(list(named.values()))
        tell = (lambda line: say(json.dumps(line))) if self.json else (lambda _: None)
        bases = LastBase()

        def draw(part: Part) -> None:
            if self.spread.to:
                jobs.elsewhere = Copy(out, self.spread.to, part).names().__contains__
            drawn = run_batch(jobs, out, tell, part, bases, parquet=self.parquet)
            if not self.json:
                say(f"wrote {drawn} images of {len(jobs)} jobs into {self.out}")

        return draw


@dataclass(frozen=True)
class Demo:
    """Show at a glance what a plain image prompt does: three scales, and its numbers.

    Args:
        out: Folder for the page.
    """

    out: str = "out/demo"

    def run(self) -> None:
        """Make the page and say which file to open."""
        from ipdiverse.evaluation.demo import DIAL, PER_ROW, SCALES, make_demo

        images = PER_ROW * len((*DIAL, *SCALES))
        note(f"drawing {images} images: less than a minute on two free cores")
        say(f"open {make_demo(Path(self.out))}")


@dataclass(frozen=True)
class Ui:
    """Open the web page; only this machine can reach it, unless you set --host.

    Args:
        page: How it is served.
    """

    page: Options = Options()  # noqa: RUF009 - it is frozen

    def run(self) -> None:
        """Serve until Ctrl-C."""
        check_installed("gradio", "ui")
        from ipdiverse.ui.safety import is_loopback
        from ipdiverse.ui.server import serve

        options = self.page
        password = options.password or os.environ.get(PASSWORD, "")
        if not password and not is_loopback(options.host) and sys.stdin.isatty():
            from getpass import getpass

            password = getpass(f"password for {options.user}: ")
        serve(replace(options, password=password), lambda url: say(f"open {url} (Ctrl-C ends it)"))


def renamed_flags(words: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """Flags by their names of today, with one note of those that changed."""
    kept: list[str] = []
    told: list[str] = []
    for word in words:
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name in names:
            new = f"--{names[name].replace('_', '-')}"
            told += [f"{flag} → {new}"]
            kept.append(f"{new}{equals}{value}")
        else:
            kept.append(word)
    if told:
        warnings.warn(f"renamed {', '.join(told)}", stacklevel=3)
    return kept
