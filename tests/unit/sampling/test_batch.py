"""Jobs as they are read, and the record of what has landed: kept, and never half there."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from ipdiverse.dial import Levers
from ipdiverse.errors import ArgumentError, DataError, OutputError
from ipdiverse.sampling import task
from ipdiverse.sampling.batch import RESULTS, read_jobs, run_batch
from ipdiverse.sampling.request import Request
from ipdiverse.writing import only_one
from tests import models

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
def test_marks_that_json_strings_may_hold_end_no_line(mark: str, tmp_path: Path) -> None:
    lines = [{"image": "a.png", "prompt": f"a critter{mark}in the snow"}, {"image": "b.png"}]
    text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "jobs.jsonl").write_bytes(text.encode())
    first, second = read_jobs(tmp_path / "jobs.jsonl", Request()).values()
    assert first.prompt == (f"a critter{mark}in the snow",)
    assert second.image == ("b.png",)


@pytest.fixture
def finished(tmp_path: Path) -> dict[str, Request]:
    """A job whose two images are there, and its record."""
    job = Request(image=("a.png",), n=2)
    (tmp_path / "0000").mkdir()
    lines = []
    for image in range(2):
        file = f"0000/{image:04d}.png"
        (tmp_path / file).touch()
        request = {"image": ["a.png"], "n": 2}
        lines.append({"job": 0, "image": image, "file": file, "request": request, "inputs": {}})
    (tmp_path / RESULTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"line 1": job}


def test_a_record_of_which_nothing_is_dropped_is_left_alone(
    finished: dict[str, Request], tmp_path: Path
) -> None:
    before = (tmp_path / RESULTS).stat()
    assert run_batch(finished, tmp_path) == 0
    after = (tmp_path / RESULTS).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_record_that_cannot_be_rewritten_is_whole(
    finished: dict[str, Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / RESULTS
    whole = file.read_text()
    file.write_text(torn := whole + '{"job": 0, "im')

    def fail(*_: object) -> None:
        raise OSError("the power went out")

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.replace", fail)
        with pytest.raises(OutputError, match=RESULTS):
            run_batch(finished, tmp_path)
    assert file.read_text() == torn
    assert run_batch(finished, tmp_path) == 0
    assert file.read_text() == whole


def written(folder: Path, *lines: dict[str, object]) -> Path:
    file = folder / "jobs.jsonl"
    file.write_text("\n\n".join(json.dumps({"image": "a.png"} | line) for line in lines))
    return file


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"image": ["a", "b"], "combine": "weighted", "weights": ["a", "b"]}, "weights: is out of"),
        ({"candidates": 4.5}, "candidates: is not a whole number"),
        ({"cads": -1}, "cads: is out of range"),
        ({"interval": [3, 1]}, "interval: is not a range of noise levels"),
        ({"no_such": 1}, "unknown key; found no_such"),
        ({"image_guidance": ""}, "image_guidance: is out of range"),
        ({"base": "sd99"}, "sd99: unknown base"),
        ({"adapter": "nope"}, "nope: unknown adapter"),
        ({"preset": "vibes"}, "preset: is not a preset"),
        ({"combine": "mix"}, "combine: is unknown"),
        ({"strength": 0.5}, "strength: needs init_image"),
    ],
)
def test_what_a_line_gets_wrong_is_said_with_its_line(
    line: dict[str, object], message: str, tmp_path: Path
) -> None:
    file = written(tmp_path, {}, line)
    with pytest.raises(DataError) as caught:
        read_jobs(file, Request())
    assert str(caught.value).startswith(f"{file}, line 3: {message}")


def test_a_flag_for_all_jobs_need_not_act_in_each(tmp_path: Path) -> None:
    file = written(tmp_path, {}, {"init_image": "b.png"})
    plain, started = read_jobs(file, Request(strength=0.5, control_scale=0.5)).values()
    assert (plain.strength, started.strength) == (0.8, 0.5)
    assert plain.control_scale == started.control_scale == 1


def test_a_line_overrides_the_flags_lever_by_lever(tmp_path: Path) -> None:
    file = written(tmp_path, {}, {"cads": 0.3}, {"cads": 0, "n": 2})
    flags = Request.of({"cads": 0.1, "interval": (0.0, 4.0), "n": 3})
    first, second, third = read_jobs(file, flags).values()
    assert (first.levers, first.n) == (flags.levers, 3)
    assert second.levers == Levers(cads=0.3, interval=(0.0, 4.0))
    assert (third.levers, third.n) == (Levers(interval=(0.0, 4.0)), 2)


def test_jobs_of_version_0_1_are_read_with_notes(tmp_path: Path) -> None:
    line = {"training": 0.5, "drop": 0.2, "repulsion": 0, "removal_rank": 4, "start": 0.1}
    file = written(tmp_path, line)
    with pytest.warns(UserWarning, match="line 1") as told:
        (job,) = read_jobs(file, Request()).values()
    assert (job.levers, job.start_at) == (Levers(interpolation=0.5), 0.1)
    where = f"{file}, line 1: "
    assert sorted(str(one.message).removeprefix(where) for one in told) == [
        "drop no longer acts",
        "renamed training → interpolation, start → start_at",
    ]


def test_results_of_version_0_1_count_as_landed(
    finished: dict[str, Request], tmp_path: Path
) -> None:
    file = tmp_path / RESULTS
    file.write_text(file.read_text().replace('"n": 2', '"n": 2, "training": 0.5, "end": 0.9'))
    job = Request.of({"image": "a.png", "n": 2, "interpolation": 0.5, "end_at": 0.9})
    with pytest.warns(UserWarning, match="renamed"):
        assert run_batch({"line 1": job}, tmp_path) == 0


@pytest.mark.parametrize("field", ["image", "mask", "init_image", "negative_image", "faces"])
def test_files_of_every_job_are_looked_for_before_the_first_is_drawn(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opens(_: Request) -> None:
        raise AssertionError("a base is opened")

    monkeypatch.setattr("ipdiverse.sampling.task.open_base", opens)
    there = tmp_path / "there.png"
    there.touch()
    line = {"image": str(there), field: str(tmp_path / "gone.png")}
    file = written(tmp_path, {"image": str(there)}, line)
    with pytest.raises(DataError) as caught:
        run_batch(read_jobs(file, Request()), tmp_path / "out")
    assert str(caught.value) == (
        f"{file}, line 3: {tmp_path / 'gone.png'}: no such file. Check the path."
    )


def test_a_job_that_cannot_be_drawn_is_said_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    file = written(tmp_path, {"image": str(tmp_path / "text.png")})
    with pytest.raises(DataError, match=rf"{file}, line 1: .*text\.png: "):
        run_batch(read_jobs(file, Request()), tmp_path / "out")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_jobs_are_read_as_windows_editors_save_them(encoding: str, tmp_path: Path) -> None:
    line = json.dumps({"image": "a.png", "prompt": "in Zürich"}, ensure_ascii=False)
    (tmp_path / "jobs.jsonl").write_text(line + "\r\n", encoding=encoding)
    (job,) = read_jobs(tmp_path / "jobs.jsonl", Request()).values()
    assert job.prompt == ("in Zürich",)


def test_jobs_in_another_encoding_are_refused(tmp_path: Path) -> None:
    line = json.dumps({"image": "a.png", "prompt": "in Zürich"}, ensure_ascii=False)
    (tmp_path / "jobs.jsonl").write_text(line, encoding="latin-1")
    with pytest.raises(DataError, match=r"jobs\.jsonl: cannot be read; .*Save it as UTF-8"):
        read_jobs(tmp_path / "jobs.jsonl", Request())


def test_the_second_batch_in_a_folder_is_refused(
    finished: dict[str, Request], tmp_path: Path
) -> None:
    with only_one(tmp_path), pytest.raises(OutputError, match="another process is at work"):
        run_batch(finished, tmp_path)


@pytest.mark.parametrize("text", ["my own notes\nabout results\n", '{"score": 1}\n', "[1]\n[2]\n"])
def test_a_file_of_somebody_else_is_not_taken_for_the_record(text: str, tmp_path: Path) -> None:
    (tmp_path / RESULTS).write_text(text)
    with pytest.raises(ArgumentError, match=r"is not a record of a batch\. Choose a new folder"):
        run_batch({"line 1": Request(image=("a.png",))}, tmp_path)
    assert (tmp_path / RESULTS).read_text() == text


@pytest.mark.parametrize("torn", ['{"job": 0, "im', "{", "\0\0\0", '{"job": 0, "image": 1}'])
def test_what_a_killed_run_or_two_at_once_left_is_repaired(
    torn: str, finished: dict[str, Request], tmp_path: Path
) -> None:
    file = tmp_path / RESULTS
    whole = file.read_text()
    first, second = whole.splitlines()
    for damaged in (whole + torn, f"{second}\n{torn}\n{first}\n", f"{first}\n{first}\n{second}\n"):
        file.write_text(damaged)
        assert run_batch(finished, tmp_path) == 0
        assert file.read_text() == whole


def test_pictures_of_somebody_else_are_not_replaced(tmp_path: Path) -> None:
    models.picture(1).save(tmp_path / "a.png")
    mine = tmp_path / "out" / "0000" / "0001.png"
    mine.parent.mkdir(parents=True)
    models.picture(2).save(mine)
    file = written(tmp_path, {"image": str(tmp_path / "a.png")})
    before = mine.read_bytes()
    with pytest.raises(OutputError, match=r"0001\.png: is there already, and no run"):
        run_batch(read_jobs(file, Request()), tmp_path / "out")
    assert mine.read_bytes() == before


def test_a_job_is_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models.picture(1).save(tmp_path / "a.png")
    file = written(tmp_path, {"image": str(tmp_path / "a.png"), "n": 1, "steps": 1})
    checked: list[Request] = []
    monkeypatch.setattr(Request, "check", lambda self, **_: checked.append(self))
    assert run_batch(read_jobs(file, Request()), tmp_path / "out") == 1
    assert len(checked) == 1


def test_one_base_serves_all_jobs_and_the_next_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted: a batch opens its base once, and a page, which hands its bases on, not again."""
    opened: list[str] = []
    stock = task.load_base

    def load(name: str, **options: Any) -> Any:
        opened.append(name)
        return stock(name, **options)

    monkeypatch.setattr(task, "load_base", load)
    models.picture(1).save(tmp_path / "a.png")
    job = Request.of({"image": str(tmp_path / "a.png"), "n": 1, "steps": 1})
    jobs, bases = {"line 1": job, "line 2": replace(job, seed=1)}, task.LastBase()
    assert [run_batch(jobs, tmp_path / out, bases=bases) for out in ("one", "two")] == [2, 2]
    assert opened == ["critters"]
