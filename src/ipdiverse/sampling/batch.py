"""Many requests from one file: each image is written as it lands, and a killed run goes on.

OUT/results.jsonl          a line for each image, in the order in which they landed
OUT/0003/0001.png          image 1 of the job in line 3 (counted from 0)
"""

from __future__ import annotations

import json
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipdiverse.errors import ArgumentError, DataError, IpdiverseError
from ipdiverse.image_io import content_hash
from ipdiverse.levers import LEVERS
from ipdiverse.provenance import save_png
from ipdiverse.sampling.draw import drawing
from ipdiverse.sampling.request import USED_WITH, Request, current
from ipdiverse.sampling.task import LastBase
from ipdiverse.writing import ensure_writable_folder, file_hash, write_text_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ipdiverse.base.bases import Base

RESULTS = "results.jsonl"


def read_jobs(file: Path, defaults: Request) -> dict[str, Request]:
    """Read requests, one JSON object a line; all are checked before the first is drawn.

    Args:
        file: Keys are the fields of `Request` and levers; empty lines are left out.
        defaults: What holds where a line states nothing else.

    Returns:
        In their order, by the line that each stands in.

    Raises:
        DataError: The file cannot be read, or a line is not a request; the first of them is named.
    """
    try:
        lines = file.read_text("utf-8").split("\n")  # JSON may hold other ends of lines
    except (OSError, UnicodeError) as error:
        raise DataError("cannot be read", where=file, expected="JSON lines") from error
    places = {f"{file}, line {number}": line for number, line in enumerate(lines, 1)}
    jobs = {
        where: _request(line, defaults, where) for where, line in places.items() if line.strip()
    }
    if not jobs:
        raise DataError("holds no jobs", where=file, expected="a JSON object a line")
    return jobs


def run_batch(
    jobs: Mapping[str, Request], out: Path, tell: Callable[[dict[str, Any]], None] = lambda _: None
) -> int:
    """Draw what is not there yet.

    Args:
        jobs: From `read_jobs`.
        out: Folder for images and results.
        tell: Given each image's line as it lands.

    Returns:
        How many images were drawn now.

    Raises:
        ArgumentError: The folder holds results of other jobs, or of files that have changed.
        DataError: A job cannot be drawn, and its line; what came before it stays. Files that are
            not there are said before the first is drawn.
    """
    ensure_writable_folder(out)
    known = _known(out, list(jobs.values()))
    waiting = [
        (number, where, job)
        for number, (where, job) in enumerate(jobs.items())
        if len(known.get(number, ())) < job.n * len(job.prompt)
    ]
    for _, where, job in waiting:
        _look_for_files(job, where)
    drawn, bases = 0, LastBase()
    for number, where, job in waiting:
        with _named(where):
            drawn += _draw(number, job, bases.open(job), out, known.get(number, set()), tell)
    return drawn


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Errors name the line that they come from."""
    try:
        yield
    except IpdiverseError as error:
        raise DataError(str(error), where=where) from error


def _look_for_files(job: Request, where: str) -> None:
    for name in (*job.picture_files, job.faces):
        if name and not Path(name).is_file():
            raise DataError(f"{name}: no such file", where=where, fix="Check the path.")


def _draw(
    number: int,
    job: Request,
    base: Base,
    out: Path,
    there: set[int],
    tell: Callable[[dict[str, Any]], None],
) -> int:
    folder = ensure_writable_folder(out / f"{number:04d}")
    drawn, inputs = 0, _inputs(job)
    with drawing(job, base) as work, (out / RESULTS).open("a", buffering=1) as results:
        for position, image in work.images(skip=there):
            name = f"{position:04d}.png"
            about = {"job": number, "image": position, "prompt": work.jobs[position].prompt}
            command = work.request.command(str(folder))
            save_png(image, folder / name, {"tool": "ipdiverse", **about, "command": command})
            line = {**about, "file": f"{folder.name}/{name}", "sha256": content_hash(image)}
            line |= {"request": _stated(job), "inputs": inputs, "notes": work.notes}
            results.write(json.dumps(line) + "\n")
            tell(line)
            drawn += 1
    return drawn


def _known(out: Path, jobs: list[Request]) -> dict[int, set[int]]:
    """Images that have landed, by job; a torn last line and lost files are drawn again."""
    file = out / RESULTS
    if not file.is_file():
        return {}
    known: dict[int, set[int]] = {}
    kept: list[str] = []
    inputs: dict[int, dict[str, str]] = {}
    found = file.read_text("utf-8")
    for text in found.split("\n"):
        try:
            line = json.loads(text)
            number, position, name = line["job"], line["image"], line["file"]
            request = line["request"]
        except (ValueError, KeyError, TypeError):
            continue
        if (
            not isinstance(number, int)
            or not 0 <= number < len(jobs)
            or _current(request) != _stated(jobs[number])
        ):
            raise ArgumentError(
                "holds results of other jobs",
                where=file,
                found=f"job {number}",
                fix="Choose a new folder for --out.",
            )
        if (out / f"{number:04d}" / Path(str(name)).name).is_file():
            if number not in inputs:
                inputs[number] = _inputs(jobs[number])
            _check_inputs(file, number, line.get("inputs"), inputs[number])
            known.setdefault(number, set()).add(int(position))
            kept.append(text)
    if (whole := "".join(f"{text}\n" for text in kept)) != found:
        write_text_atomic(file, whole)
    return known


def _inputs(job: Request) -> dict[str, str]:
    """SHA-256 of every file that a request names; folders are not looked into."""
    found = {}
    for name in (*job.picture_files, job.faces, job.adapter, job.base):
        with suppress(OSError):  # drawing says what is wrong with it
            if name and Path(name).is_file():
                state = Path(name).stat()
                found[name] = _hash_of(Path(name), state.st_mtime_ns, state.st_size)
    return found


@lru_cache(maxsize=1024)
def _hash_of(file: Path, *_state: int) -> str:
    """Of a file as it is: jobs share references, and an adapter is large."""
    return file_hash(file)


def _check_inputs(file: Path, number: int, before: Any, now: dict[str, str]) -> None:
    """Refuse images that were made from what has changed since.

    Raises:
        ArgumentError: A file has.
    """
    known = before if isinstance(before, dict) else {}
    if changed := [name for name in now if known.get(name, now[name]) != now[name]]:
        raise ArgumentError(
            "holds images that were made from other files",
            where=file,
            found=f"job {number}: {changed[0]} has changed",
            fix="Choose a new folder for --out.",
        )


def _stated(job: Request) -> dict[str, Any]:
    """A request as JSON gives it back, without values at their defaults."""
    return json.loads(json.dumps(job.stated()))


def _current(stated: Any) -> Any:
    """A recorded request in today's names."""
    return current(stated, RESULTS) if isinstance(stated, dict) else stated


def _request(line: str, defaults: Request, where: str) -> Request:
    try:
        stated = json.loads(line)
    except ValueError as error:
        raise DataError("is not JSON", where=where, found=line[:80]) from error
    if not isinstance(stated, dict):
        raise DataError("is not a JSON object", where=where, found=line[:80])
    stated = current(stated, where)
    known = {f.name for f in fields(Request)} - {"levers"} | LEVERS.keys()
    if unknown := sorted(stated.keys() - known):
        raise DataError("unknown key", where=where, found=", ".join(unknown))
    with _named(where):
        values = defaults.flat() | stated
        for name, needed in USED_WITH.items():  # a flag for all jobs need not act in each
            if name not in stated and not values[needed]:
                del values[name]
        try:
            request = Request.of(values)
        except (TypeError, ValueError) as error:
            raise DataError(str(error)) from error
        if not request.image and not request.faces:
            raise DataError("has no image")
        request.check()
    return request
