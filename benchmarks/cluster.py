"""Beyond one machine: memory of a batch by rows, images a second by workers, what saturates first.

Three cells of `docs/benchmarks/cluster.json`, each by its own word:

    driver   1,000 to 1,000,000 rows through `generate --batch`, with a stub in place of the model
    workers  one process against two on this machine, with the bundled model
    model    8, 64 and 512 workers, computed from counted operations and stated assumptions
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

TARGET = Path(__file__).parents[1] / "docs" / "benchmarks" / "cluster.json"
ROWS = (1_000, 100_000, 1_000_000)
CHECKED = 100_000
"""Up to here each row is checked as ever; beyond, memory is the question and time is ten times."""
DRAWN = 2_000
"""Rows that the stub draws at most, as a part of the list would; the others are only dealt."""
JOBS, EACH, STEPS, ROUNDS = 16, 4, 10, 3
WORKERS = (1, 2, 8, 64, 512)
ASSUMED = {
    "images_a_second_of_a_gpu": 0.7,  # SD 1.5, 30 steps with guidance
    "shared_disk_bytes_a_second": 1e9,
    "shared_disk_operations_a_second": 5_000,
    "hub_bytes_a_second": 125e6,
}
"""A network disk of the middle class, and a line of 1 Gbit/s to the hub."""


def main() -> None:
    """Measure what was asked for, and add it to the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", nargs="*", default=["driver", "workers", "model"])
    parser.add_argument("--rows", type=int, help="one size of `driver`, in this process")
    parser.add_argument("--out", type=Path, default=TARGET)
    asked = parser.parse_args()
    if asked.rows:
        print(json.dumps(driver(asked.rows)))
        return
    found = json.loads(TARGET.read_text()) if TARGET.is_file() else {}
    if "driver" in asked.cells:
        cells = [_alone("--rows", str(rows)) for rows in ROWS]
        what = "generate --batch, with a stub that touches a file in place of the model"
        found["driver"] = {"what": what, "rows": [json.loads(cell) for cell in cells]}
    if "workers" in asked.cells:
        found["workers"] = workers()
    if "model" in asked.cells:
        found["model"] = model(found["driver"]["rows"])
    asked.out.write_text(json.dumps(found, indent=2) + "\n")


def _alone(*words: str) -> str:
    """What this file prints in a process of its own."""
    run = [sys.executable, __file__, *words]
    return subprocess.run(run, check=True, capture_output=True, text=True).stdout


def _peak(reset: bool = False) -> float:
    """Peak resident memory of this process since the last reset, in MB (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1000


def driver(rows: int) -> dict[str, Any]:
    """Read and check a job file, draw a share of it with a stub, and merge a record of all rows."""
    from ipdiverse.parts import Part
    from ipdiverse.sampling import batch
    from ipdiverse.sampling.request import Request
    from ipdiverse.sampling.task import LastBase

    def draws(number: int, job: Request, _: object, out: Path, there: set[int]) -> Any:
        home = out / f"{number:04d}"
        home.mkdir(parents=True, exist_ok=True)
        for image in set(range(job.n)) - there:
            (home / f"{image:04d}.png").touch()
            yield _line(number, image, job.prompt[0], job.stated())

    batch._draw = draws  # type: ignore[assignment]
    if rows > CHECKED:
        given: Any = SimpleNamespace(n=1, prompt=("",))
        batch._request = lambda line, *_: SimpleNamespace(  # type: ignore[assignment]
            **vars(given), stated=lambda: json.loads(line)
        )
    LastBase.open = lambda *_: None  # type: ignore[assignment,method-assign]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("a.png").touch()
        with Path("jobs.jsonl").open("w") as file:
            for row in range(rows):
                file.write(json.dumps({"image": "a.png", "prompt": f"row {row}", "n": 1}) + "\n")
        Path("one.jsonl").write_text('{"image": "a.png"}')
        batch.read_jobs(Path("one.jsonl"), Request()).db.close()  # what is imported late
        before, times = _peak(reset=True), [time.process_time()]
        jobs = batch.read_jobs(Path("jobs.jsonl"), Request())
        times.append(time.process_time())
        part = Part(1, max(1, rows // DRAWN))
        drawn = batch.run_batch(jobs, Path("out"), part=part)
        times.append(time.process_time())
        worker = _peak() - before
        jobs.db.close()
        _peak(reset=True)
        _all_landed(rows)
        # one file stands for all images
        batch.image_name = lambda _: str(Path("a.png").absolute())  # type: ignore[assignment]
        times.append(time.process_time())
        merged = batch.merge_batch(Path("all"), rows)
        times.append(time.process_time())
        spent = [round(b - a, 2) for a, b in pairwise(times)]
        return {
            "rows": rows,
            "rows_are_checked": rows <= CHECKED,
            "file_mb": round(Path("jobs.jsonl").stat().st_size / 1e6, 1),
            "read_cpu_seconds": spent[0],
            "part": str(part),
            "drawn": drawn,
            "part_cpu_seconds": spent[1],
            "worker_rise_mb": round(worker, 1),
            "merged": merged,
            "merge_cpu_seconds": spent[3],
            "merge_rise_mb": round(_peak() - before, 1),
            "process_mb": round(before),
        }


def _line(number: int, image: int, prompt: str, request: dict[str, Any]) -> dict[str, Any]:
    """A line of a record, of the usual length."""
    file = f"{number:04d}/{image:04d}.png"
    about = {"job": number, "image": image, "prompt": prompt, "sha256": "0" * 64, "file": file}
    return {**about, "request": request, "inputs": {"a.png": "0" * 64}, "notes": []}


def _all_landed(rows: int) -> None:
    """A part's folder as if every row had been drawn."""
    home = Path("all", "parts", "1-of-1")
    home.mkdir(parents=True)
    (home / "part.json").write_text("{}")
    with (home / "results.jsonl").open("w") as record:
        for row in range(rows):
            stated = {"image": ["a.png"], "prompt": [f"row {row}"], "n": 1}
            record.write(json.dumps(_line(row, 0, f"row {row}", stated)) + "\n")


def _batch(folder: Path, jobs: int = JOBS) -> Path:
    """A job file for the bundled model."""
    from ipdiverse.critters.make import make_dataset

    make_dataset(folder / "refs", 2)
    file = folder / "jobs.jsonl"
    image = str(folder / "refs" / "images" / "0000000.png")
    lines = [{"image": image, "prompt": f"a critter in the snow, {row}"} for row in range(jobs)]
    more = {"n": EACH, "steps": STEPS}
    file.write_text("".join(json.dumps(line | more) + "\n" for line in lines))
    return file


def workers() -> dict[str, Any]:
    """Images a second of one process and of two, alternating; from first to last image."""
    found: dict[str, list[float]] = {"1": [], "2": []}
    with tempfile.TemporaryDirectory() as name:
        file = _batch(Path(name))
        for index in range(ROUNDS):
            for count in (1, 2) if index % 2 == 0 else (2, 1):
                out = Path(name, f"out-{index}-{count}")
                words = ["generate", "--batch", str(file), "--out", str(out)]
                runs = [
                    [sys.executable, "-m", "ipdiverse", *words, "--part", f"{n + 1}/{count}"]
                    for n in range(count)
                ]
                started = [subprocess.Popen(run, stdout=subprocess.DEVNULL) for run in runs]
                if any(one.wait() for one in started):
                    raise SystemExit("a worker failed")
                landed = sorted(one.stat().st_mtime for one in out.rglob("*.png"))
                found[str(count)].append((len(landed) - 1) / (landed[-1] - landed[0]))
    middle = {count: sorted(rates)[ROUNDS // 2] for count, rates in found.items()}
    return {
        "what": f"critters, {STEPS} steps, {JOBS * EACH} images, a thread each, {ROUNDS} rounds",
        "images_a_second": {count: round(rate, 2) for count, rate in middle.items()},
        "all": {count: [round(rate, 2) for rate in rates] for count, rates in found.items()},
        "ratio": round(middle["2"] / middle["1"], 2),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
    }


def counted() -> dict[str, float]:
    """Time, file operations and bytes that an image costs, as a batch is drawn by a warm model."""
    from ipdiverse.sampling.batch import read_jobs, run_batch
    from ipdiverse.sampling.request import Request
    from ipdiverse.sampling.task import LastBase

    seen, sync = Counter[str](), os.fsync
    events = {"open", "os.mkdir", "os.rename", "os.remove", "os.listdir", "os.scandir"}
    with tempfile.TemporaryDirectory() as name:
        out, bases = Path(name, "out"), LastBase()
        jobs = read_jobs(_batch(Path(name), 4), Request())
        run_batch(jobs, Path(name, "warm"), bases=bases)

        def hook(event: str, given: tuple[Any, ...]) -> None:
            if event in events and str(given[0]).startswith(str(out)):
                seen[event] += 1

        def counts(descriptor: int) -> None:
            seen["fsync"] += 1
            sync(descriptor)

        sys.addaudithook(hook)
        os.fsync = counts  # type: ignore[assignment]
        started = time.process_time()
        drawn = run_batch(jobs, out, bases=bases)
        spent = time.process_time() - started
        os.fsync = sync
        size = sum(one.stat().st_size for one in out.rglob("*") if one.is_file())
    return {
        "images": drawn,
        "cpu_seconds_an_image": round(spent / drawn, 3),
        "operations_an_image": round(sum(seen.values()) / drawn, 2),
        "bytes_an_image": round(size / drawn),
        **{f"{event}_an_image": round(count / drawn, 2) for event, count in sorted(seen.items())},
    }


def model(driven: list[dict[str, Any]]) -> dict[str, Any]:
    """How busy each shared thing is by number of workers, and which is full first."""
    from ipdiverse.base.presets import preset_files, total

    cost, largest = counted(), next(one for one in driven if one["rows"] == CHECKED)
    merged = largest["rows"] / largest["merge_cpu_seconds"]
    sizes = {
        "critters on a core": (1 / cost["cpu_seconds_an_image"], cost["bytes_an_image"], 0),
        "SD 1.5 on a GPU, 30 steps": (
            ASSUMED["images_a_second_of_a_gpu"],
            400_000,  # a PNG of 512 px
            total(preset_files("sd15", "sd15", "sd15")),
        ),
    }
    cells = []
    for name, (each, written, weights) in sizes.items():
        for count in WORKERS:
            images = each * count
            busy = {
                "disk, bytes": images * written / ASSUMED["shared_disk_bytes_a_second"],
                "disk, operations": images
                * cost["operations_an_image"]
                / ASSUMED["shared_disk_operations_a_second"],
                "driver, merging as fast as images come": images / merged,
            }
            first = max(busy, key=lambda one: busy[one])
            images /= max(1.0, busy[first])
            cells.append(
                {
                    "worker": name,
                    "workers": count,
                    "images_a_second": round(images, 1),
                    "busy": {one: round(share, 4) for one, share in busy.items()},
                    "first": first,
                    "hub_seconds_without_a_shared_cache": round(
                        count * weights / ASSUMED["hub_bytes_a_second"]
                    ),
                    "time_drawing_of_a_million_rows": round(
                        1 / (1 + largest["read_cpu_seconds"] * images / largest["rows"]), 3
                    ),
                }
            )
    return {"what": "computed, not measured", "counted": cost, "assumed": ASSUMED, "cells": cells}


if __name__ == "__main__":
    main()
