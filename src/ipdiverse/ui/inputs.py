"""What a visitor gives: references and settings, on both tabs that draw."""

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

from ipdiverse.bases import defaults_of
from ipdiverse.critters.make import example, png
from ipdiverse.errors import ArgumentError, ImageError, check_range
from ipdiverse.image_io import MAX_FILE_BYTES, load_image_bytes
from ipdiverse.provenance import write_bytes_atomic
from ipdiverse.sampling.request import Request
from ipdiverse.ui.recipes import SUFFIXES, safe_name
from ipdiverse.ui.safety import MAX_REFERENCES
from ipdiverse.ui.status import line, problem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ipdiverse.ui.installed import Installed
    from ipdiverse.ui.studio import Studio

MAX_SET, MAX_STEPS, MAX_GUIDANCE, MAX_TEXT = 16, 100, 20, 2000
EXAMPLES = 6
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Of every event: nothing is offered to programs, and what is drawn is not covered by a veil."""
LIVE = "element.setAttribute('role', 'status'); element.setAttribute('aria-live', 'polite');"
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


def text_inputs(tab: str) -> tuple[gr.Textbox, gr.Textbox]:
    """Prompt and negative prompt."""
    prompt = gr.Textbox(
        label="Prompt",
        info="What the image should show; empty leaves everything to the reference.",
        placeholder="a critter in the snow",
        max_length=MAX_TEXT,
        lines=2,
        elem_id=f"{tab}-prompt",
    )
    negative = gr.Textbox(
        label="Negative prompt", max_length=MAX_TEXT, elem_id=f"{tab}-negative", render=False
    )
    return prompt, negative


@dataclass(frozen=True)
class Advanced:
    """Settings that most visitors leave alone, as components."""

    seed: gr.Number
    steps: gr.Slider
    guidance: gr.Slider
    base: gr.Dropdown
    adapter: gr.Dropdown
    combine: gr.Dropdown

    def all(self) -> list[Any]:
        """In the order of `asked`."""
        return [self.seed, self.steps, self.guidance, self.base, self.adapter, self.combine]


def advanced(installed: Installed, tab: str) -> Advanced:
    """Seed, steps, guidance, and what draws."""
    first, *_ = installed.bases
    usual = defaults_of(installed.bases[first])
    seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id=f"{tab}-seed")
    steps = gr.Slider(
        1,
        MAX_STEPS,
        usual.steps,
        step=1,
        label="Denoising steps",
        buttons=[],
        elem_id=f"{tab}-steps",
    )
    guidance = gr.Slider(
        0,
        MAX_GUIDANCE,
        usual.guidance_scale,
        step=0.5,
        label="Guidance",
        info="Weight of the prompt.",
        buttons=[],
        elem_id=f"{tab}-guidance",
    )
    base = gr.Dropdown(list(installed.bases), value=first, label="Base", elem_id=f"{tab}-base")
    choices = list(installed.adapters_of(installed.bases[first]))
    adapter = gr.Dropdown(choices, value=choices[0], label="Adapter", elem_id=f"{tab}-adapter")
    combine = gr.Dropdown(
        ["concat", "average", "subtract"],
        value="concat",
        label="Several references",
        elem_id=f"{tab}-combine",
    )

    def on_base(label: str) -> tuple[Any, ...]:
        name = _chosen(installed.bases, label, "base")
        names, usual = list(installed.adapters_of(name)), defaults_of(name)
        choice = gr.Dropdown(choices=names, value=names[0] if names else None)
        return choice, usual.steps, usual.guidance_scale

    base.change(on_base, base, [adapter, steps, guidance], queue=False, **PRIVATE)
    return Advanced(seed, steps, guidance, base, adapter, combine)


def asked(
    installed: Installed,
    given: Sequence[Given],
    prompt: str,
    negative: str,
    seed: Any,
    steps: Any,
    guidance: Any,
    base: Any,
    adapter: Any,
    combine: Any,
    **more: Any,
) -> Request:
    """A request of what was set, checked: a program may send anything.

    Args:
        installed: What may be chosen.
        given: References that were looked at.
        prompt: One text.
        negative: The negative prompt.
        seed: Not negative.
        steps: Denoising steps.
        guidance: Weight of the prompt.
        base: By its label.
        adapter: By its label.
        combine: How several references are used.
        more: Other fields of `Request`.

    Raises:
        IpdiverseError: Something is missing or impossible.
    """
    if not given:
        raise ArgumentError(
            "is missing", where="reference", fix="Add an image, or take an example."
        )
    for name, text in (("prompt", prompt), ("negative prompt", negative)):
        check_range(f"length of the {name}", len(text or ""), 0, MAX_TEXT)
    numbers = {"seed": seed, "steps": steps} | {k: v for k, v in more.items() if k == "n"}
    whole = {name: _whole(name, value) for name, value in numbers.items()}
    check_range("steps", whole["steps"], 1, MAX_STEPS)
    check_range("n", whole.get("n", 1), 1, MAX_SET)
    name = _chosen(installed.bases, base, "base")
    others: dict[str, Any] = more | whole
    return Request(
        image=tuple(one.file for one in given),
        prompt=(prompt or "",),
        negative_prompt=negative or "",
        guidance_scale=guidance,
        base=name,
        adapter=_chosen(installed.adapters_of(name), adapter, "adapter"),
        combine=combine,
        **others,
    )


def _whole(name: str, value: Any) -> int:
    usable = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not usable or not float(value).is_integer():
        raise ArgumentError("is no whole number", where=name, found=repr(value))
    return int(value)


def _chosen(choices: dict[str, str], label: Any, where: str) -> str:
    if not isinstance(label, str) or label not in choices:
        known = ", ".join(choices) or "none is installed"
        raise ArgumentError("is not installed", where=where, expected=known, found=repr(label))
    return choices[label]
