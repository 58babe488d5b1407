"""References that a visitor gives: uploads, examples, and what is kept of them."""

from __future__ import annotations

import hashlib
import io
import threading
import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from ipdiverse.critters.make import example, png
from ipdiverse.errors import ImageError
from ipdiverse.image_io import MAX_FILE_BYTES, load_image_bytes
from ipdiverse.ui.inputs import LIVE, PRIVATE
from ipdiverse.ui.recipes import SUFFIXES, safe_name
from ipdiverse.ui.safety import MAX_REFERENCES
from ipdiverse.ui.status import line, problem
from ipdiverse.writing import write_bytes_atomic

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ipdiverse.ui.studio import Studio

EXAMPLES = 6
_SHOWN_SIDE = 512
_reading = threading.Semaphore(2)


@dataclass(frozen=True)
class Given:
    """A reference that was looked at and kept.

    Args:
        name: What it is called in recipes.
        file: The copy that is drawn from.
    """

    name: str
    file: str


@dataclass(frozen=True)
class Picker:
    """Where references are chosen.

    Args:
        given: State: a list of `Given`.
        shown: The pictures, to be rendered beside what is drawn from them.
    """

    given: gr.State
    shown: gr.Gallery


@lru_cache(1)
def example_files() -> tuple[tuple[str, bytes], ...]:
    """Example references, drawn by the critters' renderer: names and PNG files."""
    made = [example(index, 7, "train") for index in range(EXAMPLES)]
    return tuple((f"critter-{n}.png", png(one.scene, one.seed)) for n, one in enumerate(made, 1))


def accept(files: Sequence[tuple[str, bytes]], folder: Path) -> tuple[list[Given], list[str]]:
    """Decode what somebody sent, and keep what is an image.

    Args:
        files: Names, of any text, and contents.
        folder: For copies.

    Returns:
        What was kept, and a line for each file that was not.
    """
    kept: list[Given] = []
    refused = [f"Only the first {MAX_REFERENCES} are used."] if len(files) > MAX_REFERENCES else []
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files[:MAX_REFERENCES]:
        called = safe_name(name, [one.name for one in kept])
        try:
            with _reading, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load_image_bytes(data, called)
        except ImageError as error:
            refused.append(str(error))
            continue
        copy = folder / (hashlib.sha256(data).hexdigest()[:32] + Path(called).suffix)
        write_bytes_atomic(copy, data)
        kept.append(Given(called, str(copy)))
    return kept, refused


def _read(paths: Sequence[str]) -> list[tuple[str, bytes]]:
    """Uploads, no more of each than is looked at."""
    found = []
    for path in paths[: MAX_REFERENCES + 1]:
        with Path(path).open("rb") as file:
            found.append((Path(path).name, file.read(MAX_FILE_BYTES + 1)))
    return found


def _shown(given: Sequence[Given]) -> list[tuple[Image.Image, str]]:
    """Decoded pictures with their names, small enough for a page."""
    shown = []
    for one in given:
        with _reading:
            image = load_image_bytes(Path(one.file).read_bytes(), one.name)
        image.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
        shown.append((image, f"reference {one.name}"))
    return shown


def picker(studio: Studio, tab: str) -> Picker:
    """Uploads, examples, and what was taken of them."""
    given = gr.State([])
    upload = gr.File(
        label="Reference images (JPEG, PNG or WebP; several are one reference together)",
        file_count="multiple",
        file_types=list(SUFFIXES),
        height=130,
        elem_id=f"{tab}-upload",
    )
    examples = gr.Gallery(
        [(Image.open(io.BytesIO(data)), name) for name, data in example_files()],
        label="Or take an example",
        columns=EXAMPLES,
        format="png",
        allow_preview=False,
        interactive=False,
        object_fit="contain",
        height="auto",
        fit_columns=False,
        buttons=[],
        elem_id=f"{tab}-examples",
        elem_classes=["pixels", "small-pictures"],
    )
    told = gr.HTML(elem_id=f"{tab}-references-told", js_on_load=LIVE)
    shown = gr.Gallery(
        label="Reference",
        columns=1,
        format="png",
        interactive=False,
        allow_preview=False,
        object_fit="contain",
        height="auto",
        buttons=[],
        render=False,
        elem_id=f"{tab}-references",
        elem_classes=["pixels", "references"],
    )

    def take(files: list[tuple[str, bytes]], request: gr.Request) -> tuple[Any, Any, Any]:
        kept, refused = accept(files, studio.session(request.session_hash).folder / "references")
        names = ", ".join(one.name for one in kept)
        words = line(f"Reference: {names}." if kept else "") + "".join(map(problem, refused))
        return kept, _shown(kept), words

    def on_upload(paths: list[str] | None, request: gr.Request) -> tuple[Any, Any, Any]:
        return take(_read(paths or []), request)

    def on_example(request: gr.Request, event: gr.SelectData) -> tuple[Any, Any, Any, Any]:
        number = event.index if isinstance(event.index, int) else 0
        return *take([example_files()[number % EXAMPLES]], request), None

    outputs = [given, shown, told]
    upload.upload(on_upload, upload, outputs, queue=False, **PRIVATE)
    upload.delete(on_upload, upload, outputs, queue=False, **PRIVATE)
    upload.clear(on_upload, upload, outputs, queue=False, **PRIVATE)
    examples.select(on_example, None, [*outputs, upload], queue=False, **PRIVATE)
    return Picker(given, shown)
