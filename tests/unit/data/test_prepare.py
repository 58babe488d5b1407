"""From a source to a folder to train on: what is good, what is not, and going on."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from ipdiverse.cli import main
from ipdiverse.data import prepare as module
from ipdiverse.data.manifest import read_manifest
from ipdiverse.data.prepare import PrepareOptions, prepare, to_square
from ipdiverse.errors import DataError
from ipdiverse.image_io import content_hash, load_image

PHOTOS = Path(__file__).parents[4] / "shared" / "photos"


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def subjects(tmp_path: Path) -> Path:
    """Two dogs (one twice as another file), a cat, a file that is no image, and one cut off."""
    root = tmp_path / "subjects"
    for subject, count in (("dog", 2), ("cat", 1)):
        (root / subject).mkdir(parents=True)
        for index in range(count):
            picture(10 * len(subject) + index + ord(subject[0])).save(
                root / subject / f"{index}.png"
            )
    picture(10 * 3 + ord("d")).save(root / "dog" / "copy.png", compress_level=1)
    (root / "dog" / "text.jpg").write_text("not an image")
    whole = io.BytesIO()
    picture(5).save(whole, "JPEG")
    (root / "dog" / "cut.jpg").write_bytes(whole.getvalue()[:400])
    return root


def options(**changes: Any) -> PrepareOptions:
    return PrepareOptions(**{"max_bad": 1.0, **changes})


def test_good_images_are_stored_and_bad_ones_listed_with_reasons(
    subjects: Path, tmp_path: Path
) -> None:
    report = prepare(str(subjects), tmp_path / "out", options())
    records = read_manifest(tmp_path / "out")
    assert [r.source for r in records] == ["cat/0.png", "dog/0.png", "dog/1.png", "dog/copy.png"]
    for record in records:
        image = load_image(tmp_path / "out" / record.file_name)
        assert (image.width, image.height) == (record.width, record.height) == (40, 30)
        assert content_hash(image) == record.sha256
        assert record.text == f"a photo of a {record.subject}"
    listed = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").open()]
    assert [line["source"] for line in listed] == ["dog/cut.jpg", "dog/text.jpg"]
    assert "truncated or corrupt" in listed[0]["reason"]
    assert "not an image of an accepted format" in listed[1]["reason"]
    assert report["images"] == 4
    assert report["bad"]["count"] == 2
    assert report["duplicates"] == {"images": 1, "examples": [["dog/0.png", "dog/copy.png"]]}
    assert report["subjects"] == {"count": 2, "single": 1, "without": 0, "largest": 3}
    assert "Subjects with one image, which cannot be paired: 1." in report["advice"]
    assert report["notes"][0].startswith("Captions are made from names of folders")
    assert "as 'a photo of a cat' for 'cat/0.png'" in report["notes"][0]


def test_a_format_that_few_tools_read_is_stored_as_png(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for index, kind in enumerate(("BMP", "TIFF", "GIF")):  # told by their content
        picture(index).save(tmp_path / "in" / f"{index}.jpg", kind)
    prepare(str(tmp_path / "in"), tmp_path / "out", options())
    names = [record.file_name for record in read_manifest(tmp_path / "out")]
    assert {Path(name).suffix for name in names} == {".png"}
    assert load_image(tmp_path / "out" / names[0]).size == (40, 30)


@pytest.mark.parametrize("name", ["a.bmp", "a.TIF", "a.gif", "a.jfif", "a.avif"])
def test_pictures_of_every_format_that_is_read_are_found(name: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    kind = {".TIF": "TIFF", ".jfif": "JPEG"}.get(Path(name).suffix, name[2:].upper())
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this build of Pillow does not read AVIF")
    picture(1).save(tmp_path / "in" / name, kind)
    report = prepare(str(tmp_path / "in"), tmp_path / "out", options())
    assert (report["images"], report["bad"]["count"], report["unused"]) == (1, 0, {})


def test_datasets_opens_a_prepared_folder(subjects: Path, tmp_path: Path) -> None:
    import datasets

    prepare(str(subjects), tmp_path / "out", options())
    opened = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "c")
    )
    assert opened["text"][0] == "a photo of a cat"
    assert opened["image"][0].size == (40, 30)


def test_too_many_bad_images_stop_the_command(subjects: Path, tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"at most 1 of 6 \(--max-bad 0.2\); found 2 of 6 \(dog/cut.*--max-bad 0\.34",
    ):
        prepare(str(subjects), tmp_path / "out", options(max_bad=0.2))
    assert not (tmp_path / "out" / "metadata.jsonl").exists()
    report = prepare(str(subjects), tmp_path / "out", options(max_bad=0.5))
    assert report["images"] == 4, "with a higher share the same folder goes on"


def test_nothing_usable_says_why(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_text("no")
    with pytest.raises(DataError, match=r"holds no usable image; found a\.png: .*not an image"):
        prepare(str(tmp_path / "in"), tmp_path / "out", options())


def test_an_interrupted_run_goes_on_without_reading_again(
    subjects: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(str(subjects), tmp_path / "whole", options())
    monkeypatch.setattr(module, "_CHUNK", 2)
    taken: list[str] = []
    look = module._look

    def stops(item: Any, *rest: Any) -> Any:
        if len(taken) == 4:
            raise KeyboardInterrupt
        taken.append(item.name)
        return look(item, *rest)

    monkeypatch.setattr(module, "_look", stops)
    with pytest.raises(KeyboardInterrupt):
        prepare(str(subjects), tmp_path / "out", options())
    journal = tmp_path / "out" / module.JOURNAL
    journal.write_text(journal.read_text() + '{"source": "cut o')
    again: list[str] = []
    monkeypatch.setattr(
        module, "_look", lambda item, *rest: (again.append(item.name), look(item, *rest))[1]
    )
    report = prepare(str(subjects), tmp_path / "out", options())
    assert not set(again) & set(taken)
    assert len(again) + len(taken) == 6
    assert report == whole
    manifests = [(tmp_path / name / "metadata.jsonl").read_text() for name in ("whole", "out")]
    assert manifests[0] == manifests[1]
    assert prepare(str(subjects), tmp_path / "out", options()) == whole, "finished: nothing to do"
    assert len(again) == 2


def test_a_folder_of_something_else_is_not_mixed_with(subjects: Path, tmp_path: Path) -> None:
    prepare(str(subjects), tmp_path / "out", options())
    with pytest.raises(DataError, match=r"prepared from something else; expected square 'keep'"):
        prepare(str(subjects), tmp_path / "out", options(square="pad"))


def test_a_path_out_of_the_root_is_quarantined(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "secret.png")
    (tmp_path / "in").mkdir()
    picture(2).save(tmp_path / "in" / "a.png")
    rows = [{"file_name": name, "text": "x"} for name in ("a.png", "../secret.png")]
    (tmp_path / "in" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = prepare(str(tmp_path / "in"), tmp_path / "out", options())
    assert report["images"] == 1
    assert "leaves its root" in report["bad"]["examples"][0]["reason"]


def test_references_are_stored_beside(tmp_path: Path) -> None:
    report = prepare("critters", tmp_path / "out", options(n=5))
    records = read_manifest(tmp_path / "out")
    assert report["references"] == 5
    for record in records:
        assert record.reference is not None
        reference = load_image(tmp_path / "out" / record.reference)
        assert reference.size == (64, 64)
        assert content_hash(reference) != record.sha256
    assert report["advice"] == [] or all("with one image" in line for line in report["advice"])


def test_square_pads_without_cutting_and_crops_the_centre(tmp_path: Path) -> None:
    image = picture(1, (40, 20))
    padded, cropped = to_square(image, "pad"), to_square(image, "crop")
    assert padded.size == (40, 40)
    np.testing.assert_array_equal(np.asarray(padded)[10:30], np.asarray(image))
    np.testing.assert_array_equal(np.asarray(cropped), np.asarray(image)[:, 10:30])
    assert to_square(image, "keep") is image
    assert to_square(picture(1, (20, 20)), "pad").size == (20, 20)
    (tmp_path / "in").mkdir()
    image.save(tmp_path / "in" / "wide.png")
    prepare(str(tmp_path / "in"), tmp_path / "out", options(square="pad"))
    (record,) = read_manifest(tmp_path / "out")
    assert (record.width, record.height) == (40, 40)
    stored = np.asarray(load_image(tmp_path / "out" / record.file_name))
    np.testing.assert_array_equal(stored, np.asarray(padded))


def test_the_command_prints_the_report(
    subjects: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["prepare", str(subjects), "--out", out, "--max-bad", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert "4 images, 2 bad, 1 duplicates" in printed
    assert "bad: dog/cut.jpg: " in printed
    assert main(["prepare", str(subjects), "--out", out, "--max-bad", "0.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "subjects"
    assert main(["prepare", str(tmp_path / "no"), "--out", out]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error == [line for line in error if "does not exist" in line]
    assert len(error) == 1


def folder(root: Path, *names: str) -> Path:
    for index, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(index).save(root / name)
    return root


def texts(out: Path) -> dict[str, str]:
    return {record.source: record.text for record in read_manifest(out)}


def test_what_changed_in_the_source_is_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = folder(tmp_path / "s", "a.png", "b.png", "c.png", "d.png"), tmp_path / "out"
    whole = (source / "b.png").read_bytes()
    (source / "b.png").write_bytes(whole[:300])
    (source / "a.txt").write_text("old")
    assert prepare(str(source), out, options())["bad"]["count"] == 1
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    looked: list[str] = []
    look = module._look
    monkeypatch.setattr(
        module, "_look", lambda item, *rest: (looked.append(item.name), look(item, *rest))[1]
    )
    prepare(str(source), out, options())
    assert looked == []
    assert files == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (source / "a.txt").write_text("new")
    (source / "b.png").write_bytes(whole)
    (source / "c.png").unlink()
    (source / "d.png").touch()
    for seed, name in ((90, "0.png"), (91, "e.png")):
        picture(seed).save(source / name)
    assert prepare(str(source), out, options())["bad"]["count"] == 0
    assert texts(out) == {"0.png": "", "a.png": "new", "b.png": "", "d.png": "", "e.png": ""}
    assert sorted(looked) == ["0.png", "b.png", "d.png", "e.png"]
    monkeypatch.undo()
    prepare(str(source), tmp_path / "fresh", options())
    images = [
        sorted(p.name for p in (d / "images").rglob("*.*")) for d in (out, tmp_path / "fresh")
    ]
    assert images[0] == images[1], "what no record names is gone"


def test_a_harmed_journal_or_a_lost_image_is_made_again(tmp_path: Path) -> None:
    source, out = folder(tmp_path / "s", "a.png", "b.png"), tmp_path / "out"
    prepare(str(source), out, options())
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    journal = out / module.JOURNAL
    journal.write_text(journal.read_text().replace('"width": 40', '"width": 41', 1))
    next((out / "images").rglob("*.png")).unlink()
    prepare(str(source), out, options())
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_a_manifest_that_was_edited_is_never_overwritten(tmp_path: Path) -> None:
    source, out = folder(tmp_path / "s", "a.png"), tmp_path / "out"
    prepare(str(source), out, options())
    manifest = out / "metadata.jsonl"
    manifest.write_text(manifest.read_text().replace('"text": ""', '"text": "mine"'))
    with pytest.raises(DataError, match=r"is damaged.*If you edited it, say --keep-edits, or move"):
        prepare(str(source), out, options())
    kept = prepare(str(source), out, options(keep_edits=True))
    assert "was edited" in kept["notes"][0]
    assert texts(out) == {"a.png": "mine"}
    assert prepare(str(source), out, options()) == kept, "said once"
    (source / "a.txt").write_text("theirs")
    with pytest.raises(DataError, match="was edited after prepare wrote it"):
        prepare(str(source), out, options())
    assert texts(out) == {"a.png": "mine"}


def test_the_same_place_spelled_otherwise_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(tmp_path / "s", "a.png")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("s")
    reports = [
        prepare(spelled, Path(out), options())
        for spelled, out in (("s", "d"), ("s/", "./d"), ("./s", "d/"), (str(tmp_path / "s"), "d"))
    ]
    assert prepare("link", tmp_path / "d", options()) == reports[0]
    assert reports.count(reports[0]) == len(reports)
    (tmp_path / "s").rename(tmp_path / "moved")
    assert prepare("moved", Path("d"), options())["images"] == 1
    folder(tmp_path / "other", "0.png", "a.png")
    with pytest.raises(DataError, match="prepared from something else; expected source"):
        prepare("other", Path("d"), options())


def test_no_whole_path_of_this_machine_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = folder(tmp_path / "s", "a.png"), tmp_path / "out"
    # as where a source and its target share no folder but the root
    monkeypatch.setattr("os.path.commonpath", lambda _: tmp_path.anchor)
    report = prepare(str(source), out, options())
    assert re.fullmatch(r"s \([0-9a-f]{12}\)", report["source"])
    assert tmp_path.name not in (out / "prepare.json").read_text()
    assert prepare(f"{source}/", out, options()) == report
    with pytest.raises(DataError, match="prepared from something else; expected source"):
        prepare(str(folder(tmp_path / "other", "0.png")), out, options())


def test_a_list_that_is_added_and_an_encoding_that_is_named_are_taken_up(tmp_path: Path) -> None:
    source, out = folder(tmp_path / "s", "a.png", "b.png"), tmp_path / "out"
    prepare(str(source), out, options())
    (source / "metadata.csv").write_text("file_name,text\na.png,one\n")
    assert prepare(str(source), out, options())["kind"] == "metadata"
    assert texts(out) == {"a.png#2": "one"}
    other, target = folder(tmp_path / "t", "a.png", "b.png"), tmp_path / "target"
    for name in ("a.txt", "b.txt"):
        (other / name).write_bytes(b"gr\xfcn")
    with pytest.raises(DataError, match=r"no usable image; .*--encoding"):
        prepare(str(other), target, options())
    prepare(str(other), target, options(encoding="cp1252", square="crop"))
    assert texts(target) == {"a.png": "gr\u00fcn", "b.png": "gr\u00fcn"}
    assert {record.width for record in read_manifest(target)} == {30}


def test_folders_of_somebody_else_are_left_alone(tmp_path: Path) -> None:
    source = folder(tmp_path / "s", "a.png")
    for name in ("metadata.jsonl", "images/mine.png", "report.json"):
        home = tmp_path / name.replace("/", "-")
        (home / name).parent.mkdir(parents=True)
        (home / name).write_text("mine")
        with pytest.raises(DataError, match="holds files that prepare did not write; found"):
            prepare(str(source), home, options())
        assert [p.name for p in home.rglob("*") if p.is_file()] == [Path(name).name]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "prepare.json").write_text("[]")
    with pytest.raises(DataError, match=r"prepare\.json: was not written by prepare"):
        prepare(str(source), tmp_path / "other", options())
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "notes.txt").write_text("mine")
    prepare(str(source), tmp_path / "kept", options())
    assert (tmp_path / "kept" / "notes.txt").read_text() == "mine"


def test_a_target_in_the_source_is_not_read_as_source(tmp_path: Path) -> None:
    source = folder(tmp_path / "s", "a.png")
    for _ in range(2):
        assert prepare(str(source), source / "out", options())["images"] == 1
    for out in (source, tmp_path / "s/.."):
        inner = folder(tmp_path / "images" / "x", "b.png") if out != source else source
        with pytest.raises(DataError, match="lies in the source"):
            prepare(str(inner), out, options())
    assert sorted(p.name for p in source.iterdir()) == ["a.png", "out"]


def test_repeats_of_a_folder_of_kohya_count_in_an_epoch(tmp_path: Path) -> None:
    from ipdiverse.training.build import _trained
    from ipdiverse.training.config import TrainConfig

    prepare(str(folder(tmp_path / "s", "3_dog/a.png", "cat/b.png")), tmp_path / "d", options())
    records = read_manifest(tmp_path / "d")
    assert [(record.subject, record.repeats) for record in records] == [("dog", 3), ("cat", 1)]
    assert _trained(TrainConfig(data="d", out="o"), records) == [0, 0, 0, 1]


@pytest.mark.parametrize(("max_bad", "goes_on"), [(0.05, True), (0.0, False)])
def test_one_bad_image_among_few_does_not_stop(
    max_bad: float, goes_on: bool, tmp_path: Path
) -> None:
    source = folder(tmp_path / "s", "a.png", "b.png")
    (source / "c.png").write_text("no")
    if goes_on:
        assert prepare(str(source), tmp_path / "out", options(max_bad=max_bad))["images"] == 2
    else:
        with pytest.raises(DataError, match=r"at most 0 of 3.*found 1 of 3.*--max-bad 0\.34"):
            prepare(str(source), tmp_path / "out", options(max_bad=max_bad))


@pytest.mark.parametrize("harm", ["\0", "\ufffd", chr(0xD800)])
def test_harmed_text_does_not_go_into_training(harm: str, tmp_path: Path) -> None:
    folder(tmp_path / "s", "a.png", "b.png")
    rows = [{"file_name": "a.png", "text": "a"}, {"file_name": "b.png", "text": f"x{harm}y"}]
    (tmp_path / "s" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = prepare(str(tmp_path / "s"), tmp_path / "out", options())
    assert "its caption has characters that were lost" in report["bad"]["examples"][0]["reason"]
    assert texts(tmp_path / "out") == {"a.png#1": "a"}


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the shared photos are not beside the repository")
def test_real_photos_of_subjects(tmp_path: Path) -> None:
    report = prepare(str(PHOTOS), tmp_path / "out", PrepareOptions())
    assert report["images"] == 103
    assert report["subjects"]["count"] == 20
    assert report["subjects"]["single"] == 0
    assert report["bad"]["count"] == 0
    texts = {record.text for record in read_manifest(tmp_path / "out")}
    assert "a photo of a stuffed animal" in texts, "the class, not the name of the folder"


def test_help_stays_light() -> None:
    import subprocess

    code = (
        "import sys; sys.argv = ['ipdiverse', '--help']\n"
        "from ipdiverse.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'PIL.Image', 'datasets', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip().splitlines()[-1] == "[]"
