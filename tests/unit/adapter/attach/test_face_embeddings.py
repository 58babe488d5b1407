"""Face embeddings from files, and insightface's absence."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ipdiverse.adapter.attach.face_embeddings import detect_face, face_array, load_face_embeddings
from ipdiverse.errors import ArgumentError, CheckpointError, ModelError

if TYPE_CHECKING:
    from pathlib import Path

FACES = np.random.default_rng(0).normal(size=(2, 512)).astype(np.float32)


def test_every_format_gives_the_same_faces(tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", FACES)
    save_file({"faces": torch.from_numpy(FACES)}, tmp_path / "f.safetensors")
    (tmp_path / "f.json").write_text(json.dumps(FACES.tolist()))
    for name in ("f.npy", "f.safetensors", "f.json"):
        np.testing.assert_allclose(load_face_embeddings(tmp_path / name).numpy(), FACES, rtol=1e-6)


def test_one_face_may_be_a_plain_vector() -> None:
    assert face_array(FACES[0]).shape == (1, 512)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "gone.npy", "no such file"),
        (b"text", "a.txt", r"holds no face embeddings; expected .npy \| .safetensors \| .json"),
        (b"not numpy", "b.npy", "cannot be read"),
        (b"{", "c.json", "cannot be read"),
        (b"[[1, 2], [3]]", "d.json", "holds no numbers"),
        (b"[[1, NaN]]", "e.json", "holds no face embeddings; expected finite numbers"),
        (b"[]", "f.json", "holds no face embeddings"),
    ],
)
def test_broken_files_get_one_line(
    tmp_path: Path, content: bytes | None, name: str, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_face_embeddings(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_an_array_of_objects_is_not_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object))
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_face_embeddings(tmp_path / "objects.npy")


def test_without_insightface_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "insightface.app", None)
    with pytest.raises(
        ModelError, match=r"insightface: is not installed\. Run `pip install -e '\.\[faces\]'`"
    ):
        detect_face(Image.new("RGB", (8, 8)))


class Analysis:
    """insightface's, of which only what is asked of it is there."""

    found: tuple[Any, ...] = ()

    def __init__(self, name: str, root: str = "") -> None:
        self.root = root

    def prepare(self, **_: Any) -> None:
        if self.root:
            raise RuntimeError(f"{self.root} cannot be downloaded\nand more")

    def get(self, pixels: np.ndarray) -> tuple[Any, ...]:
        assert pixels[0, 0].tolist() == [3, 2, 1], "blue first"
        return self.found


@pytest.fixture
def insightface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "insightface.app", SimpleNamespace(FaceAnalysis=Analysis))


@pytest.mark.usefixtures("insightface")
def test_models_that_are_not_there_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as told:
        detect_face(Image.new("RGB", (8, 8)), tmp_path)
    assert str(told.value) == (f"insightface: has no models; found {tmp_path} cannot be downloaded")


@pytest.mark.usefixtures("insightface")
def test_the_largest_face_counts_and_there_must_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("RGB", (8, 8), (1, 2, 3))
    with pytest.raises(ArgumentError, match=r"image: shows no face\. Crop closer, or"):
        detect_face(image)
    boxes = ((0, 0, 2, 6), (0, 0, 4, 4), (5, 5, 8, 8))
    faces = [SimpleNamespace(bbox=b, normed_embedding=[area(b), 0.0]) for b in boxes]
    monkeypatch.setattr(Analysis, "found", faces)
    assert detect_face(image).tolist() == [[16.0, 0.0]]


def area(box: tuple[int, int, int, int]) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))
