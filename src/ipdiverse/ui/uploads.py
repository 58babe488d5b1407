"""References that a visitor gives: uploads and examples, checked, copied and shown."""

from __future__ import annotations

import hashlib
import io
import re
import shutil
import threading
import uuid
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from ipdiverse.critters.make import example, png
from ipdiverse.errors import ArgumentError, ImageError
from ipdiverse.image_io import MAX_FILE_BYTES, load_image_bytes
from ipdiverse.image_io.files import SUFFIXES
from ipdiverse.ui.safety import MAX_REFERENCES
from ipdiverse.ui.status import LIVE, PRIVATE, line, on_load, problem
from ipdiverse.writing import write_bytes_atomic

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ipdiverse.ui.visitors import Session, Sessions, Visitor

EXAMPLES = 6
MAX_SCENES = 32
_MOST_WORDS = 2000
_KEPT = "references"
_SHOWN_SIDE = 512
_LONGEST_NAME = 80
# a small file may decode to 40 megapixels: a crowd that uploads at once must not fill the memory
_decoding, _in_line = threading.Semaphore(2), threading.Semaphore(12)


@dataclass(frozen=True)
class Upload:
    """A reference that was decoded once and kept.

    Args:
        name: What it is called in recipes.
        file: The copy to draw from.
        shown: A small one for the page.
    """

    name: str
    file: str
    shown: str = ""


def safe_name(name: str, taken: Sequence[str] = ()) -> str:
    """A file name without folders or special characters, for a command and for an archive."""
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


def accept(
    files: Sequence[tuple[str, Path | bytes]], folder: Path, most: int = MAX_REFERENCES
) -> tuple[list[Upload], list[str]]:
    """Decode what somebody sent, one picture at a time, and keep at most so many.

    Returns:
        What was kept, and a line for each file that was refused.
    """
    kept: list[Upload] = []
    refused = [f"Only the first {most} are used."] if len(files) > most else []
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in files[:most]:
        called = safe_name(name, [one.name for one in kept])
        try:
            with _slot():
                kept.append(_keep(called, source, folder))
        except ImageError as error:
            refused.append(str(error))
    return kept, refused


@contextmanager
def _slot() -> Iterator[None]:
    """A turn to decode; a short line waits for it, as waiting takes a thread of the page."""
    if not _in_line.acquire(blocking=False):
        raise ArgumentError("too many pictures are being read", fix="Try again in a minute.")
    try:
        with _decoding:
            yield
    finally:
        _in_line.release()


def _keep(called: str, source: Path | bytes, folder: Path) -> Upload:
    if isinstance(source, Path):
        with source.open("rb") as file:  # of one that is too large, just enough to be refused
            source = file.read(MAX_FILE_BYTES + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = load_image_bytes(source, called)
    copy = folder / (hashlib.sha256(source).hexdigest()[:32] + Path(called).suffix)
    shown = copy.with_name(f"{copy.stem}-shown.png")
    write_bytes_atomic(copy, source)
    image.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
    image.save(shown)
    return Upload(called, str(copy), str(shown))


def choose(session: Session, tab: str, kept: list[Upload]) -> None:
    """Make references those of a tab, and delete the visitor's that no page uses any more."""
    owner = session.visitor
    session.chosen[tab] = owner.chosen[tab] = kept
    pages = owner.pages
    used = {one.file for page in (owner, *pages) for some in page.chosen.values() for one in some}
    # a job that still draws reads its references once, at the start of each turn
    used |= {
        file
        for page in pages
        for job in (*page.jobs.values(), *page.earlier)
        for request in job.requests.values()
        for file in (*request.image, request.scenes)
    }
    for file in (owner.folder / _KEPT).iterdir():
        if any(Path(name).stem == file.stem.removesuffix("-shown") for name in used):
            continue
        if file.is_dir():  # of scenes
            shutil.rmtree(file, ignore_errors=True)
        else:
            file.unlink(missing_ok=True)
    owner.weigh()


@contextmanager
def reading(owner: Visitor) -> Iterator[Path]:
    """The folder of a visitor's pictures, which one event at a time may change."""
    if not owner.reading.acquire(blocking=False):
        raise ArgumentError("your other pictures are still being read")
    try:
        folder = owner.folder / _KEPT
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    finally:
        owner.reading.release()


def shown_of(kept: Sequence[Upload]) -> tuple[list[tuple[str, str]], str]:
    """Pictures with their names for the gallery, and the line that names them."""
    names = ", ".join(one.name for one in kept)
    pictures = [(one.shown, f"reference {one.name}") for one in kept]
    return pictures, line(f"Reference: {names}." if kept else "")


Taker = Callable[["list[tuple[str, Path | bytes]]", "Session"], tuple[Any, Any]]


def picker(sessions: Sessions, tab: str) -> tuple[gr.Gallery, gr.HTML, gr.File, Taker]:
    """Lay out uploads and examples.

    Returns:
        A gallery of the references, for the caller to render next to the images that are drawn
        from them; the line that names them; the uploads; and what makes files the references and
        returns the new values of the first two.
    """
    upload = gr.File(
        label="Reference images (several act as one)",
        file_count="multiple",
        file_types=list(SUFFIXES),
        height=150,
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

    def take(files: list[tuple[str, Path | bytes]], session: Session) -> tuple[Any, Any]:
        with reading(session.visitor) as folder:
            kept, refused = accept(files, folder)
            choose(session, tab, kept)
        pictures, words = shown_of(kept)
        return pictures, words + "".join(map(problem, refused))

    def on_upload(files: list[Any] | None, request: gr.Request) -> tuple[Any, Any]:
        paths = [Path(one["path"]) for one in files or []]
        return take([(path.name, path) for path in paths], sessions.asking(request))

    def on_example(request: gr.Request, event: gr.SelectData) -> tuple[Any, Any, Any]:
        return *take([example_files()[event.index % EXAMPLES]], sessions.asking(request)), None

    outputs = [shown, told]
    for happens in (upload.upload, upload.delete, upload.clear):
        happens(on_upload, upload, outputs, queue=False, **PRIVATE)
    examples.select(on_example, None, [*outputs, upload], queue=False, **PRIVATE)
    return shown, told, upload, take


def scenes_picker(sessions: Sessions) -> None:
    """Lay out a place for pictures whose scenes are drawn in place of the adapter's own."""
    gr.Markdown(
        "Give 2 or more pictures: their scenes are drawn in place of the adapter's own. A text "
        "file of the same name is a picture's caption. At diversity 0 they have no effect."
    )
    given = gr.File(
        label="Pictures of scenes",
        file_count="multiple",
        file_types=[*SUFFIXES, ".txt"],
        height=120,
        elem_id="vary-scenes",
    )
    told = gr.HTML(elem_id="vary-scenes-told", js_on_load=LIVE)

    def say(session: Session) -> str:
        kept = session.chosen.get("scenes")
        return line(f"Scenes are drawn from {kept[0].name}.") if kept else ""

    def on_upload(files: list[Any] | None, request: gr.Request) -> str:
        session, refused = sessions.asking(request), []
        with reading(session.visitor) as folder:
            kept, refused = keep_scenes([Path(one["path"]) for one in files or []], folder)
            choose(session, "scenes", kept)
        return say(session) + "".join(map(problem, refused))

    def restore(request: gr.Request) -> str:
        session = sessions.asking(request)
        session.chosen["scenes"] = session.visitor.chosen.get("scenes", [])
        return say(session)

    for happens in (given.upload, given.delete, given.clear):
        happens(on_upload, given, told, queue=False, **PRIVATE)
    on_load(restore, None, told)


def keep_scenes(files: Sequence[Path], folder: Path) -> tuple[list[Upload], list[str]]:
    """Pictures and captions as a folder of their own, as `--scenes` reads it.

    Returns:
        The folder, if there are enough, and a line for each file that was refused.
    """
    if not files:
        return [], []
    own = folder / uuid.uuid4().hex
    texts = [file for file in files if file.suffix.lower() == ".txt"]
    found: list[Any] = [(file.name, file) for file in files if file not in texts]
    kept, refused = accept(found, own, MAX_SCENES)
    for one in kept:
        Path(one.file).rename(own / one.name)
        Path(one.shown).unlink()
    for file in texts:
        caption = own / f"{Path(safe_name(f'{file.stem}.png')).stem}.txt"
        write_bytes_atomic(caption, file.read_bytes()[:_MOST_WORDS])
    if len(kept) > 1:
        return [Upload(f"{len(kept)} pictures", str(own))], refused
    return [], [*refused, "Give 2 or more pictures, or none."]
