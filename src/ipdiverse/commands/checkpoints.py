"""`inspect` and `convert`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ipdiverse.commands.printing import say, say_json


@dataclass(frozen=True)
class Source:
    """A checkpoint: a file, a folder, or a hub id `owner/repository`.

    Args:
        source: The file, folder or hub id.
        weight_name: The file in a folder or repository.
        subfolder: Where in the folder or repository.
        revision: Branch, tag or commit of a repository.
        local_files_only: Never connect.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    weight_name: str | None = None
    subfolder: str = ""
    revision: str | None = None
    local_files_only: bool = False

    def find(self) -> Path:
        """The local file."""
        from ipdiverse.adapter.sources import find_checkpoint

        return find_checkpoint(
            self.source,
            weight_name=self.weight_name,
            subfolder=self.subfolder,
            revision=self.revision,
            local_files_only=self.local_files_only,
        )


@dataclass(frozen=True)
class Inspect(Source):
    """Say what a checkpoint is: kind, base family, tokens, widths, fusion, what does not fit.

    Args:
        json: Print everything as JSON.
    """

    json: bool = False

    def run(self) -> None:
        """Read names and shapes, and print."""
        from ipdiverse.adapter.inspection import as_text, inspect_checkpoint

        report = inspect_checkpoint(self.find())
        say_json(report) if self.json else say(as_text(report))


@dataclass(frozen=True)
class Convert(Source):
    """Write a checkpoint of any layout in another, and verify it by loading.

    Args:
        out: The file to write: .safetensors, with `tencent` .bin too.
        to: `ipdiverse` (with a spec), `diffusers` (no fusion) or `tencent` (the original code's).
        force: Replace a file that is there.
        face_id_plus_v2: Version 2 (True) or 1 (False) of FaceID-Plus, whose files do not say.
    """

    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = field(kw_only=True)
    to: Literal["ipdiverse", "diffusers", "tencent"] = field(kw_only=True)
    force: bool = False
    face_id_plus_v2: bool | None = None

    def run(self) -> None:
        """Convert and say what was assumed or left out."""
        from ipdiverse.adapter.conversion import convert

        notes = convert(
            self.find(),
            self.out,
            self.to,
            force=self.force,
            face_id_plus_v2=self.face_id_plus_v2,
        )
        for note in notes:
            sys.stderr.write(f"note: {note}\n")
        say(f"wrote {self.out}")
