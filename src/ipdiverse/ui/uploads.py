"""References that a visitor gives: uploads and examples, checked, copied and shown."""

from __future__ import annotations

import hashlib
import io
import re
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
from ipdiverse.ui.safety import MAX_REFERENCES
from ipdiverse.ui.status import LIVE, PRIVATE, line, problem
from ipdiverse.writing import write_bytes_atomic

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ipdiverse.ui.queue import Sessions

EXAMPLES = 6
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_SHOWN_SIDE = 512
_LONGEST_NAME = 80
# a small file may decode to 40 megapixels: a crowd that uploads at once must not fill the memory
_decoding = threading.Semaphore(2)


@dataclass(frozen=True)
class Upload:
    """A reference that was decoded once and kept.

    Args:
        name: What it is called in recipes.
        file: The copy to draw from.
    """

    name: str
    file: str


def safe_name(name: str, taken: Sequence[str] = ()) -> str:
    """A file name without folders or special characters, for a command and for an archive.

    Args:
        name: As a browser sent it: any text.
        taken: Names that others have.
    """
    bare = Path(name.replace("\\", "/")).name
    kept = re.sub(r"[^\w.-]+", "_", bare, flags=re.ASCII).strip("._-")
    stem, suffix = Path(kept).stem[:_LONGEST_NAME], Path(kept).suffix
    if suffix.lower() not in SUFFIXES:
        stem, suffix = kept[:_LONGEST_NAME], ".png"
    stem = stem or "reference"
    chosen, number = f"{stem}{suffix}", 1
    while chosen in taken:
        number += 1
        chosen = f"{stem}-{number}{suffix}"
    return chosen


@lru_cache(1)
def example_files() -> tuple[tuple[str, bytes], ...]:
    """Example references, drawn by the critters' renderer: names and PNG files."""
    made = [example(index, 7, "train") for index in range(EXAMPLES)]
    return tuple((f"critter-{n}.png", png(one.scene, one.seed)) for n, one in enumerate(made, 1))


def accept(files: Sequence[tuple[str, bytes]], folder: Path) -> tuple[list[Upload], list[str]]:
    """Decode what somebody sent, and keep the images.

    Args:
        files: Names, of any text, and contents.
        folder: For copies.

    Returns:
        What was kept, and a line for each file that was refused.
    """
    kept: list[Upload] = []
    refused = [f"Only the first {MAX_REFERENCES} are used."] if len(files) > MAX_REFERENCES else []
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files[:MAX_REFERENCES]:
        called = safe_name(name, [one.name for one in kept])
        try:
            with _decoding, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load_image_bytes(data, called)
        except ImageError as error:
            refused.append(str(error))
            continue
        copy = folder / (hashlib.sha256(data).hexdigest()[:32] + Path(called).suffix)
        write_bytes_atomic(copy, data)
        kept.append(Upload(called, str(copy)))
    return kept, refused


def _read(paths: Sequence[str]) -> list[tuple[str, bytes]]:
    """Names and contents; of a file that is too large, just enough to be refused."""
    found = []
    for path in paths[: MAX_REFERENCES + 1]:
        with Path(path).open("rb") as file:
            found.append((Path(path).name, file.read(MAX_FILE_BYTES + 1)))
    return found


def _shown(uploads: Sequence[Upload]) -> list[tuple[Image.Image, str]]:
    """Decoded pictures with their names, small enough for a page."""
    shown = []
    for one in uploads:
        with _decoding:
            image = load_image_bytes(Path(one.file).read_bytes(), one.name)
        image.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
        shown.append((image, f"reference {one.name}"))
    return shown


def picker(sessions: Sessions, tab: str) -> tuple[gr.State, gr.Gallery]:
    """Lay out uploads and examples.

    Returns:
        State: a list of `Upload`. And a gallery of them, for the caller to render next to the
        images that are drawn from them.
    """
    chosen = gr.State([])
    upload = gr.File(
        label="Reference images (several act as one): JPEG, PNG, WebP",
        file_count="multiple",
        file_types=list(SUFFIXES),
        height=130,
        elem_id=f"{tab}-upload",
    )
    options: dict[str, Any] = {"format": "png", "allow_preview": False, "interactive": False}
    options |= {"object_fit": "contain", "height": "auto", "buttons": []}
    examples = gr.Gallery(
        [(Image.open(io.BytesIO(data)), name) for name, data in example_files()],
        label="Or pick an example",
        columns=EXAMPLES,
        fit_columns=False,
        elem_id=f"{tab}-examples",
        elem_classes=["pixels", "small-pictures"],
        **options,
    )
    told = gr.HTML(elem_id=f"{tab}-references-told", js_on_load=LIVE)
    shown = gr.Gallery(
        label="Reference",
        columns=1,
        render=False,
        elem_id=f"{tab}-references",
        elem_classes=["pixels", "references"],
        **options,
    )

    def take(files: list[tuple[str, bytes]], request: gr.Request) -> tuple[Any, Any, Any]:
        kept, refused = accept(files, sessions.of(request.session_hash).folder / "references")
        names = ", ".join(one.name for one in kept)
        words = line(f"Reference: {names}." if kept else "") + "".join(map(problem, refused))
        return kept, _shown(kept), words

    def on_upload(files: list[Any] | None, request: gr.Request) -> tuple[Any, Any, Any]:
        return take(_read([one["path"] for one in files or []]), request)

    def on_example(request: gr.Request, event: gr.SelectData) -> tuple[Any, Any, Any, Any]:
        number = event.index if isinstance(event.index, int) else 0
        return *take([example_files()[number % EXAMPLES]], request), None

    outputs = [chosen, shown, told]
    for happens in (upload.upload, upload.delete, upload.clear):
        happens(on_upload, upload, outputs, queue=False, **PRIVATE)
    examples.select(on_example, None, [*outputs, upload], queue=False, **PRIVATE)
    return chosen, shown
