"""`evaluate` from the outside: a small study on critters, and images of any tool."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ipdiverse.cli import main
from ipdiverse.critters.make import make_dataset
from ipdiverse.evaluation import images

STUDY = """
pairs = 3
images = 2
steps = 2
features = ["base"]
[[sweep]]
family = "λ"
scale = [0.0, 1.0]
[[arm]]
name = "levers"
diversity = 0.8
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    (folder / "study.toml").write_text(STUDY)
    assert run(folder) == 0
    return folder


def run(folder: Path) -> int:
    config, out = str(folder / "study.toml"), str(folder / "out")
    return main(["evaluate", "--config", config, "--out", out])


def test_a_study_writes_numbers_plots_and_a_page_of_its_own(finished: Path) -> None:
    out = finished / "out"
    results = json.loads((out / "results.json").read_text())
    names = [arm["name"] for arm in results["arms"]]
    assert names == ["levers", "λ: scale 0", "λ: scale 1", "renderer", "pixel copy"]
    renderer, copy = results["arms"][-2:]
    assert renderer["scores"]["prompt_accuracy"][0] == 1
    assert copy["scores"]["retention"][0] == 1
    assert renderer["scores"]["js"][0] < copy["scores"]["js"][0], "copies are far from the world"
    assert {row["family"] for row in results["hypervolumes"]} == {"λ", "levers"}
    assert results["dials"] == []
    assert copy["scores"]["image (base)"][0] == pytest.approx(1, abs=1e-3)
    assert copy["scores"]["vendi (base)"][0] == pytest.approx(1, abs=1e-3)
    assert (out / "entropy-retention.svg").is_file()
    with Image.open(out / "entropy-prompt-accuracy.png") as plot:
        assert len(plot.getcolors(1 << 24)) > 50, "something is drawn"
    page = (out / "report.html").read_text()
    # pictures are inline, and base64 may spell any word
    text = re.sub(r"base64,[\w+/=]+", "", page.replace("http://www.w3.org", ""))
    assert "http" not in text, "nothing is fetched"
    assert all(name in page for name in ("levers", "renderer", "Hypervolume"))
    assert str(out) not in page
    lines = (out / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == names[:3]


def test_a_finished_study_is_not_drawn_again_and_a_torn_one_goes_on(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = finished / "out"
    results = (out / "results.json").read_text()
    drawn: list[int] = []
    real = images.sample_array

    def counting(base, jobs, *rest):
        drawn.append(len(jobs))
        return real(base, jobs, *rest)

    monkeypatch.setattr(images, "sample_array", counting)
    assert run(finished) == 0
    assert drawn == []
    next((out / "images").rglob("00000.npz")).unlink()
    assert run(finished) == 0
    assert drawn == [6]
    assert (out / "results.json").read_text() == results


def test_an_adapter_that_is_missing_is_said_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[int] = []
    monkeypatch.setattr(images, "sample_array", lambda *_: drawn.append(1))
    more = '[[arm]]\nname = "last"\nadapter = "no such adapter"\n'
    (tmp_path / "study.toml").write_text(STUDY + more)
    assert run(tmp_path) == 2
    assert "no such adapter" in capsys.readouterr().err
    assert drawn == []


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Two references; copies of the first, other scenes for the second."""
    make_dataset(tmp_path / "world", 6)
    files = sorted((tmp_path / "world" / "images").iterdir())
    pictures = [Image.open(file).convert("RGB") for file in files]
    for name in ("references", "images/one", "images/two"):
        (tmp_path / name).mkdir(parents=True)
    pictures[0].save(tmp_path / "references" / "one.png")
    pictures[1].save(tmp_path / "references" / "two.png")
    for index in range(3):
        pictures[0].save(tmp_path / "images" / "one" / f"{index}.png")
        pictures[2 + index].save(tmp_path / "images" / "two" / f"{index}.png")
    (tmp_path / "prompts.txt").write_text("# a comment\na critter\nanother critter\n")
    return tmp_path


def score(folder: Path, *more: str) -> int:
    return main(
        [
            *("evaluate", "--images", str(folder / "images")),
            *("--references", str(folder / "references"), "--features", "base"),
            *("--prompts", str(folder / "prompts.txt")),
            *more,
        ]
    )


def test_images_of_any_tool_are_scored(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(made, "--json", "--out", str(made / "scores.json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["sets"], report["images"]) == (2, 6)
    copies = report["scores"]["copies (base)"]
    assert copies[0] >= 0.5
    assert report["scores"]["vendi (base)"][0] > 1.01
    assert json.loads((made / "scores.json").read_text()) == report


def test_copies_alone_have_no_variety(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (made / "images" / "two").iterdir():
        Image.open(made / "references" / "two.png").save(file)
    assert score(made, "--json") == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert np.allclose(scores["vendi (base)"], 1, atol=1e-4)
    assert np.allclose(scores["distance (base)"], 0, atol=1e-4)
    assert np.allclose(scores["copies (base)"], 1)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda f: (f / "images" / "one").rename(f / "images" / "three"),
            "not name a reference",
        ),
        (lambda f: (f / "images" / "one" / "0.png").write_bytes(b"no image"), "0.png"),
        (lambda f: (f / "prompts.txt").write_text("\n"), "holds no prompts"),
        (lambda f: [p.unlink() for p in (f / "references").iterdir()], "holds no images"),
        (lambda f: (f / "prompts.txt").write_text("a\nb\nc\n"), "several prompts"),
        (
            lambda f: (f / "images" / "one").rename(f / "images" / "one--9"),
            "not name a prompt",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(
    break_it, message: str, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    break_it(made)
    assert score(made) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config, --quick or --images"),
        (["--quick", "--images", "x"], "--config, --quick or --images"),
        (["--images", "x"], "--references DIR"),
        (["--config", "none.toml"], "none.toml"),
        (["--config", "x", "--references", "r"], "--references: has no effect with a study. Set"),
        (
            ["--quick", "--prompts", "p", "--features", "clip"],
            "--prompts, --features: have no",
        ),
        (["--quick", "--publish", "p"], "--publish: has moved. Use `python -m workshop study"),
        (["--config", "x", "--partial"], "--partial: has moved. Use `python -m workshop study"),
    ],
)
def test_what_is_missing_or_would_do_nothing_is_said(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", *arguments]) == 2
    assert message in capsys.readouterr().err
