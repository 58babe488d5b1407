"""`generate --batch`: many jobs, each image as it lands, safe to kill."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ipdiverse import generate
from ipdiverse.cli import main
from ipdiverse.critters.make import make_dataset
from tests.e2e.ui_clients import until


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    make_dataset(tmp_path / "refs", 2)
    first, second = sorted((tmp_path / "refs" / "images").iterdir())
    lines = [
        {"image": str(first), "prompt": "a critter in the snow", "n": 3},
        {"image": str(second), "prompt": ["on the moon", "at the beach"], "n": 1, "seed": 5},
        {"image": str(first), "diversity": 0.5, "n": 1},
    ]
    file = tmp_path / "jobs.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return file


def run(jobs: Path, *more: str) -> int:
    out = str(jobs.parent / "out")
    return main(["generate", "--batch", str(jobs), "--steps", "2", "--out", out, *more])


def landed(jobs: Path) -> list[dict]:
    file = jobs.parent / "out" / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_job_is_drawn_as_alone_and_told_as_it_lands(
    jobs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(jobs, "--json") == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert told == landed(jobs)
    assert [(line["job"], line["image"]) for line in told] == [
        *((0, i) for i in range(3)),
        *((1, i) for i in range(2)),
        (2, 0),
    ]
    assert told[4]["prompt"] == "at the beach"
    stated = json.loads(jobs.read_text().splitlines()[1])
    alone = generate(stated["image"], stated["prompt"], n=1, seed=5, steps=2)
    for index, image in enumerate(alone.images):
        with Image.open(jobs.parent / "out" / "0001" / f"{index:04d}.png") as drawn:
            np.testing.assert_array_equal(np.asarray(drawn), np.asarray(image))


def test_what_is_there_is_not_drawn_again(jobs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(jobs) == 0
    assert "wrote 6 images of 3 jobs" in capsys.readouterr().out
    before = landed(jobs)
    assert run(jobs) == 0
    assert "wrote 0 images" in capsys.readouterr().out
    (jobs.parent / "out" / "0000" / "0001.png").unlink()
    with (jobs.parent / "out" / "results.jsonl").open("a") as file:
        file.write('{"job": 2, "im')
    assert run(jobs) == 0
    assert "wrote 1 images" in capsys.readouterr().out
    key = lambda line: (line["job"], line["image"])  # noqa: E731
    assert sorted(landed(jobs), key=key) == sorted(before, key=key)


STUCK = """
import sys, time
from ipdiverse.cli import main
from ipdiverse.sampling import batch

save, saved = batch.save_png, []

def saves(*given):
    save(*given)
    saved.append(given)
    if len(saved) == 5:  # it has not yet been told of
        time.sleep(3600)

batch.save_png = saves
sys.exit(main())
"""
"""The command, which gets no further than the fifth of six images."""


def test_killed_between_an_image_and_its_line_it_goes_on(jobs: Path) -> None:
    out = jobs.parent / "out"
    words = ["generate", "--batch", str(jobs), "--steps", "2", "--out", str(out)]
    started = subprocess.Popen([sys.executable, "-c", STUCK, *words])
    try:
        until(lambda: started.poll() is not None or (out / "0001" / "0001.png").exists(), "five")
        assert started.poll() is None, "killed while it draws"
    finally:
        started.kill()
        started.wait()
    before = {str(f.relative_to(out)): f.stat().st_mtime_ns for f in out.rglob("*.png")}
    told = {line["file"] for line in landed(jobs)}
    assert (len(before), len(told)) == (5, 4)
    assert run(jobs) == 0
    whole = jobs.parent / "whole"
    assert main([*words[:-1], str(whole)]) == 0
    results = [folder / "results.jsonl" for folder in (out, whole)]
    assert results[0].read_bytes() == results[1].read_bytes(), "as if it had not been killed"
    kept = {file for file, at in before.items() if (out / file).stat().st_mtime_ns == at}
    assert kept == told, "what had landed was not drawn again"
    assert len(landed(jobs)) == 6
    assert len({(line["job"], line["image"]) for line in landed(jobs)}) == 6
    for line in landed(jobs):
        with Image.open(out / line["file"]) as image:
            image.load()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: is not JSON"),
        ("[]", "line 1: is not a JSON object"),
        ('{"imag": "x"}', "unknown key; found imag"),
        ('{"prompt": "x"}', "line 1: has no image"),
        ('{"image": "x", "n": 0}', "line 1: n"),
        ("", "holds no jobs"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_drawn(
    line: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "jobs.jsonl").write_text(line)
    assert run(tmp_path / "jobs.jsonl") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_results_of_other_jobs_are_not_mixed_in(
    jobs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(jobs) == 0
    lines = jobs.read_text().splitlines()
    jobs.write_text("\n".join([lines[1], lines[0]]))
    assert run(jobs) == 2
    assert "holds results of other jobs" in capsys.readouterr().err


def test_images_of_files_that_changed_are_not_mixed_in(
    jobs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(jobs) == 0
    first, second = sorted((jobs.parent / "refs" / "images").iterdir())
    assert landed(jobs)[0]["inputs"] == {str(first): hashlib.sha256(first.read_bytes()).hexdigest()}
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    assert run(jobs) == 2
    said = capsys.readouterr().err
    assert "holds images that were made from other files" in said
    assert f"job 0: {first} has changed" in said
    first.unlink()
    assert run(jobs) == 0, "what is finished needs no reference"
    results = jobs.parent / "out" / "results.jsonl"
    text = results.read_text()
    results.write_text(text.replace('"inputs": {', '"inputs": null, "was": {'))
    first.write_bytes(kept)
    (jobs.parent / "out" / "0000" / "0001.png").unlink()
    assert run(jobs) == 0, "the same file again"
    assert len(landed(jobs)) == 6
    results.write_text(text)
    first.write_bytes(second.read_bytes())
    for job in ("0000", "0002"):
        shutil.rmtree(jobs.parent / "out" / job)
    assert run(jobs) == 0, "what is gone is drawn from what is there"
