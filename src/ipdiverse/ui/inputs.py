"""Settings of both tabs that draw, the request that they make, and what a browser may send.

Gradio answers a value of the wrong type with a traceback and an error without words. So everything
that is sent is checked here first, in one place: `Fields` for what is sent to any event of the
page, `request_from` for what goes together.
"""

from __future__ import annotations

import math
import re
import secrets
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any, NamedTuple

import gradio as gr

from ipdiverse.base.bases import CRITTERS, defaults_of
from ipdiverse.base.presets import PRESETS
from ipdiverse.errors import ArgumentError, check_range
from ipdiverse.sampling.request import MAX_FAST, Request
from ipdiverse.ui import Installed
from ipdiverse.ui.status import PRIVATE, line, on_load
from ipdiverse.ui.uploads import Upload, shown_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ipdiverse.ui.visitors import Sessions

MAX_SET, MAX_STEPS, MAX_GUIDANCE, MAX_TEXT = 16, 100, 20, 2000
MAX_SEED = 2**53
"""Above that, a browser's numbers are no longer whole."""
_NEW_SEEDS = 10**6
"""Seeds that are drawn are short enough to be read out."""
_MAX_FILES = 100
_CHANGING = ("vary-adapter", "grid-adapter", "reports-chosen")
_SESSION = re.compile(r"[\w-]{1,64}", re.ASCII)


class Fields:
    """What a browser may send to each event of the page; anything else is one line.

    Args:
        page: With all its events.
        cache: The folder that holds uploads.
    """

    def __init__(self, page: gr.Blocks, cache: Path) -> None:
        # only gradio itself says that a page was closed
        self._events = {
            number: event
            for number, event in page.fns.items()
            if event.fn and not any(kind == "unload" for _, kind in event.targets)
        }
        self._cache = cache

    def checked(self, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        """What of a request gradio gets to see."""
        session = asked.get("session_hash")
        if not (isinstance(session, str) and _SESSION.fullmatch(session)):
            raise _unusable("session_hash", "a short name", session)
        number = _whole("fn_index", asked.get("fn_index"))
        known = {"session_hash": session, "fn_index": number}
        event = self._events.get(number)
        cancels, joins = path.endswith("/cancel"), path.endswith("/join")
        if event is None or (not cancels and event.queue != joins):
            raise _unusable("fn_index", "an event of this page", number)
        if cancels:
            return known | {"event_id": _text("event_id", asked.get("event_id"), 64) or ""}
        data, inputs = asked.get("data"), event.inputs
        if not isinstance(data, list) or len(data) != len(inputs):
            found = len(data) if isinstance(data, list) else data
            raise _unusable("data", f"a list of {len(inputs)} values", found)
        passed = [
            self._files(str(field.label), one)
            if isinstance(field, gr.File)
            else check_value(field, one)
            for field, one in zip(inputs, data, strict=True)
        ]
        if event.collects_event_data:
            about = asked.get("event_data")
            index = _whole("event_data", about.get("index") if isinstance(about, dict) else about)
            known["event_data"] = {"index": index, "value": None, "selected": True}
        return known | {"data": passed}

    def _files(self, name: str, value: Any) -> Any:
        if value is None:
            return value
        if not isinstance(value, list) or len(value) > _MAX_FILES:
            raise _unusable(name, f"a list of at most {_MAX_FILES} files", value)
        found: dict[str, Any] = {}
        for one in value:
            path = one.get("path") if isinstance(one, dict) else one
            if not isinstance(path, str) or "\0" in path or not self._is_upload(Path(path)):
                raise _unusable(name, "files that were uploaded", path)
            if path in found:
                raise ArgumentError("is named twice", where=name, found=Path(path).name)
            found[path] = {"path": path, "meta": {"_type": "gradio.FileData"}}
        return list(found.values())

    def _is_upload(self, path: Path) -> bool:
        try:
            return path.resolve().is_relative_to(self._cache) and path.is_file()
        except OSError:  # a name that is too long, a loop of links
            return False


def check_value(field: Any, value: Any) -> Any:
    """A value for a component."""
    name = str(field.label or field.elem_id)
    match field:
        case gr.BrowserState():
            return value if isinstance(value, list) and len(value) <= _MAX_FILES else None
        case gr.Slider() | gr.Number():
            return _number(name, value, field.minimum, field.maximum)
        case gr.Checkbox():
            return value is True
        case gr.CheckboxGroup() | gr.Dropdown() if field.elem_id not in _CHANGING:
            return _chosen_of(name, value, field)
        case _:  # what is chosen of a list that changes is looked up by whoever uses it
            return _text(name, value, MAX_TEXT)


def _unusable(name: str, expected: str, found: Any) -> ArgumentError:
    return ArgumentError("cannot be used", where=name, expected=expected, found=short(found))


def _text(name: str, value: Any, most: int) -> Any:
    if value is not None and not (isinstance(value, str) and len(value) <= most):
        if isinstance(value, str):
            raise ArgumentError("is too long", where=name, expected=f"{most}", found=len(value))
        raise _unusable(name, "a text", value)
    return value


def _number(name: str, value: Any, low: float | None, high: float | None) -> Any:
    if value is None:  # an emptied field: the request says what is missing
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _unusable(name, "a number", value)
    low, high = (-math.inf if low is None else low), (math.inf if high is None else high)
    check_range(name, value, low, high)
    return value


def _chosen_of(name: str, value: Any, field: gr.CheckboxGroup | gr.Dropdown) -> Any:
    known = [one for _, one in field.choices]
    several = isinstance(field, gr.CheckboxGroup)
    chosen = value if several and isinstance(value, list) else [value]
    if any(not isinstance(one, str) or one not in known for one in chosen[: len(known) + 1]):
        raise _unusable(name, " | ".join(map(str, known)), value)
    return list(dict.fromkeys(chosen)) if several else value


def text_inputs(tab: str) -> tuple[gr.Textbox, gr.Textbox]:
    """Prompt and negative prompt."""
    prompt = gr.Textbox(
        label="Prompt",
        info="What the images should show. Leave it empty to follow the reference alone.",
        placeholder="a critter in the snow",
        max_length=MAX_TEXT,
        lines=2,
        elem_id=f"{tab}-prompt",
    )
    negative = gr.Textbox(
        label="Negative prompt", max_length=MAX_TEXT, elem_id=f"{tab}-negative", render=False
    )
    return prompt, negative


FAST = (
    "0 is exact; 1 to 3 leave out work: 1.9, 2.4 and 2.7 times as fast on critters, and lose up to "
    "0.3, 0.5 and 0.9 of 100 in prompt, identity, variety or valid images."
)
"""Of `docs/benchmarks/fast.json`."""


class Advanced(NamedTuple):
    """Settings of both tabs, as components, in the order of `request_from`."""

    seed: gr.Number
    keep: gr.Checkbox
    steps: gr.Slider
    guidance: gr.Slider
    base: gr.Dropdown
    adapter: gr.Dropdown
    combine: gr.Dropdown
    fast: gr.Slider


def models(installed: Installed, tab: str) -> tuple[gr.Dropdown, gr.Dropdown, gr.HTML]:
    """Base and adapter, and a line that says what the base can draw."""
    first, *_ = installed.bases
    choices = list(installed.adapters_of(installed.bases[first]))
    with gr.Row():
        named: list[dict[str, Any]] = [
            {"label": one, "elem_id": f"{tab}-{one.lower()}", "min_width": 120}
            for one in ("Base", "Adapter")
        ]
        base = gr.Dropdown(list(installed.bases), value=first, **named[0])
        adapter = gr.Dropdown(choices, value=choices[0], **named[1])
    limits = gr.HTML(limits_of(installed.bases[first]), elem_id=f"{tab}-limits")
    return base, adapter, limits


def limits_of(base: str) -> str:
    """What a base can draw, in a line."""
    if base == CRITTERS:
        return line(
            "This small model draws 64×64 pixels and knows critters alone: photos as references, "
            "or words about anything else, need another base."
        )
    if base in PRESETS:
        one = PRESETS[base]
        return line(f"{one.about[:1].upper()}{one.about[1:]}; {one.resolution} pixels.")
    return ""


def slider(
    elem_id: str,
    label: str,
    span: tuple[float, float, float],
    value: float,
    info: str | None = None,
) -> gr.Slider:
    """One that goes from `span[0]` to `span[1]` in steps of `span[2]`."""
    low, high, step = span
    named: dict[str, Any] = {"label": label, "info": info, "elem_id": elem_id}
    return gr.Slider(low, high, value, step=step, buttons=[], **named)


def seeds(tab: str) -> tuple[gr.Number, gr.Checkbox]:
    """The seed of the last drawing, and whether the next one keeps it."""
    number: dict[str, Any] = {"precision": 0, "minimum": 0, "maximum": MAX_SEED, "min_width": 120}
    with gr.Row(elem_classes=["seeds"]):
        seed = gr.Number(0, label="Seed", elem_id=f"{tab}-seed", **number)
        keep = gr.Checkbox(label="Keep this seed", min_width=120, elem_id=f"{tab}-keep")
    return seed, keep


def advanced(
    installed: Installed,
    tab: str,
    seed: tuple[gr.Number, gr.Checkbox],
    model: tuple[gr.Dropdown, gr.Dropdown, gr.HTML],
) -> Advanced:
    """Lay out steps, guidance and how references are combined."""
    base, adapter, limits = model
    usual = defaults_of(next(iter(installed.bases.values())))
    steps = slider(f"{tab}-steps", "Denoising steps", (1, MAX_STEPS, 1), usual.steps)
    info = "How strongly the images follow the prompt."
    strength = (0, MAX_GUIDANCE, 0.5)
    guidance = slider(f"{tab}-guidance", "Guidance", strength, usual.guidance_scale, info)
    ways = {"all of them together": "concat", "their average": "average"}
    ways |= {"the first minus the others": "subtract"}
    name: dict[str, Any] = {"label": "Several references", "elem_id": f"{tab}-combine"}
    combine = gr.Dropdown(list(ways.items()), value="concat", **name)
    fast = slider(f"{tab}-fast", "Fast", (0, MAX_FAST, 1), 0, FAST)

    def on_base(label: str) -> tuple[Any, ...]:
        name = _chosen(installed.bases, label, "base")
        names, usual = list(installed.adapters_of(name)), defaults_of(name)
        choice = gr.Dropdown(choices=names, value=names[0] if names else None)
        return choice, usual.steps, usual.guidance_scale, limits_of(name)

    base.input(on_base, base, [adapter, steps, guidance, limits], queue=False, **PRIVATE)
    return Advanced(*seed, steps, guidance, base, adapter, combine, fast)


def remembered(
    sessions: Sessions,
    installed: Installed,
    tab: str,
    fields: list[Any],
    more: Advanced,
    references: list[Any],
) -> None:
    """Let a reload keep what was typed and chosen.

    Settings are kept by the browser; of references it knows nothing but their visitor's cookie.
    """
    # the secret hides nothing: the page knows it; it only has to stay the same
    kept = gr.BrowserState(storage_key=f"ipdiverse-{tab}", secret="ipdiverse")  # noqa: S106
    changes = [field.change for field in fields]
    gr.on(changes, None, fields, kept, js="(...values) => [values]", show_progress="hidden")

    def restore(values: list[Any] | None, request: gr.Request) -> list[Any]:
        session = sessions.asking(request)
        chosen = session.chosen[tab] = session.visitor.chosen.get(tab, [])
        return [*_restored(fields, more, values or [], installed), *shown_of(chosen)]

    on_load(restore, kept, [*fields, *references])


def _restored(
    fields: list[Any], more: Advanced, values: list[Any], installed: Installed
) -> list[Any]:
    """What was kept, where it can still be used; a browser may have kept it for years."""
    if len(values) != len(fields):
        return [gr.skip()] * len(fields)
    found = dict(zip(fields, values, strict=True))
    for field, value in found.items():
        try:
            found[field] = check_value(field, value)
        except ArgumentError:
            found[field] = field.value
    names = list(installed.adapters_of(installed.bases[found[more.base]]))
    if found[more.adapter] not in names:
        found[more.adapter] = names[0] if names else None
    found[more.adapter] = gr.Dropdown(choices=names, value=found[more.adapter])
    return list(found.values())


def request_from(
    installed: Installed,
    uploads: Sequence[Upload],
    prompt: str,
    negative: str,
    seed: Any,
    keep: Any,
    steps: Any,
    guidance: Any,
    base: Any,
    adapter: Any,
    combine: Any,
    fast: Any = 0,
    **more: Any,
) -> Request:
    """The request that the settings make. They are checked, for a program may send anything."""
    if not uploads:
        raise ArgumentError(
            "is missing", where="reference", fix="Add an image, or pick an example."
        )
    for name, text in (("prompt", prompt), ("negative prompt", negative)):
        check_range(f"length of the {name}", len(text or ""), 0, MAX_TEXT)
    if keep is not True:
        seed = secrets.randbelow(_NEW_SEEDS)
    numbers = {"seed": seed, "steps": steps, "fast": fast} | {
        k: v for k, v in more.items() if k == "n"
    }
    whole = {name: _whole(name, value) for name, value in numbers.items()}
    check_range("steps", whole["steps"], 1, MAX_STEPS)
    check_range("n", whole.get("n", 1), 1, MAX_SET)
    name = _chosen(installed.bases, base, "base")
    others: dict[str, Any] = more | whole
    return Request(
        image=tuple(one.file for one in uploads),
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
    if not usable or not (isinstance(value, int) or value.is_integer()):
        raise ArgumentError("is not a whole number", where=name, found=short(value))
    return int(value)


def _chosen(choices: dict[str, str], label: Any, where: str) -> str:
    if not isinstance(label, str) or label not in choices:
        known = ", ".join(choices) or "none is installed"
        raise ArgumentError("is not installed", where=where, expected=known, found=short(label))
    return choices[label]
