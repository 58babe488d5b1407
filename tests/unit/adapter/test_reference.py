"""References: several images for one item, and what may go together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from ipdiverse.adapter.attach.attach import attach
from ipdiverse.adapter.reference import Reference, as_reference, combine_embeds
from ipdiverse.errors import ArgumentError, ImageError
from tests import models

if TYPE_CHECKING:
    from pathlib import Path

RED, BLUE = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
EMBEDS = torch.tensor([[2.0, 0.0], [0.0, 4.0], [4.0, 8.0]])


def test_combinations_are_their_formulas() -> None:
    assert torch.equal(combine_embeds(EMBEDS, "concat"), EMBEDS)
    assert combine_embeds(EMBEDS, "average").tolist() == [[2.0, 4.0]]
    assert combine_embeds(EMBEDS, "subtract").tolist() == [[0.0, -6.0]]
    assert combine_embeds(EMBEDS, "weighted", [1, 3, 0]).tolist() == [[0.5, 3.0]]
    assert combine_embeds(EMBEDS, "weighted", [2, 2, 2]).tolist() == [[2.0, 4.0]]
    with pytest.raises(ArgumentError, match="weights: sum to 0"):
        combine_embeds(EMBEDS, "weighted", [1, -1, 0])


def test_one_reference_is_itself_however_it_is_combined() -> None:
    for how in ("concat", "average", "subtract"):
        assert torch.equal(combine_embeds(EMBEDS[:1], how), EMBEDS[:1])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "reference: is empty"),
        ({"images": [3]}, "reference: is not an image; expected a PIL image, .*; found int"),
        ({"images": [RED], "masks": [3]}, "masks: is not an image; expected PIL im.*; found int"),
        ({"images": [RED], "combine": "mix"}, "combine: is unknown; expected concat"),
        ({"images": [RED], "weights": [1.0]}, "combine='weighted' and weights: go together"),
        ({"images": [RED], "combine": "weighted"}, "combine='weighted' and weights: go together"),
        (
            {"images": [RED, BLUE], "combine": "weighted", "weights": [1.0]},
            "weights: has the wrong length; expected 2; found 1",
        ),
        ({"images": [RED, BLUE], "masks": [RED]}, "masks: has the wrong length; expected 2"),
        (
            {"images": [RED, BLUE], "masks": [RED, RED], "combine": "average"},
            "masks: cannot be masked apart once combined",
        ),
    ],
)
def test_parts_that_do_not_fit_are_named(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Reference(**parts)


def test_an_image_or_a_list_is_a_reference() -> None:
    assert as_reference(RED).images == [RED]
    assert as_reference([RED, BLUE]).count() == 2
    whole = Reference(embeds=[torch.zeros(3, 8)])
    assert as_reference(whole) is whole
    assert whole.count() == 3


def test_files_are_references_too(tmp_path: Path) -> None:
    red = RED.resize((16, 16))
    red.save(tmp_path / "red.png")
    for given in (tmp_path / "red.png", str(tmp_path / "red.png")):
        (image,) = as_reference(given).images
        assert image.tobytes() == red.tobytes()
    assert len(as_reference([tmp_path / "red.png", BLUE]).images) == 2
    with pytest.raises(ImageError, match=r"gone\.png: the image file does not exist"):
        as_reference(tmp_path / "gone.png")


PICTURE = np.asarray(models.picture(1, 16))
FRACTIONS = torch.from_numpy(PICTURE.copy()) / 255
SAME = {
    "HWC": PICTURE,
    "CHW": PICTURE.transpose(2, 0, 1),
    "a tensor in 0..1": FRACTIONS,
    "a tensor in 0..1, CHW": FRACTIONS.permute(2, 0, 1),
    "that needs a gradient": FRACTIONS.clone().requires_grad_(),
    "of double precision": FRACTIONS.double().numpy(),
    "fractions in 0..255": FRACTIONS * 255,
    "whole numbers": torch.from_numpy(PICTURE.astype(np.int64)),
}
BATCHES = {
    "NHWC": np.stack([PICTURE, PICTURE]),
    "NCHW": FRACTIONS.permute(2, 0, 1)[None].repeat(2, 1, 1, 1),
    "a list": [PICTURE, FRACTIONS],
}


@pytest.mark.parametrize("given", SAME.values(), ids=SAME)
def test_an_array_is_its_picture(given: Any) -> None:
    (image,) = as_reference(given).images
    assert np.array_equal(np.asarray(image), PICTURE)


def test_half_precision_is_read_as_well_as_it_can_tell() -> None:
    (image,) = as_reference(FRACTIONS.bfloat16()).images
    assert np.abs(np.asarray(image).astype(int) - PICTURE).max() <= 1


def test_grey_and_transparent_arrays_are_pictures_too() -> None:
    grey, alpha = PICTURE[..., 0], np.dstack([PICTURE, PICTURE[..., :1]])
    for given in (grey, grey[None], grey[..., None]):
        assert as_reference(given).images[0].tobytes() == grey.tobytes()
    assert as_reference(grey > 128).images[0].getextrema() == (0, 255)
    assert as_reference(alpha).images[0].mode == "RGBA"
    assert as_reference(np.zeros((16, 16, 3), np.uint8)).images[0].getextrema() == ((0, 0),) * 3


@pytest.mark.parametrize("given", BATCHES.values(), ids=BATCHES)
def test_a_batch_is_several_images_or_one_for_each_item(given: Any) -> None:
    assert as_reference(given).count() == Reference(given).count() == 2
    pipe = models.pipeline("sd1")
    with attach(pipe, models.adapter("base", pipe.unet)) as prompt:
        prompt.set_reference(given)
        assert [one.count() for one in prompt.references()] == [1, 1]


def test_one_reference_can_be_for_all_adapters() -> None:
    pipe = models.pipeline("sd1")
    with attach(pipe, *(models.adapter(k, pipe.unet) for k in ("base", "plus"))) as prompt:
        prompt.set_reference(RED, adapter=None)
        assert prompt.references(0) == prompt.references(1) != []


WHITE = "does not say which number is white; expected fractions in 0..1, or numbers in 0..255"
BAD_ARRAYS = {
    "prepared": (FRACTIONS * 2 - 1, WHITE),
    "a little above 1": (FRACTIONS * 1.01 / FRACTIONS.max(), WHITE),
    "prepared, bright": (FRACTIONS + 1.1, WHITE),
    "sixteen bits": (PICTURE.astype(np.uint16) * 257, rf"{WHITE}; found uint16, \d+ to 6\d+"),
    "0 and 1 in whole numbers": ((PICTURE > 128).astype(np.uint8), WHITE),
    "NaN": (FRACTIONS * torch.nan, WHITE),
    "text": (np.full((16, 16, 3), "a"), WHITE),
    "two channels": (PICTURE[..., :2], r"axes that are not an image's; .*found \(16, 16, 2\)"),
    "either layout": (PICTURE[:3], r"axes that are not an image's; .*found \(3, 16, 3\)"),
    "one axis": (PICTURE[0, 0], r"axes that are not an image's; .*found \(3,\)"),
    "five axes": (PICTURE[None, None], r"axes that are not an image's"),
    "nothing": (PICTURE[:0], r"axes that are not an image's; .*found \(0, 16, 3\)"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_an_array_that_may_be_anything_is_one_line(case: str) -> None:
    given, message = BAD_ARRAYS[case]
    with pytest.raises(ArgumentError, match=message) as error:
        as_reference(given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", [None, 3, [RED, 3]])
def test_what_is_no_image_is_one_error(given: Any) -> None:
    with pytest.raises(
        ArgumentError, match="reference: is not an image; expected a PIL image, an im"
    ):
        as_reference(given)
    with pytest.raises(ArgumentError, match=r"reference: has no pixels; found \(0, 5\)"):
        as_reference(Image.new("RGB", (0, 5)))


def test_a_photograph_is_upright_by_its_path_and_as_pillow_opened_it(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # as a phone writes it when it is held upright
    Image.linear_gradient("L").crop((0, 0, 256, 128)).save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as opened:
        lying = Reference([opened]).images[0]
    upright = as_reference(tmp_path / "a.jpg").images[0]
    assert lying.size == upright.size == (128, 256)
    assert lying.convert("RGB").tobytes() == upright.tobytes()


BAD_EMBEDS = {
    "nothing": ([], "reference: is empty"),
    "one axis": ([torch.ones(48)], r"embeds: has the wrong shape; expected \(count.*found \(48,\)"),
    "no rows": ([torch.ones(0, 48)], r"embeds: has the wrong shape.*found \(0, 48\)"),
    "whole numbers": ([torch.ones(1, 48, dtype=torch.int64)], r"floating-point.*torch\.int64"),
    "NaN": ([torch.full((1, 48), torch.nan)], "found NaN or infinity"),
    "infinity": ([torch.full((1, 48), torch.inf)], "found NaN or infinity"),
    "no memory": ([torch.ones(1, 48, device="meta")], "found a tensor of torch.strided on meta"),
    "sparse": ([torch.ones(1, 48).to_sparse()], "found a tensor of torch.sparse_coo on cpu"),
    "text": ("abc", "embeds: is not a tensor; expected embeddings; found str"),
    "a list": ([[1.0]], "embeds: is not a tensor; expected embeddings; found list"),
    "another width": ([torch.ones(1, 49)], r"expected \(count, 48\), or stock.*found \(1, 49\)"),
    "hidden states": ([torch.ones(3, 7, 32)], r"expected \(count, 48\).*found \(3, 7, 32\)"),
    "three stacked": ([torch.ones(3, 1, 48)], r"expected \(count, 48\).*found \(3, 1, 48\)"),
    "four axes": ([torch.ones(2, 1, 1, 48)], r"expected \(count, 48\).*found \(2, 1, 1, 48\)"),
    "one too many": ([torch.ones(1, 48)] * 2, "wrong number of embeddings; expected 1, of pooled"),
    "other negatives": (
        [torch.arange(4.0)[:, None, None].expand(4, 1, 48)],
        "negative embeddings: differ between items",
    ),
}


@pytest.mark.parametrize("case", BAD_EMBEDS)
def test_embeddings_of_a_wrong_shape_are_one_sentence(case: str) -> None:
    given, message = BAD_EMBEDS[case]
    pipe = models.pipeline("sd1")
    with (
        attach(pipe, models.adapter("base", pipe.unet)) as prompt,
        pytest.raises(ArgumentError, match=message),
    ):
        prompt.set_reference(Reference(embeds=given))  # type: ignore[arg-type]


def test_embeddings_may_be_one_tensor_an_array_or_several_items_stacked() -> None:
    one = torch.randn(1, 48)
    pipe = models.pipeline("sd1")
    with attach(pipe, models.adapter("base", pipe.unet)) as prompt:

        def tokens(given: Any, **options: Any) -> torch.Tensor:
            prompt.set_reference(Reference(embeds=given, **options))
            return prompt.hook.prompts[0].references[0].positive

        expected = tokens([one])
        for given in (one, [one.numpy()], [one[None]], [one.double()]):
            assert torch.allclose(tokens(given), expected, atol=1e-6)
        items = torch.randn(2, 1, 48)
        stacked = tokens([torch.cat([torch.zeros_like(items), items])])
        assert torch.equal(stacked, torch.cat([tokens([item]) for item in items]))
        with pytest.raises(ArgumentError, match="weights: has the wrong length; expected 2"):
            tokens([torch.randn(1, 2, 48)], combine="weighted", weights=[1.0])


@pytest.mark.parametrize(
    ("kind", "faces", "message"),
    [
        ("faceid", torch.ones(1, 9), r"face embeddings: has the wrong.*found \(1, 9\)"),
        ("faceid", torch.ones(9), r"reference: faces: has the wrong shape.*found \(9,\)"),
        ("faceid-plus", torch.ones(2, 32), r"reference: differ in number.*found 2 and 1"),
    ],
)
def test_faces_of_a_wrong_shape_are_one_sentence(
    kind: str, faces: torch.Tensor, message: str
) -> None:
    pipe = models.pipeline("sd1")
    with (
        attach(pipe, models.adapter(kind, pipe.unet)) as prompt,
        pytest.raises(ArgumentError, match=message),
    ):
        prompt.set_reference(Reference([models.picture(1)], faces=faces))
