"""The page in a real browser. Clients that mean it no good: tests/hostile/test_page.py."""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from ipdiverse.cli import main
from ipdiverse.critters.make import example
from ipdiverse.critters.render import render
from ipdiverse.evaluation.report import inline
from ipdiverse.provenance import read_provenance
from tests.e2e.ui_clients import CHROMIUM, FLAGS, PATIENCE, Client, free_port, until, waiting_job

pytest.importorskip("gradio", reason="the page needs gradio")

from ipdiverse.ui import Options
from ipdiverse.ui.queue import Job
from ipdiverse.ui.server import opened_page

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from playwright.sync_api import Browser, FrameLocator, Page

    from ipdiverse.ui.server import Page as Served

WAITING = 6
ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "images"
PASSWORD = "correct horse"  # noqa: S105 - of the test's own page
SHOOTS = os.environ.get("IPDIVERSE_SCREENSHOTS") == "1"
STUDY = """
[[arm]]
name = "scale 1"
family = "plain, scale"
adapter = "plus"
at = 1.0

[[sweep]]
family = "plain, scale"
adapter = "plus"
scale = [0.5, 0.0]

[[sweep]]
family = "dial"
adapter = "plus"
diversity = [0.5, 1.0]
"""
REPORT = (
    "<!doctype html><title>r</title><h1>Variety against fidelity</h1>"
    "<script>parent.document.title = 'taken over'</script><p id=told>all of it</p>"
    f'<img src="{inline(Image.new("RGB", (3, 2)))}">'
)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports")
    (folder / "study").mkdir()
    (folder / "study" / "report.html").write_text(REPORT)
    return folder


@pytest.fixture(scope="module")
def served(reports: Path) -> Iterator[Served]:
    with opened_page(Options(port=free_port(), reports=(str(reports),), waiting=WAITING)) as page:
        yield page
        at = page.folder
    assert not at.exists(), "nothing is left"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs chromium on the PATH")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Browser, served: Served) -> Iterator[Callable[..., Page]]:
    contexts = []

    def open_page(width: int = 1280, height: int = 1000) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height})
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        context.set_default_timeout(PATIENCE * 1000)
        contexts.append(context)
        page = context.new_page()
        page.goto(served.url)
        page.wait_for_selector("#vary-go")
        return page

    yield open_page
    for context in contexts:
        context.close()
    until(lambda: not served.sessions.turns.busy, "the slot is free again")


@pytest.fixture
def photo(references: list[Image.Image], tmp_path: Path) -> Path:
    file = tmp_path / "my photo.png"
    references[0].save(file)
    return file


def says(page: Page, element: str, words: str) -> None:
    page.wait_for_function(
        "([id, words]) => document.querySelector(id)?.innerText.includes(words)",
        arg=[element, words],
    )


def give(page: Page, *files: Path, tab: str = "vary") -> None:
    page.set_input_files(f"#{tab}-upload input[type=file]", [str(file) for file in files])


def take_example(page: Page, tab: str = "vary", number: int = 0) -> None:
    page.locator(f"#{tab}-examples .thumbnail-item").nth(number).click()
    says(page, f"#{tab}-references-told", f"Reference: critter-{number + 1}.png.")


def set_number(page: Page, element: str, value: float) -> None:
    """Type a number until the page has taken it: a panel being opened may lose what is typed."""
    slider = page.locator(f"{element} input[type=range]")

    def taken() -> bool:
        page.fill(f"{element} input[type=number]", str(value))
        page.keyboard.press("Tab")
        deadline = time.monotonic() + 5.0
        while slider.count() and float(slider.input_value()) != value:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    until(taken, f"{element} is {value}")


def configure(page: Page, prompt: str, steps: int, count: int, tab: str = "vary") -> None:
    page.fill(f"#{tab}-prompt textarea", prompt)
    if tab == "vary":
        set_number(page, "#vary-count", count)
    if not page.locator(f"#{tab}-steps").is_visible():
        page.get_by_role("button", name="Advanced").locator("visible=true").click()
    set_number(page, f"#{tab}-steps", steps)


def copied(page: Page, which: str, tab: str = "vary") -> str:
    page.evaluate("() => navigator.clipboard.writeText('')")
    page.click(f"#{tab}-copy-{which}")
    says(page, f"#{tab}-copied", "Copied.")
    return page.evaluate("() => navigator.clipboard.readText()")


def downloaded(page: Page, into: Path, tab: str = "vary", button: str = "download") -> Path:
    """Fetch the set and unpack it; the folder."""
    with page.expect_download() as waiting:
        page.click(f"#{tab}-{button}")
    archive = into / waiting.value.suggested_filename
    waiting.value.save_as(archive)
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(into)
    return into / archive.stem


def pixels(folder: Path) -> dict[str, np.ndarray]:
    files = sorted(folder.rglob("[0-9]*.png"))
    return {str(f.relative_to(folder)): np.asarray(Image.open(f)) for f in files}


def shown_images(page: Page) -> list[np.ndarray]:
    """What the browser shows, fetched as it fetches it."""
    found = []
    for image in page.locator("#vary-images .thumbnail-item img").all():
        answer = page.request.get(image.get_attribute("src") or "")
        found.append(np.asarray(Image.open(io.BytesIO(answer.body())).convert("RGB")))
    return found


def assert_equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    assert one
    for name, image in one.items():
        np.testing.assert_array_equal(image, other[name])


def picture(page: Page, name: str) -> None:
    """For the documentation, when somebody asks."""
    if SHOOTS:
        page.mouse.move(0, 0)
        page.evaluate("() => document.activeElement.blur()")
        page.wait_for_timeout(500)
        page.screenshot(path=str(PICTURES / f"ui-{name}.png"), full_page=True)


def test_upload_draw_copy_and_draw_again(
    visit: Callable[..., Page], photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = visit()
    give(page, photo)
    says(page, "#vary-references-told", "Reference: my_photo.png.")
    configure(page, 'a "critter" in the $(snow)', steps=3, count=2)
    page.click("#vary-go")
    says(page, "#vary-status", "Done: 2 images.")
    says(page, "#vary-report", "How close they are")
    before = shown_images(page)

    unpacked = downloaded(page, tmp_path)
    first = pixels(unpacked / "out")
    for image, shown in zip(first.values(), before, strict=True):
        np.testing.assert_array_equal(image, shown)
    record = read_provenance(unpacked / "out" / "0001.png")
    assert record["image_index"] == 1
    assert "/tmp" not in str(record), "a record tells nothing of the machine"  # noqa: S108

    monkeypatch.chdir(unpacked)
    words = shlex.split(copied(page, "command"))
    assert words[:2] == ["ipdiverse", "generate"]
    for file in Path("out").iterdir():
        file.unlink()
    assert main(words[1:]) == 0
    assert_equal(pixels(Path("out")), first)

    for file in Path("out").iterdir():
        file.unlink()
    exec(compile(copied(page, "python"), "recipe", "exec"), {})  # noqa: S102
    assert_equal(pixels(Path("out")), first)

    set_number(page, "#vary-diversity", 0)
    page.click("#vary-go")
    says(page, "#vary-status", "Drawing 2 images.")
    says(page, "#vary-status", "Done: 2 images.")
    moved = shown_images(page)
    assert not any(np.array_equal(a, b) for a, b in zip(before, moved, strict=True))
    assert "--diversity=0 " in copied(page, "command")


def test_a_reload_keeps_prompt_settings_and_reference(
    visit: Callable[..., Page], references: list[Image.Image], tmp_path: Path
) -> None:
    photo = tmp_path / "phone.jfif"
    references[0].save(photo, "JPEG")
    page = visit()
    give(page, photo)
    says(page, "#vary-references-told", "Reference: phone.jfif.")
    configure(page, "a critter in the rain", steps=3, count=2)
    page.reload()
    page.wait_for_selector("#vary-go")
    says(page, "#vary-references-told", "Reference: phone.jfif.")
    assert page.locator("#vary-references img").count() == 1
    assert page.input_value("#vary-prompt textarea") == "a critter in the rain"
    assert page.input_value("#vary-count input[type=number]") == "2"
    page.click("#vary-go")
    says(page, "#vary-status", "Done: 2 images.")
    assert "--steps=3" in copied(page, "command")
    stranger = visit()
    stranger.wait_for_selector("#vary-references-told p", state="attached")  # what was kept came
    assert stranger.input_value("#vary-prompt textarea") == ""
    assert "phone" not in stranger.inner_text("#vary-references-told")


def test_a_reload_keeps_what_was_drawn(visit: Callable[..., Page], tmp_path: Path) -> None:
    page = visit()
    take_example(page)
    configure(page, "a critter", steps=1, count=2)
    for _ in range(2):
        page.click("#vary-go")
        says(page, "#vary-status", "Drawing")
        says(page, "#vary-status", "Done: 2 images.")
    before, seed = shown_images(page), page.input_value("#vary-seed input")
    page.reload()
    page.wait_for_selector("#vary-go")
    says(page, "#vary-status", f"Done: 2 images. Seed {seed}.")
    for shown, image in zip(shown_images(page), before, strict=True):
        np.testing.assert_array_equal(shown, image)
    assert page.locator("#vary-earlier .thumbnail-item").count() == 1
    assert f"--seed={seed}" in copied(page, "command")
    first = pixels(downloaded(page, tmp_path) / "out")
    for shown, image in zip(first.values(), before, strict=True):
        np.testing.assert_array_equal(shown, image)


def test_scenes_of_ones_own_are_drawn_and_repeated(
    visit: Callable[..., Page], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = []
    for number, place in enumerate(("snow", "moon", "beach")):
        made = example(number, 77, "train")
        file = tmp_path / f"my scene {number}.png"
        Image.fromarray(render(replace(made.scene, place=place), made.seed)).save(file)
        file.with_suffix(".txt").write_text(f"a critter, {place}")
        files += [file, file.with_suffix(".txt")]
    page = visit()
    take_example(page)
    configure(page, "a critter", steps=2, count=2)
    page.get_by_role("button", name="Scenes of your own").click()
    drop = "#vary-scenes input[type=file]"
    page.set_input_files(drop, [str(files[0])])
    says(page, "#vary-scenes-told", "Give 2 or more pictures, or none.")
    page.get_by_role("button", name="Clear").locator("visible=true").click()
    says(page, "#vary-scenes-told", "")
    page.set_input_files(drop, [str(file) for file in files])
    says(page, "#vary-scenes-told", "Scenes are drawn from 3 pictures.")
    page.click("#vary-go")
    says(page, "#vary-status", "Done: 2 images.")
    unpacked = downloaded(page, tmp_path)
    names = sorted(file.name for file in (unpacked / "scenes").iterdir())
    assert names == [f"my_scene_{n}.{kind}" for n in range(3) for kind in ("png", "txt")]
    assert (unpacked / "scenes" / "my_scene_1.txt").read_text() == "a critter, moon"
    first = pixels(unpacked / "out")
    record = read_provenance(unpacked / "out" / "0000.png")
    assert record["request"]["scenes"] == "scenes"
    assert "/tmp" not in str(record), "a record tells nothing of the machine"  # noqa: S108
    monkeypatch.chdir(unpacked)
    shutil.rmtree("out")
    assert main(shlex.split(copied(page, "command"))[1:]) == 0
    assert_equal(pixels(Path("out")), first)
    page.reload()
    page.wait_for_selector("#vary-go")
    page.get_by_role("button", name="Scenes of your own").click()
    says(page, "#vary-scenes-told", "Scenes are drawn from 3 pictures.")


def test_what_is_being_drawn_is_shown_before_it_is_finished(visit: Callable[..., Page]) -> None:
    page = visit()
    take_example(page)
    configure(page, "a critter", steps=8, count=2)
    page.click("#vary-go")
    says(page, "#vary-images", "2: being drawn")
    page.wait_for_function(
        "() => document.querySelector('#vary-images .thumbnail-item img')?.naturalWidth === 64"
    )
    says(page, "#vary-status", "Done: 2 images.")
    assert "being drawn" not in page.inner_text("#vary-images")


def test_a_draw_that_waits_says_its_place(visit: Callable[..., Page], served: Served) -> None:
    page = visit()
    take_example(page)
    configure(page, "", steps=1, count=1)
    with served.sessions.turns.turn(lambda: None):
        page.click("#vary-go")
        says(page, "#vary-status", "Drawing 1 image. Others come first: 1 before you.")
    says(page, "#vary-status", "Done: 1 image.")


@pytest.mark.slow
def test_images_appear_as_they_finish_and_cancelling_keeps_them(
    visit: Callable[..., Page], tmp_path: Path, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = visit()
    take_example(page)
    configure(page, "a critter on the moon", steps=8, count=12)
    page.click("#vary-go")
    page.wait_for_selector("#vary-progress [role=progressbar]")
    says(page, "#vary-progress", "left")
    says(page, "#vary-status", "4 of 12 images finished.")
    page.wait_for_function("document.querySelectorAll('#vary-images .thumbnail-item').length >= 4")
    page.click("#vary-cancel")
    says(page, "#vary-status", "Cancelled.")
    until(lambda: not served.sessions.turns.busy, "cancelling frees the slot")
    kept = page.locator("#vary-images .thumbnail-item").count()
    assert kept in (4, 8)
    assert f"{kept} images finished before that." in page.inner_text("#vary-status")

    unpacked = downloaded(page, tmp_path)
    first = pixels(unpacked / "out")
    assert len(first) == kept
    words = shlex.split(copied(page, "command"))
    assert f"--n={kept}" in words
    words[-1] = "--out=again"
    words = [f"--n={1}" if word.startswith("--n=") else word for word in words]
    monkeypatch.chdir(unpacked)
    assert main(words[1:]) == 0
    np.testing.assert_array_equal(pixels(Path("again"))["0000.png"], first["0000.png"])


def current_job(served: Served) -> Job:
    jobs = [job for s in served.sessions.all() for job in s.jobs.values()]
    (found,) = [job for job in jobs if not job.wait(0)]
    return found


def test_cancelling_frees_the_slot_within_a_step(
    visit: Callable[..., Page], served: Served
) -> None:
    page = visit()
    take_example(page)
    configure(page, "", steps=100, count=16)
    page.click("#vary-go")
    says(page, "#vary-progress", "left")
    job = current_job(served)
    page.click("#vary-cancel")
    until(job._stop.is_set, "the job is told")
    told = job.done
    says(page, "#vary-status", "Cancelled.")
    assert "Error" not in page.inner_text("body")
    assert job.done <= told + 4, "no more than the batch's step that was at work"
    assert job.total == 1600
    page.click("#vary-cancel")
    says(page, "#vary-status", "Cancelled.")


def test_a_closed_tab_frees_the_slot(visit: Callable[..., Page], served: Served) -> None:
    page = visit()
    take_example(page)
    configure(page, "", steps=100, count=16)
    page.click("#vary-go")
    says(page, "#vary-progress", "left")
    job = current_job(served)
    page.close()
    until(lambda: job.wait(0), "the slot is free", 60)
    assert job.stopped


@pytest.mark.slow
def test_the_grid(
    visit: Callable[..., Page], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = visit()
    page.get_by_role("tab", name="Grid").click()
    page.click("#grid-go")
    says(page, "#grid-status", "reference: is missing")
    take_example(page, "grid", 1)
    configure(page, "a critter in the desert", steps=12 if SHOOTS else 2, count=1, tab="grid")
    if not SHOOTS:
        page.locator("#grid-diversities").get_by_label("0.5", exact=True).uncheck()
    page.click("#grid-go")
    cells = 6 if SHOOTS else 4
    says(page, "#grid-status", f"Done: {cells} images.")
    table = page.locator("#grid-table table")
    assert table.locator("th[scope=row]").all_inner_texts() == ["0.5", "1"]
    alts = [image.get_attribute("alt") or "" for image in table.locator("img").all()]
    assert len(alts) == cells
    assert all(re.match(r"diversity [\d.]+, scale [\d.]+: \w+", alt) for alt in alts)
    picture(page, "grid")
    if SHOOTS:
        return
    unpacked = downloaded(page, tmp_path, "grid")
    first = pixels(unpacked / "out")
    assert next(iter(first)) == "diversity-0-scale-0.5/0000.png"
    monkeypatch.chdir(unpacked)
    lines = copied(page, "command", "grid").splitlines()
    assert len(lines) == cells
    for folder in Path("out").iterdir():
        (folder / "0000.png").unlink()
    assert main(shlex.split(lines[-1])[1:]) == 0
    exec(compile(copied(page, "python", "grid"), "recipe", "exec"), {})  # noqa: S102
    assert_equal(pixels(Path("out")), first)


def test_the_grid_takes_over_and_its_cells_open_and_save(
    visit: Callable[..., Page], tmp_path: Path
) -> None:
    page = visit()
    take_example(page, number=2)
    page.fill("#vary-prompt textarea", "a critter on the moon")
    page.get_by_role("tab", name="Grid").click()
    says(page, "#grid-references-told", "Reference: critter-3.png.")
    assert page.input_value("#grid-prompt textarea") == "a critter on the moon"
    for name, kept in (("diversities", "0.5"), ("scales", "1")):
        boxes = page.locator(f"#grid-{name}").get_by_role("checkbox")
        for box in boxes.all():
            box.set_checked(False)
        page.locator(f"#grid-{name}").get_by_label(kept, exact=True).check()
    configure(page, "a critter in the desert", steps=1, count=1, tab="grid")
    page.click("#grid-go")
    says(page, "#grid-status", "Done: 1 image.")
    page.locator("#grid-table td button").focus()
    page.keyboard.press("Enter")
    save = page.get_by_role("link", name="Save this image")
    save.wait_for()
    with page.expect_download() as waiting:
        save.click()
    assert waiting.value.suggested_filename == "diversity-0.5-scale-1.png"
    waiting.value.save_as(tmp_path / "saved.png")
    assert "a critter in the desert" in read_provenance(tmp_path / "saved.png")["command"]
    page.keyboard.press("Escape")
    save.wait_for(state="hidden")
    page.get_by_role("tab", name="Vary").click()
    take_example(page, number=0)
    page.get_by_role("tab", name="Grid").click()
    assert page.input_value("#grid-prompt textarea") == "a critter in the desert", "kept"
    page.click("#grid-over")
    says(page, "#grid-references-told", "Reference: critter-1.png.")
    assert page.input_value("#grid-prompt textarea") == "a critter on the moon"


def widths(frame: FrameLocator) -> list[int]:
    """Of every picture, in its own pixels; 0 is one that was not loaded."""
    found = frame.locator("img")
    return found.evaluate_all("images => images.map(i => i.complete ? i.naturalWidth : 0)")


def test_a_report_is_shown_and_can_do_nothing(visit: Callable[..., Page], reports: Path) -> None:
    page = visit()
    page.get_by_role("tab", name="Reports").click()
    page.locator("#reports-chosen input").click()
    page.get_by_role("option").first.click()
    frame = page.frame_locator("#reports-shown iframe")
    frame.locator("#told").wait_for()
    assert frame.locator("#told").inner_text() == "all of it"
    assert page.title() == "ipdiverse", "the script before it did nothing"
    assert widths(frame) == [3], "pictures inside a report are let in"
    (reports / "later").mkdir()
    (reports / "later" / "report.html").write_text(REPORT)
    page.get_by_role("tab", name="Vary").click()
    page.get_by_role("tab", name="Reports").click()
    says(page, "#reports-chosen", "2 found.")
    page.locator("#reports-chosen input").click()
    page.get_by_role("option", name="later").wait_for()


def bomb() -> bytes:
    """A PNG of 400 megapixels in a few hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


SVG = (
    b"<svg xmlns='http://www.w3.org/2000/svg'><script>document.title = 'taken over'</script></svg>"
)


HOSTILE = {
    "notes.png": (b"not a picture at all", "not an image of an accepted format"),
    "drawing.png": (SVG, "not an image of an accepted format"),
    "bomb.png": (bomb(), "the image is too large"),
    "empty.jpg": (b"", "the image file is empty"),
    "half.png": (None, "truncated or corrupt"),
}


def test_hostile_uploads_are_one_line_each(
    visit: Callable[..., Page], photo: Path, tmp_path: Path
) -> None:
    page = visit()
    for name, (data, _) in HOSTILE.items():
        (tmp_path / name).write_bytes(photo.read_bytes()[:-400] if data is None else data)
    give(page, *(tmp_path / name for name in HOSTILE), photo)
    says(page, "#vary-references-told", "Reference: my_photo.png.")
    told = page.locator("#vary-references-told [role=alert]").all_inner_texts()
    assert len(told) == len(HOSTILE), "the good one is kept"
    for line, (name, (_, words)) in zip(told, HOSTILE.items(), strict=True):
        assert line.startswith(f"{name}: ")
        assert words in line
    assert page.title() == "ipdiverse"


def test_the_extension_does_not_decide(
    visit: Callable[..., Page], references: list[Image.Image], tmp_path: Path
) -> None:
    page = visit()
    references[0].save(tmp_path / "really.webp", "PNG")
    give(page, tmp_path / "really.webp")
    says(page, "#vary-references-told", "Reference: really.webp.")
    (tmp_path / "evil.svg").write_bytes(SVG)
    give(page, tmp_path / "evil.svg")
    page.get_by_text("Invalid file type: evil.svg").wait_for()
    assert page.inner_text("#vary-references-told").strip() == "Reference: really.webp."


def test_a_photo_is_told_which_base_to_take(visit: Callable[..., Page]) -> None:
    page = visit()
    give(page, PICTURES / "photo-cat.jpg")
    says(page, "#vary-references-told", "Reference: photo-cat.jpg.")
    configure(page, "a dog", steps=1, count=1)
    page.click("#vary-go")
    says(page, "#vary-status", "Note: the bundled model draws critters alone, and the reference")
    assert "it does not know dog; base sd15-plus draws photos" in page.inner_text("#vary-status")


def test_a_full_queue_is_said_on_the_page(visit: Callable[..., Page], served: Served) -> None:
    page = visit()
    take_example(page)
    configure(page, "", steps=1, count=1)
    crowd = [Client(served.url) for _ in range(WAITING + 1)]
    for one in crowd:
        one.http.get("/config").raise_for_status()
        one._config = crowd[0].config
        one.take_example()
    with served.sessions.turns.turn(lambda: None):
        job = waiting_job(served, crowd[0])
        for one in crowd[1:]:
            one.join().raise_for_status()
        page.click("#vary-go")
        page.get_by_text(re.compile("currently busy|[Qq]ueue is full")).first.wait_for()
        for one in crowd:
            stream = one.messages()
            next(stream)
            stream.close()  # type: ignore[attr-defined]
        until(lambda: job.wait(0), "who left waits no more")
    assert job.done == 0


def test_a_password_is_asked_for() -> None:
    with opened_page(Options(port=free_port(), password=PASSWORD)) as page:
        client = Client(page.url)
        assert client.http.get("/config").status_code == 401
        assert client.http.post("/gradio_api/upload", files={"files": b"x"}).status_code == 401
        wrong = {"username": "ipdiverse", "password": "incorrect"}
        codes = [client.http.post("/login", data=wrong).status_code for _ in range(10)]
        assert codes == [400] * 10
        right = {"username": "ipdiverse", "password": PASSWORD}
        assert client.http.post("/login", data=right).status_code == 429
        other = opened_page(Options(port=free_port(), password=PASSWORD))
        with other as fresh:
            client = Client(fresh.url)
            assert client.http.post("/login", data=right).status_code == 200
            assert client.http.get("/config").status_code == 200


def test_a_taken_port_is_one_line(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    port = served.url.rstrip("/").rpartition(":")[2]
    assert main(["ui", "--port", port]) == 2
    error = capsys.readouterr().err
    assert f"127.0.0.1:{port}: cannot be listened on" in error
    assert error.count("\n") == 1


_LIVE = """() => {
  const live = document.querySelector('#vary-status [role=status][aria-live=polite]');
  return window.live === undefined ? live : live === window.live && live !== null;
}"""
_NAMELESS = """() => [...document.querySelectorAll('button, input, textarea, select, img, iframe')]
  .filter(e => e.offsetParent !== null && e.type !== 'file')
  .filter(e => !(e.labels?.length || e.getAttribute('aria-label') || e.alt || e.title
                 || e.innerText?.trim() || e.getAttribute('aria-labelledby')))
  .map(e => e.outerHTML.slice(0, 200))"""


def test_hands_and_eyes_are_not_needed(visit: Callable[..., Page]) -> None:
    page = visit()
    page.locator("#vary-examples .thumbnail-item").first.focus()
    page.keyboard.press("Enter")
    says(page, "#vary-references-told", "Reference: critter-1.png.")
    page.evaluate(f"() => {{ window.live = ({_LIVE})() }}")
    page.locator("#vary-prompt textarea").focus()
    page.keyboard.type("a critter")
    inside = "() => document.activeElement.closest('[id^=vary-]')?.id"
    order = []
    for _ in range(10):
        page.keyboard.press("Tab")
        order.append(page.evaluate(inside))
        if order[-1] == "vary-go":
            break
    steps = list(dict.fromkeys(filter(None, order)))
    assert steps == ["vary-diversity", "vary-count", "vary-seed", "vary-keep", "vary-go"]
    page.get_by_role("button", name="Advanced").click()
    set_number(page, "#vary-count", 1)
    set_number(page, "#vary-steps", 1)
    page.locator("#vary-go").focus()
    page.keyboard.press("Enter")
    says(page, "#vary-status", "Done: 1 image.")
    assert page.evaluate(_LIVE), "the same element throughout, or nothing would be read aloud"
    assert page.evaluate("() => document.documentElement.lang") == "en"
    assert page.evaluate(_NAMELESS) == []
    alt = page.locator("#vary-images .thumbnail-item img").first.get_attribute("alt") or ""
    assert re.match(r"1: .*(critter|another|the reference)", alt)
    assert "common." not in page.inner_text("body"), "an untranslated word of gradio's"


_COVERED = """() => {
  const seen = e => e.checkVisibility() && e.getBoundingClientRect();
  const meet = (a, b) => a && b && a.left < b.right - 1 && b.left < a.right - 1
    && a.top < b.bottom - 1 && b.top < a.bottom - 1;
  return [...document.querySelectorAll('[data-testid=block-label]')].flatMap(label =>
    [...label.closest('.block').querySelectorAll('button, a')].filter(
      button => !/drop files/.test(button.ariaLabel)  // all of the block
      && meet(seen(label), seen(button))).map(
      button => `${label.innerText} under ${button.getAttribute('aria-label')}`));
}"""


def heard(page: Page) -> list[tuple[str, str]]:
    """Role and name of all that a screen reader finds."""
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")
    told = [node for node in tree["nodes"] if not node["ignored"]]
    return [(one["role"]["value"], one.get("name", {}).get("value", "")) for one in told]


_SPOKEN = {"button", "checkbox", "combobox", "image", "link", "slider", "spinbutton", "tab"}
_SPOKEN |= {"textbox", "listbox", "radio", "Iframe"}


PLACES = ("limits", "upload", "progress", "images")
_BLANK = """() => {
  const bottom = within => document.querySelector(`#vary-examples ${within}`)
    .getBoundingClientRect().bottom;
  return bottom('.gallery-container') - bottom('.thumbnail-item');
}"""


@pytest.mark.parametrize("width", [390, 768, 1366, 2560])
def test_every_width_in_light_and_dark(visit: Callable[..., Page], width: int) -> None:
    page = visit(width=width)
    assert page.inner_text("#vary-images [data-testid=block-label]").strip() == "Images"
    assert page.evaluate(_BLANK) < 20, "no empty space below the examples"
    at = {name: page.locator(f"#vary-{name}").bounding_box() or {} for name in PLACES}
    assert at["limits"]["y"] < at["upload"]["y"], "what the base can draw is told at the top"
    assert at["progress"]["y"] < at["images"]["y"], "the status is above the images"
    assert at["images"]["height"] < 150, "an empty box takes little room"
    take_example(page)
    page.get_by_role("button", name="Scenes of your own").click()
    configure(page, "a critter in the snow", steps=25 if SHOOTS else 1, count=2)
    page.click("#vary-go")
    says(page, "#vary-status", "Done: 2 images.")
    image = page.locator("#vary-images .thumbnail-item img").first
    crisp = "image => [image.width, getComputedStyle(image).imageRendering]"
    wide, rendering = image.evaluate(crisp)
    assert wide >= 128, "64 pixels are shown large"
    assert rendering == "pixelated"
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        for tab in ("Vary", "Grid", "Reports"):
            page.get_by_role("tab", name=tab).click()
            assert page.evaluate("() => document.documentElement.scrollWidth") <= width
            assert page.evaluate(_COVERED) == []
            spoken = heard(page)
            assert [role for role, name in spoken if role in _SPOKEN and not name] == []
            assert [name for _, name in spoken if "common." in name] == []


def test_narrow_screens_do_not_scroll_sideways(visit: Callable[..., Page]) -> None:
    page = visit(width=390, height=844)
    take_example(page)
    configure(page, "a critter in the snow", steps=25 if SHOOTS else 1, count=4)
    if SHOOTS:
        page.get_by_role("button", name="Advanced").click()
    page.click("#vary-go")
    says(page, "#vary-status", "Done: 4 images.")
    page.wait_for_timeout(300)
    top = "() => document.querySelector('#vary-images').getBoundingClientRect().top"
    until(lambda: page.evaluate(top) < 844, "the images come into view")
    picture(page, "narrow")
    for tab in ("Vary", "Grid", "Reports"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 390


def titles(page: Page, *elements: str) -> list[str]:
    return [
        page.inner_text(f"#{element} [data-testid=block-label]").strip() for element in elements
    ]


def test_the_same_seeds_beside_stars_earlier_sets_and_new_references(
    visit: Callable[..., Page], tmp_path: Path
) -> None:
    page = visit(width=1366)
    take_example(page, number=3)
    configure(page, "a critter", steps=25 if SHOOTS else 1, count=4 if SHOOTS else 2)
    page.click("#vary-go")
    says(page, "#vary-status", "Done:")
    seed = page.input_value("#vary-seed input")
    assert f"Seed {seed}." in page.inner_text("#vary-status")
    first = shown_images(page)
    set_number(page, "#vary-other", 0)
    page.click("#vary-again")
    says(page, "#vary-images", "Diversity 0, seed")
    says(page, "#vary-status", "Done:")
    compared = ["Diversity 0.5, seed " + seed, "Diversity 0, seed " + seed]
    assert titles(page, "vary-compared", "vary-images") == compared
    assert not any(map(np.array_equal, first, shown_images(page)))
    page.locator("#vary-images .thumbnail-item").nth(1).click()
    says(page, "#vary-star", "Star image 2")
    page.keyboard.press("Escape")
    page.click("#vary-star")
    says(page, "#vary-starred", "Download the 1 starred")
    if SHOOTS:
        picture(page, "beside")
    starred = downloaded(page, tmp_path, button="starred")
    assert [file.name for file in (starred / "out").iterdir()] == ["0001.png"]
    page.click("#vary-use")
    says(page, "#vary-references-told", f"Reference: seed-{seed}-image-2.png.")
    page.click("#vary-go")
    says(page, "#vary-images", "Diversity 0.5, seed")
    says(page, "#vary-status", "Done:")
    assert page.input_value("#vary-seed input") != seed, "new unless it is kept"
    assert not page.locator("#vary-compared").is_visible()
    assert page.locator("#vary-earlier .thumbnail-item").count() == 2
    page.locator("#vary-earlier .thumbnail-item").nth(1).click()
    says(page, "#vary-compared", f"Diversity 0.5, seed {seed}")
    kept = page.input_value("#vary-seed input")
    page.get_by_label("Keep this seed").locator("visible=true").check()
    page.click("#vary-go")
    says(page, "#vary-status", "Drawing")
    says(page, "#vary-status", "Done:")
    assert page.input_value("#vary-seed input") == kept


def test_every_image_is_told_of_and_can_be_repeated(visit: Callable[..., Page]) -> None:
    page = visit()
    take_example(page, number=2)
    count = 8 if SHOOTS else 2
    configure(page, "a critter in the snow", steps=25 if SHOOTS else 1, count=count)
    page.get_by_role("button", name="Advanced").click()
    page.click("#vary-go")
    says(page, "#vary-status", f"Done: {count} images.")
    captions = page.locator("#vary-images .caption-label").all_inner_texts()
    assert [caption.partition(":")[0] for caption in captions] == [
        str(number + 1) for number in range(count)
    ]
    assert page.locator("#vary-report svg circle").count() == count, "a dot for each"
    page.get_by_role("button", name="How to repeat this").click()
    says(page, "#vary-command", f"--n={count}")
    says(page, "#vary-python", "result = ipdiverse.generate(")
    picture(page, "vary")


@pytest.mark.slow
def test_the_report_of_a_study_is_shown_whole(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    size = "pairs = 6\nimages = 4\nsteps = 8" if SHOOTS else "pairs = 2\nimages = 2\nsteps = 1"
    Path("study.toml").write_text(f"{size}\n{STUDY}")
    assert main(["evaluate", "--config=study.toml", "--out=out/study"]) == 0
    with opened_page(Options(port=free_port(), reports=("out",))) as served:
        page = browser.new_page(viewport={"width": 1280, "height": 1100})
        page.goto(served.url)
        page.wait_for_selector("#vary-go")
        page.get_by_role("tab", name="Reports").click()
        page.locator("#reports-chosen input").click()
        page.get_by_role("option", name="out/study").click()
        frame = page.frame_locator("#reports-shown iframe")
        frame.locator("h1").wait_for()
        until(lambda: widths(frame) and all(widths(frame)), "the report's pictures")
        if SHOOTS:  # the part in view: a picture of the whole page would empty the frame
            page.screenshot(path=str(PICTURES / "ui-reports.png"))
        page.close()


@pytest.mark.slow
def test_the_command_ends_cleanly(tmp_path: Path) -> None:
    import signal

    words = [sys.executable, "-m", "ipdiverse", "ui", "--port", str(free_port())]
    env = os.environ | {"TMPDIR": str(tmp_path)}
    started = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env)
    assert started.stdout is not None
    line = started.stdout.readline()
    assert line.startswith("open http://127.0.0.1:")
    assert list(tmp_path.glob("ipdiverse-ui-*"))
    started.send_signal(signal.SIGTERM)
    assert started.wait(PATIENCE) == 0
    assert not list(tmp_path.glob("ipdiverse-ui-*")), "the cache is gone"
