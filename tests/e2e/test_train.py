"""From images to an adapter to pictures, as `docs/train.md` says, on the embedded base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ipdiverse.cli import main
from ipdiverse.commands.train import IGNORED_FLAGS, ORIGINAL_FLAGS
from ipdiverse.critters.make import make_dataset
from ipdiverse.training.config import RENAMED

if TYPE_CHECKING:
    import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "train.md"


def test_from_a_folder_of_images_to_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_dataset(tmp_path / "critters", 12, pairs=True)
    data, run, out = (str(tmp_path / name) for name in ("data", "run", "out"))
    config = tmp_path / "run.toml"
    config.write_text(
        "steps = 3\nbatch = 4\nwidth = 64\ndepth = 1\nnum_validation_images = 2\n"
        "validate_every = 3\nnum_images_per_prompt = 2\nvalidation_steps = 2\n"
    )
    assert main(["prepare", str(tmp_path / "critters"), "--out", data]) == 0
    assert main(["embed", data]) == 0
    embedded = {file: file.stat().st_mtime_ns for file in Path(data, "embedded").glob("*.s*")}
    assert len(embedded) == 4
    assert main(["train", "--config", str(config), "--data", data, "--out", run]) == 0
    assert embedded == {file: file.stat().st_mtime_ns for file in embedded}, "taken as it is"
    adapter = str(tmp_path / "run" / "adapter.safetensors")
    assert capsys.readouterr().out.strip().endswith(f"wrote {adapter}")
    with Image.open(tmp_path / "run" / "validation" / "00000003.png") as sheet:
        assert sheet.width > 200
    last = (tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1]
    assert {"loss", "copy_layout", "copy_clip"} <= json.loads(last).keys()
    reference = next((tmp_path / "critters" / "images").iterdir())
    arguments = [
        "generate",
        "--image",
        str(reference),
        "--adapter",
        adapter,
        "--prompt",
        "a critter",
    ]
    assert main([*arguments, "-n", "1", "--steps", "2", "--out", out]) == 0
    assert (tmp_path / "out" / "contact_sheet.png").is_file()
    study, results = tmp_path / "study.toml", tmp_path / "results"
    study.write_text(
        "pairs = 2\nimages = 2\nsteps = 2\n"
        '[[arm]]\nname = "before"\n'
        f'[[arm]]\nname = "mine"\nadapter = "{adapter}"\n'
    )
    assert main(["evaluate", "--config", str(study), "--out", str(results)]) == 0
    page = (results / "report.html").read_text()
    assert all(name in page for name in ("before", "mine", "renderer"))


def test_the_guide_names_only_flags_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    import re

    flags = set(re.findall(r"`?(--[a-z][a-z_-]+)", GUIDE.read_text()))
    flags = {flag.replace("_", "-") for flag in flags} - IGNORED_FLAGS.keys()
    flags -= {f"--{name}".replace("_", "-") for name in (*ORIGINAL_FLAGS, *RENAMED)}
    known = ""
    for command in ("prepare", "embed", "train", "generate", "evaluate", "calibrate"):
        try:
            main([command, "--help"])
        except SystemExit:
            known += capsys.readouterr().out
    assert flags
    unknown = {flag for flag in flags if flag not in known}
    assert unknown == {"--noise-offset"}, "which the guide says is refused"
