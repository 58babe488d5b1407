"""A run's folder: what landed stays, what others wrote stays, and the same run goes on."""

from __future__ import annotations

import importlib.metadata
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ipdiverse.errors import Interrupted, OutputError
from ipdiverse.provenance import read_provenance
from ipdiverse.sampling import draw
from ipdiverse.sampling.draw import Generation, draw_into
from ipdiverse.sampling.request import Request
from ipdiverse.sampling.saving import fingerprint, open_run, versions
from ipdiverse.writing import only_one
from tests import models

SEEN = "0000.png", "0001.png", "contact_sheet.png", "generation.json"


def made(prompt: str = "in the snow", n: int = 2) -> Generation:
    images = [models.picture(number) for number in range(n)]
    request = Request(image=("a.png",), prompt=(prompt,), n=n)
    return Generation(request, [models.picture(9)], images, [], list(range(n)))


def contents(folder: Path) -> dict[str, bytes]:
    """Visible files of a folder."""
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.name[0] != "."}


def test_a_second_run_leaves_the_first_alone(tmp_path: Path) -> None:
    first = made().save(tmp_path / "out")
    before = contents(tmp_path / "out")
    assert tuple(before) == SEEN
    with pytest.warns(UserWarning, match="out holds something else: saved in .*out-2"):
        second = made("on the moon").save(tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert (first["out"], second["out"]) == (str(tmp_path / "out"), str(tmp_path / "out-2"))
    assert tuple(contents(tmp_path / "out-2")) == SEEN
    with pytest.warns(UserWarning, match="out-3"):
        made("at the beach").save(tmp_path / "out")


def test_the_same_run_is_where_it_is_and_is_not_written_again(tmp_path: Path) -> None:
    made().save(tmp_path)
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in SEEN}
    made().save(tmp_path)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in SEEN} == before


@pytest.mark.parametrize("name", SEEN)
def test_files_of_others_stay_and_the_run_goes_elsewhere(name: str, tmp_path: Path) -> None:
    album = tmp_path / "album"
    album.mkdir()
    models.picture(5).save(album / "picture.png")
    (album / "picture.png").rename(album / name)
    (album / "1984.png").write_bytes(b"mine")
    before = contents(album)
    with pytest.warns(UserWarning, match="album-2"):
        made().save(album)
    assert contents(album) == before
    with pytest.raises(OutputError, match=f"{name}: is there already"):
        made().save(album, overwrite=True)
    assert contents(album) == before


def test_a_folder_of_other_files_is_added_to(tmp_path: Path) -> None:
    (tmp_path / "0042.png").write_bytes(b"mine")
    made().save(tmp_path)
    assert tuple(contents(tmp_path)) == (*SEEN[:2], "0042.png", *SEEN[2:])


def test_overwrite_replaces_the_run_that_is_there_and_nothing_else(tmp_path: Path) -> None:
    made(n=3).save(tmp_path)
    (tmp_path / "0042.png").write_bytes(b"mine")
    made("on the moon").save(tmp_path, overwrite=True)
    assert tuple(contents(tmp_path)) == (*SEEN[:2], "0042.png", *SEEN[2:])
    assert read_provenance(tmp_path / "0000.png")["prompt"] == "on the moon"


def test_a_picture_of_the_run_that_the_user_changed_is_the_users(tmp_path: Path) -> None:
    made().save(tmp_path)
    with Image.open(tmp_path / "0001.png") as image:
        image.load()
    image.putpixel((0, 0), (1, 2, 3))
    image.save(tmp_path / "0001.png")
    before = contents(tmp_path)
    with pytest.raises(OutputError, match=r"0001\.png: is there already"):
        made("on the moon").save(tmp_path, overwrite=True)
    with pytest.warns(UserWarning, match="holds something else"):
        made().save(tmp_path)
    assert contents(tmp_path) == before


def test_a_run_does_not_replace_what_it_reads(tmp_path: Path) -> None:
    made().save(tmp_path)
    reads = str(tmp_path / "x" / ".." / "0001.png")
    (tmp_path / "x").mkdir()
    other = made("on the moon")
    other = replace(other, request=replace(other.request, image=(reads,)))
    with pytest.raises(OutputError, match="is read by the run that would replace it"):
        other.save(tmp_path, overwrite=True)


def test_a_record_that_names_files_elsewhere_deletes_nothing(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"mine")
    out = tmp_path / "out"
    out.mkdir()
    record = {"run": "x", "files": ["../secret.png", str(tmp_path / "secret.png")]}
    (out / "generation.json").write_text(json.dumps(record))
    made().save(out, overwrite=True)
    assert (tmp_path / "secret.png").read_bytes() == b"mine"


def test_the_folder_one_stands_in_gets_no_neighbour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made().save(".")
    with pytest.raises(OutputError, match="holds another run"):
        made("on the moon").save(".")
    assert tuple(contents(tmp_path)) == SEEN


def test_the_second_process_in_a_folder_is_refused(tmp_path: Path) -> None:
    with only_one(tmp_path), pytest.raises(OutputError, match="another process is at work"):
        made().save(tmp_path)


def test_what_an_interrupted_write_left_goes(tmp_path: Path) -> None:
    left = tmp_path / f".{'0' * 32}.tmp"
    left.write_bytes(b"half")
    made().save(tmp_path)
    assert not left.exists()


def test_requests_that_differ_in_spelling_alone_are_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    models.picture(1).save("a.png")
    models.picture(2).save("b.png")
    one = fingerprint(Request(image=("a.png",)))
    assert fingerprint(Request(image=(str(tmp_path / "a.png"),))) == one
    assert fingerprint(Request(image=("./a.png",))) == one
    others = [{"image": ("b.png",)}, {"image": ("a.png",), "seed": 1}]
    assert one not in [fingerprint(Request.of(other)) for other in others]
    models.picture(3).save("a.png")
    assert fingerprint(Request(image=("a.png",))) != one


class Stub:
    """What `drawing` yields, with pictures in place of a model's."""

    def __init__(self, request: Request, stops: int, error: BaseException) -> None:
        self.made, self.stops, self.error = made(n=request.n), stops, error
        self.drawn: list[int] = []

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def record(self, out: str) -> dict[str, Any]:
        return replace(self.made, images=[]).record(out)

    def images(self, skip: set[int]) -> Any:
        for number, image in enumerate(self.made.images):
            if len(self.drawn) == self.stops:
                raise self.error
            if number not in skip:
                self.drawn.append(number)
                yield number, image

    def finished(self, images: list[Image.Image]) -> Generation:
        return replace(self.made, images=images)


@pytest.mark.parametrize(
    ("error", "seen"), [(KeyboardInterrupt(), Interrupted), (OSError("disk"), OSError)]
)
def test_what_is_finished_stays_and_the_same_command_goes_on(
    error: BaseException, seen: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.picture(1).save(tmp_path / "a.png")
    request = Request(image=(str(tmp_path / "a.png"),), n=4)
    stub, told = Stub(request, 3, error), list[str]()
    monkeypatch.setattr(draw, "drawing", lambda *_, **__: stub)
    out = tmp_path / "out"
    with pytest.raises(seen) as caught:
        draw_into(out, request, tell=told.append)
    assert getattr(caught.value, "number", signal.SIGINT) == signal.SIGINT
    assert told == [f"3 of 4 images are in {out}"]
    assert [*contents(out)] == ["0000.png", "0001.png", "0002.png", "generation.json"]
    assert json.loads((out / "generation.json").read_text())["files"] == [*contents(out)]
    stub.stops, stub.drawn = 99, []
    record = draw_into(out, request, tell=told.append)
    assert (stub.drawn, told[1:]) == ([3], [f"3 of 4 images are in {out} already"])
    monkeypatch.setattr(draw, "drawing", lambda *_, **__: pytest.fail("is complete"))
    assert draw_into(out, request) == json.loads(json.dumps(record))
    resumed = contents(out)

    for file in out.iterdir():
        file.unlink()
    monkeypatch.setattr(draw, "drawing", lambda *_, **__: Stub(request, 99, error))
    draw_into(out, request)
    assert contents(out) == resumed, "byte for byte"


def test_a_run_that_fails_before_its_first_image_holds_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.picture(1).save(tmp_path / "a.png")
    request = Request(image=(str(tmp_path / "a.png"),), n=4)
    monkeypatch.setattr(draw, "drawing", lambda *_, **__: Stub(request, 0, OSError("no")))
    with pytest.raises(OSError, match="no"):
        draw_into(tmp_path / "out", request)
    assert not contents(tmp_path / "out")


def test_candidates_that_were_chosen_are_known_to_the_next_call(tmp_path: Path) -> None:
    with open_run(tmp_path, "x", 2) as run:
        assert run.indices is None
        run.begin({"image_indices": [3, 5]})
        run.add(0, models.picture(0))
    with open_run(tmp_path, "x", 2) as again:
        assert (again.indices, [*again.images]) == ([3, 5], [0])


def test_a_warm_request_reads_no_versions_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsing what pip wrote took 4 % of a warm image of critters."""
    asked: list[str] = []
    known = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: asked.append(name) or known(name)
    )
    versions.cache_clear()
    for seed in range(3):
        fingerprint(Request(image=("a.png",), prompt=("a",), seed=seed))
    assert sorted(asked) == ["diffusers", "ipdiverse", "torch", "transformers"]
