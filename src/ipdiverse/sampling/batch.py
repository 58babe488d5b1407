"""Many requests from one file: each image is written as it lands, and a killed run goes on.

OUT/results.jsonl          a line for each image, in the order in which they landed
OUT/failed.jsonl           jobs that could not be drawn; the same command tries them again
OUT/0003/0001.png          image 1 of the job in line 3 (counted from 0)

A part (`parts`) draws the jobs that it takes and keeps its own two lists; `merge_batch` joins them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipdiverse import config
from ipdiverse.errors import ArgumentError, DataError, IpdiverseError, OutputError
from ipdiverse.image_io import content_hash
from ipdiverse.levers import LEVERS
from ipdiverse.parts import WHOLE, Part, dealt_otherwise, forget_parts, holding_parts, part_of
from ipdiverse.provenance import save_png
from ipdiverse.sampling.draw import drawing
from ipdiverse.sampling.request import USED_WITH, Request, current
from ipdiverse.sampling.saving import fingerprint, image_name, in_the_way, inputs, own_image
from ipdiverse.sampling.task import LastBase, decoded
from ipdiverse.writing import (
    append_text,
    ensure_writable_folder,
    only_one,
    write_text_atomic,
    writing,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from ipdiverse.base.bases import Base

RESULTS, FAILED = "results.jsonl", "failed.jsonl"


def read_jobs(file: Path, defaults: Request) -> dict[str, Request]:
    """Read requests, one JSON object a line; all are checked before the first is drawn."""
    try:
        # not `splitlines`: JSON may hold the other ends of lines that Unicode has
        lines = config.decoded(file.read_bytes()).split("\n")
    except (OSError, ValueError) as error:
        fix = "Check the path." if isinstance(error, OSError) else "Save it as UTF-8."
        raise DataError(
            "cannot be read", where=file, expected="JSON lines", found=error, fix=fix
        ) from error
    places = {f"{file}, line {number}": line for number, line in enumerate(lines, 1)}
    jobs = {
        where: _request(line, defaults, where) for where, line in places.items() if line.strip()
    }
    if not jobs:
        raise DataError("holds no jobs", where=file, expected="a JSON object a line")
    return jobs


def run_batch(
    jobs: Mapping[str, Request],
    out: Path,
    tell: Callable[[dict[str, Any]], None] = lambda _: None,
    part: Part = WHOLE,
    bases: LastBase | None = None,
) -> int:
    """Draw what is not there yet; returns how many images were drawn now.

    Args:
        tell: Called with the line of each image.
        part: The share of the jobs that is drawn.
        bases: Where models stay open from one call to the next.

    Raises:
        DataError: Jobs failed; the others were drawn.
    """
    numbered = dict(enumerate(jobs.items()))
    bases = bases or LastBase()
    if part.whole:
        with only_one(out), holding_parts(out) as folders:
            drawn = _run(numbered, out, [out, *folders], tell, bases)
            forget_parts(out, RESULTS, FAILED)
            return drawn
    about = {"kind": "batch", "rows": len(jobs), "sha256": _key(list(map(_key, jobs.values())))}
    with part_of(out, part, about) as home:
        own = {n: named for n, named in numbered.items() if part.takes(_key(named[1]))}
        return _run(own, out, [home, out, *dealt_otherwise(out, part)], tell, bases)


def _key(job: Request | list[str]) -> str:
    """What a job is dealt by: as it is stated, wherever it stands in the list."""
    stated = job if isinstance(job, list) else job.stated()
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()


def _run(
    numbered: Mapping[int, tuple[str, Request]],
    out: Path,
    homes: list[Path],
    tell: Callable[[dict[str, Any]], None],
    bases: LastBase,
) -> int:
    """Draw jobs by their numbers; the record is in the first of the homes, and others count."""
    jobs = {number: job for number, (_, job) in numbered.items()}
    known = _known(out, homes, jobs)
    waiting = [
        (number, where, job)
        for number, (where, job) in numbered.items()
        if len(known.get(number, ())) < job.n * len(job.prompt)
    ]
    for number, where, job in waiting:
        _look_for_files(job, where)
        _look_for_others(job, out / f"{number:04d}", known.get(number, set()))
    drawn, failed = 0, dict[int, IpdiverseError]()
    for number, where, job in waiting:
        with _named(where):
            base = bases.open(job)  # what cannot be opened stops all jobs, here and below a disk
        try:
            with _named(where):
                for line in _draw(number, job, base, out, known.get(number, set())):
                    # after the image, which it says is there
                    append_text(homes[0] / RESULTS, json.dumps(line) + "\n")
                    tell(line)
                    drawn += 1
        except OutputError:
            raise
        except IpdiverseError as error:
            failed[number] = error
    _known(out, homes, jobs)  # puts lines in order, if a lost image was drawn again
    _list(failed, homes[0] / FAILED, len(jobs))
    return drawn


def _list(failed: Mapping[int, IpdiverseError], file: Path, jobs: int) -> None:
    """Write the list of jobs that failed, and raise it as one error."""
    if not failed:
        with writing(file):
            file.unlink(missing_ok=True)
        return
    lines = [json.dumps({"job": n, "error": str(error)}) + "\n" for n, error in failed.items()]
    write_text_atomic(file, "".join(lines))
    first = next(iter(failed.values()))
    if len(failed) == 1:
        raise first
    raise DataError(
        f"lists {len(failed)} of {jobs} jobs that could not be drawn; the first: {first}",
        where=file,
        fix="The same command tries them again.",
    )


def merge_batch(out: Path, rows: int) -> int:
    """Join the records of parts that have all finished; returns the number of images.

    Args:
        rows: How many jobs there are.

    Raises:
        DataError: Images are missing; the error names the first jobs.
    """
    with only_one(out), holding_parts(out) as folders:
        kept, wanted = dict[tuple[int, int], str](), dict[int, int]()
        for _, number, position, line, text in _lines(out, [out, *folders]):
            if position < 0:
                continue
            kept[number, position] = text
            request = Request.of(_current(line["request"]))
            wanted[number] = request.n * len(request.prompt)
        landed = Counter(number for number, _ in kept)
        lost = [n for n in range(rows) if not landed[n] or landed[n] < wanted[n]]
        if lost:
            found = ", ".join(f"job {number}" for number in lost[:5])
            fix = "Run the parts again; what is there is not drawn again."
            raise DataError(f"lacks images of {len(lost)} jobs", where=out, found=found, fix=fix)
        _write(out / RESULTS, kept)
        forget_parts(out, RESULTS, FAILED)
        return len(kept)


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


def _look_for_others(job: Request, folder: Path, there: set[int]) -> None:
    """Refuse a folder in which a file of somebody else has the name of an image to come."""
    missing = [at for at in range(job.n * len(job.prompt)) if at not in there]
    files = [folder / image_name(at) for at in missing]
    found = [file for file in files if os.path.lexists(file)]
    run = fingerprint(job) if found else ""
    if others := [file for file in found if own_image(file, run) is None]:
        raise in_the_way(others[0])


def _draw(
    number: int, job: Request, base: Base, out: Path, there: set[int]
) -> Iterator[dict[str, Any]]:
    """Write each image, and yield its line of the record."""
    folder = ensure_writable_folder(out / f"{number:04d}")
    read, run = inputs(job), fingerprint(job)
    pictures = decoded(job)  # the request was checked when its line was read
    with drawing(job, base, pictures=pictures) as work:
        for position, image in work.images(skip=there):
            name, sha256 = image_name(position), content_hash(image)
            prompt = work.jobs[position].prompt
            about = {"job": number, "image": position, "prompt": prompt, "sha256": sha256}
            command = work.request.command(str(folder))
            record = {"tool": "ipdiverse", **about, "command": command, "run": run}
            save_png(image, folder / name, record)
            line = {**about, "file": f"{folder.name}/{name}", "request": _stated(job)}
            yield line | {"inputs": read, "notes": work.notes}


def _lines(
    out: Path, homes: Iterable[Path]
) -> Iterator[tuple[Path, int, int, dict[str, Any], str]]:
    """Lines of records whose images are there: file, job, image, content and text."""
    for file in (home / RESULTS for home in homes):
        if not os.path.lexists(file):
            continue
        for text in _text(file).split("\n"):
            line = _line(text)
            if line is None:
                continue
            number, position = line["job"], line["image"]
            there = (out / f"{number:04d}" / image_name(position)).is_file()
            yield file, number, position if there else -1, line, text


def _known(out: Path, homes: list[Path], jobs: Mapping[int, Request]) -> dict[int, set[int]]:
    """Images that have landed, by job; torn lines and lost files go, and the rest is in order.

    The first home is the caller's own. In that of the whole batch stands all that has landed.
    """
    own, is_whole = homes[0] / RESULTS, homes[0] == out
    known: dict[int, set[int]] = {}
    kept: dict[tuple[int, int], str] = {}
    read: dict[int, dict[str, str]] = {}
    stated: dict[int, dict[str, Any]] = {}
    for file, number, position, line, text in _lines(out, homes):
        if number not in jobs and not is_whole:
            if file == own and position >= 0:  # of an n before
                kept[number, position] = text
            continue
        if number in jobs and number not in stated:
            stated[number] = _stated(jobs[number])
        if number not in jobs or _current(line["request"]) != stated[number]:
            raise ArgumentError(
                "holds results of other jobs",
                where=file,
                found=f"job {number}",
                fix="Choose a new folder for --out.",
            )
        if position >= 0:
            if number not in read:
                read[number] = inputs(jobs[number])
            _check_inputs(file, number, line.get("inputs"), read[number])
            known.setdefault(number, set()).add(position)
            if is_whole or file == own:
                kept[number, position] = text
    if kept or os.path.lexists(own):
        _write(own, kept)
    return known


def _write(file: Path, kept: Mapping[tuple[int, int], str]) -> None:
    """Put a record in order, unless it is."""
    whole = "".join(f"{kept[at]}\n" for at in sorted(kept))
    if not file.is_file() or whole.encode() != file.read_bytes():
        write_text_atomic(file, whole)


def _text(file: Path) -> str:
    """What the record holds."""
    try:
        text = file.read_text("utf-8", errors="replace")
    except OSError as error:
        raise ArgumentError("cannot be read", where=file, found=error) from error
    lines = [line for line in text.split("\n") if line.strip()]
    torn = len(lines) == 1 and '{"job": '.startswith(lines[0][:8])
    if lines and not torn and all(_line(line) is None for line in lines):
        fix = "Choose a new folder for --out."
        raise ArgumentError("is not a record of a batch", where=file, fix=fix)
    return text


def _line(text: str) -> dict[str, Any] | None:
    """A line of the record; None of what is none."""
    try:
        line = json.loads(text)
        whole = type(line["job"]) is type(line["image"]) is int and line["image"] >= 0
        return line if whole and "request" in line else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _check_inputs(file: Path, number: int, before: Any, now: dict[str, str]) -> None:
    """Refuse images that were made from what has changed since."""
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
    except (ValueError, RecursionError) as error:
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
