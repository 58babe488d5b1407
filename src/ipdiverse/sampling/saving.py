"""The folder of a run: images as they land, their record, and nothing of anybody else's.

OUT/0000.png, 0001.png …   each image, with its own record inside
OUT/generation.json        the record of all that are there, written again with each
OUT/contact_sheet.png      once all are there

A file is a run's own if it carries the run's fingerprint and still has the pixels that it was
written with. A folder that holds anything else under these names is left as it is, and the run
goes into OUT-2, or the next number that is free.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image

from ipdiverse.errors import IpdiverseError, OutputError
from ipdiverse.image_io import content_hash, load_image
from ipdiverse.provenance import PLACES, read_provenance, save_png
from ipdiverse.sampling.request import Request
from ipdiverse.writing import file_hash, only_one, write_text_atomic, writing

RECORD, SHEET = "generation.json", "contact_sheet.png"
_IMAGE = re.compile(r"[0-9]{4}\.png")


def fingerprint(request: Request) -> str:
    """The same for requests that draw the same, however they spell the files that they name."""
    decides = request.flat()
    for name in PLACES:
        value = decides[name]
        several = value if isinstance(value, tuple) else (value,)
        decides[name] = [_content(one) for one in several]
    for name, value in decides.items():  # a browser says 1 where the command line says 1.0
        decides[name] = int(value) if isinstance(value, float) and value.is_integer() else value
    # another torch or diffusers may draw other pixels, so that its images do not complete a set
    text = json.dumps([decides, versions()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def inputs(request: Request) -> dict[str, str]:
    """SHA-256 of every file that a request names; folders are not looked into."""
    names = (*request.picture_files, request.faces, request.adapter, request.base)
    names = (*names, request.space)
    return {name: _content(name) for name in names if name and Path(name).is_file()}


@lru_cache  # reading what pip wrote takes as long as a step of a small base
def versions() -> dict[str, str]:
    """Versions of this package and of what decides its pixels."""
    from importlib.metadata import version

    return {name: version(name) for name in ("ipdiverse", "torch", "diffusers", "transformers")}


def _content(name: str) -> str:
    """A file's hash, a folder's one name, or the word that it is."""
    path = Path(name)
    try:
        if name and path.is_file():
            state = path.stat()
            return _hash_of(path, state.st_mtime_ns, state.st_size)
        return str(path.resolve()) if name and path.is_dir() else name
    except (OSError, ValueError):  # drawing says what is wrong with it
        return name


@lru_cache(maxsize=1024)
def _hash_of(file: Path, *_state: int) -> str:
    """Of a file as it is: jobs share references, and an adapter is large."""
    return file_hash(file)


def own_image(file: Path, run: object) -> Image.Image | None:
    """A picture that a run wrote and that nobody has changed; None of any other file."""
    try:
        record = read_provenance(file)
        if not run or record.get("run") != run:
            return None
        image = load_image(file)
    except IpdiverseError:
        return None
    return image if content_hash(image) == record.get("sha256") else None


@dataclass
class Run:
    """A folder that a run writes into."""

    folder: Path
    id: str
    total: int
    images: dict[int, Image.Image] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    replaced: Collection[Path] = ()
    complete: bool = False

    def __post_init__(self) -> None:
        self._hashes = {number: content_hash(image) for number, image in self.images.items()}

    @property
    def indices(self) -> list[int] | None:
        """Which candidates an interrupted run chose; None where it had not got so far."""
        found = self.record.get("image_indices")
        return found if isinstance(found, list) and len(found) == self.total else None

    def begin(self, record: dict[str, Any]) -> None:
        """Take the folder, before the first image."""
        with writing(self.folder):
            for file in self.replaced:
                file.unlink(missing_ok=True)
        self.record = {**record, "run": self.id}
        self._write()

    def add(self, number: int, image: Image.Image) -> Path:
        """Write an image; returns its file."""
        file = self._save(image, image_name(number), image_index=number)
        self.images[number] = image
        self._hashes[number] = content_hash(image)
        self._write()
        return file

    def finish(self, sheet: Image.Image, notes: list[str]) -> None:
        """Write the contact sheet, once all images are there."""
        self.record["notes"] = notes
        self._save(sheet, SHEET)
        self._write(SHEET)

    def give_up(self) -> None:
        """Leave nothing behind where no image has landed."""
        if not self.images and self.record:
            with writing(self.folder):
                (self.folder / RECORD).unlink(missing_ok=True)

    def _save(self, image: Image.Image, name: str, **more: Any) -> Path:
        file = self.folder / name
        if os.path.lexists(file):  # put there while this run was drawing
            raise in_the_way(file)
        # these grow with each image; without them an image is the same after an interruption
        own = {k: v for k, v in self.record.items() if k not in ("image_sha256", "files")}
        save_png(image, file, {**own, **more, "sha256": content_hash(image)})
        return file

    def _write(self, *more: str) -> None:
        there = sorted(self.images)
        files = [*(image_name(number) for number in there), *more, RECORD]
        hashes = [self._hashes[number] for number in there]
        # what a kill leaves is a whole record of the images that are there
        self.record |= {"image_sha256": hashes, "files": files}
        write_text_atomic(self.folder / RECORD, json.dumps(self.record, indent=2) + "\n")


def image_name(number: int) -> str:
    """The file of an image, by its number in its set."""
    return f"{number:04d}.png"


@contextmanager
def open_run(
    out: Path, run: str, total: int, *, overwrite: bool = False, used: Collection[str] = ()
) -> Iterator[Run]:
    """Find a folder for a run and hold it for the length of a `with` block."""
    folder = out if overwrite else _free(out, run, total)
    with only_one(folder):
        found = _found(folder, run, total)
        if found is None and not overwrite:  # somebody was faster
            raise OutputError("was taken by another run", where=folder, fix="Try again.")
        yield found or _replacing(folder, run, total, used)


def _free(out: Path, run: str, total: int) -> Path:
    """The first of OUT, OUT-2, OUT-3 … that holds nothing, or this run."""
    if _found(out, run, total) is not None:
        return out
    if out.name in ("", ".."):  # `.` and the like: a folder beside it would surprise
        raise OutputError(
            "holds another run, or files of the names that this one writes",
            where=out,
            fix="Choose a new folder, or replace that run with --overwrite.",
        )
    numbered = (out.with_name(f"{out.name}-{number}") for number in count(2))
    return next(folder for folder in numbered if _found(folder, run, total) is not None)


def _found(folder: Path, run: str, total: int) -> Run | None:
    """A run as far as it is there; None where the folder holds something else."""
    record = _record(folder)
    names = {image_name(number): number for number in range(total)} | {SHEET: -1}
    there = {number: name for name, number in names.items() if os.path.lexists(folder / name)}
    if record is None:
        return None if there else Run(folder, run, total)
    if record.get("run") != run:
        return None
    images = {number: own_image(folder / name, run) for number, name in there.items()}
    if None in images.values():
        return None
    sheet = images.pop(-1, None)
    kept = {number: image for number, image in images.items() if image is not None}
    complete = sheet is not None and len(kept) == total and SHEET in record.get("files", ())
    # killed between the sheet and the record that names it
    stale = [folder / SHEET] if sheet is not None and not complete else []
    return Run(folder, run, total, kept, record, stale, complete)


def _replacing(folder: Path, run: str, total: int, used: Collection[str]) -> Run:
    """A run in place of the one that is there."""
    before = (_record(folder) or {}).get("run")
    ours = [file for file in folder.iterdir() if _IMAGE.fullmatch(file.name) or file.name == SHEET]
    own = [file for file in ours if own_image(file, before) is not None]
    wanted = [folder / name for name in (*map(image_name, range(total)), SHEET, RECORD)]
    others = [file for file in wanted if os.path.lexists(file) and file not in own]
    if stray := [file for file in others if file.name != RECORD or before is None]:
        raise in_the_way(stray[0])
    inside = {file.resolve() for file in own}
    if read := [name for name in used if Path(name).resolve() in inside]:
        raise OutputError(
            "is read by the run that would replace it",
            where=read[0],
            fix="Choose another folder, or copy the picture elsewhere.",
        )
    return Run(folder, run, total, replaced=own)


def in_the_way(file: Path) -> OutputError:
    """The error for a file that a run must not replace."""
    return OutputError(
        "is there already, and no run of this folder wrote it",
        where=file,
        fix="Move it away, or choose another folder.",
    )


def _record(folder: Path) -> dict[str, Any] | None:
    """What generation.json holds; nothing of what cannot be read, None where there is none."""
    file = folder / RECORD
    if not os.path.lexists(file):
        return None
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
