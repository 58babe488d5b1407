"""The page that `ipdiverse demo` writes: the dial at a glance, next to plain IP-Adapter."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ipdiverse.adapter.attach.attach import Attachment
from ipdiverse.base.adapters import DEFAULT_ADAPTER, adapter_file, copier_report
from ipdiverse.base.bases import CRITTERS, Base, load_base
from ipdiverse.contact_sheet import labelled_points
from ipdiverse.critters.render import render
from ipdiverse.critters.scene import Scene
from ipdiverse.dial import Dial
from ipdiverse.evaluation.measured import LABELS
from ipdiverse.evaluation.report import inline, inline_figure, new_axes, render_page, with_legend
from ipdiverse.provenance import save_png
from ipdiverse.sampling.request import Request
from ipdiverse.sampling.sample import Job, attached, dial_for, sampled, space_of
from ipdiverse.sampling.task import Task
from ipdiverse.writing import ensure_writable_folder, write_text_atomic

DIAL = (0.0, 0.5, 1.0)
SCALES = (0.25, 0.5, 1.0)
PER_ROW = 4  # a whole batch: a fifth image would cost as much as eight
REFERENCE = Scene(
    shape="star",
    colour="orange",
    pattern="plain",
    eyes="two",
    headgear="crown",
    place="beach",
    position="right",
    item="balloon",
    item_colour="blue",
)
PROMPT = "a critter in the snow"

_CURVES = {
    "retention": "#1b7f4d",
    "retention_worst": "#7a6a00",
    "asked_for": "#c0392b",
    "contradict_accuracy": "#2962c9",
    "entropy": "#8e44ad",
    "copy_rate": "#d35400",
}


def make_demo(out: Path) -> Path:
    """Generate the images, draw the plot, and write one self-contained page, which is returned."""
    ensure_writable_folder(out)
    reference = Image.fromarray(render(REFERENCE, seed=5))
    save_png(reference, out / "reference.png", {"scene": REFERENCE.as_dict()})
    base = load_base(CRITTERS)
    dial_rows, dial = _turned(base, reference)
    plus, small = (json.loads(copier_report(name).read_text()) for name in ("plus", "base"))
    page = render_page(
        "demo.html",
        title="ipdiverse: the dial",
        per_row=PER_ROW,
        reference=inline(reference),
        reference_words=", ".join(REFERENCE.as_dict().values()),
        prompt=PROMPT,
        adapter=DEFAULT_ADAPTER,
        dial=dial,
        dial_rows=dial_rows,
        curve=_curve(dial, plus) if dial.achieved else "",
        scale_rows=_scaled(base, reference),
        labels=[LABELS[name] for name in _CURVES],
        reports=[_told(plus, "plus, 16 tokens"), _told(small, "base, 4 tokens")],
    )
    write_text_atomic(out / "index.html", page)
    return out / "index.html"


def _drawn(base: Base, request: Request, reference: Image.Image, on: Attachment) -> list[str]:
    jobs = [Job(PROMPT, 0, index, reference) for index in range(PER_ROW)]
    return [inline(image) for image in sampled(Task(base), jobs, request, on)]


def _turned(base: Base, reference: Image.Image) -> tuple[dict[float, list[str]], Dial]:
    """Images at each setting of the default adapter's dial, and the dial."""
    request = Request(n=1, guidance_scale=base.guidance_scale)
    with attached(base, adapter_file(CRITTERS, DEFAULT_ADAPTER)) as on:
        on.set_space(space_of("", on.adapters[0]))
        asked = {setting: replace(request, diversity=setting) for setting in DIAL}
        images = {setting: _drawn(base, one, reference, on) for setting, one in asked.items()}
        return images, dial_for(on.adapters[0], on.scenes is not None)


def _scaled(base: Base, reference: Image.Image) -> dict[float, list[str]]:
    """Images of plain IP-Adapter at each scale."""
    request, images = Request(n=1, guidance_scale=base.guidance_scale), {}
    with attached(base, adapter_file(CRITTERS, "plus")) as on:
        for scale in SCALES:
            on.set_scale(scale)
            images[scale] = _drawn(base, request, reference, on)
    return images


def _curve(dial: Dial, report: dict[str, Any]) -> str:
    """Plot of identity kept over variety: the dial and a sweep of scales on the same axes."""
    axes = new_axes(9, 4)
    achieved = zip(dial.points, dial.achieved, strict=True)
    points = [(one.variety, one.retention, f"{at:.2g}") for (at, _), one in achieved]
    sweep = [(row["entropy"], row["retention"], f"λ {row['scale']:g}") for row in report["rows"]]
    told = labelled_points([x for x, _, _ in points]), range(len(sweep))
    dialled = "the dial, on the pairs it\nwas calibrated with", "#1b7f4d"
    plain = "plain IP-Adapter at its\nscales, on held-out pairs", "#d35400"
    for (label, colour), curve, at in ((dialled, points, told[0]), (plain, sweep, told[1])):
        xs, ys, words = zip(*curve, strict=True)
        axes.plot(xs, ys, "o-", color=colour, label=label)
        for i in at:
            axes.annotate(words[i], (xs[i], ys[i]), (4, 4), textcoords="offset points", fontsize=7)
    axes.set_xlabel(LABELS["entropy"])
    axes.set_ylabel("identity kept")
    return inline_figure(with_legend(axes))


def _told(report: dict[str, Any], title: str) -> dict[str, Any]:
    """A shipped measurement of a plain adapter: its numbers, plot and table."""
    axes, scales = new_axes(9, 4), [row["scale"] for row in report["rows"]]
    for name, colour in _CURVES.items():
        values = [row[name] for row in report["rows"]]
        axes.plot(scales, values, "o-", label=LABELS[name], color=colour)
    axes.set_xlabel("scale of the image prompt")
    axes.set_ylim(-0.05, 1.1)
    rows = [*((f"scale {row['scale']:g}", row) for row in report["rows"])]
    rows += report["anchors"].items()
    shown = [(name, [scores[column] for column in _CURVES]) for name, scores in rows]
    plot, command = inline_figure(with_legend(axes)), copier_command(report)
    return report | {"title": title, "plot": plot, "command": command, "rows": shown}


def copier_command(report: dict[str, Any]) -> str:
    """The command that measures a report's numbers again."""
    scales = " ".join(f"{row['scale']:g}" for row in report["rows"])
    numbers = " ".join(
        f"--{name} {report[name]:g}" for name in ("pairs", "images", "steps", "guidance")
    )
    adapter = shlex.quote(report["adapter"])
    return f"python -m workshop copier --adapter {adapter} {numbers} --scales {scales}"
