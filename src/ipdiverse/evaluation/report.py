"""A study as one self-contained page: curves, images beside them, hypervolumes, every number."""

from __future__ import annotations

import base64
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ipdiverse.evaluation.bootstrap import difference, estimate, holm, hypervolume, interval
from ipdiverse.evaluation.dial_check import dial_table
from ipdiverse.evaluation.plots import LABELS, as_bytes, axes_of, tradeoff
from ipdiverse.evaluation.readings import FOLDER
from ipdiverse.writing import ensure_writable_folder, write_bytes_atomic, write_text_atomic

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ipdiverse.evaluation.measured import Done, Measured
    from ipdiverse.evaluation.study import Study

TITLE = "Variety against fidelity"
"""What a report is known by."""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
  color: #1d2330; background: #fbfbfd; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
img {{ max-width: 100%; }} .sets img {{ image-rendering: pixelated; border-radius: 4px; }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .85rem; }}
td, th {{ padding: .2rem .6rem; border-bottom: 1px solid #dde; text-align: right; }}
td:first-child, th:first-child {{ text-align: left; }} small {{ color: #667; }}
</style></head><body>
<h1>{title}</h1>
<p>{about}</p>
<div class="plots">{plots}</div>
{volumes}
{dials}
<h2>The images</h2>
<p>The same seeds in every row; the reference stands first.</p>
<div class="sets">{sets}</div>
<h2>Every number</h2>
<p>With 95 % intervals over pairs. Δ is the difference from “{baseline}”, drawn together; its
interval is that of one comparison, and a * marks those that hold together over all arms of a column
(Holm, 5 %).</p>
<div class="wide">{table}</div>
</body></html>
"""


def write_report(study: Study, done: Done, out: Path) -> Path:
    """Write `report.html` and its plots as PNG and SVG.

    Args:
        study: What was measured.
        done: Its arms and anchors, and the references that they were given.
        out: The folder.

    Returns:
        The page.
    """
    measured, references = done.measured, done.references
    plots = []
    for across, up in axes_of(measured):
        figure = tradeoff(measured, across, up)
        stem = f"{_slug(across)}-{_slug(up)}"
        for kind in ("png", "svg"):
            write_bytes_atomic(out / f"{stem}.{kind}", as_bytes(figure, kind))
        words = f"{LABELS.get(up, up)} over {LABELS.get(across, across)}; the numbers stand below"
        encoded = base64.b64encode(as_bytes(figure, "png")).decode()
        plots.append(f'<img src="data:image/png;base64,{encoded}" alt="{escape(words)}">')
    page = _PAGE.format(
        title=TITLE,
        about=_about(study, len(references)) + _left_out(done.left_out),
        plots="".join(plots),
        volumes=_volumes(study, done.hypervolumes),
        dials=dial_table(measured),
        sets=_sets(study, measured, references),
        baseline=escape(study.baseline_arm.name),
        table=_table(study, measured),
    )
    write_text_atomic(out / "report.html", page)
    write_bytes_atomic(out / "sets.png", as_bytes(_sets_figure(study, measured, references), "png"))
    return out / "report.html"


def publish(out: Path, target: Path) -> None:
    """Copy a study's numbers and pictures, without the images, to where a project keeps them.

    Args:
        out: A finished study's folder.
        target: The folder to write to; what is in it under other names stays.
    """
    folder = ensure_writable_folder(target)
    for file in (out / "results.json", *sorted(out.glob("*.svg")), *sorted(out.glob("*.png"))):
        write_bytes_atomic(folder / file.name, file.read_bytes())
    for file in sorted((out / FOLDER).glob("*.npz")):
        write_bytes_atomic(ensure_writable_folder(folder / FOLDER) / file.name, file.read_bytes())


def volumes(study: Study, measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Hypervolume of each family over each pair of axes, and its excess over the baseline's family.

    The corner is fixed, so that areas of one study can be compared with another's: 0 on every axis,
    and 1 for a Vendi score, which is that of equal images.

    Args:
        study: Names the baseline.
        measured: Arms and anchors.
    """
    arms = [one for one in measured if one.arm.family != "anchor"]
    families: dict[str, list[Measured]] = {}
    for one in arms:
        families.setdefault(one.arm.family, []).append(one)
    found = []
    for across, up in axes_of(measured):
        points = {
            name: [(one.parts(across), one.parts(up)) for one in members]
            for name, members in families.items()
        }
        corner = (1.0 if across.startswith("vendi") else 0.0, 0.0)
        areas = {name: hypervolume(group, corner) for name, group in points.items()}
        base, base_drawn = areas[study.baseline_arm.family]
        for name, (area, drawn) in areas.items():
            low, high = np.quantile(drawn - base_drawn, [0.025, 0.975])
            found.append(
                {
                    "axes": [across, up],
                    "family": name,
                    "area": round(area, 4),
                    "more": round(area - base, 4),
                    "more_low": round(float(low), 4),
                    "more_high": round(float(high), 4),
                }
            )
    return found


def _volumes(study: Study, rows: Sequence[dict[str, Any]]) -> str:
    if len({row["family"] for row in rows}) < 2:
        return ""
    body = "".join(
        f"<tr><td>{escape(row['family'])}</td><td>{escape(' × '.join(row['axes']))}</td>"
        f"<td>{row['area']:.4f}</td><td>{row['more']:+.4f}</td>"
        f"<td>{row['more_low']:+.4f} to {row['more_high']:+.4f}</td></tr>"
        for row in rows
    )
    return (
        "<h2>Hypervolume</h2><p>Area that a family dominates above a fixed corner; what it "
        f"has more than “{escape(study.baseline_arm.family)}”, with 95 % intervals.</p>"
        "<div class='wide'><table><tr><th>family</th><th>axes</th><th>area</th><th>more</th>"
        f"<th>95 %</th></tr>{body}</table></div>"
    )


def _about(study: Study, pairs: int) -> str:
    what = "held-out critters" if study.references is None else "your references"
    return (
        f"{pairs} pairs of a prompt and a reference ({what}), {study.images} images each, "
        f"{study.steps} steps, base {escape(study.base)}, seed {study.seed}. The noise of an image "
        "is the same in every arm."
    )


def _left_out(arms: list[str]) -> str:
    names = ", ".join(escape(name) for name in arms)
    return f" A part of the study; not drawn yet: {names}." if arms else ""


def _sets(study: Study, measured: Sequence[Measured], references: Sequence[Image.Image]) -> str:
    """The baseline, and of each family the arm that varies most while it keeps most."""
    rows = []
    for one, images in _chosen(study, measured):
        strips = [
            _strip(reference, drawn) for reference, drawn in zip(references, images, strict=False)
        ]
        pictures = "<br>".join(
            f'<img src="{inline(s)}" alt="{escape(one.arm.name)}, pair {i + 1}">'
            for i, s in enumerate(strips)
        )
        rows.append(f"<h3>{escape(one.arm.name)} <small>{_words(one)}</small></h3>{pictures}")
    return "".join(rows)


def _sets_figure(
    study: Study, measured: Sequence[Measured], references: Sequence[Image.Image]
) -> Any:
    """The first pair's set of every chosen arm, under each other."""
    from matplotlib.figure import Figure

    chosen = _chosen(study, measured)
    figure = Figure(figsize=(9, 1.25 * len(chosen)), dpi=100, layout="constrained")
    rows = figure.subplots(len(chosen), 1, squeeze=False)[:, 0]
    for axes, (one, images) in zip(rows, chosen, strict=True):
        axes.imshow(_strip(references[0], images[0]), interpolation="nearest")
        axes.set_title(one.arm.name, fontsize=8, loc="left", pad=2)
        axes.axis("off")
    return figure


def _chosen(study: Study, measured: Sequence[Measured]) -> list[tuple[Measured, np.ndarray]]:
    """Arms to show, with their images: anchors, the baseline first, the best of each family."""
    across, up = axes_of(measured)[0]
    best: dict[str, Measured] = {}
    for one in measured:
        if one.images is None:
            continue
        if one.arm.family == "anchor" or one.arm.name == study.baseline_arm.name:
            best[one.arm.name] = one
            continue
        product = [
            estimate(m.parts(across)) * estimate(m.parts(up))
            for m in (one, best.get(one.arm.family, one))
        ]
        if one.arm.family not in best or product[0] > product[1]:
            best[one.arm.family] = one
    first = best.get(study.baseline_arm.name)  # what all is compared with
    ordered = sorted(best.values(), key=lambda one: one is not first)
    return [(one, one.images) for one in ordered if one.images is not None]


def _words(one: Measured) -> str:
    names = [name for pair in axes_of([one]) for name in pair]
    said = [f"{LABELS.get(n, n)} {estimate(one.parts(n)):.2f}" for n in dict.fromkeys(names)]
    return escape(", ".join(said))


def _strip(reference: Image.Image, images: np.ndarray) -> Image.Image:
    """A reference and its set side by side."""
    side = images.shape[1]
    first = reference.convert("RGB").resize((images.shape[2], side))
    gap = max(4, side // 12)
    whole = Image.new("RGB", ((len(images) + 1) * (images.shape[2] + gap), side), "white")
    for position, picture in enumerate([first, *[Image.fromarray(image) for image in images]]):
        whole.paste(picture, (position * (images.shape[2] + gap), 0))
    return (
        whole.resize((whole.width * 2, whole.height * 2), Image.Resampling.NEAREST)
        if (side <= 96)
        else whole
    )


def _table(study: Study, measured: Sequence[Measured]) -> str:
    names = list(measured[0].runs[0])
    known = any(one.sets is not None for one in measured)
    head = "".join(f"<th>{escape(LABELS.get(name, name))}</th>" for name in names)
    head += f"<th>{escape(LABELS['leak'])}</th><th>{escape(LABELS['js'])}</th>" if known else ""
    baseline = next((m for m in measured if m.arm.name == study.baseline_arm.name), measured[0])
    others = [one for one in measured if one is not baseline]
    columns = {name: _column(others, baseline, name) for name in names}
    body = "".join(
        f"<tr><td>{escape(one.arm.name)}</td>"
        f"{''.join(_cell(one, name, columns[name].get(one.arm.name, '')) for name in names)}"
        f"{_plain_cell(one.leak) + _plain_cell(one.js) if known else ''}</tr>"
        for one in measured
    )
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def _column(others: Sequence[Measured], baseline: Measured, name: str) -> dict[str, str]:
    """By arm, what a score differs by from the baseline's."""
    apart = [difference(one.parts(name), baseline.parts(name)) for one in others]
    held = holm([found.p for found in apart])
    return {
        one.arm.name: f"<br><small>Δ {found.estimate:+.3f}{' *' if holds else ''} "
        f"({found.low:+.3f} to {found.high:+.3f})</small>"
        for one, found, holds in zip(others, apart, held, strict=True)
    }


def _cell(one: Measured, name: str, apart: str) -> str:
    found = interval(one.parts(name))
    if np.isnan(found.estimate):
        return "<td>-</td>"
    text = f"{found.estimate:.3f}<br><small>{found.low:.3f} to {found.high:.3f}</small>"
    return f"<td>{text}{apart}</td>"


def _plain_cell(found: tuple[float, float, float] | None) -> str:
    if found is None:
        return "<td>-</td>"
    estimate, low, high = found
    return f"<td>{estimate:.3f}<br><small>{low:.3f} to {high:.3f}</small></td>"


def _slug(name: str) -> str:
    kept = "".join(c if c.isalnum() else "-" for c in name.lower())
    return "-".join(part for part in kept.split("-") if part)


def inline(image: Image.Image) -> str:
    """An image as the address of itself, for a page of one file."""
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
