"""`fit` on bases that are transformers, and what is drawn with the spaces that it finds."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from ipdiverse.adapter.imagine import load_space
from ipdiverse.cli import main
from ipdiverse.data.prepare import PrepareOptions, prepare
from tests import joint_models, models

if TYPE_CHECKING:
    from collections.abc import Iterator

PAIRS = 24
ADAPTERS: dict[str, tuple[str, Any, int]] = {
    "xlabs": ("flux", joint_models.xlabs_tensors, 4 * joint_models.TEXT_WIDTH),
    "instantx": ("flux", joint_models.instantx_tensors, 6 * joint_models.TEXT_WIDTH),
    "redux": ("flux", joint_models.redux_tensors, 16 * joint_models.TEXT_WIDTH),
    "sd3": ("sd3", joint_models.sd3_tensors, 16 * models.CLIP_WIDTH),
}
"""Its base, its file, and how many numbers a picture's tokens are (SD 3.5: its kept states)."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs") / "data"
    prepare("critters", folder, PrepareOptions(n=PAIRS))
    return folder


def prepared(kind: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """Write base, encoder, adapter and a picture; the flags that name the first three."""
    monkeypatch.chdir(folder)
    name, tensors, _ = ADAPTERS[kind]
    joint_models.pipeline(name, fresh=True).save_pretrained("base")
    save_file(tensors(), "adapter.safetensors")
    models.picture(1).save("a.png")
    words = ["--base", "base", "--adapter", "adapter.safetensors"]
    if kind in ("redux", "sd3"):  # those read SigLIP, and the base was saved with CLIP
        joint_models.siglip().save_pretrained("siglip")
        words += ["--image-encoder", "siglip"]
    return words


@contextmanager
def aside(*folders: str) -> Iterator[None]:
    """Take the weights of these models away for a while: T5's and the transformer's are large."""
    files = [file for folder in folders for file in Path(folder).glob("*.safetensors")]
    assert len(files) == len(folders)
    for file in files:
        file.rename(file.with_suffix(".away"))
    yield
    for file in files:
        file.with_suffix(".away").rename(file)


def drawn(words: list[str], out: str, *more: str) -> list[np.ndarray]:
    small = ["--width", "64", "--height", "64", "--steps", "2", "--prompt", "a cat in the snow"]
    assert main(["generate", "--image", "a.png", *words, *small, "--out", out, *more]) == 0
    return [np.asarray(Image.open(file)) for file in sorted(Path(out).glob("0*.png"))]


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_space_is_fitted_and_drawn_with(
    kind: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = prepared(kind, monkeypatch, tmp_path)
    unread = "text_encoder_3" if ADAPTERS[kind][0] == "sd3" else "text_encoder_2"
    with aside(f"base/{unread}", "base/transformer"):
        assert main(["fit", str(data), *words, "--out", "space.safetensors"]) == 0
    space = load_space("space.safetensors")
    assert len(space.mean) == ADAPTERS[kind][2]
    assert space.spec["pairs"] == PAIRS
    assert space.scene.shape[1] > 0
    with_space = [*words, "--space", "space.safetensors"]
    stock, off = (
        drawn(words, "stock", "-n", "2"),
        drawn(with_space, "off", "--diversity=0", "-n", "2"),
    )
    np.testing.assert_array_equal(off, stock)
    many = drawn(with_space, "many", "--diversity", "1", "-n", "2")
    (one,) = drawn(with_space, "one", "--diversity", "1", "-n", "1")
    np.testing.assert_array_equal(many[0], one)
    assert all((new != old).any() for new, old in zip(many, stock, strict=True))
    assert (many[0] != many[1]).any()
