"""Jobs as they are read, and the record of what has landed: kept, and never half there."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from ipdiverse.errors import OutputError
from ipdiverse.sampling.batch import RESULTS, read_jobs, run_batch
from ipdiverse.sampling.request import Request

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
def test_marks_that_json_strings_may_hold_end_no_line(mark: str, tmp_path: Path) -> None:
    lines = [{"image": "a.png", "prompt": f"a critter{mark}in the snow"}, {"image": "b.png"}]
    text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "jobs.jsonl").write_bytes(text.encode())
    first, second = read_jobs(tmp_path / "jobs.jsonl", {})
    assert first.prompt == (f"a critter{mark}in the snow",)
    assert second.image == ("b.png",)


@pytest.fixture
def finished(tmp_path: Path) -> list[Request]:
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
    return [job]


def test_a_record_of_which_nothing_is_dropped_is_left_alone(
    finished: list[Request], tmp_path: Path
) -> None:
    before = (tmp_path / RESULTS).stat()
    assert run_batch(finished, tmp_path) == 0
    after = (tmp_path / RESULTS).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_record_that_cannot_be_rewritten_is_whole(
    finished: list[Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
