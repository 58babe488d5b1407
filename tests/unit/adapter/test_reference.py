"""References: several images for one item, and what may go together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image

from ipdiverse.adapter.reference import Reference, as_reference, combine_embeds
from ipdiverse.errors import ArgumentError, ImageError

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
        (
            {"images": ["red.png"]},
            r"is not an image; expected PIL images; found str\. Open files with",
        ),
        ({"images": [RED], "masks": [3]}, "is not an image; expected PIL images; found int"),
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


@pytest.mark.parametrize("given", [None, 3, EMBEDS, [RED, 3]])
def test_what_is_no_image_is_one_error(given: Any) -> None:
    with pytest.raises(
        ArgumentError, match="reference: is not an image; expected a PIL image, an im"
    ):
        as_reference(given)


def test_a_photograph_is_upright_by_its_path_and_as_pillow_opened_it(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # as a phone writes it when it is held upright
    Image.linear_gradient("L").crop((0, 0, 256, 128)).save(tmp_path / "a.jpg", exif=exif)
    with Image.open(tmp_path / "a.jpg") as opened:
        lying = Reference([opened]).images[0]
    upright = as_reference(tmp_path / "a.jpg").images[0]
    assert lying.size == upright.size == (128, 256)
    assert lying.convert("RGB").tobytes() == upright.tobytes()
