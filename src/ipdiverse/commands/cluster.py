"""Beyond one process: `--part i/n` and `--ray ADDRESS` of several commands, and `merge`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import tyro

from ipdiverse.commands.console import note, say
from ipdiverse.errors import ArgumentError, DataError, IpdiverseError, check_range
from ipdiverse.parts import Part, finished, part_folders
from ipdiverse.writing import LOCK, writing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_PARTS_A_WORKER = 4
"""So that a slow or lost worker leaves little for the others to wait for."""


@dataclass(frozen=True)
class Spread:
    """How the work is spread over processes and machines that share `--out`.

    Args:
        part: `i/n`, do this share of the work; `ipdiverse merge` joins the shares. By default what
            SLURM's array variables or RANK and WORLD_SIZE say; `1/1` is everything.
        ray: Spread the work over a Ray cluster and merge: its address, `auto`, or `local`.
        ray_workers: Processes on the cluster, each with a model of its own; 0 is one for each GPU,
            or for each CPU core where there is none.
        ray_gpus: GPUs of each process; None takes one where the cluster has any.
        ray_install: What pip installs on the workers first, such as `ipdiverse[ray]` or the address
            of a wheel. Without it they have ipdiverse already.
    """

    part: str = ""
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


class Parted(Protocol):
    """A command whose work can be done in parts."""

    @property
    def spread(self) -> Spread:
        """As it was asked for."""
        ...

    @property
    def home(self) -> Path:
        """The folder that `merge` takes."""
        ...

    def opened(self) -> Callable[[Part], Any]:
        """Open what all parts need once; then do any of them."""
        ...


def in_parts(command: Parted) -> bool:
    """Do a command in parts, if it is asked for; whether it was."""
    if command.spread.ray:
        if command.spread.part:
            raise ArgumentError("deals the parts itself", where="--ray", found="--part")
        _on_ray(command)
        say(merge(command.home))
        return True
    part = command.spread.chosen()
    if part.whole:
        return False
    command.opened()(part)
    sys.stderr.write(f"finished part {part}; after the last: ipdiverse merge {command.home}\n")
    return True


@dataclass(frozen=True)
class Merge:
    """Join what the parts of a command left in a folder, as if one process had done it all.

    Args:
        folder: The folder that the parts wrote into.
        to: Then copy the folder to this address, such as `s3://bucket/out`; one without parts too.
    """

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    to: str = ""

    def run(self) -> None:
        """Merge and say what there is."""
        home = Path(self.folder)
        if not self.to or any(map(part_folders, (home, home / "embedded"))):
            say(merge(home))
        if self.to:
            say(f"copied {copied(home, self.to)} files to {self.to}")


def copied(folder: Path, to: str) -> int:
    """Copy a finished folder to an object store; the number of files that were not there yet."""
    from ipdiverse.data.files import remote

    there, count = remote(Path(to)), 0
    if there is None:
        raise ArgumentError("is no address", where="--to", expected="s3://bucket/out", found=to)
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != LOCK]
    if not files:
        raise DataError("holds no files", where=folder)
    # the records come last: what they name is there
    for file in sorted(files, key=lambda one: (-len(one.parts), one)):
        name = f"{there[1]}/{file.relative_to(folder).as_posix()}"
        with writing(name):
            stored = file.parent != folder and there[0].exists(name)
            if not stored or there[0].size(name) != file.stat().st_size:
                there[0].put_file(str(file), name)
                count += 1
    return count


def merge(folder: Path) -> str:
    """Check that all parts have finished, and join them; what was made, in a line."""
    home = next((one for one in (folder, folder / "embedded") if part_folders(one)), folder)
    about = finished(home)
    if about.get("kind") not in MERGES:
        raise DataError("holds parts of an unknown command", where=home, found=about.get("kind"))
    return MERGES[about["kind"]](folder, about)


def _batch(folder: Path, about: Mapping[str, Any]) -> str:
    from ipdiverse.sampling.batch import merge_batch

    rows, parquet = about["rows"], about.get("parquet", False)
    if parquet:
        check_parquet()
    return f"merged {merge_batch(folder, rows, parquet=parquet)} images of {rows} jobs in {folder}"


def check_parquet() -> None:
    """Refuse `--parquet` before anything is drawn, where its library is missing."""
    if find_spec("pyarrow") is None:
        fix = "Run `pip install 'ipdiverse[parquet]'`, or leave it out."
        raise ArgumentError("needs pyarrow, which is not installed", where="--parquet", fix=fix)


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

    def __init__(self, command: Parted, folder: str, count: int) -> None:
        os.chdir(folder)  # paths are those of whoever asked
        self.count, self.work = count, None
        self.command = command

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Do parts by number; what failed of each, or ""."""
        failed = [self._do(Part(int(number), self.count)) for number in batch["number"]]
        return {"number": batch["number"], "failed": failed}

    def _do(self, part: Part) -> str:
        try:
            # here, as what an actor raises when it is made is tried again without end
            self.work = self.work or self.command.opened()
            self.work(part)
        except IpdiverseError as error:
            return f"{part}: {error}"
        return ""


def _on_ray(command: Parted) -> None:
    """Do all parts of a command on a Ray cluster; a part whose worker is lost is done again."""
    if find_spec("ray") is None:
        raise ArgumentError(
            "needs ray, which is not installed",
            where="--ray",
            fix="Run `pip install -e '.[ray]'` in your copy of ipdiverse.",
        )
    import ray  # type: ignore[import-not-found]

    spread = command.spread
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
    room = there.get("GPU", 0.0) / gpus if gpus else there.get("CPU", 1.0)
    workers = spread.ray_workers or max(1, int(room))
    count = workers * _PARTS_A_WORKER
    numbers = [{"number": number} for number in range(1, count + 1)]
    done = ray.data.from_items(numbers, override_num_blocks=count).map_batches(
        _Worker,
        fn_constructor_args=(command, os.getcwd(), count),  # noqa: PTH109
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
