"""Face embeddings from files, and insightface's absence."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ipdiverse.adapter.face_embeddings import detect_face, face_array, load_face_embeddings
from ipdiverse.errors import CheckpointError, ModelError

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
    monkeypatch.setitem(__import__("sys").modules, "insightface.app", None)
    with pytest.raises(ModelError, match=r"insightface: is not installed\. Run `pip install"):
        detect_face(Image.new("RGB", (8, 8)))
