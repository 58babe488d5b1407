"""A study as one self-contained page: curves, images, areas, every number."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image, ImageOps

from ipdiverse.evaluation.bootstrap import difference, estimate, holm, interval
from ipdiverse.evaluation.measured import (
    LABELS,
    NOT_SUMS,
    WORST,
    Done,
    Measured,
    axes_of,
    by_family,
    check_dials,
)
from ipdiverse.evaluation.sets import RETENTION_OF
from ipdiverse.evaluation.study import Study
from ipdiverse.sampling.draw import side_by_side
from ipdiverse.writing import write_bytes_atomic, write_text_atomic

TITLE = "Variety against fidelity"
"""The heading by which reports are recognised."""
_COLOURS = (
    *("#2962c9", "#d35400", "#1b7f4d", "#8e44ad", "#c0392b", "#00838f", "#7a6a00", "#ad1457"),
    *("#455a64", "#6d4c41"),
)
_MARKS = "os^Dv"
"""The next one once all colours are taken, so that no two families look alike."""
_ANCHOR = "#1d2330"


def write_report(study: Study, done: Done, out: Path) -> Path:
    """Write `report.html`, whose path is returned, and its plots as PNG and SVG."""
    measured, plots = done.measured, []
    for across, up in axes_of(measured):
        stem = re.sub(r"[\W_]+", "-", f"{across} {up}".lower()).strip("-")
        figure = tradeoff(measured, across, up)
        png = as_bytes(figure, "png")
        write_bytes_atomic(out / f"{stem}.png", png)
        write_bytes_atomic(out / f"{stem}.svg", as_bytes(figure, "svg"))
        words = f"{LABELS.get(up, up)} over {LABELS.get(across, across)}; the numbers are below"
        plots.append({"source": _png_address(png), "words": words})
    chosen = _chosen(study, measured)
    figure = _sets_figure(chosen, done.references)
    write_bytes_atomic(out / "sets.png", as_bytes(figure, "png"))
    several = len({row["family"] for row in done.hypervolumes}) > 1
    labels, rows = _table(study, measured)
    page = render_page(
        "report.html",
        title=TITLE,
        study=study,
        pairs=len(done.references),
        left_out=done.left_out,
        plots=plots,
        areas=done.hypervolumes if several else [],
        dials=check_dials(measured),
        sets=[_set(one, images, done.references) for one, images in chosen],
        labels=labels,
        rows=rows,
    )
    write_text_atomic(out / "report.html", page)
    return out / "report.html"


def render_page(template: str, **values: Any) -> str:
    """A template of this package with values; their text is escaped."""
    environment = Environment(
        loader=PackageLoader("ipdiverse.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,  # a value that is missing fails rather than shows as nothing
        trim_blocks=True,
    )
    return environment.get_template(template).render(values)


def inline(image: Image.Image) -> str:
    """An image as an address that holds all of it, for pages that are one file."""
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return _png_address(buffer.getvalue())


def as_bytes(figure: Any, kind: str) -> bytes:
    """A figure as `png` or `svg`."""
    import matplotlib as mpl

    buffer = BytesIO()
    # neither the time nor random names: the same study gives the same bytes
    with mpl.rc_context({"svg.hashsalt": "ipdiverse"}):
        figure.savefig(buffer, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def inline_figure(figure: Any) -> str:
    """A figure as `inline` has images."""
    return _png_address(as_bytes(figure, "png"))


def new_axes(width: float, height: float) -> Any:
    """Axes that fill a new figure of a size in inches."""
    from matplotlib.figure import Figure

    # not pyplot: it keeps every figure in memory, and may look for a display
    axes = Figure(figsize=(width, height), dpi=150, layout="constrained").add_subplot()
    axes.grid(alpha=0.25)
    return axes


def with_legend(axes: Any) -> Any:
    """The figure of axes, with a legend right of them."""
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return axes.figure


def tradeoff(measured: Sequence[Measured], across: str, up: str) -> Any:
    """Plot a score over another: every family with its intervals, and anchors."""
    axes = new_axes(8.5, 5)
    families = by_family(measured)
    anchors = families.pop("anchor", [])
    for number, (family, arms) in enumerate(families.items()):
        _draw_family(axes, family, arms, across, up, number)
    for one in anchors:
        x, y = (estimate(one.sums(name)) for name in (across, up))
        axes.plot(x, y, "*", color=_ANCHOR, markersize=12)
        axes.annotate(one.arm.name, (x, y), (6, 5), textcoords="offset points", fontsize=8)
    axes.set_xlabel(LABELS.get(across, across))
    axes.set_ylabel(LABELS.get(up, up))
    return with_legend(axes)


def _draw_family(
    axes: Any, family: str, arms: Sequence[Measured], across: str, up: str, number: int
) -> None:
    again, nth = divmod(number, len(_COLOURS))
    colour, mark = _COLOURS[nth], _MARKS[again % len(_MARKS)]
    placed = all(one.arm.at is not None for one in arms)
    ordered = sorted(arms, key=lambda one: one.arm.at or 0.0) if placed else arms
    # estimates, low and high ends of each arm
    x, y = (np.array([interval(one.sums(name)) for one in ordered]).T for name in (across, up))
    joined = "-" if len(arms) > 1 and placed else ""
    axes.errorbar(
        *(x[0], y[0]),
        xerr=[x[0] - x[1], x[2] - x[0]],
        yerr=[y[0] - y[1], y[2] - y[0]],
        fmt=f"{mark}{joined}",
        color=colour,
        markersize=4,
        elinewidth=0.8,
        alpha=0.9,
        label=family,
    )
    if joined:
        axes.fill_between(x[0], y[1], y[2], color=colour, alpha=0.1, linewidth=0)
        small = {"textcoords": "offset points", "fontsize": 6, "color": colour}
        for one, at in zip(ordered, zip(x[0], y[0], strict=True), strict=True):
            axes.annotate(f"{one.arm.at:g}", at, (3, 3), **small)


def _chosen(study: Study, measured: Sequence[Measured]) -> list[tuple[Measured, np.ndarray]]:
    """Arms to show, with their images: the baseline first, the best of each family, anchors.

    The best varies most for what it keeps: it has the largest product of the two main scores.
    """
    across, up = axes_of(measured)[0]

    def product(one: Measured) -> float:
        return estimate(one.sums(across)) * estimate(one.sums(up))

    best: dict[tuple[bool, str], Measured] = {}
    for one in measured:
        alone = one.arm.family == "anchor" or one.arm.name == study.baseline_arm.name
        key = (alone, one.arm.name if alone else one.arm.family)
        if one.images is not None and (key not in best or product(one) > product(best[key])):
            best[key] = one
    first = best.get((True, study.baseline_arm.name))
    ordered = sorted(best.values(), key=lambda one: one is not first)
    return [(one, one.images) for one in ordered if one.images is not None]


def _set(one: Measured, images: np.ndarray, references: Sequence[Image.Image]) -> dict[str, Any]:
    """An arm's images of a few pairs, with its main scores in words."""
    names = dict.fromkeys(name for pair in axes_of([one]) for name in pair)
    words = [f"{LABELS.get(name, name)} {estimate(one.sums(name)):.2f}" for name in names]
    pairs = zip(references, images, strict=False)
    strips = [inline(_strip(reference, drawn)) for reference, drawn in pairs]
    return {"name": one.arm.name, "words": ", ".join(words), "strips": strips}


def _sets_figure(
    chosen: Sequence[tuple[Measured, np.ndarray]], references: Sequence[Image.Image]
) -> Any:
    """The first pair's set of every chosen arm, one below the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.25 * len(chosen)), dpi=100, layout="constrained")
    rows = figure.subplots(len(chosen), 1, squeeze=False)[:, 0]
    for axes, (one, images) in zip(rows, chosen, strict=True):
        axes.imshow(_strip(references[0], images[0]), interpolation="nearest")
        axes.set_title(one.arm.name, fontsize=8, loc="left", pad=2)
        axes.axis("off")
    return figure


def _strip(reference: Image.Image, images: np.ndarray) -> Image.Image:
    """A reference and its set side by side, enlarged where they are as small as critters."""
    _, height, width, _ = images.shape
    shown = [reference.convert("RGB").resize((width, height)), *map(Image.fromarray, images)]
    gap = (0, 0, max(4, height // 12), 0)
    whole = side_by_side([ImageOps.expand(one, gap, "white") for one in shown])
    larger = (whole.width * 2, whole.height * 2)
    return whole.resize(larger, Image.Resampling.NEAREST) if height <= 96 else whole


def _table(study: Study, measured: Sequence[Measured]) -> tuple[list[str], list[dict[str, Any]]]:
    """Heads of columns, and rows of cells: an interval, its difference, and whether that holds."""
    # readings of another time may lack a score: its cell shows a dash
    names = list(dict.fromkeys(name for one in measured for name in one.names))
    baseline = next((m for m in measured if m.arm.name == study.baseline_arm.name), measured[0])
    rows: list[list[dict[str, Any]]] = [[] for _ in measured]
    for name in names:
        compared = [m for m in measured if m is not baseline and name in m.names]
        compared = compared if name in baseline.names else []
        less = {m.arm.name: difference(m.sums(name), baseline.sums(name)) for m in compared}
        held = dict(zip(less, holm([one.p for one in less.values()]), strict=True))
        for row, one in zip(rows, measured, strict=True):
            found = interval(one.sums(name)) if name in one.names else None
            apart = less.get(one.arm.name)
            row.append({"found": found, "less": apart, "holds": held.get(one.arm.name, False)})
            if name == WORST and one.worst is not None:
                row[-1]["note"] = one.worst.removeprefix(RETENTION_OF)
    for name in NOT_SUMS if any(one.sets is not None for one in measured) else ():
        names.append(name)
        for row, one in zip(rows, measured, strict=True):
            row.append({"found": getattr(one, name), "less": None})
    heads = [LABELS.get(name, name) for name in names]
    arms = [{"name": one.arm.name, "seeds": len(one.runs)} for one in measured]
    return heads, [arm | {"cells": row} for arm, row in zip(arms, rows, strict=True)]


def _png_address(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()
