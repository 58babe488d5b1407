"""Pipelines for tasks that a base has none for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from ipdiverse.base.bases import Base, load_base
from ipdiverse.critters.render import render
from ipdiverse.critters.scene import sample_scene
from ipdiverse.errors import ArgumentError, ImageError, ModelError
from ipdiverse.sampling.request import Request
from ipdiverse.sampling.task import LastBase, Pictures, decoded, is_far, task_for
from tests import joint_models, models

if TYPE_CHECKING:
    from pathlib import Path


def half(size: tuple[int, int]) -> Image.Image:
    """A mask that is white on the right."""
    mask = Image.new("L", size)
    mask.paste(255, (size[0] // 2, 0, *size))
    return mask


@pytest.fixture(scope="module")
def base() -> Base:
    return Base("mine", models.pipeline("sd1"), 8.0, 4)


def task(base: Base, mask: Image.Image, picture: Image.Image | None = None, **options: object):
    """What is given to the pipeline that repaints a picture where a mask says."""
    side = base.pipe.unet.config.sample_size * base.pipe.vae_scale_factor
    images = {"a.png": picture or Image.new("RGB", (side, side), "red")}
    request = Request(init_image="a.png", mask_image="m.png", **options)
    return task_for(base, request, Pictures(images, {"m.png": mask}))


@pytest.mark.parametrize(
    ("how", "fitted"),
    [(None, "crop"), ("crop", "crop"), ("pad", "pad"), ("stretch", "stretch")],
)
def test_pictures_of_another_shape_are_fitted_as_asked_and_that_is_said(
    base: Base, how: str | None, fitted: str
) -> None:
    picture = models.picture(1).resize((120, 60))
    options = {"width": 64, "height": 64} | ({"fit": how} if how else {})
    made = task(base, half((120, 60)), picture, **options)
    assert made.notes[:2] == [
        f"{name} image: 120x60 is fitted to 64x64 by {fitted}; --fit takes crop, pad or stretch"
        for name in ("init", "mask")
    ]
    middle = picture.resize((64, 64), Image.Resampling.LANCZOS, (30, 0, 90, 60))
    whole = picture.resize((64, 32), Image.Resampling.LANCZOS)
    squashed = picture.resize((64, 64), Image.Resampling.LANCZOS)
    barred = ImageOps.expand(whole, (0, 16), "black")
    expected = {"crop": middle, "pad": barred, "stretch": squashed}[fitted]
    assert made.pictures["image"].tobytes() == expected.tobytes()
    bars = np.asarray(made.pictures["mask_image"])[:15]
    assert bars.min() == (255 if how == "pad" else 0), "bars are repainted"


def test_a_picture_of_the_same_shape_is_scaled_without_a_word(base: Base) -> None:
    picture = models.picture(1).resize((96, 48))
    made = task(base, half((30, 15)), picture, width=64, height=32)
    assert made.notes == ["mask image: 50 % of the picture is repainted"]
    scaled = picture.resize((64, 32), Image.Resampling.LANCZOS)
    assert made.pictures["image"].tobytes() == scaled.tobytes()


def test_an_unknown_fit_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"fit: is unknown; expected crop \| pad \| stretch; "):
        Request(fit="squash")  # type: ignore[arg-type]


def test_grey_in_a_mask_is_cut_at_half_and_that_is_said(base: Base) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(127, (0, 0, 32, 64))
    mask.paste(128, (32, 0, 48, 64))
    (note,) = task(base, mask, width=64, height=64).notes
    assert note == "mask image: 25 % of the picture is repainted; grey is cut at half"


@pytest.mark.parametrize(
    ("grey", "words"),
    [
        (
            127,
            ["repaints nothing", "grey from 128", "found a lightest grey of 127", "Draw in white"],
        ),
        (128, ["repaints everything", "found a darkest grey of 128", "Leave out --mask-image"]),
        (255, ["repaints everything", "found a darkest grey of 255", "Leave out --mask-image"]),
        (0, ["acts nowhere", "black everywhere"]),
    ],
)
def test_a_mask_of_nothing_or_everything_is_refused_before_a_base_is_opened(
    grey: int, words: list[str], tmp_path: Path
) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    Image.new("L", (32, 32), grey).save(tmp_path / "m.png")
    files = {"init_image": str(tmp_path / "a.png"), "mask_image": str(tmp_path / "m.png")}
    with pytest.raises((ArgumentError, ImageError)) as told:
        decoded(Request(**files))
    assert all(word in str(told.value) for word in [files["mask_image"], *words]), told.value


def test_what_latents_and_fitting_leave_of_a_mask_counts(base: Base) -> None:
    every = base.pipe.vae_scale_factor
    thin = Image.new("L", (64, 64))
    thin.paste(255, (1, 0, every, 64))  # between two columns that latents take
    with pytest.raises(ArgumentError, match=rf"repaints nothing; .* areas of more than {every} px"):
        task(base, thin, width=64, height=64)
    wide = Image.new("L", (128, 64))
    wide.paste(255, (0, 0, 16, 64))
    with pytest.raises(ArgumentError, match=r"repaints nothing; .* or take another --fit"):
        task(base, wide, width=64, height=64)
    assert task(base, wide, width=64, height=64, fit="stretch").notes[-1].startswith("mask image")


def test_one_file_may_be_picture_and_mask(tmp_path: Path) -> None:
    half((32, 32)).save(tmp_path / "a.png")
    file = str(tmp_path / "a.png")
    pictures = decoded(Request(image=(file,), mask=(file,), init_image=file, mask_image=file))
    assert pictures.images[file].mode == "RGB"
    assert pictures.masks[file].mode == "L"


def test_a_note_says_where_a_reference_acts(base: Base) -> None:
    pictures = Pictures({"a.png": models.picture(1)}, {"m\x1b.png": half((64, 64))})
    request = Request(image=("a.png",), mask=("m\x1b.png",))
    told = r"mask m\x1b.png: its image acts on 50 % of the picture"
    assert task_for(base, request, pictures).notes == [told]


def test_a_negative_prompt_that_flux_does_not_read_is_one_note() -> None:
    flux, note = Base("flux", joint_models.pipeline("flux"), 3.5, 4), "guided without"

    def notes(negative: str) -> list[str]:
        request = Request(image=("a.png",), width=64, height=64, negative_prompt=negative)
        return [one for one in task_for(flux, request, Pictures({}, {})).notes if note in one]

    expected = "the negative prompt has no effect: Flux.1 is guided without one"
    assert (notes("a stone"), notes("")) == ([expected], [])


def test_a_task_that_a_base_has_no_pipeline_for_is_one_line(tmp_path: Path) -> None:
    base = Base("mine", models.pipeline("sd1", "LatentConsistencyModel"), 8.0, 4)
    file = tmp_path / "start.png"
    pictures = Pictures({str(file): models.picture(1)}, {str(file): half((64, 64))})
    start = Request(init_image=str(file))
    assert type(task_for(base, start, pictures).base.pipe).__name__.endswith("Img2ImgPipeline")
    with pytest.raises(ModelError, match=r"^mine: has no pipeline for inpainting; found ") as told:
        task_for(base, Request(init_image=str(file), mask_image=str(file)), pictures)
    assert "\n" not in str(told.value)


def test_a_strength_that_redoes_no_step_is_refused(tmp_path: Path) -> None:
    base = Base("mine", models.pipeline("sd1"), 8.0, 4, steps=4)
    file = tmp_path / "start.png"
    pictures = Pictures({str(file): models.picture(1)}, {})
    refused = r"strength: redoes none of 4 steps; expected 1/4 or more; found 0\.2\. Raise"
    with pytest.raises(ArgumentError, match=refused):
        task_for(base, Request(init_image=str(file), strength=0.2), pictures)
    least = task_for(base, Request(init_image=str(file), strength=0.25), pictures)
    made = least.base.pipe("", num_inference_steps=4, output_type="latent", **least.arguments(1))
    assert len(made.images) == 1
    task_for(
        base, Request(strength=0), Pictures({}, {})
    )  # nothing is redone where there is no picture


def test_the_last_base_stays_open_for_requests_that_can_share_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[str] = []

    def opens(request: Request) -> Any:
        opened.append(request.adapter)
        return object()

    monkeypatch.setattr("ipdiverse.sampling.task.open_base", opens)
    bases = LastBase()
    first = bases.open(Request(adapter="plus"))
    assert bases.open(Request(adapter="base", n=2, steps=7)) is first
    assert bases.open(Request(dtype="float32")) is not first
    assert bases.open(Request(adapter="plus")) is not first, "one is kept, not two"
    assert len(opened) == 3


def photograph(seed: int) -> Image.Image:
    """A picture with the smooth light and the fine grain that photographs have, and no outlines."""
    rng = np.random.default_rng(seed)
    light = Image.fromarray(rng.integers(40, 220, (3, 3, 3), dtype=np.uint8)).resize((256, 256))
    grain = rng.normal(0, 12, (256, 256, 3))
    return Image.fromarray((np.asarray(light) + grain).clip(0, 255).astype(np.uint8))


def test_what_is_beyond_the_bundled_model_is_one_note_that_names_the_base_to_take() -> None:
    base, rng = load_base(), np.random.default_rng(50)
    critters = [Image.fromarray(render(sample_scene(rng), number)) for number in range(20)]
    assert sum(is_far(base, one) for one in critters) <= 1
    assert not is_far(base, critters[0].resize((512, 512)))
    assert sum(is_far(base, photograph(seed)) for seed in range(10)) >= 9

    def notes(image: Image.Image, *prompts: str) -> list[str]:
        request = Request(image=("a.png",), prompt=prompts)
        return task_for(base, request, Pictures({"a.png": image}, {})).notes

    begun = "the bundled model draws critters alone, and "
    ended = "; base sd15-plus draws photos"
    assert notes(critters[0], "a blue critter, in the snow", "") == []
    assert notes(critters[0], "A dog on the beach", "a dog and a dogma") == [
        f"{begun}it does not know dog, dogma{ended}"
    ]
    photo = next(one for one in map(photograph, range(10)) if is_far(base, one))
    assert notes(photo, "") == [f"{begun}the reference looks like none{ended}"]
    assert notes(photo, "a dog") == [
        f"{begun}the reference looks like none and it does not know dog{ended}"
    ]


def test_another_base_is_not_measured_by_critters(base: Base) -> None:
    request = Request(image=("a.png",), prompt=("a dog",))
    assert task_for(base, request, Pictures({"a.png": photograph(3)}, {})).notes == []
