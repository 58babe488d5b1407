"""Work in parts: whatever n, killed or dealt anew, it ends as if one process had done it all."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import shutil
import tarfile
import threading
import tracemalloc
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from ipdiverse.cli import main
from ipdiverse.commands import cluster, console
from ipdiverse.commands.cluster import Spread, merge
from ipdiverse.data.manifest import PrepareOptions
from ipdiverse.data.prepare import JOURNAL, prepare
from ipdiverse.errors import ArgumentError, DataError, IpdiverseError, OutputError
from ipdiverse.parts import PARTS, WHOLE, Part, finished, part_of
from ipdiverse.sampling import batch
from ipdiverse.sampling.batch import FAILED, FINGERPRINT, RESULTS, TABLE, read_jobs, run_batch
from ipdiverse.sampling.request import Request
from ipdiverse.writing import only_one
from tests import models

if TYPE_CHECKING:
    from collections.abc import Iterator

ROWS = 40


def tree(folder: Path) -> dict[str, bytes]:
    """Every file that a command wrote, but for locks and the address of a copy."""
    marks = (".lock", ".copy")
    files = (file for file in folder.rglob("*") if file.is_file() and file.name not in marks)
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(files)}


@pytest.mark.parametrize(
    "text", ["", "1", "0/3", "4/3", "1/0", "1/2/3", "-1/3", "1/1000000", "a/b"]
)
def test_what_is_no_part_is_said(text: str) -> None:
    with pytest.raises(ArgumentError, match=r"part: is not a part; expected i/n, from 1/n to n/n"):
        Part.of(text)


SLURM = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "5"}


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        ({}, WHOLE),
        ({"RANK": "2"}, WHOLE),
        ({"RANK": "0", "WORLD_SIZE": "1"}, WHOLE),
        ({"RANK": "2", "WORLD_SIZE": "7"}, Part(3, 7)),
        (SLURM | {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "5"}, Part(5, 5)),
        (SLURM | {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "9"}, Part(3, 5)),
        (SLURM | {"SLURM_ARRAY_TASK_ID": "0", "RANK": "1", "WORLD_SIZE": "2"}, Part(1, 5)),
    ],
)
def test_launchers_say_which_part_it_is(variables: dict[str, str], part: Part) -> None:
    assert Part.of_environment(variables) == part


@pytest.mark.parametrize("rank", ["first", "7", "-1"])
def test_variables_that_contradict_each_other_are_refused(rank: str) -> None:
    with pytest.raises(ArgumentError):
        Part.of_environment({"RANK": rank, "WORLD_SIZE": "7"})


@pytest.mark.parametrize("count", [1, 3, 7])
def test_each_key_is_in_one_part(count: int) -> None:
    parts = [Part(number + 1, count) for number in range(count)]
    keys = [*map(str, range(1000)), "Zürich", "half a pair \udc80 \ud800"]
    taken = [[part for part in parts if part.takes(key)] for key in keys]
    assert {len(some) for some in taken} == {1}
    shares = [sum(part in some for some in taken) for part in parts]
    assert min(shares) > 1000 / count * 0.7, "no part has much less than its share"


def test_the_flag_goes_before_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert Spread().chosen() == Part(2, 2)
    assert Spread(part="1/1").chosen() == WHOLE


class Painter:
    """In place of a model: an image of each position's own, and a kill when it is asked for."""

    def __init__(self) -> None:
        self.drawn, self.left = 0, 10**9
        self.broken: set[str] = set()

    @contextmanager
    def __call__(self, job: Request, *_: Any, **__: Any) -> Iterator[Any]:
        prompts = [prompt for prompt in job.prompt for _ in range(job.n)]

        def images(skip: set[int]) -> Iterator[tuple[int, Any]]:
            if self.broken & set(prompts):
                raise DataError("is beyond what this model draws", where=prompts[0])
            for position, prompt in enumerate(prompts):
                if position not in skip:
                    if not self.left:
                        raise KeyboardInterrupt
                    self.left, self.drawn = self.left - 1, self.drawn + 1
                    yield position, models.picture(sum(map(ord, prompt)) + position, 8)

        jobs = [SimpleNamespace(prompt=prompt) for prompt in prompts]
        yield SimpleNamespace(images=images, jobs=jobs, request=job, notes=[])


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Painter:
    painter = Painter()
    monkeypatch.setattr(batch, "drawing", painter)
    monkeypatch.setattr(batch.LastBase, "open", lambda *_: None)
    monkeypatch.chdir(tmp_path)  # records hold the folder as it was given
    models.picture(1).save("a.png")
    lines = [
        {"image": "a.png", "prompt": f"row {row // 2}", "n": 1 + row % 2} for row in range(ROWS)
    ]
    lines[7]["prompt"] = ["on the moon", "at the beach"]
    Path("jobs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return painter


def draw(part: Part, out: str = "out") -> int:
    return run_batch(read_jobs(Path("jobs.jsonl"), Request()), Path(out), part=part)


def alone(painter: Painter) -> dict[str, bytes]:
    """The folder that one process makes, under the same name."""
    draw(WHOLE)
    Path("out").rename("alone")
    painter.drawn = 0
    return tree(Path("alone"))


def all_parts(count: int) -> Iterator[Part]:
    return (Part(number + 1, count) for number in range(count))


@pytest.mark.parametrize("count", [1, 3, 7])
def test_a_batch_in_parts_ends_as_one_process_leaves_it(painter: Painter, count: int) -> None:
    wanted = alone(painter)
    assert all(draw(part) > 0 for part in all_parts(count))
    assert painter.drawn == len(wanted) - 2, "each once"
    if count > 1:
        assert not Path("out", RESULTS).exists()
        assert merge(Path("out")) == f"merged {painter.drawn} images of {ROWS} jobs in out"
    assert tree(Path("out")) == wanted


def test_killed_and_dealt_anew_nothing_is_drawn_twice(painter: Painter) -> None:
    wanted = alone(painter)
    painter.left = 5
    with pytest.raises(KeyboardInterrupt):
        draw(Part(2, 3))
    painter.left = 10**9
    draw(Part(3, 3))
    torn = Path("out", PARTS, "2-of-3", RESULTS)
    torn.write_text(torn.read_text() + '{"job": 3, "im')
    with pytest.raises(DataError, match="has parts that have not finished; found 1/3, 2/3"):
        merge(Path("out"))
    for part in all_parts(7):
        draw(part)
    merge(Path("out"))
    assert tree(Path("out")) == wanted
    assert painter.drawn == len(wanted) - 2


def test_a_part_reads_no_record_of_its_siblings(
    painter: Painter, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in (Part(1, 2), Part(1, 3)):
        draw(part)
    read: list[str] = []
    text = batch._text
    monkeypatch.setattr(batch, "_text", lambda file: read.append(file.parent.name) or text(file))
    draw(Part(2, 3))
    draw(Part(2, 3))  # its own is there now
    assert set(read) == {"1-of-2", "2-of-3"}


def test_one_process_takes_up_what_parts_left(painter: Painter) -> None:
    wanted = alone(painter)
    draw(Part(2, 3))
    assert draw(WHOLE) > 0
    assert tree(Path("out")) == wanted
    assert painter.drawn == len(wanted) - 2


def test_a_lost_image_is_named_by_merge_and_drawn_by_its_part(painter: Painter) -> None:
    wanted = alone(painter)
    for part in all_parts(3):
        draw(part)
    Path("out/0004/0000.png").unlink()
    with pytest.raises(DataError, match="out: lacks images of 1 jobs; found job 4"):
        merge(Path("out"))
    assert sum(draw(part) for part in all_parts(3)) == 1
    merge(Path("out"))
    assert tree(Path("out")) == wanted


def test_parts_of_other_jobs_are_not_merged(painter: Painter) -> None:
    draw(Part(1, 2))
    file = Path("jobs.jsonl")
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines, json.dumps({"image": "a.png", "prompt": "one more"})]))
    draw(Part(2, 2))
    with pytest.raises(DataError, match="not finished; found 1/2"):
        merge(Path("out"))
    draw(Part(1, 2))  # the list has grown: the rest is kept
    merge(Path("out"))
    assert len(list(Path("out").rglob("*.png"))) == painter.drawn
    jobs = file.read_text().replace("row 0", "another row 0")
    file.write_text(jobs)
    # by its part of before, or by another, as what it is dealt by has changed
    with pytest.raises(IpdiverseError, match=r"holds results of other jobs|is there already"):
        [draw(part) for part in all_parts(2)]


def test_failed_jobs_are_listed_and_tried_again(painter: Painter) -> None:
    wanted = alone(painter)
    painter.broken = {"row 3", "row 9"}
    with pytest.raises(DataError, match=r"failed\.jsonl: lists 3 of 40 jobs .*row 3: is beyond"):
        draw(WHOLE)
    listed = [json.loads(line) for line in Path("out", FAILED).read_text().splitlines()]
    assert [line["job"] for line in listed] == [6, 18, 19]
    assert painter.drawn > 0, "the others are drawn"
    painter.broken = set()
    assert draw(WHOLE) > 0
    assert tree(Path("out")) == wanted


def test_what_failed_is_tried_once_more_when_the_others_are_done(
    painter: Painter, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = alone(painter)
    tried: list[int] = []

    def opens(_: object, job: Request) -> None:
        if "row 3" in job.prompt:
            tried.append(painter.drawn)
            painter.broken = {"row 3"} if len(tried) == 1 else set()

    monkeypatch.setattr(batch.LastBase, "open", opens)
    assert draw(WHOLE) == len(wanted) - 2
    assert len(tried) == 2
    assert tried[-1] > tried[0], "after the others"
    assert tree(Path("out")) == wanted


def test_another_job_file_is_refused_even_by_a_part_that_shares_nothing(painter: Painter) -> None:
    draw(Part(1, 3))
    file = Path("jobs.jsonl")
    before = file.read_text()
    file.write_text(before.replace('"row ', '"another '))
    with pytest.raises(ArgumentError, match=r"jobs\.sha256: holds results of other jobs"):
        draw(Part(2, 3))
    assert not Path("out", PARTS, "2-of-3").exists()
    lines = before.splitlines()
    drawn = {int(one.name) for one in Path("out").glob("[0-9]*")}
    free = next(number for number in range(ROWS) if number not in drawn)
    lines[free] = lines[free].replace("row", "corrected row")
    file.write_text("\n".join([*lines, json.dumps({"image": "a.png", "prompt": "one more"})]))
    painter.drawn = 0
    [draw(part) for part in all_parts(3)]
    merge(Path("out"))
    assert len(Path("out", FINGERPRINT).read_text().splitlines()) == ROWS + 1
    file.write_text("\n".join(lines[:5]))
    with pytest.raises(ArgumentError, match="holds results of other jobs; found job 5"):
        draw(WHOLE)


def test_memory_does_not_grow_with_the_rows(painter: Painter) -> None:
    peaks = []
    for rows in (100, 3000):
        lines = (json.dumps({"image": "a.png", "prompt": f"row {n}"}) for n in range(rows))
        Path("jobs.jsonl").write_text("\n".join(lines))
        tracemalloc.start()
        jobs = read_jobs(Path("jobs.jsonl"), Request())
        draw_none = run_batch(jobs, Path(f"out {rows}"), part=Part(7, 100_000))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert draw_none == 0
        assert len(jobs) == rows
    # each row held would take 2 kB
    assert peaks[1] - peaks[0] < 3000 * 100


@pytest.mark.parametrize("count", [1, 3])
def test_the_record_is_a_table_too(painter: Painter, count: int) -> None:
    table = pytest.importorskip("pyarrow.parquet")
    for part in all_parts(count):
        jobs = read_jobs(Path("jobs.jsonl"), Request())
        run_batch(jobs, Path("out"), part=part, parquet=True)
    if count > 1:
        assert not Path("out", TABLE).exists()
        merge(Path("out"))
    rows = table.read_table(Path("out", TABLE)).to_pylist()
    lines = [json.loads(line) for line in Path("out", RESULTS).read_text().splitlines()]
    assert [(row["job"], row["image"]) for row in rows] == [(x["job"], x["image"]) for x in lines]
    for name in ("request", "inputs", "notes"):
        assert [json.loads(row[name]) for row in rows] == [line[name] for line in lines]
    assert rows[0]["prompt"] == "row 0"
    wanted = Path("out", TABLE).read_bytes()
    run_batch(read_jobs(Path("jobs.jsonl"), Request()), Path("out"), parquet=True)
    assert Path("out", TABLE).read_bytes() == wanted, "however it was dealt"


def test_a_table_without_its_library_is_said_before_anything_is_drawn(
    painter: Painter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "find_spec", lambda _: None)
    words = ["generate", "--batch", "jobs.jsonl", "--out", "out", "--parquet"]
    assert main(words) == 2
    assert "--parquet: needs pyarrow, which is not installed" in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_part_with_failed_jobs_has_not_finished(painter: Painter) -> None:
    painter.broken = {"on the moon"}
    failed = []
    for part in all_parts(3):
        try:
            draw(part)
        except DataError:
            failed.append(part)
    assert len(failed) == 1
    with pytest.raises(DataError, match=f"not finished; found {failed[0]}"):
        merge(Path("out"))


def test_parts_at_work_are_not_merged(painter: Painter) -> None:
    for part in all_parts(2):
        draw(part)
    with (
        only_one(Path("out", PARTS, "1-of-2")),
        pytest.raises(OutputError, match="another process is at work"),
    ):
        merge(Path("out"))


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Thirty pictures of three subjects, two that are the same, and a broken one."""
    monkeypatch.chdir(tmp_path)
    for number in range(30):
        file = Path("in", f"subject {number % 3}", f"{number}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        models.picture(number // 2 if number == 1 else number, 16).save(file)
    Path("in", "subject 0", "broken.png").write_text("none")
    return "in"


@pytest.mark.parametrize("count", [3, 7])
def test_a_data_set_in_parts_is_that_of_one_process(pictures: str, count: int) -> None:
    prepare(pictures, Path("alone"), PrepareOptions())
    for part in all_parts(count):
        prepare(pictures, Path("out"), PrepareOptions(), part)
    merge(Path("out"))
    assert tree(Path("out")) == tree(Path("alone"))


def test_preparing_goes_on_with_another_number_of_parts(
    pictures: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ipdiverse.data import prepare as module

    prepare(pictures, Path("alone"), PrepareOptions())
    decoded: list[str] = []
    load = module.load_image_bytes
    monkeypatch.setattr(
        module, "load_image_bytes", lambda data, name: decoded.append(name) or load(data, name)
    )
    prepare(pictures, Path("out"), PrepareOptions(), Part(1, 3))
    journal = Path("out", PARTS, "1-of-3", JOURNAL)
    journal.write_text(journal.read_text()[:-30])  # killed as it wrote
    with pytest.raises(DataError, match="not finished; found 2/3, 3/3"):
        merge(Path("out"))
    for part in all_parts(7):
        prepare(pictures, Path("out"), PrepareOptions(), part)
    merge(Path("out"))
    assert len(decoded) == 31 + 1, "one line was lost"
    assert tree(Path("out")) == tree(Path("alone"))


@pytest.fixture
def stored(pictures: str) -> Iterator[str]:
    """The same pictures in an object store, with a list and an archive beside them."""
    import fsspec

    store = fsspec.filesystem("memory")
    store.put(f"{pictures}/", "/bucket/pictures", recursive=True)
    rows = [{"file_name": f"pictures/subject 0/{n}.png", "text": f"picture {n}"} for n in (0, 3)]
    store.pipe("/bucket/list.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    with tarfile.open("some.tar", "w") as archive:
        archive.add("in/subject 1/4.png", "4.png")
    store.put("some.tar", "/bucket/some.tar")
    yield "memory://bucket"
    store.rm("/bucket", recursive=True)


def test_a_source_in_an_object_store_is_as_one_on_a_disk(pictures: str, stored: str) -> None:
    prepare(pictures, Path("alone"), PrepareOptions())
    for part in all_parts(3):
        prepare(f"{stored}/pictures", Path("out"), PrepareOptions(), part)
    merge(Path("out"))
    prepare(f"{stored}/pictures", Path("again"), PrepareOptions())
    assert tree(Path("out")) == tree(Path("again"))
    made, wanted = tree(Path("out")), tree(Path("alone"))
    images = {name for name in wanted if name.startswith("images")}
    assert len(images) > 20
    for name in (*images, "metadata.jsonl", "quarantine.jsonl"):
        assert made[name] == wanted[name]
    assert str(Path.cwd()) not in made["report.json"].decode()


def test_lists_and_archives_are_read_where_they_are_stored(stored: str) -> None:
    assert prepare(f"{stored}/list.jsonl", Path("listed"), PrepareOptions())["kind"] == "metadata"
    texts = [json.loads(x)["text"] for x in Path("listed/metadata.jsonl").read_text().splitlines()]
    assert texts == ["picture 0", "picture 3"]
    assert prepare(f"{stored}/some.tar", Path("packed"), PrepareOptions())["kind"] == "webdataset"
    assert len(list(Path("packed/images").rglob("*.png"))) == 1


def test_what_is_not_in_a_store_is_said_in_a_line(stored: str) -> None:
    with pytest.raises(DataError, match="does not exist"):
        prepare(f"{stored}/nothing", Path("out"), PrepareOptions())
    with pytest.raises(DataError, match="no-such://a/b: cannot be opened"):
        prepare("no-such://a/b", Path("out"), PrepareOptions())


def test_what_was_merged_is_copied_to_a_store(pictures: str, stored: str) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    for part in all_parts(2):
        prepare(pictures, Path("out"), PrepareOptions(), part)
    words = ["merge", "out", "--to", f"{stored}/data"]
    assert main(words) == 0
    wanted = tree(Path("out"))
    there = lambda: {n.removeprefix("/bucket/data/") for n in store.find("/bucket/data")}  # noqa: E731
    assert there() == wanted.keys()
    assert all(store.cat(f"/bucket/data/{name}") == held for name, held in wanted.items())
    lost = next(name for name in wanted if name.startswith("images"))
    store.rm(f"/bucket/data/{lost}")
    assert main(words) == 0, "no parts are left, and what is missing is copied"
    assert there() == wanted.keys()
    assert main(["merge", "out", "--to", "somewhere"]) == 2


@pytest.fixture
def bucket() -> Iterator[tuple[str, Any]]:
    """An address to copy to, and its store."""
    import fsspec

    store = fsspec.filesystem("memory")
    yield "memory://jobs/out", store
    if store.exists("/jobs"):
        store.rm("/jobs", recursive=True)


def in_store(bucket: tuple[str, Any]) -> dict[str, bytes]:
    return {
        name.removeprefix("/jobs/out/"): bucket[1].cat(name) for name in bucket[1].find("/jobs/out")
    }


def machine(monkeypatch: pytest.MonkeyPatch, home: Path, name: str) -> None:
    """Go on in a folder that shares nothing with the others but the list of jobs."""
    folder = home / name
    folder.mkdir()
    for shared in ("jobs.jsonl", "a.png"):
        shutil.copy(home / shared, folder)
    monkeypatch.chdir(folder)


def test_machines_without_a_shared_disk_leave_what_one_process_makes(
    painter: Painter,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bucket: tuple[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    wanted = alone(painter)
    words = ["generate", "--batch", "jobs.jsonl", "--out", "out", "--to", bucket[0], "--part"]
    painter.left = 5
    machine(monkeypatch, tmp_path, "lost")
    assert main([*words, "2/3"]) == 130
    assert painter.drawn == 5
    painter.left = 10**9
    for number in (1, 2, 3):
        machine(monkeypatch, tmp_path, f"machine {number}")
        assert main([*words, f"{number}/3"]) == 0
    assert painter.drawn == len(wanted) - 2, "what the lost machine had drawn is in the store"
    assert not list(Path().rglob("1-of-3")), "a part takes nothing of its siblings"
    assert f"ipdiverse merge out --to {bucket[0]}" in capsys.readouterr().err
    machine(monkeypatch, tmp_path, "merging")
    assert main(["merge", "out", "--to", bucket[0]]) == 0
    assert in_store(bucket) == wanted
    assert not list(Path("out").rglob("*.png")), "images stay where they are"
    lost = next(name for name in wanted if name.endswith(".png"))
    bucket[1].rm(f"/jobs/out/{lost}")
    machine(monkeypatch, tmp_path, "again")
    assert main(words[:-1]) == 0
    assert painter.drawn == len(wanted) - 1
    assert in_store(bucket) == wanted
    Path("jobs.jsonl").write_text(json.dumps({"image": "a.png", "prompt": "another"}))
    assert main(words[:-1]) == 2
    assert "holds results of other jobs; found job 0" in capsys.readouterr().err
    assert in_store(bucket) == wanted


def test_a_lost_image_in_a_store_is_named_by_merge(
    painter: Painter, bucket: tuple[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "--batch", "jobs.jsonl", "--out", "out", "--to", bucket[0], "--part"]
    for part in all_parts(2):
        assert main([*words, str(part)]) == 0
    bucket[1].rm("/jobs/out/0004/0000.png")
    shutil.rmtree("out")
    assert main(["merge", "out", "--to", bucket[0]]) == 2
    assert "lacks images of 1 jobs; found job 4" in capsys.readouterr().err
    painter.drawn = 0
    assert [main([*words, str(part)]) for part in all_parts(2)] == [0, 0]
    assert painter.drawn == 1
    assert main(["merge", "out", "--to", bucket[0]]) == 0


def test_a_data_set_is_prepared_from_a_store_into_a_store(
    stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = f"{stored}/pictures"
    prepare(source, Path("data"), PrepareOptions())
    wanted = tree(Path("data"))
    there = tmp_path / "mounted"
    to = ["--to", there.as_uri()]
    for number in range(3):
        folder = tmp_path / f"machine {number}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        assert main(["prepare", source, "--out", "data", *to, "--part", f"{number + 1}/3"]) == 0
    shutil.rmtree("data")
    assert main(["merge", "data", *to]) == 0
    assert tree(there) == wanted


def test_files_of_the_same_size_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: tuple[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out/images").mkdir(parents=True)
    Path("out/images/a.png").write_bytes(b"before")
    copy = cluster.Copy(Path("out"), bucket[0])
    copy.send()
    Path("out/images/a.png").write_bytes(b"behind")
    copy = cluster.Copy(Path("out"), bucket[0])
    copy.send()
    assert (copy.sent, in_store(bucket)) == (1, {"images/a.png": b"behind"})
    md5 = hashlib.md5(b"behind", usedforsecurity=False)
    info, opened = type(bucket[1]).info, list[str]()
    stated: dict[str, Any] = {}
    system = type(bucket[1])
    monkeypatch.setattr(system, "info", lambda *given: info(*given) | stated)
    monkeypatch.setattr(system, "open", lambda _, path, *__: opened.append(path) or io.BytesIO())
    for name, value in {
        "ETag": f'"{md5.hexdigest()}"',
        "md5Hash": base64.b64encode(md5.digest()).decode(),
        "lfs": {"sha256": hashlib.sha256(b"behind").hexdigest()},
    }.items():
        stated = {name: value}
        copy = cluster.Copy(Path("out"), bucket[0])
        copy.send()
        assert (copy.sent, opened) == (0, []), f"{name} says it"


def test_of_two_that_differ_the_newer_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: tuple[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    copy = cluster.Copy(Path("out"), bucket[0])
    for name in ("here.json", "there.json"):
        Path("out", name).write_text("old")
    copy.send()
    os.utime("out/there.json", (1, 1))
    for name in ("here.json", "there.json"):
        bucket[1].pipe(f"/jobs/out/{name}", b"of the store")
    Path("out/here.json").write_text("newest")
    os.utime("out/here.json", (2**32, 2**32))
    copy = cluster.Copy(Path("out"), bucket[0])
    copy.fetch("")
    copy.send()
    assert tree(Path("out")).items() >= in_store(bucket).items()
    assert in_store(bucket) == {"here.json": b"newest", "there.json": b"of the store"}


def test_finished_files_are_sent_while_work_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: tuple[str, Any]
) -> None:
    monkeypatch.setattr(cluster, "_SECONDS", 0.01)
    sent = threading.Event()
    send = cluster.Copy.send
    monkeypatch.setattr(
        cluster.Copy, "send", lambda self: send(self) or (self._known and sent.set())
    )
    with cluster.copied(tmp_path / "out", bucket[0], (), WHOLE) as copy:
        assert copy is not None
        (tmp_path / "out/1.png").write_bytes(b"image")
        (tmp_path / "out/.2.png.tmp").write_bytes(b"half an im")
        assert sent.wait(60)
        assert in_store(bucket) == {"1.png": b"image"}
        (tmp_path / "out/1.png").unlink()
    assert not in_store(bucket), "what is removed here is removed there"


def test_folders_that_are_no_copies_of_each_other_are_not_mixed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bucket: tuple[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        Path(name).mkdir()
        Path(name, "a.json").write_text(name)
    assert main(["merge", "one", "--to", bucket[0]]) == 0
    capsys.readouterr()
    for words in (["two", "--to", bucket[0]], ["one", "--to", "memory://jobs/elsewhere"]):
        assert main(["merge", *words]) == 2
        assert "is the copy of another folder" in capsys.readouterr().err
    assert in_store(bucket) == {"a.json": b"one"}
    assert main(["merge", "three", "--to", "memory://jobs/nothing"]) == 2
    assert "three: holds no parts" in capsys.readouterr().err


def test_a_store_cannot_write_outside_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: tuple[str, Any]
) -> None:
    copy = cluster.Copy(tmp_path / "out", bucket[0])
    monkeypatch.setattr(copy.store, "find", lambda _: ["../../x"])
    with pytest.raises(DataError, match="the path leaves its root"):
        copy.fetch("")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--to somewhere", "--to: is no address; expected s3://bucket/out"),
        ("--to no-such://a/b", "no-such://a/b: cannot be reached"),
    ],
)
def test_an_address_that_is_none_is_one_line(
    words: str, message: str, painter: Painter, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--batch", "jobs.jsonl", "--out", "out", *words.split()]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert painter.drawn == 0


@pytest.mark.parametrize(
    "command", ["generate --image a.png", "prepare critters", "train --data a"]
)
def test_a_folder_at_an_address_is_refused_with_what_works(
    command: str, painter: Painter, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.split(), "--out", "s3://bucket/out"]) == 2
    assert "--out: is an address, not a folder" in (said := capsys.readouterr().err)
    assert "--out out --to s3://bucket/out" in said
    assert not Path("s3:").exists()


def test_parts_of_another_source_are_refused(pictures: str) -> None:
    prepare(pictures, Path("out"), PrepareOptions(), Part(1, 2))
    with pytest.raises(DataError, match="was prepared from something else"):
        prepare("critters", Path("out"), PrepareOptions(n=3), Part(2, 2))


def test_a_folder_without_parts_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no parts"):
        merge(tmp_path)


def test_a_broken_statement_is_named(tmp_path: Path) -> None:
    with part_of(tmp_path, Part(1, 2), {"kind": "batch"}) as home:
        pass
    (home / "part.json").write_text("{")
    with pytest.raises(DataError, match=r"1-of-2/part\.json: is broken; .*run this part again"):
        finished(tmp_path)


def test_ray_and_a_part_contradict_each_other() -> None:
    spread, opened = Spread(part="1/2", ray="local"), lambda: lambda _: None
    with pytest.raises(ArgumentError, match="--ray: deals the parts itself"):
        cluster.in_parts(spread, Path("out"), opened, lambda: None)
