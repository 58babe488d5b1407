"""A reference and a prompt in, images out: as a user runs it, on the embedded base."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

import ipdiverse
from ipdiverse.base.bases import Base
from ipdiverse.cli import main
from ipdiverse.provenance import read_provenance

if TYPE_CHECKING:
    from pathlib import Path

FAST = ["--steps", "3"]


@pytest.fixture
def reference(references: list[Image.Image], tmp_path: Path) -> Path:
    file = tmp_path / "ref.png"
    references[0].save(file)
    return file


def generate(reference: Path, out: Path, *more: str) -> int:
    words = ["--image", str(reference), "--prompt", "a critter in the snow"]
    return main(["generate", *words, "--out", str(out), *FAST, *more])


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file))


def test_images_sheet_and_record_are_written(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert generate(reference, out, "-n", "3") == 0
    assert sorted(f.name for f in out.iterdir() if f.name[0] != ".") == [
        "0000.png",
        "0001.png",
        "0002.png",
        "contact_sheet.png",
        "generation.json",
    ]
    assert pixels(out / "0000.png").shape == (64, 64, 3)
    record = json.loads((out / "generation.json").read_text())
    assert record["request"]["prompt"] == ["a critter in the snow"]
    assert read_provenance(out / "0001.png")["image_index"] == 1
    captured = capsys.readouterr()
    assert "contact_sheet.png" in captured.out
    assert captured.err == "", "silence in pipes"


def test_the_recorded_command_repeats_the_images(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(reference, tmp_path / "a", "-n", "2", "--seed", "5", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    words = shlex.split(record["command"])
    assert words[0] == "ipdiverse"
    words[-1] = f"--out={tmp_path / 'b'}"
    assert main(words[1:]) == 0
    for name in ("0000.png", "0001.png"):
        np.testing.assert_array_equal(pixels(tmp_path / "a" / name), pixels(tmp_path / "b" / name))


def test_image_i_is_the_same_alone_and_among_n(reference: Path) -> None:
    common: dict[str, Any] = {"prompt": "a critter", "seed": 3, "steps": 3}
    many = ipdiverse.generate(reference, n=6, **common).images
    few = ipdiverse.generate(reference, n=1, **common).images
    np.testing.assert_array_equal(np.asarray(few[0]), np.asarray(many[0]))
    assert len({image.tobytes() for image in many}) == 6


def test_seed_prompt_scale_and_reference_all_matter(
    reference: Path, references: list[Image.Image], tmp_path: Path
) -> None:
    references[1].save(tmp_path / "other.png")
    common: dict[str, Any] = {"n": 1, "steps": 3, "prompt": "a critter", "seed": 0, "scale": 1.0}
    plain = ipdiverse.generate(reference, **common).images[0]
    for change in ({"seed": 1}, {"prompt": "a red critter on the moon"}, {"scale": 0.2}):
        changed = ipdiverse.generate(reference, **(common | change)).images[0]
        assert changed.tobytes() != plain.tobytes(), change
    other = ipdiverse.generate(tmp_path / "other.png", **common).images[0]
    assert other.tobytes() != plain.tobytes()


def test_an_empty_prompt_is_allowed(reference: Path) -> None:
    assert len(ipdiverse.generate(reference, "", n=1, steps=2).images) == 1


def test_a_prompt_that_is_too_long_says_what_was_cut(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "a critter " * 20 + "in the snow"
    arguments = ["--image", str(reference), "--prompt", words, "-n", "1", "--steps", "2"]
    assert main(["generate", *arguments, "--out", str(tmp_path / "o")]) == 0
    message = capsys.readouterr().err
    assert "longer than 40 tokens; cut: " in message
    assert "in the snow" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "0"], "n: is out of range; expected 1 to 1024; found 0"),
        (["-n", "10000"], "n: is out of range; expected 1 to 1024; found 10000"),
        (["--steps", "0"], "steps: is out of range"),
        (["--scale", "-1"], "scale: is out of range"),
        (["--scale", "nan"], "scale: is out of range"),
        (["--seed", "-3"], "seed: is out of range"),
        (["--guidance-scale", "inf"], "guidance_scale: is out of range"),
        (["--base", "sd99"], "sd99: unknown base"),
        (["--adapter", "nope"], "nope: unknown adapter"),
    ],
)
def test_impossible_arguments_get_one_line_and_exit_2(
    reference: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert generate(reference, tmp_path / "out", *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("ipdiverse: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not list((tmp_path / "out").glob("*")), "nothing half-written"


def broken_images(folder: Path) -> dict[str, Path]:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 80, 3), np.uint8))
    picture.save(folder / "good.jpg")
    data = (folder / "good.jpg").read_bytes()
    files = {
        "missing": folder / "missing.png",
        "empty": folder / "empty.png",
        "text": folder / "text.png",
        "truncated": folder / "cut.jpg",
        "folder": folder,
        "heic": folder / "phone.heic",
    }
    files["empty"].write_bytes(b"")
    files["text"].write_text("no image")
    files["truncated"].write_bytes(data[: len(data) // 2])
    files["heic"].write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    return files


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "truncated", "folder", "heic"])
def test_images_that_cannot_be_read_get_one_line_and_exit_2(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = broken_images(tmp_path)[kind]
    assert generate(file, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert str(file) in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("mode", ["CMYK", "I;16", "RGBA", "P", "L"])
def test_images_of_every_mode_are_accepted(
    mode: str, references: list[Image.Image], tmp_path: Path
) -> None:
    if mode == "I;16":
        grey = np.asarray(references[0].convert("L")).astype(np.uint16) * 257
        Image.fromarray(grey).save(tmp_path / "image.png")
    else:
        suffix = "jpg" if mode == "CMYK" else "png"
        references[0].convert(mode).save(tmp_path / f"image.{suffix}")
    file = next(tmp_path.glob("image.*"))
    assert len(ipdiverse.generate(file, n=1, steps=1).images) == 1


def test_a_folder_that_cannot_be_written_is_one_line(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert generate(reference, tmp_path / "file" / "out") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_unknown_option_is_one_line_with_the_likely_one(
    reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(reference, reference.parent / "out", "--diversty", "1") == 2
    assert capsys.readouterr().err == (
        "ipdiverse: --diversty: is not an option of ipdiverse generate. Did you mean --diversity? "
        "`ipdiverse generate --help` lists all.\n"
    )


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    code = (
        "import sys; from ipdiverse.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'matplotlib', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout


def test_python_in_under_ten_lines(reference: Path, tmp_path: Path) -> None:
    result = ipdiverse.generate(reference, "a critter in the snow", n=2, seed=0, steps=2)
    result.save(tmp_path / "out")
    assert (tmp_path / "out" / "contact_sheet.png").is_file()


def test_a_prompt_that_looks_like_an_option_is_repeatable(reference: Path, tmp_path: Path) -> None:
    result = ipdiverse.generate(reference, "--a critter", n=1, steps=1)
    words = shlex.split(result.record(str(tmp_path / "out"))["command"])
    assert main(words[1:]) == 0
    np.testing.assert_array_equal(pixels(tmp_path / "out" / "0000.png"), result.images[0])


def test_a_second_call_goes_elsewhere_unless_it_may_overwrite(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(reference, tmp_path / "out", "-n", "3", "--steps", "1")
    (tmp_path / "out" / "mine.png").write_bytes(b"the user's own")
    generate(reference, tmp_path / "out", "-n", "1", "--steps", "1")
    assert f"the images go to {tmp_path / 'out-2'}" in capsys.readouterr().err
    assert len([*(tmp_path / "out").glob("000?.png")]) == 3
    generate(reference, tmp_path / "out", "-n", "1", "--steps", "1", "--overwrite")
    names = sorted(f.name for f in (tmp_path / "out").glob("*.png"))
    assert names == ["0000.png", "contact_sheet.png", "mine.png"]


CTRL_C = """
import sys
from ipdiverse.cli import main
from ipdiverse.sampling.saving import Run

add = Run.add

def adds(self, number, image):
    if number == 5:
        raise KeyboardInterrupt
    return add(self, number, image)

Run.add = adds
sys.exit(main())
"""


def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", "--image", str(reference), "-n", "6", "--candidates", "7", *FAST]
    words += ["--prompt", "a critter in the snow", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-c", CTRL_C, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert "5 of 6 images are in" in done.stderr
    assert "run the same command again to continue" in done.stderr
    assert len([*(tmp_path / "out").glob("000?.png")]) == 5
    assert main(words) == 0
    assert "5 of 6 images are in" in capsys.readouterr().err
    assert main([*words[:-1], str(tmp_path / "whole")]) == 0
    for number in range(6):
        name = f"{number:04d}.png"
        np.testing.assert_array_equal(
            pixels(tmp_path / "out" / name), pixels(tmp_path / "whole" / name)
        )


def test_the_largest_set_can_be_saved(references: list[Image.Image], tmp_path: Path) -> None:
    from ipdiverse.sampling.request import MAX_IMAGES

    request = ipdiverse.Request(image="x.png", n=MAX_IMAGES)
    images = [references[0]] * MAX_IMAGES
    ipdiverse.Generation(request, [references[0]], images, [], list(range(len(images)))).save(
        tmp_path
    )
    assert (tmp_path / f"{MAX_IMAGES - 1:04d}.png").is_file()
    assert (tmp_path / "generation.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": None}, "prompt: is not text"),
        ({"prompt": "\ud800"}, "prompt: is not valid Unicode"),
        ({"n": 2.5}, "n: is not a whole number"),
        ({"n": "3"}, "n: is not a whole number"),
        ({"seed": True}, "seed: is not a whole number"),
        ({"scale": "1"}, "scale: is out of range"),
    ],
)
def test_python_arguments_of_another_type_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ipdiverse.IpdiverseError, match=message):
        ipdiverse.Request(**({"image": "x.png"} | options))


def test_a_loaded_base_is_the_one_that_is_recorded(reference: Path, tmp_path: Path) -> None:
    from ipdiverse.base.adapters import adapter_file
    from ipdiverse.base.bases import CRITTERS_BASE, load_base

    loaded = load_base(str(CRITTERS_BASE))
    weights = str(adapter_file("critters", "plus"))
    result = ipdiverse.generate(reference, n=1, steps=1, loaded=loaded, adapter=weights)
    assert result.request.base == str(CRITTERS_BASE)


@pytest.mark.parametrize(
    "option",
    [
        {"base": "sd15"},
        {"dtype": "float16"},
        {"offload": "model"},
        {"tiling": True},
        {"revision": "main"},
        {"safety_checker": False},
    ],
)
def test_what_an_open_base_cannot_heed_is_refused(reference: Path, option: dict[str, Any]) -> None:
    loaded = Base("critters", None, 3.0, 4)
    (name,) = option
    with pytest.raises(ipdiverse.IpdiverseError, match=rf"{name}: does not go with loaded.*load_b"):
        ipdiverse.generate(reference, loaded=loaded, **option)


def test_images_that_are_no_files_are_refused(references: list[Image.Image]) -> None:
    for images in (references[0], references[:2], np.zeros(3)):
        with pytest.raises(
            ipdiverse.IpdiverseError, match=r"image: is not a file's path; .*Save it"
        ):
            ipdiverse.generate(images)  # type: ignore[arg-type]


def test_a_broken_base_is_one_line(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    from ipdiverse.base.adapters import adapter_file
    from ipdiverse.base.bases import CRITTERS_BASE

    broken = tmp_path / "broken"
    shutil.copytree(CRITTERS_BASE, broken)
    (broken / "text_encoder" / "model.safetensors").write_bytes(b"not tensors")
    wanted = ["--base", str(broken), "--adapter", str(adapter_file("critters", "plus"))]
    assert generate(reference, tmp_path / "out", *wanted) == 2
    error = capsys.readouterr().err
    assert f"{broken}: cannot be opened" in error
    assert error.count("\n") == 1
