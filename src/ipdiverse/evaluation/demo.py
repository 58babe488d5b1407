"""The page that `ipdiverse demo` writes: the dial at a glance, next to plain IP-Adapter."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ipdiverse.adapter.attach.attach import Attachment
from ipdiverse.base.adapters import DEFAULT_ADAPTER, adapter_file, copier_report
from ipdiverse.base.bases import CRITTERS, Base, load_base
from ipdiverse.contact_sheet import labelled_points
from ipdiverse.critters.render import render
from ipdiverse.critters.scene import Scene
from ipdiverse.dial import Dial
from ipdiverse.evaluation.report import inline, render_page
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
    "retention": ("identity kept, mean over attributes", "#1b7f4d"),
    "retention_worst": ("identity kept, its worst attribute", "#7a6a00"),
    "asked_for": ("valid, with the whole prompt and identity", "#c0392b"),
    "contradict_accuracy": ("prompt obeyed where it contradicts the reference", "#2962c9"),
    "entropy": ("variety of what nobody fixed (1 = the world's own)", "#8e44ad"),
    "copy_rate": ("copies of the whole scene, minus chance", "#d35400"),
}


def make_demo(out: Path) -> Path:
    """Generate the images, draw the plot, and write one self-contained page, which is returned."""
    ensure_writable_folder(out)
    reference = Image.fromarray(render(REFERENCE, seed=5))
    save_png(reference, out / "reference.png", {"scene": REFERENCE.as_dict()})
    base = load_base(CRITTERS)
    dial_rows, dial = _turned(base, reference)
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
        curve=_curve(dial),
        scale_rows=_scaled(base, reference),
        labels=[label for label, _ in _CURVES.values()],
        reports=_reports(),
    )
    write_text_atomic(out / "index.html", page)
    return out / "index.html"


def _drawn(
    base: Base, reference: Image.Image, request: Request, attachment: Attachment
) -> list[str]:
    jobs = [Job(PROMPT, 0, index, reference) for index in range(PER_ROW)]
    return [inline(image) for image in sampled(Task(base), jobs, request, attachment)]


def _turned(base: Base, reference: Image.Image) -> tuple[dict[float, list[str]], Dial]:
    """Images at each setting of the default adapter's dial, and the dial."""
    images = {}
    with attached(base, adapter_file(CRITTERS, DEFAULT_ADAPTER)) as attachment:
        attachment.set_space(space_of("", attachment.adapters[0]))
        for setting in DIAL:
            request = Request(n=1, guidance_scale=base.guidance_scale, diversity=setting)
            images[setting] = _drawn(base, reference, request, attachment)
        return images, dial_for(attachment.adapters[0], attachment.scenes is not None)


def _scaled(base: Base, reference: Image.Image) -> dict[float, list[str]]:
    """Images of plain IP-Adapter at each scale."""
    request = Request(n=1, guidance_scale=base.guidance_scale)
    images = {}
    with attached(base, adapter_file(CRITTERS, "plus")) as attachment:
        for scale in SCALES:
            attachment.set_scale(scale)
            images[scale] = _drawn(base, reference, request, attachment)
    return images


def _curve(dial: Dial) -> str:
    """Plot of identity kept over variety; empty where one of the two curves is not known."""
    file = copier_report("plus")
    if not dial.achieved or not file.is_file():
        return ""
    return inline(plot_dial(dial, json.loads(file.read_text())))


def plot_dial(dial: Dial, report: dict[str, Any]) -> Image.Image:
    """Identity kept over variety, dial and λ sweep on the same axes."""
    axes = _axes()
    points = [
        (one.variety, one.retention, f"{at:.2g}")
        for (at, _), one in zip(dial.points, dial.achieved, strict=True)
    ]
    sweep = [(row["entropy"], row["retention"], f"λ {row['scale']:g}") for row in report["rows"]]
    for label, colour, curve in (
        ("the dial, on the pairs it\nwas calibrated with", "#1b7f4d", points),
        ("plain IP-Adapter at its\nscales, on held-out pairs", "#d35400", sweep),
    ):
        axes.plot(
            [x for x, _, _ in curve], [y for _, y, _ in curve], "o-", color=colour, label=label
        )
        told = labelled_points([x for x, _, _ in curve]) if curve is points else range(len(curve))
        for x, y, words in (curve[index] for index in told):
            axes.annotate(words, (x, y), (4, 4), textcoords="offset points", fontsize=7)
    axes.set_xlabel("variety of what nobody fixed (1 = the world's own)")
    axes.set_ylabel("identity kept")
    return _as_image(axes)


def _reports() -> list[dict[str, Any]]:
    """Each shipped measurement of plain adapters: its numbers, plot and table."""
    found = []
    for adapter, title in (("plus", "plus, 16 tokens"), ("base", "base, 4 tokens")):
        file = copier_report(adapter)
        if file.is_file():
            report = json.loads(file.read_text())
            rows = [(f"scale {row['scale']:g}", row) for row in report["rows"]]
            rows += report["anchors"].items()
            shown = [(name, [scores.get(column) for column in _CURVES]) for name, scores in rows]
            told = {"title": title, "plot": inline(plot(report)), "command": copier_command(report)}
            found.append(report | told | {"rows": shown})
    return found


def copier_command(report: dict[str, Any]) -> str:
    """The command that measures a report's numbers again."""
    scales = " ".join(f"{row['scale']:g}" for row in report["rows"])
    numbers = " ".join(
        f"--{name} {report[name]:g}" for name in ("pairs", "images", "steps", "guidance")
    )
    adapter = shlex.quote(report["adapter"])
    return f"python -m workshop copier --adapter {adapter} {numbers} --scales {scales}"


def plot(report: dict[str, Any]) -> Image.Image:
    """Curves over the scale, with the measured points."""
    axes = _axes()
    scales = [row["scale"] for row in report["rows"]]
    for name, (label, colour) in _CURVES.items():
        if name not in report["rows"][0]:  # a report that was measured before the score was
            continue
        axes.plot(scales, [row[name] for row in report["rows"]], "o-", label=label, color=colour)
    axes.set_xlabel("scale of the image prompt")
    axes.set_ylim(-0.05, 1.1)
    return _as_image(axes)


def _axes() -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(9, 4), dpi=150, layout="constrained").add_subplot()


def _as_image(axes: Any) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    canvas = FigureCanvasAgg(axes.figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
