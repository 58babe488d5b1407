"""Beyond one process: `--part i/n`, `--to ADDRESS` and `--ray ADDRESS`, and `merge`."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ipdiverse.commands.console import check_installed, note, say
from ipdiverse.data.files import MIB, inside, stamp_of
from ipdiverse.errors import ArgumentError, DataError, IpdiverseError, OutputError, check_range
from ipdiverse.parts import PARTS, STATEMENT, WHOLE, Part, finished, of_another, part_folders
from ipdiverse.writing import file_hash, write_bytes_atomic, write_text_atomic, writing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

_PARTS_A_WORKER = 4
"""So that a slow or lost worker leaves little for the others to wait for."""
_SECONDS = 10.0
"""Between two looks for files to send, so this much work is done again after a machine is lost."""
_MARK = ".copy"
"""Holds the address that a folder is copied to, so that files of two never mix."""


@dataclass(frozen=True)
class Spread:
    """How the work is spread over processes and machines that share `--out`.

    Args:
        part: `i/n`, do this share of the work; `ipdiverse merge` joins the shares. By default what
            SLURM's array variables or RANK and WORLD_SIZE say; `1/1` is everything.
        to: Keep a copy of the folder at an address such as `s3://bucket/out`: files are copied
            there as they are finished, and what is there already counts. Machines need no shared
            disk then.
        ray: Spread the work over a Ray cluster and merge: its address, `auto`, or `local`.
        ray_workers: Processes on the cluster, each with a model of its own; 0 is one for each GPU,
            or for each CPU core where there is none.
        ray_gpus: GPUs of each process; None takes one where the cluster has any.
        ray_install: What pip installs on the workers first, such as `ipdiverse[ray]` or the address
            of a wheel. Without it they have ipdiverse already.
    """

    part: str = ""
    to: str = ""
    ray: str = ""
    ray_workers: int = 0
    ray_gpus: float | None = None
    ray_install: str = ""

    def chosen(self) -> Part:
        """The part of this process."""
        if self.part:
            return Part.of(self.part)
        part = Part.of_environment(os.environ)
        if not part.whole:
            note(f"part {part}, as the launcher's variables say; --part 1/1 does everything")
        return part


def in_parts(
    spread: Spread,
    home: Path,
    opened: Callable[[], Callable[[Part], Any]],
    alone: Callable[[], Any],
    records: Sequence[str] = ("",),
) -> None:
    """Do all of a command's work, a part of it, or its parts on Ray.

    Args:
        spread: As it was asked for.
        home: The folder that `merge` takes.
        opened: Opens what all parts need once; what it returns does any of them.
        alone: Does all of it.
        records: What a part needs of a copy of the folder in a store; "" is everything.
    """
    kept = partial(copied, home, spread.to, records)
    if spread.ray:
        if spread.part:
            raise ArgumentError("deals the parts itself", where="--ray", found="--part")
        _on_ray(spread, opened, kept)
        Merge(str(home), spread.to).run()
        return
    part = spread.chosen()
    with kept(part):
        if part.whole:
            alone()
            return
        opened()(part)
    to = f" --to {spread.to}" * bool(spread.to)
    sys.stderr.write(f"finished part {part}; after the last: ipdiverse merge {home}{to}\n")


@dataclass(frozen=True)
class Merge:
    """Join what the parts of a command left in a folder, as if one process had done it all.

    Args:
        folder: The folder that the parts wrote into.
        to: Where they kept its copy, such as `s3://bucket/out`; any other folder, also one without
            parts, is copied there.
    """

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    to: str = ""

    def run(self) -> None:
        """Merge and say what there is."""
        home = Path(self.folder)
        with copied(home, self.to, (PARTS, f"embedded/{PARTS}"), WHOLE) as copy:
            has_parts = any(map(part_folders, (home, home / "embedded")))
            if copy is None or has_parts or not any(home.glob("[!.]*")):
                say(merge(home, copy))
        if copy is not None:
            say(f"copied {copy.sent} files to {self.to}")


class Copy:
    """A folder's copy in an object store, which knows neither locks nor files that grow.

    So a part sends files of its own alone, and a record as a whole, after what it names.

    Raises:
        ArgumentError: It is no address, or the store holds the copy of another folder.
        OutputError: The store cannot be reached, here and in all methods.
    """

    def __init__(self, folder: Path, to: str, part: Part = WHOLE) -> None:
        self.folder, self.to, self.part, self.sent = folder, to, part, 0
        self._known: dict[str, str] = {}  # stamps of what is the same here and there
        if "://" not in to:
            raise ArgumentError("is no address", where="--to", expected="s3://bucket/out", found=to)
        from fsspec.core import url_to_fs
        from fsspec.implementations.dirfs import DirFileSystem

        fresh = {"use_listings_cache": False, "skip_instance_cache": True}  # others write there too
        noted = mark.read_text("utf-8") if (mark := folder / _MARK).is_file() else ""
        with self._reached():
            system, root = url_to_fs(to.rstrip("/"), **fresh)
            system.auto_mkdir = True  # on a disk; stores have no folders
            self.store: Any = DirFileSystem(root, system)  # with the same names as the folder
            is_mixed = not noted and any(folder.glob("[!.]*")) and self.store.find("")
        if noted not in ("", to) or is_mixed:
            fix = "Choose a new folder here, or another address."
            raise ArgumentError("is the copy of another folder", where=to, found=folder, fix=fix)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_text_atomic(mark, to)

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except IpdiverseError:
            raise
        except Exception as error:  # each store has its own kinds
            fix = "Check address and rights; the same command goes on."
            raise OutputError("cannot be reached", where=self.to, found=error, fix=fix) from error

    def names(self) -> set[str]:
        """Every file that the store has."""
        with self._reached():
            return {*self.store.find("")}

    def fetch(self, *tops: str) -> None:
        """Bring what the store has below some names; of two files that differ the newer counts."""
        with self._reached():
            for name in itertools.chain(*map(self.store.find, tops)):
                file = inside(self.folder, name)  # whoever may write there may not write here
                if of_another(name, self.part) or "/." in f"/{name}":
                    continue
                if not (file.is_file() and self._is_same(name)):
                    changed = self.store.modified(name).timestamp()
                    if file.is_file() and file.stat().st_mtime >= changed:
                        continue
                    file.parent.mkdir(parents=True, exist_ok=True)
                    with self.store.open(name, "rb") as stream:
                        write_bytes_atomic(file, iter(partial(stream.read, MIB), b""))
                self._known[name] = stamp_of(self.folder, name)

    def send(self) -> None:
        """Copy what the store lacks, records last."""
        order = lambda one: (one.name == STATEMENT, one.suffix in (".json", ".jsonl"), one)  # noqa: E731
        for file in sorted(self.folder.rglob("[!.]*"), key=order):  # no locks, nothing unfinished
            name = file.relative_to(self.folder).as_posix()
            known, stamp = self._known.get(name), stamp_of(self.folder, name)
            if known == stamp or of_another(name, self.part) or not file.is_file():
                continue
            with self._reached(), contextlib.suppress(FileNotFoundError):  # gone meanwhile
                if known or not self._is_same(name):
                    self.store.put_file(str(file), name)
                    self.sent += 1
                self._known[name] = stamp

    def forget(self) -> None:
        """Remove there what was removed here since it was fetched or sent."""
        for name in self._known:
            if not (self.folder / name).is_file():
                with self._reached():
                    self.store.rm_file(name)

    def _is_same(self, name: str) -> bool:
        """By the checksum that the store gives, S3's, Google's or the hub's; else byte by byte."""
        file = self.folder / name
        try:
            about = self.store.info(name)
        except FileNotFoundError:
            return False
        if about["size"] != file.stat().st_size:
            return False
        with file.open("rb") as stream:
            md5 = hashlib.file_digest(stream, partial(hashlib.md5, usedforsecurity=False))
        own = file_hash(file)
        known = {md5.hexdigest(), base64.b64encode(md5.digest()).decode(), own}
        said = about.get("ETag"), about.get("md5Hash"), (about.get("lfs") or {}).get("sha256")
        if known & {str(one).strip('"') for one in said}:
            return True
        with self.store.open(name, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == own


@contextlib.contextmanager
def copied(folder: Path, to: str, tops: Sequence[str], part: Part) -> Iterator[Copy | None]:
    """Keep a folder's copy at an address for a `with` block, if there is one; `tops` count here."""
    if not to:
        yield None
        return
    copy, ended = Copy(folder, to, part), Event()
    copy.fetch(*tops)

    def watch() -> None:
        while not ended.wait(_SECONDS):
            with contextlib.suppress(IpdiverseError):  # said when it fails at the end too
                copy.send()

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield copy
    finally:
        ended.set()
        thread.join()
        copy.send()
    copy.forget()


def merge(folder: Path, copy: Copy | None = None) -> str:
    """Check that all parts have finished, and join them; what was made, in a line."""
    home = next((one for one in (folder, folder / "embedded") if part_folders(one)), folder)
    about = finished(home)
    if about.get("kind") not in MERGES:
        raise DataError("holds parts of an unknown command", where=home, found=about.get("kind"))
    if copy is not None and about["kind"] != "batch":
        copy.fetch("")
    elif copy is not None:  # whose images stay there
        from ipdiverse.sampling.batch import RECORDS

        copy.fetch(*RECORDS)
        about["elsewhere"] = copy.names().__contains__
    return MERGES[about["kind"]](folder, about)


def _batch(folder: Path, about: Mapping[str, Any]) -> str:
    from ipdiverse.sampling.batch import merge_batch

    rows, parquet = about["rows"], about.get("parquet", False)
    if parquet:
        check_installed("pyarrow", "--parquet")
    images = merge_batch(folder, rows, about.get("elsewhere"), parquet=parquet)
    return f"merged {images} images of {rows} jobs in {folder}"


def _prepared(folder: Path, about: Mapping[str, Any]) -> str:
    from ipdiverse.data.doctor import as_text
    from ipdiverse.data.manifest import PrepareOptions
    from ipdiverse.data.prepare import prepare

    return as_text(prepare(about["source"], folder, PrepareOptions(**about["options"])))


def _embedded(folder: Path, about: Mapping[str, Any]) -> str:
    from ipdiverse.training.embed import merge_embedded

    merge_embedded(folder, about)
    return f"merged the cache in {folder / 'embedded'}"


def _measured(folder: Path, about: Mapping[str, Any]) -> str:
    from ipdiverse.evaluation.report import write_report
    from ipdiverse.evaluation.running import Runner
    from ipdiverse.evaluation.study import quick_study, read_study

    file = about["config"]
    study = quick_study() if file is None else read_study(Path(file))
    if repr(study) != about["study"]:
        fix = "Run the parts again, or give the file its old content."
        raise DataError("has changed since its images were drawn", where=file, fix=fix)
    return f"open {write_report(study, Runner(study, folder).run(), folder)}"


MERGES = {"batch": _batch, "prepare": _prepared, "embed": _embedded, "evaluate": _measured}
"""How to join the parts of each command, by its name; `fit` adds its own."""


class _Worker:
    """An actor: opens what a command needs once, and does one part after the other."""

    def __init__(self, opened: Any, kept: Any, folder: str, count: int) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        os.chdir(folder)  # paths are those of whoever asked
        self.opened, self.kept, self.count, self.work = opened, kept, count, None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Do parts by number; what failed of each, or ""."""
        failed = [self._do(Part(int(number), self.count)) for number in batch["number"]]
        return {"number": batch["number"], "failed": failed}

    def _do(self, part: Part) -> str:
        try:
            # here, as what an actor raises when it is made is tried again without end
            with self.kept(part):
                self.work = self.work or self.opened()
                self.work(part)
        except IpdiverseError as error:
            return f"{part}: {error}"
        return ""


def _on_ray(spread: Spread, opened: Any, kept: Any) -> None:
    """Do all parts of a command on a Ray cluster; a part whose worker is lost is done again."""
    check_installed("ray", "--ray")
    import ray  # type: ignore[import-not-found]

    check_range("ray_workers", spread.ray_workers, 0, 10_000)
    check_range("ray_gpus", spread.ray_gpus or 0, 0, 64)
    if not ray.is_initialized():
        try:
            workers_have = {"pip": [spread.ray_install]} if spread.ray_install else None
            ray.init(address=spread.ray, log_to_driver=False, runtime_env=workers_have)
        except (ConnectionError, ValueError, RuntimeError) as error:
            fix = "Start one with `ray start --head`, or use --ray local."
            raise ArgumentError("not a cluster", where=spread.ray, found=error, fix=fix) from error
    there = ray.cluster_resources()
    gpus = min(1.0, there.get("GPU", 0.0)) if spread.ray_gpus is None else spread.ray_gpus
    room = [there.get("CPU", 1.0), *([there.get("GPU", 0.0) / gpus] if gpus else [])]
    workers = spread.ray_workers or max(1, int(min(room)))
    count = workers * _PARTS_A_WORKER
    numbers = [{"number": number} for number in range(1, count + 1)]
    done = ray.data.from_items(numbers, override_num_blocks=count).map_batches(
        _Worker,
        fn_constructor_args=(opened, kept, os.getcwd(), count),  # noqa: PTH109
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=1,
        num_gpus=gpus or None,
    )
    failed = sorted(str(row["failed"]) for row in done.iter_rows() if row["failed"])
    if failed:
        fix = "Run the same command again; what is done is kept."
        what = f"{len(failed)} of {count} parts failed"
        raise DataError(what, where="--ray", found=failed[0], fix=fix)
