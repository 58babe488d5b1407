"""Settings of both tabs that draw, and the request that they make."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr

from ipdiverse.base.bases import defaults_of
from ipdiverse.errors import ArgumentError, check_range
from ipdiverse.sampling.request import Request
from ipdiverse.ui import Installed
from ipdiverse.ui.status import PRIVATE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ipdiverse.ui.uploads import Upload

MAX_SET, MAX_STEPS, MAX_GUIDANCE, MAX_TEXT = 16, 100, 20, 2000


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
        """In the order of `request_from`."""
        return [self.seed, self.steps, self.guidance, self.base, self.adapter, self.combine]


def advanced(installed: Installed, tab: str) -> Advanced:
    """Lay out seed, steps, guidance, base and adapter."""
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
        info="How strongly the images follow the prompt.",
        buttons=[],
        elem_id=f"{tab}-guidance",
    )
    base = gr.Dropdown(list(installed.bases), value=first, label="Base", elem_id=f"{tab}-base")
    choices = list(installed.adapters_of(installed.bases[first]))
    adapter = gr.Dropdown(choices, value=choices[0], label="Adapter", elem_id=f"{tab}-adapter")
    combine = gr.Dropdown(
        [
            ("all of them together", "concat"),
            ("their average", "average"),
            ("the first minus the others", "subtract"),
        ],
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


def request_from(
    installed: Installed,
    uploads: Sequence[Upload],
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
    """The request that the settings make. They are checked, for a program may send anything.

    Args:
        installed: What may be chosen.
        uploads: The references.
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
    if not uploads:
        raise ArgumentError(
            "is missing", where="reference", fix="Add an image, or pick an example."
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
    if not usable or not float(value).is_integer():
        raise ArgumentError("is not a whole number", where=name, found=repr(value))
    return int(value)


def _chosen(choices: dict[str, str], label: Any, where: str) -> str:
    if not isinstance(label, str) or label not in choices:
        known = ", ".join(choices) or "none is installed"
        raise ArgumentError("is not installed", where=where, expected=known, found=repr(label))
    return choices[label]
