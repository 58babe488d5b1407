"""What else `generate` takes: several images and prompts, masks, presets, other tasks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

import ipdiverse
from ipdiverse.cli import main
from tests.conftest import random_pipeline

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def files(references: list[Image.Image], tmp_path: Path) -> list[str]:
    for index, image in enumerate(references):
        image.save(tmp_path / f"ref{index}.png")
    left = Image.new("L", (64, 64))
    left.paste(255, (0, 0, 32, 64))
    left.save(tmp_path / "left.png")
    Image.fromarray(255 - np.asarray(left)).save(tmp_path / "right.png")
    return [str(tmp_path / f"ref{index}.png") for index in range(len(references))]


@pytest.fixture(scope="module")
def base() -> ipdiverse.base.bases.Base:  # type: ignore[name-defined]
    return ipdiverse.load_base()


def images(base: Any, files: list[str], prompt: Any = "a critter", **options: Any) -> np.ndarray:
    settings: dict[str, Any] = {"n": 1, "steps": 3}
    made = ipdiverse.generate(files, prompt, loaded=base, **(settings | options)).images
    return np.stack([np.asarray(image) for image in made])


def test_several_images_are_one_reference(base: Any, files: list[str]) -> None:
    one, both = images(base, files[:1]), images(base, files[:2])
    mean = images(base, files[:2], combine="average")
    first = images(base, files[:2], combine="weighted", weights=[1.0, 0.0])
    assert not np.array_equal(one, both)
    assert not np.array_equal(both, mean)
    assert np.abs(first.astype(int) - one).max() <= 1


def test_several_prompts_get_n_images_each_from_the_same_seeds(base: Any, files: list[str]) -> None:
    prompts = ["a critter on the moon", "a critter in the snow"]
    whole = images(base, files[:1], prompts, n=2)
    assert len(whole) == 4
    for index, prompt in enumerate(prompts):
        alone = images(base, files[:1], prompt, n=2)
        np.testing.assert_array_equal(whole[2 * index : 2 * index + 2], alone)


def test_presets_start_end_and_negative_images_act(base: Any, files: list[str]) -> None:
    plain = images(base, files[:1])
    for change in (
        {"preset": "style"},
        {"preset": "weak output"},
        {"end_at": 0.4},
        {"start_at": 0.4},
        {"negative_image": files[1]},
    ):
        assert not np.array_equal(images(base, files[:1], **change), plain), change
    assert np.array_equal(images(base, files[:1], preset="linear"), plain)


def test_masks_split_the_image(base: Any, files: list[str], tmp_path: Path) -> None:
    masks = [str(tmp_path / "left.png"), str(tmp_path / "right.png")]
    there = images(base, files[:2], mask=masks)
    swapped = images(base, files[:2], mask=masks[::-1])
    assert not np.array_equal(there, swapped)


def test_image_to_image_keeps_more_at_low_strength(base: Any, files: list[str]) -> None:
    start = np.asarray(Image.open(files[2])).astype(int)
    distances = [
        np.abs(images(base, files[:1], init_image=files[2], strength=s, steps=10) - start).mean()
        for s in (0.2, 0.9)
    ]
    assert distances[0] < 0.5 * distances[1]


def test_inpainting_keeps_what_is_not_masked(base: Any, files: list[str], tmp_path: Path) -> None:
    start = np.asarray(Image.open(files[2])).astype(int)
    made = images(
        base,
        files[:1],
        init_image=files[2],
        mask_image=str(tmp_path / "right.png"),
        strength=1.0,
        steps=6,
    )[0]
    change = np.abs(made - start).mean((0, 2))
    assert change[:24].mean() < 0.5 * change[40:].mean()


def test_a_controlnet_steers(base: Any, files: list[str], tmp_path: Path) -> None:
    from diffusers import ControlNetModel

    torch.manual_seed(0)
    control = ControlNetModel.from_unet(
        base.pipe.unet, conditioning_embedding_out_channels=(8, 16, 16, 32)
    )
    for block in [*control.controlnet_down_blocks, control.controlnet_mid_block]:
        torch.nn.init.normal_(block.weight, std=0.2)
    torch.nn.init.normal_(control.controlnet_cond_embedding.conv_out.weight, std=0.2)
    control.save_pretrained(tmp_path / "control")
    given = {"controlnet": str(tmp_path / "control"), "control_image": files[2]}
    steered = images(base, files[:1], **given)
    assert not np.array_equal(steered, images(base, files[:1]))
    other = images(base, files[:1], **(given | {"control_image": files[3]}))
    assert not np.array_equal(steered, other)
    nothing = images(base, files[:1], **given, control_scale=0.0)
    assert np.abs(nothing.astype(int) - images(base, files[:1])).max() <= 1


def test_the_recorded_command_repeats_every_flag(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shlex

    words = ["generate", "--image", files[0], "--image", files[1], "--prompt", "a", "--prompt", "b"]
    words += ["--mask", str(tmp_path / "left.png"), "--mask", str(tmp_path / "right.png")]
    words += ["--negative-image", files[2], "--preset", "ease in", "--end-at", "0.8", "-n", "1"]
    words += ["--steps", "2", "--init-image", files[3], "--strength", "0.7", "--json"]
    assert main([*words, "--out", str(tmp_path / "a")]) == 0
    record = json.loads(capsys.readouterr().out)
    again = shlex.split(record["command"])[1:]
    again[-1] = f"--out={tmp_path / 'b'}"
    assert main(again) == 0
    for name in ("0000.png", "0001.png"):
        a, b = (np.asarray(Image.open(tmp_path / f / name)) for f in ("a", "b"))
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "image: is missing. Give a reference: --image FILE"),
        (["--image", "REF", "--mask-image", "REF"], "mask_image: needs init_image"),
        (["--image", "REF", "--control-image", "REF"], "control_image: needs controlnet"),
        (
            ["--image", "REF", "--preset", "vibes"],
            "preset: is not a preset; expected linear | ease in",
        ),
        (["--image", "REF", "--combine", "mix"], "combine: is unknown; expected concat | average"),
        (
            ["--image", "REF", "--mask", "REF", "--mask", "REF"],
            "mask: has the wrong length; expected 1; found 2",
        ),
        (["--image", "REF", "--width", "60"], "width: is not a multiple of 8; found 60"),
        (
            ["--image", "REF", "--controlnet", "nowhere", "--control-image", "REF"],
            "nowhere: no such folder",
        ),
        (["--image", "REF", "--faces", "REF"], "holds no face embeddings; expected .npy"),
        (
            ["--image", "REF", "--image-encoder", "./enc"],
            "./enc: no such folder; expected a folder",
        ),
        (["--image", "REF", "--strength", "2"], "strength: is out of range"),
        (["--image", "REF", "--strength", "0.5"], "strength: needs init_image. Give --init-image."),
        (["--image", "REF", "--control-scale", "0.5"], "control_scale: needs controlnet"),
        (
            ["--image", "REF", "--mask", "REF", "--combine", "average"],
            "mask: cannot be masked apart once combined",
        ),
        (
            ["--image", "REF", "--init-image", "REF", "--strength", "0.4"],
            "strength: redoes none of 2 steps; expected 1/2 or more; found 0.4. Raise --strength",
        ),
        (
            ["--image", "REF", "--init-image", "REF", "--mask-image", "REF", "--strength", "0"],
            "strength: redoes none of 2 steps",
        ),
        (["--image", "REF", "--start-at", "0.5", "--end-at", "0.2"], "end_at: is out of range"),
    ],
)
def test_what_does_not_fit_gets_one_line(
    words: list[str],
    message: str,
    files: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [files[0] if word == "REF" else word for word in words]
    assert main(["generate", *given, "--steps", "2", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ipdiverse: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_folder_and_a_single_file_are_bases(tmp_path: Path, files: list[str]) -> None:
    random_pipeline().save_pretrained(tmp_path / "mine")
    loaded = ipdiverse.load_base(str(tmp_path / "mine"))
    assert loaded.guidance_scale == 7.5
    (tmp_path / "old.ckpt").write_bytes(b"x")
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 100)
    for name, message in (
        ("old.ckpt", r"is not a safetensors file; found \.ckpt\. Other single files are pickles"),
        ("broken.safetensors", r"broken\.safetensors: cannot be opened"),
    ):
        with pytest.raises(ipdiverse.IpdiverseError, match=message):
            ipdiverse.load_base(str(tmp_path / name))
    with pytest.raises(ipdiverse.IpdiverseError, match="nobody/nothing: cannot be opened"):
        ipdiverse.load_base("nobody/nothing", local_files_only=True)
