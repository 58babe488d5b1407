"""What a block of a page needs in addition to an empty folder: `needs="…"` in its fence names it.

Each need has a stand-in: the hub's cache with small random weights, the hub as a folder,
insightface as a module that finds a face, ComfyUI as its folders. Files that readers bring exist
for one block and are removed after it.
"""

from __future__ import annotations

import shutil
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants

from ipdiverse.adapter.files.checkpoint import save_adapter
from ipdiverse.base import bases
from ipdiverse.base.memory import Device
from ipdiverse.commands.generate import PASSWORD
from tests import hub, models
from tests.fences import ROOT, SERVES
from tests.folder_hub import FolderHub

Files = dict[str, Callable[[Path], Any]]
"""Files that readers bring, by path: the function that makes each."""


@contextmanager
def given(need: str, folder: Path, cache: Callable[[], Path]) -> Iterator[None]:
    """Give a block what it needs, for as long as it runs.

    Args:
        need: One of `NEEDS`; empty needs nothing.
        folder: The working directory.
        cache: Where the hub's local cache is, with weights in it.
    """
    if not need:
        yield
        return
    with pytest.MonkeyPatch.context() as patch, _brought(folder, NEEDS[need](patch, folder, cache)):
        yield


@contextmanager
def _brought(folder: Path, files: Files) -> Iterator[None]:
    """Make the files that do not exist yet, for as long as a block runs."""
    new = [folder / name for name in files if not (folder / name).exists()]
    for path in new:
        path.parent.mkdir(parents=True, exist_ok=True)
        files[path.relative_to(folder).as_posix()](path)
    yield
    for path in new:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for parent in path.relative_to(folder).parents[:-1]:
            if not any((folder / parent).iterdir()):
                (folder / parent).rmdir()


def _weights(patch: pytest.MonkeyPatch, _: Path, cache: Callable[[], Path]) -> Files:
    """Everything from the hub that pages name is in the local cache; nothing connects."""
    patch.setattr(constants, "HF_HUB_CACHE", str(cache()))
    patch.setattr(constants, "HF_HUB_OFFLINE", True)
    patch.setattr(bases, "this_device", lambda: Device("cpu", 16 * 2**30))
    pictures = ["photo.jpg", "face.jpg", "person.jpg", "pose.png", "refs/0.png", "refs/1.png"]
    pictures += [f"made/{number}/{image}.png" for number in range(2) for image in range(2)]
    return {
        **{name: models.picture(number).save for number, name in enumerate(pictures)},
        "prompts.txt": lambda path: path.write_text("a cat\n"),
        "face.npy": lambda path: np.save(path, models.face(0).numpy()),
        "my-dreambooth": _tuned,
        "run/adapter.safetensors": _trained,
    }


def _tuned(folder: Path) -> None:
    """A base of the reader's own."""
    pipe = models.pipeline("sd1", image_encoder=None, feature_extractor=None)
    pipe.save_pretrained(folder)
    hub.write_tokenizer(folder / "tokenizer")


def _trained(file: Path) -> None:
    """An adapter as a training on Stable Diffusion 1.5 leaves it."""
    made = models.adapter("plus", models.unet("sd1"))
    save_adapter(made, file, {"recipe": {"steps": 2}})


def _token(patch: pytest.MonkeyPatch, folder: Path, _: Any) -> Files:
    """The hub answers and takes uploads."""
    FolderHub(folder / ".hub").install(patch)
    return {"run/adapter.safetensors": _trained}


def _insightface(patch: pytest.MonkeyPatch, _: Path, __: Any) -> Files:
    """insightface with its models: one face in every picture."""

    class FaceAnalysis:
        def __init__(self, name: str) -> None:
            assert name == "buffalo_l"

        def prepare(self, ctx_id: int, det_size: tuple[int, int]) -> None:
            assert (ctx_id, det_size) == (0, (640, 640))

        def get(self, pixels: np.ndarray) -> list[types.SimpleNamespace]:
            assert pixels.ndim == 3
            embedding = models.face(int(pixels.sum()))[0].numpy()
            return [types.SimpleNamespace(bbox=[0, 0, 9, 9], normed_embedding=embedding)]

    app = types.ModuleType("insightface.app")
    app.__dict__["FaceAnalysis"] = FaceAnalysis
    patch.setitem(sys.modules, "insightface", types.ModuleType("insightface"))
    patch.setitem(sys.modules, "insightface.app", app)
    return {"person.jpg": models.picture(0).save}


def _comfyui(_: pytest.MonkeyPatch, folder: Path, __: Any) -> Files:
    """ComfyUI's folders, and a link to this repository's."""
    for name in ("custom_nodes", "models/ipadapter"):
        (folder / "COMFYUI" / name).mkdir(parents=True, exist_ok=True)
    return {
        "integrations": lambda path: path.symlink_to(ROOT / "integrations"),
        "adapter.safetensors": _trained,
    }


def _keyboard(patch: pytest.MonkeyPatch, _: Path, __: Any) -> Files:
    """A reader who ends the command, and sets a password where one is needed."""
    patch.setenv(PASSWORD, "correct horse battery")
    return {}


NEEDS = {
    "weights from the hub": _weights,
    "a token of the hub": _token,
    "insightface and its models": _insightface,
    "ComfyUI": _comfyui,
    SERVES: _keyboard,
}
"""By the words that pages show."""
