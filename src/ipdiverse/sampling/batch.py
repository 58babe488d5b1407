"""Many requests from one file: each image is written as it lands, and a killed run goes on.

OUT/results.jsonl          a line for each image, in the order of the jobs
OUT/results.parquet        the same as a table, where it is asked for
OUT/failed.jsonl           jobs that could not be drawn; the same command tries them again
OUT/jobs.sha256            a fingerprint of each job: another list's images are never mixed in
OUT/0003/0001.png          image 1 of the job in line 3 (counted from 0)

A part (`parts`) draws the jobs that it takes and keeps its own two lists; `merge_batch` joins them.
Jobs and lines wait in a temporary file, so memory does not grow with their number.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import tempfile
from contextlib import contextmanager
from dataclasses import fields
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipdiverse.data.files import text_lines
from ipdiverse.errors import ArgumentError, DataError, IpdiverseError, OutputError, quoted
from ipdiverse.image_io import content_hash
from ipdiverse.levers import LEVERS
from ipdiverse.parts import (
    PARTS,
    WHOLE,
    Part,
    dealt_otherwise,
    forget_parts,
    holding_parts,
    part_of,
)
from ipdiverse.provenance import save_png
from ipdiverse.sampling.draw import drawing
from ipdiverse.sampling.request import USED_WITH, Request, current
from ipdiverse.sampling.saving import fingerprint, image_name, in_the_way, inputs, own_image
from ipdiverse.sampling.task import LastBase, decoded
from ipdiverse.writing import (
    append_text,
    ensure_writable_folder,
    file_hash,
    only_one,
    write_bytes_atomic,
    writing,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from ipdiverse.base.bases import Base

RESULTS, FAILED, TABLE, FINGERPRINT = (
    *("results.jsonl", "failed.jsonl"),
    *("results.parquet", "jobs.sha256"),
)
RECORDS = RESULTS, FAILED, TABLE, FINGERPRINT, PARTS
"""All that a batch reads of its folder, apart from images."""
_TABLES = """
pragma journal_mode = off;
create table jobs (number integer primary key, place text, stated text, images integer);
create table lines (number integer, image integer, own integer, text text,
                    primary key (number, image)) without rowid;
create table failed (number integer primary key, error text);
"""
_KEEP = """insert into lines values (?, ?, ?, ?)
on conflict do update set text = excluded.text, own = 1 where excluded.own"""
_WAITING = """select number, place, stated from jobs
where images > (select count(*) from lines where lines.number = jobs.number) order by number"""
_FAILURES = "select count(*), min(number), error from failed"
_ROW_GROUP = 10_000
_KNOWN = {f.name for f in fields(Request)} - {"levers"} | LEVERS.keys()


class Jobs:
    """Requests by number and what is known of their images, in a temporary file.

    Args:
        jobs: Each with its place, which errors name.

    Attributes:
        elsewhere: Whether a store has an image, such as `0003/0001.png`; it then counts as here.
    """

    def __init__(self, jobs: Iterable[tuple[str, Request]] = ()) -> None:
        # SQLite deletes a database of this name itself; Ray may call from another thread
        self.db = sqlite3.connect("", check_same_thread=False)
        self.db.executescript(_TABLES)
        self.elsewhere: Callable[[str], bool] = lambda _: False
        text = lambda job: json.dumps(job.stated(), sort_keys=True)  # noqa: E731
        rows = (
            (number, quoted(place, None), text(job), job.n * len(job.prompt))
            for number, (place, job) in enumerate(jobs)
        )
        self.db.executemany("insert into jobs values (?, ?, ?, ?)", rows)

    def __len__(self) -> int:
        return self.db.execute("select count(*) from jobs").fetchone()[0]

    def values(self) -> Iterator[Request]:
        """Every job, in order; each is made when it is asked for."""
        every = self.db.execute("select stated from jobs")
        return (Request.of(json.loads(stated)) for (stated,) in every)

    def hashes(self) -> Iterator[str]:
        """A hash of each job, 16 hexadecimal digits and an end of line."""
        every = self.db.execute("select stated from jobs")
        return (hashlib.sha256(text.encode()).hexdigest()[:16] + "\n" for (text,) in every)

    def waiting(self, part: Part) -> Iterator[tuple[int, str, Request, set[int]]]:
        """Jobs of a part that lack images: number, place, request, and the images it has."""
        for number, place, stated in self.db.execute(_WAITING):
            if part.takes(stated):
                there = self.db.execute("select image from lines where number = ?", [number])
                yield number, place, Request.of(json.loads(stated)), {image for (image,) in there}

    def stated(self, number: int, part: Part) -> dict[str, Any] | None:
        """What a job says, if it is there and a part takes it."""
        row = self.db.execute("select stated from jobs where number = ?", [number]).fetchone()
        return json.loads(row[0]) if row and part.takes(row[0]) else None

    def keep(self, number: int, image: int, own: bool, text: str) -> None:
        """Note the line of an image; one of the caller's own record goes before others'."""
        self.db.execute(_KEEP, (number, image, own, text))

    def write(self, file: Path) -> None:
        """Put the own record in order, unless it is."""
        chosen = "select text from lines where own order by number, image"
        lines = lambda: (f"{text}\n".encode() for (text,) in self.db.execute(chosen))  # noqa: E731
        digest = hashlib.sha256()
        for line in lines():
            digest.update(line)
        if not file.is_file() or file_hash(file) != digest.hexdigest():
            write_bytes_atomic(file, lines())


def read_jobs(file: Path, defaults: Request) -> Jobs:
    """Read requests, one JSON object a line; all are checked before the first is drawn."""
    usual = defaults.flat()
    jobs = Jobs((where, _request(line, usual, where)) for where, line in _rows(file))
    if not len(jobs):
        raise DataError("holds no jobs", where=file, expected="a JSON object a line")
    return jobs


def _rows(file: Path) -> Iterator[tuple[str, str]]:
    """Place and text of each line that is not blank."""
    try:
        with file.open("rb") as opened:
            for number, line in text_lines(opened, file, "utf-8"):
                if line.strip():
                    yield f"{file}, line {number}", line
    except (OSError, DataError) as error:
        fix = "Check the path." if isinstance(error, OSError) else "Save it as UTF-8."
        found = f"{error.what} ({error.found})" if isinstance(error, DataError) else error
        raise DataError(
            "cannot be read", where=file, expected="JSON lines", found=found, fix=fix
        ) from error


def run_batch(
    jobs: Jobs | Mapping[str, Request],
    out: Path,
    tell: Callable[[dict[str, Any]], None] = lambda _: None,
    part: Part = WHOLE,
    bases: LastBase | None = None,
    *,
    parquet: bool = False,
) -> int:
    """Draw what is not there yet; returns how many images were drawn now.

    Args:
        tell: Called with the line of each image.
        part: The share of the jobs that is drawn.
        bases: Where models stay open from one call to the next.
        parquet: Write the record as a table too; of parts, `merge_batch` does.

    Raises:
        DataError: Jobs failed; the others were drawn.
    """
    jobs, bases = jobs if isinstance(jobs, Jobs) else Jobs(jobs.items()), bases or LastBase()
    _check_fingerprint(jobs, out)
    if part.whole:
        with only_one(out), holding_parts(out) as folders:
            drawn = _run(jobs, part, out, [out, *folders], tell, bases)
            if parquet:
                write_table(out)
            forget_parts(out, RESULTS, FAILED)
            return drawn
    digest = hashlib.sha256()
    for key in jobs.hashes():
        digest.update(key.encode())
    about = {"kind": "batch", "rows": len(jobs), "sha256": digest.hexdigest(), "parquet": parquet}
    with part_of(out, part, about) as home:
        return _run(jobs, part, out, [home, out, *dealt_otherwise(out, part)], tell, bases)


def _run(
    jobs: Jobs,
    part: Part,
    out: Path,
    homes: list[Path],
    tell: Callable[[dict[str, Any]], None],
    bases: LastBase,
) -> int:
    """Draw the jobs of a part; the record is in the first of the homes, and others count."""
    _read(jobs, part, out, homes)
    for number, where, job, there in jobs.waiting(part):
        _look_for_files(job, where)
        _look_for_others(job, out / f"{number:04d}", there)
    if _check_fingerprint(jobs, out):
        write_bytes_atomic(out / FINGERPRINT, (key.encode() for key in jobs.hashes()))
    own, drawn = homes[0] / RESULTS, 0
    # what failed is tried once more when all others are done: a shared disk may have been away
    for _ in range(2):
        jobs.db.execute("delete from failed")
        for number, where, job, there in jobs.waiting(part):
            with _named(where):
                base = bases.open(job)  # what cannot be opened stops all jobs, as a full disk does
            try:
                for line in _draw(number, job, base, out, there):
                    text = json.dumps(line)
                    append_text(own, text + "\n")  # after the image, which it says is there
                    jobs.keep(number, line["image"], True, text)
                    tell(line)
                    drawn += 1
            except OutputError:
                raise
            except IpdiverseError as error:
                said = str(DataError(str(error), where=where))
                jobs.db.execute("insert into failed values (?, ?)", (number, said))
    if drawn:
        jobs.write(own)  # in order, if a lost image was drawn again
    _list(jobs, homes[0] / FAILED)
    return drawn


def _list(jobs: Jobs, file: Path) -> None:
    """Write the list of jobs that failed, and raise it as one error."""
    count, _, first = jobs.db.execute(_FAILURES).fetchone()
    if not count:
        with writing(file):
            file.unlink(missing_ok=True)
        return
    failed = jobs.db.execute("select number, error from failed order by number")
    lines = (json.dumps({"job": number, "error": error}) + "\n" for number, error in failed)
    write_bytes_atomic(file, (line.encode() for line in lines))
    if count == 1:
        raise DataError(first)
    raise DataError(
        f"lists {count} of {len(jobs)} jobs that could not be drawn; the first: {first}",
        where=file,
        fix="The same command tries them again.",
    )


def merge_batch(
    out: Path, rows: int, elsewhere: Callable[[str], bool] | None = None, *, parquet: bool = False
) -> int:
    """Join the records of parts that have all finished; returns the number of images.

    Args:
        rows: How many jobs there are.
        elsewhere: As of `Jobs`.
        parquet: Write the record as a table too.

    Raises:
        DataError: Images are missing; the error names the first jobs.
    """
    with only_one(out), holding_parts(out) as folders:
        jobs, at = Jobs(), -1
        jobs.elsewhere = elsewhere or jobs.elsewhere
        every = ((number,) for number in range(rows))
        jobs.db.executemany("insert into jobs values (?, '', '', 1)", every)
        for _, number, position, line, text in _lines(jobs, out, [out, *folders]):
            if position < 0:
                continue
            jobs.keep(number, position, True, text)
            if number != at:
                at, request = number, _current(line["request"])
                prompts = request.get("prompt", "")
                several = len(prompts) if isinstance(prompts, list) else 1
                images = request.get("n", Request.n) * max(1, several)
                jobs.db.execute("replace into jobs values (?, '', '', ?)", (number, images))
        lost = [number for number, *_ in jobs.db.execute(_WAITING)]
        if lost:
            found = ", ".join(f"job {number}" for number in lost[:5])
            fix = "Run the parts again; what is there is not drawn again."
            raise DataError(f"lacks images of {len(lost)} jobs", where=out, found=found, fix=fix)
        jobs.write(out / RESULTS)
        if parquet:
            write_table(out)
        forget_parts(out, RESULTS, FAILED)
        return jobs.db.execute("select count(*) from lines").fetchone()[0]


def write_table(out: Path) -> None:
    """Write the record as Parquet; what differs from job to job is JSON in it."""
    import pyarrow as pa
    from pyarrow import parquet

    words = ("prompt", "sha256", "file", "request", "inputs", "notes")
    schema = pa.schema(
        [("job", pa.int64()), ("image", pa.int32()), *((one, pa.string()) for one in words)]
    )
    as_text = lambda value: value if isinstance(value, str) else json.dumps(value)  # noqa: E731
    with tempfile.TemporaryFile() as table:
        with parquet.ParquetWriter(table, schema, compression="zstd") as writer:
            lines = map(json.loads, _text(out / RESULTS))
            while some := list(islice(lines, _ROW_GROUP)):
                rows = [line | {one: as_text(line[one]) for one in words} for line in some]
                writer.write_table(pa.Table.from_pylist(rows, schema))
        table.seek(0)
        write_bytes_atomic(out / TABLE, iter(lambda: table.read(1 << 20), b""))


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
            line = {**about, "file": f"{folder.name}/{name}", "request": job.stated()}
            yield line | {"inputs": read, "notes": work.notes}


def _check_fingerprint(jobs: Jobs, out: Path) -> bool:
    """Refuse a list that is not the folder's own; whether it has grown or was corrected.

    A job of which there is no image yet may change.
    """
    file, changed = out / FINGERPRINT, False
    if not file.is_file():
        return True
    with file.open() as known:
        for number, (before, now) in enumerate(zip_longest(known, jobs.hashes())):
            if before == now:
                continue
            changed = True
            first = f"{number:04d}/{image_name(0)}"
            drawn = any((out / first).parent.glob("*.png")) or jobs.elsewhere(first)
            if before is not None and drawn:
                raise _of_other_jobs(file, number)
    return changed


def _of_other_jobs(file: Path, number: int) -> ArgumentError:
    fix = "Choose a new folder for --out."
    return ArgumentError("holds results of other jobs", where=file, found=f"job {number}", fix=fix)


def _read(jobs: Jobs, part: Part, out: Path, homes: list[Path]) -> None:
    """Note the images that have landed; torn lines and lost files go, and the rest is in order.

    The first home is the caller's own. In that of the whole batch stands all that has landed.
    """
    own, is_whole = homes[0] / RESULTS, homes[0] == out
    jobs.db.execute("delete from lines")
    at, stated, checked = -1, None, None
    for file, number, position, line, text in _lines(jobs, out, homes):
        if number != at:
            at, stated = number, jobs.stated(number, part)
        if stated is None and not is_whole:
            if file == own and position >= 0:  # of an n before
                jobs.keep(number, position, True, text)
            continue
        if stated is None or _current(line["request"]) != stated:
            raise _of_other_jobs(file, number)
        if position >= 0:
            if line.get("inputs") != checked:  # most jobs share their references
                checked = line.get("inputs")
                _check_inputs(file, number, checked, inputs(Request.of(stated)))
            jobs.keep(number, position, is_whole or file == own, text)
    if os.path.lexists(own) or jobs.db.execute("select 1 from lines where own").fetchone():
        jobs.write(own)


def _lines(
    jobs: Jobs, out: Path, homes: Iterable[Path]
) -> Iterator[tuple[Path, int, int, dict[str, Any], str]]:
    """Lines of records whose images are there: file, job, image, content and text."""
    for file in (home / RESULTS for home in homes):
        if not os.path.lexists(file):
            continue
        stray, found = list[str](), False
        for text in _text(file):
            if (line := _line(text)) is None:
                stray = [*stray, text][:2]
                continue
            number, position, found = line["job"], line["image"], True
            name = f"{number:04d}/{image_name(position)}"
            there = (out / name).is_file() or jobs.elsewhere(name)
            yield file, number, position if there else -1, line, text
        torn = len(stray) == 1 and '{"job": '.startswith(stray[0][:8])
        if stray and not found and not torn:
            fix = "Choose a new folder for --out."
            raise ArgumentError("is not a record of a batch", where=file, fix=fix)


def _text(file: Path) -> Iterator[str]:
    """Lines of a record that are not blank."""
    try:
        with file.open(encoding="utf-8", errors="replace", newline="\n") as opened:
            yield from (line.removesuffix("\n") for line in opened if line.strip())
    except OSError as error:
        raise ArgumentError("cannot be read", where=file, found=error) from error


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


def _current(stated: Any) -> Any:
    """A recorded request in today's names."""
    return current(stated, RESULTS) if isinstance(stated, dict) else stated


def _request(line: str, usual: dict[str, Any], where: str) -> Request:
    try:
        stated = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError("is not JSON", where=where, found=line[:80]) from error
    if not isinstance(stated, dict):
        raise DataError("is not a JSON object", where=where, found=line[:80])
    stated = current(stated, where)
    if unknown := sorted(stated.keys() - _KNOWN):
        raise DataError("unknown key", where=where, found=", ".join(unknown))
    with _named(where):
        values = usual | stated
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
