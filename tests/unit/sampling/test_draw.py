"""From a request to its images: in which order, and nothing twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ipdiverse.errors import ArgumentError, ImageError
from ipdiverse.image_io import load_image
from ipdiverse.sampling import draw, task
from ipdiverse.sampling.draw import Generation, draw_into, drawing
from ipdiverse.sampling.request import Request
from tests import models


class RefusedError(Exception):
    pass


def drawn(request: Request) -> Generation:
    with drawing(request) as work:
        return work.finished([image for _, image in work.images()])


@pytest.fixture
def picture(tmp_path: Path) -> str:
    models.picture(1).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def test_a_picture_is_decoded_once_wherever_it_is_used(
    picture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Path] = []

    def counted(file: Path) -> Any:
        decoded.append(file)
        return load_image(file)

    monkeypatch.setattr(task, "load_image", counted)
    uses = {"image": picture, "negative_image": picture, "init_image": picture}
    made = drawn(Request.of({**uses, "n": 1, "steps": 2}))
    assert (len(made.images), decoded) == (1, [Path(picture)])


def test_consent_is_asked_after_the_checks_and_before_anything_is_opened(
    picture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Request) -> None:
        raise RefusedError

    monkeypatch.setattr(draw, "open_base", lambda _: pytest.fail("was opened"))
    out = tmp_path / "out"
    with pytest.raises(RefusedError):
        draw_into(out, Request(image=picture), before_opening=refuse)  # type: ignore[arg-type]
    with pytest.raises(ImageError):
        draw_into(out, Request(image=str(tmp_path)), before_opening=refuse)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="preset"):
        draw_into(out, Request(image=(picture,), preset="vibes"), before_opening=refuse)


def test_the_request_that_was_asked_is_in_the_record(picture: str) -> None:
    request = Request.of({"image": picture, "n": 1, "steps": 2, "cads": 0.2})
    made = drawn(request)
    assert made.request.levers is request.levers
    record = made.record("out")
    assert record["request"] | request.stated() == record["request"]
    assert record["request"]["cads"] == 0.2
    assert record["command"] == made.request.command("out")
