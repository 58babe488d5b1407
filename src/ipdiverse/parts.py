"""Work in parts: `--part i/n` takes its share by content, and writes only files of its own.

OUT/parts/2-of-3/part.json    what the part is of, and whether it has finished
OUT/parts/2-of-3/…            its journal

A share depends on what a row, file or shard is, not on its place: parts may be dealt anew, by
another n, and what earlier parts finished counts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from ipdiverse.errors import ArgumentError, DataError
from ipdiverse.writing import LOCK, only_one, sealed, unsealed, write_text_atomic

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PARTS, STATEMENT = "parts", "part.json"
MOST = 100_000
_NAMED = 5
_FOLDER = re.compile(r"([0-9]+)-of-([0-9]+)")


@dataclass(frozen=True)
class Part:
    """One of `count` shares of a work list, counted from 1; the default is all of it."""

    number: int = 1
    count: int = 1

    @classmethod
    def of(cls, text: str) -> Part:
        """Read `i/n` (`ArgumentError`)."""
        found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
        number, count = map(int, found.groups()) if found else (0, 0)
        if not 1 <= number <= count <= MOST:
            expected = f"i/n, from 1/n to n/n, n at most {MOST}"
            raise ArgumentError("is not a part", where="part", expected=expected, found=text)
        return cls(number, count)

    @classmethod
    def of_environment(cls, variables: Mapping[str, str]) -> Part:
        """The part that a launcher gave this process: SLURM's array, or RANK of WORLD_SIZE.

        Raises:
            ArgumentError: The variables are not numbers, or contradict each other.
        """
        number, count = "RANK", "WORLD_SIZE"
        if {"SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"} <= variables.keys():
            number, count = "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"
        if not {number, count} <= variables.keys():
            return cls()
        try:
            at, several = int(variables[number]), int(variables[count])
            first = int(variables.get("SLURM_ARRAY_TASK_MIN", 0)) if number != "RANK" else 0
            last = int(variables.get("SLURM_ARRAY_TASK_MAX", first + several - 1))
        except ValueError as error:
            raise ArgumentError("not numbers", where=f"{number}, {count}", found=error) from error
        # ids of `--array=1-9:2` are 1, 3, 5, 7, 9
        step = max(1, (last - first) // max(1, several - 1)) if number != "RANK" else 1
        return cls.of(f"{(at - first) // step + 1}/{several}")

    @property
    def whole(self) -> bool:
        """Whether it is all of the work."""
        return self.count == 1

    def takes(self, key: str) -> bool:
        """Whether what is known by this key is in the share."""
        # file names and captions may hold halves of surrogate pairs
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.number - 1

    def folder(self, out: Path) -> Path:
        """Where its own files are."""
        return out / PARTS / f"{self.number}-of-{self.count}"

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


WHOLE = Part()


@contextlib.contextmanager
def part_of(out: Path, part: Part, about: Mapping[str, Any]) -> Iterator[Path]:
    """Hold the folder of a part for a `with` block; when that ends well, the part has finished.

    Args:
        about: What the work is, as JSON; only parts of the same work are merged.
    """
    folder = part.folder(out)
    begun, done = (sealed({"about": dict(about), "done": done}) for done in (False, True))
    with only_one(folder):
        write_text_atomic(folder / STATEMENT, begun)
        yield folder
        write_text_atomic(folder / STATEMENT, done)


@contextlib.contextmanager
def holding_parts(out: Path) -> Iterator[list[Path]]:
    """The folders of all parts, none of which is at work meanwhile (`OutputError`)."""
    with contextlib.ExitStack() as stack:
        folders = part_folders(out)
        for folder in folders:
            stack.enter_context(only_one(folder))
        yield folders


def dealt_otherwise(out: Path, part: Part) -> list[Path]:
    """Folders of parts of another number, which may hold some of a part's share.

    Those of the same number hold none: reading all of them would grow with its square.
    """
    return [one for one in part_folders(out) if not one.name.endswith(f"-of-{part.count}")]


def of_another(name: PurePath | str, part: Part) -> bool:
    """Whether a file is in the folder of another part of the same number."""
    others = (one for one in PurePath(name).parts if one.endswith(f"-of-{part.count}"))
    return any(_FOLDER.fullmatch(one) and not one.startswith(f"{part.number}-") for one in others)


def part_folders(out: Path) -> list[Path]:
    """The folders of parts that were begun, in order."""
    found = [folder for folder in (out / PARTS).glob("*-of-*") if _FOLDER.fullmatch(folder.name)]
    return sorted(folder for folder in found if (folder / STATEMENT).is_file())


def finished(out: Path) -> dict[str, Any]:
    """What the work of a folder's parts is, once all parts of one number have finished.

    Raises:
        DataError: There are no parts, or some are missing: the error names them.
    """
    stated: dict[str, list[tuple[Part, float, bool]]] = defaultdict(list)
    for folder in part_folders(out):
        file = folder / STATEMENT
        try:
            content = unsealed(file.read_text("utf-8"))
            about, done = json.dumps(content["about"], sort_keys=True), bool(content["done"])
        except (OSError, ValueError, KeyError, RecursionError) as error:
            fix = "Delete it, and run this part again."
            raise DataError("is broken", where=file, found=error, fix=fix) from error
        part = Part.of(folder.name.replace("-of-", "/"))
        stated[about].append((part, file.stat().st_mtime, done))
    if not stated:
        fix = "Run a command with --part i/n and this folder first."
        raise DataError("holds no parts", where=out, fix=fix)
    # the work that was last at hand is what the user means
    for about in sorted(stated, key=lambda one: -max(time for _, time, _ in stated[one])):
        counts = {part.count for part, _, _ in stated[about]}
        if any(not _lacking(stated[about], count) for count in counts):
            return json.loads(about)
    latest = max((one for many in stated.values() for one in many), key=lambda one: one[1])
    same = next(many for many in stated.values() if latest in many)
    lacking = _lacking(same, latest[0].count)
    more = f" and {len(lacking) - _NAMED} more" * (len(lacking) > _NAMED)
    raise DataError(
        "has parts that have not finished",
        where=out,
        found=", ".join(map(str, lacking[:_NAMED])) + more,
        fix="Run each again, with its --part and otherwise the same command.",
    )


def _lacking(stated: list[tuple[Part, float, bool]], count: int) -> list[Part]:
    done = {part for part, _, is_done in stated if is_done}
    return [part for number in range(count) if (part := Part(number + 1, count)) not in done]


def forget_parts(out: Path, *names: str) -> None:
    """Remove the folders of parts, whose files are all merged; a file of somebody else stays."""
    for folder in part_folders(out):
        for name in (*names, STATEMENT, LOCK):
            (folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()
    with contextlib.suppress(OSError):
        (out / PARTS).rmdir()
