"""The page that `make demo` opens: the dial at a glance, and what a plain image prompt does."""

from __future__ import annotations

import json
import shlex
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ipdiverse.base.bases import (
    CRITTERS,
    DEFAULT_ADAPTER,
    adapter_source,
    copier_report,
    load_base,
)
from ipdiverse.critters.render import render
from ipdiverse.critters.scene import Scene
from ipdiverse.evaluation.report import inline
from ipdiverse.labels import apart
from ipdiverse.provenance import save_png
from ipdiverse.sampling.request import Request
from ipdiverse.sampling.sample import Job, attached, dial_for, sample
from ipdiverse.writing import ensure_writable_folder, write_text_atomic

if TYPE_CHECKING:
    from pathlib import Path

    from ipdiverse.base.bases import Base
    from ipdiverse.dial import Dial

DIAL = (0.0, 0.5, 1.0)
SCALES = (0.25, 0.5, 1.0)
PER_SCALE = 6
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
    "retention": ("identity kept", "#1b7f4d"),
    "contradict_accuracy": ("prompt obeyed where it contradicts the reference", "#2962c9"),
    "entropy": ("variety of what nobody fixed (1 = the world's own)", "#8e44ad"),
    "copy_rate": ("copies of the whole scene, minus chance", "#d35400"),
}

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>ipdiverse: the dial</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem;
  color: #1d2330; background: #fbfbfd; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
figure {{ margin: 0; }} figcaption {{ font-size: .85rem; color: #566; }}
img {{ image-rendering: pixelated; border-radius: 6px; max-width: 100%; }}
.reference {{ display: flex; gap: 1.5rem; align-items: center; flex-wrap: wrap; }}
.reference img {{ border: 3px solid #1d2330; }}
.row {{ display: grid; grid-template-columns: 7rem repeat({per_scale}, 1fr); gap: .5rem;
  align-items: center; margin-bottom: .5rem; }}
.row img {{ width: 100%; }} .plot img {{ image-rendering: auto; width: 100%; }}
code {{ background: #eef; padding: .1rem .3rem; border-radius: 4px; }}
table {{ border-collapse: collapse; font-size: .9rem; }}
td, th {{ padding: .2rem .7rem; border-bottom: 1px solid #dde; text-align: right; }}
</style></head><body>
<h1>Variety without losing what you asked for</h1>
<div class="reference"><figure><img src="{reference}" width="160" height="160"
 alt="the reference: {reference_words}"><figcaption>reference</figcaption></figure>
<div>Prompt: <b>“{prompt}”</b><br>The same seeds in every row.</div></div>
<h2>The dial</h2>
<p>{dial}: 0 is stock IP-Adapter.</p>
{dial_rows}
{curve}
<h2>What users have today: plain IP-Adapter (plus) at three scales</h2>
{rows}
{numbers}
</body></html>
"""


def make_demo(out: Path) -> Path:
    """Generate the images, draw the plot, write one self-contained page.

    Args:
        out: Folder for the page and its images.

    Returns:
        The page.

    Raises:
        OutputError: The folder cannot be written.
    """
    ensure_writable_folder(out)
    reference = Image.fromarray(render(REFERENCE, seed=5))
    save_png(reference, out / "reference.png", {"scene": REFERENCE.as_dict()})
    base = load_base(CRITTERS)
    turned, dial = _turned(base, reference)
    dial_rows = [_row(f"diversity {d:g}", images) for d, images in turned.items()]
    scaled = _scaled(base, reference)
    rows = "\n".join(_row(f"scale {scale:g}", images) for scale, images in scaled.items())
    page = _PAGE.format(
        dial=escape(f"Adapter {DEFAULT_ADAPTER}, {dial.source}"),
        dial_rows="\n".join(dial_rows),
        curve=_curve(dial),
        per_scale=PER_SCALE,
        reference=inline(reference),
        reference_words=escape(", ".join(REFERENCE.as_dict().values())),
        prompt=escape(PROMPT),
        rows=rows,
        numbers=_numbers(),
    )
    write_text_atomic(out / "index.html", page)
    return out / "index.html"


def _jobs(reference: Image.Image) -> list[Job]:
    return [Job(PROMPT, 0, index, reference) for index in range(PER_SCALE)]


def _turned(base: Base, reference: Image.Image) -> tuple[dict[float, list[Image.Image]], Dial]:
    """Images at each setting of the default adapter's dial, and the dial."""
    images = {}
    with attached(base, adapter_source(CRITTERS, DEFAULT_ADAPTER)) as attachment:
        for setting in DIAL:
            request = Request(n=1, guidance_scale=base.guidance_scale, diversity=setting)
            images[setting] = sample(base, _jobs(reference), request, attachment)
        return images, dial_for(attachment.adapters[0])


def _scaled(base: Base, reference: Image.Image) -> dict[float, list[Image.Image]]:
    """Images of plain IP-Adapter at each scale."""
    request = Request(n=1, guidance_scale=base.guidance_scale)
    images = {}
    with attached(base, adapter_source(CRITTERS, "plus")) as attachment:
        for scale in SCALES:
            attachment.set_scale(scale)
            images[scale] = sample(base, _jobs(reference), request, attachment)
    return images


def _row(label: str, images: list[Image.Image]) -> str:
    cells = "".join(
        f'<img src="{inline(image)}" alt="image {index} at {escape(label)}">'
        for index, image in enumerate(images)
    )
    return f'<div class="row"><b>{escape(label)}</b>{cells}</div>'


def _curve(dial: Dial) -> str:
    """Variety against identity kept: the dial's points, and the scales of plain IP-Adapter."""
    file = copier_report("plus")
    if not dial.achieved or not file.is_file():
        return ""
    picture = plot_dial(dial, json.loads(file.read_text()))
    words = "identity kept over variety: the dial's points, and plain IP-Adapter's scales"
    return f'<div class="plot"><img src="{inline(picture)}" alt="{words}"></div>'


def plot_dial(dial: Dial, report: dict[str, Any]) -> Image.Image:
    """Identity kept over variety, dial and λ sweep on the same axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
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
        told = apart([x for x, _, _ in curve]) if curve is points else range(len(curve))
        for x, y, words in (curve[index] for index in told):
            axes.annotate(words, (x, y), (4, 4), textcoords="offset points", fontsize=7)
    axes.set_xlabel("variety of what nobody fixed (1 = the world's own)")
    axes.set_ylabel("identity kept")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return _drawn(figure)


def _numbers() -> str:
    """Plot and table of each shipped measurement."""
    parts = []
    for adapter, title in (("plus", "plus, 16 tokens"), ("base", "base, 4 tokens")):
        file = copier_report(adapter)
        if file.is_file():
            parts.append(_measured(json.loads(file.read_text()), title))
    return "\n".join(parts)


def _measured(report: dict[str, Any], title: str) -> str:
    head = "".join(f"<th>{escape(label)}</th>" for label, _ in _CURVES.values())
    rows = [(f"scale {row['scale']:g}", row) for row in report["rows"]]
    body = "".join(
        f"<tr><td>{escape(name)}</td>" + "".join(f"<td>{_cell(row[c])}</td>" for c in _CURVES)
        for name, row in [*rows, *report["anchors"].items()]
    )
    return (
        f"<h2>{escape(title)}: measured on {report['pairs']} held-out references × "
        f"{report['images']} images</h2>"
        f'<div class="plot"><img src="{inline(plot(report))}" alt="the table below, as curves">'
        f"</div><table><tr><th></th>{head}</tr>{body}</table>"
        "<p>An ideal image prompt keeps identity and prompt near 1, has the variety of the world "
        "itself (1), and copies nothing (0): the renderer's row. Remake the numbers with "
        f"<code>{escape(copier_command(report))}</code>.</p>"
    )


def copier_command(report: dict[str, Any]) -> str:
    """The command that measures a report again."""
    scales = " ".join(f"{row['scale']:g}" for row in report["rows"])
    numbers = " ".join(
        f"--{name} {report[name]:g}" for name in ("pairs", "images", "steps", "guidance")
    )
    adapter = shlex.quote(report["adapter"])
    return f"python -m workshop copier --adapter {adapter} {numbers} --scales {scales}"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def plot(report: dict[str, Any]) -> Image.Image:
    """Curves over the scale, with the measured points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    scales = [row["scale"] for row in report["rows"]]
    for name, (label, colour) in _CURVES.items():
        axes.plot(scales, [row[name] for row in report["rows"]], "o-", label=label, color=colour)
    axes.set_xlabel("scale of the image prompt")
    axes.set_ylim(-0.05, 1.1)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return _drawn(figure)


def _drawn(figure: Any) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
