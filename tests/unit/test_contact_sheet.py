"""The sheet of a reference and its outputs, and labels for plots."""

from __future__ import annotations

import pytest
from PIL import Image

from ipdiverse import contact_sheet as module
from ipdiverse.contact_sheet import contact_sheet
from ipdiverse.errors import ArgumentError

RED, BLUE, GREEN = (255, 0, 0), (0, 0, 255), (0, 128, 0)


def plain(colour: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, colour)


def colours(image: Image.Image) -> set[tuple[int, int, int]]:
    return {colour for _, colour in image.getcolors(1 << 24)}


def centre_of_cell(column: int, cell: int = 192) -> tuple[int, int]:
    left = module.MARGIN + cell + 3 * module.GAP + column * (cell + module.GAP)
    return left + cell // 2, module.MARGIN + cell // 2


def test_reference_stands_left_and_outputs_follow_in_order():
    sheet = contact_sheet(plain(RED), [plain(BLUE), plain(GREEN)], ["", ""], columns=2)
    assert sheet.mode == "RGB"
    assert sheet.getpixel((module.MARGIN + 96, module.MARGIN + 96)) == RED
    assert sheet.getpixel(centre_of_cell(0)) == BLUE
    assert sheet.getpixel(centre_of_cell(1)) == GREEN


def test_only_the_reference_is_framed():
    sheet = contact_sheet(plain(RED), [plain(BLUE)], [""])
    frame = Image.new("RGB", (1, 1), "#c2410c").getpixel((0, 0))
    assert sheet.getpixel((module.MARGIN - 1, module.MARGIN + 50)) == frame
    assert sheet.getpixel((centre_of_cell(0)[0] - 97, module.MARGIN + 50)) == (255, 255, 255)


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (4, 2), (5, 3), (9, 3)])
def test_grid_is_square_by_default(count: int, columns: int):
    sheet = contact_sheet(plain(RED), [plain(BLUE)] * count, [""] * count)
    explicit = contact_sheet(plain(RED), [plain(BLUE)] * count, [""] * count, columns=columns)
    assert sheet.size == explicit.size


def test_more_columns_than_images_leave_no_empty_ones():
    wide = contact_sheet(plain(RED), [plain(BLUE)], [""], columns=5)
    assert wide.size == contact_sheet(plain(RED), [plain(BLUE)], [""], columns=1).size


def test_long_captions_make_room_and_stay_in_their_cell():
    short = contact_sheet(plain(RED), [plain(BLUE)], ["one"])
    long = contact_sheet(plain(RED), [plain(BLUE)], ["many words of a caption " * 4])
    assert long.width == short.width
    assert long.height > short.height
    right_margin = long.crop((long.width - module.MARGIN, 0, long.width, long.height))
    below = long.crop((0, long.height - module.MARGIN, long.width, long.height))
    assert colours(right_margin) == colours(below) == {(255, 255, 255)}


def test_a_word_longer_than_the_cell_is_broken():
    lines = module._wrap("x" * 100, module.CAPTION_SIZE, 100, 20)
    assert "".join(lines) == "x" * 100
    assert all(module._font(module.CAPTION_SIZE).getlength(line) <= 100 for line in lines)


def test_too_long_a_caption_ends_in_an_ellipsis_that_fits():
    lines = module._wrap("words without end " * 500, module.CAPTION_SIZE, 150, 3)
    assert len(lines) == 3
    assert lines[-1].endswith("…")
    assert module._font(module.CAPTION_SIZE).getlength(lines[-1]) <= 150


def test_line_breaks_in_a_caption_are_kept():
    assert module._wrap("one\ntwo\n\n", module.CAPTION_SIZE, 150, 3) == ["one", "two"]


def test_characters_that_the_font_lacks_get_their_nearest_letter():
    assert module._drawable("Café – grün × “blau”") == 'Cafe - grun x "blau"'


def test_title_adds_height_on_top():
    without = contact_sheet(plain(RED), [plain(BLUE)], [""])
    titled = contact_sheet(plain(RED), [plain(BLUE)], [""], "A title")
    assert titled.height > without.height
    assert titled.width == without.width


def test_small_images_keep_hard_pixels():
    tiny = Image.new("RGB", (64, 64), RED)
    tiny.paste(BLUE, (0, 0, 32, 64))
    fitted = module._fit(tiny, 192)
    assert fitted.size == (192, 192)
    assert colours(fitted) == {RED, BLUE}


def test_small_images_that_whole_pixels_would_leave_lost_are_smoothed_to_fit():
    assert module._fit(plain(RED), 96).size == (96, 96)


@pytest.mark.parametrize(
    ("size", "fitted"),
    [
        ((640, 320), (192, 96)),
        ((320, 640), (96, 192)),
        ((4000, 16), (192, 1)),
        ((50, 20), (150, 60)),
    ],
)
def test_proportions_are_kept(size: tuple[int, int], fitted: tuple[int, int]):
    assert module._fit(plain(RED, size), 192).size == fitted


def test_images_of_any_mode_are_drawn():
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    sheet = contact_sheet(Image.new("L", (64, 64), 90), [clear], [""])
    assert sheet.getpixel(centre_of_cell(0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("count", "captions", "options", "words"),
    [
        (0, 0, {}, ["images", "at least one image"]),
        (2, 1, {}, ["captions", "differ in number", "expected 2", "found 1"]),
        (1, 1, {"columns": 0}, ["columns", "out of range", "expected 1 to", "found 0"]),
        (1, 1, {"cell": 10}, ["cell", "out of range", "expected 48 to", "found 10"]),
        (1, 1, {"cell": 9000}, ["cell", "too large", "40 megapixels", "smaller cell"]),
    ],
)
def test_impossible_requests_are_explained(
    count: int, captions: int, options: dict, words: list[str]
):
    with pytest.raises(ArgumentError) as caught:
        contact_sheet(plain(RED), [plain(BLUE)] * count, ["caption"] * captions, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_labels_keep_their_distance_and_both_ends() -> None:
    assert module.labelled_points([0.0, 0.01, 0.2, 0.22, 0.6, 0.98, 1.0]) == [0, 2, 4, 6]
    assert module.labelled_points([0.0, 0.5, 1.0]) == [0, 1, 2]
    assert module.labelled_points([3.0]) == [0]
    assert module.labelled_points([]) == []
