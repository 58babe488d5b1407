"""What the study found, read from docs/study/ at each build: plots, areas, every number.

`python -m workshop study --publish` copies its `results.json` and pictures there, without the
images. As long as they are missing, the pages say that the study has not been run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "study"
MARK, CURVE = "<!-- study -->", "<!-- curve -->"
ABSENT = "The study has not been run yet: nothing is claimed until it has."


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put results where the marks are."""
    above = "../" * page.file.src_uri.count("/")
    if MARK in markdown:
        markdown = markdown.replace(MARK, results(FOLDER, f"{above}study/"))
    if CURVE in markdown:
        markdown = markdown.replace(CURVE, curve(FOLDER, f"{above}study/"))
    return markdown


def results(folder: Path, at: str) -> str:
    """Everything that a folder holds, as Markdown.

    Args:
        folder: Where `results.json`, plots and `report.html` are.
        at: The same folder as a link from the page.
    """
    file = folder / "results.json"
    if not file.is_file():
        return ABSENT
    report = json.loads(file.read_text("utf-8"))
    parts = [_about(report), *_pictures(folder, at)]
    if (folder / "report.html").is_file():
        parts.append(f"[The whole report]({at}report.html) with images and every number.")
    for title, rows in (("Areas", _areas(report)), ("Dials", _dials(report))):
        parts += [f"## {title}", _table(rows)] if len(rows) > 1 else []
    return "\n\n".join([*parts, "## Every arm", _table(_arms(report))])


def curve(folder: Path, at: str) -> str:
    """The plot of variety against the identity kept, or the first one, if there is any."""
    found = _pictures(folder, at)
    return next((one for one in found if "retention" in one), next(iter(found), ABSENT))


def _about(report: dict[str, Any]) -> str:
    study = report["study"]
    return (
        f"{study['pairs']} pairs of a prompt and a reference, {study['images']} images of each, "
        f"{study['steps']} steps, base {study['base']}. Differences are taken from "
        f"“{report['baseline']}”. Brackets hold 95 % intervals over pairs."
    )


def _pictures(folder: Path, at: str) -> list[str]:
    """Each plot once, as SVG where there is one."""
    found = {file.stem: file for kind in ("png", "svg") for file in folder.glob(f"*.{kind}")}
    return [f"![{stem.replace('-', ' ')}]({at}{found[stem].name})" for stem in sorted(found)]


def _areas(report: dict[str, Any]) -> list[list[str]]:
    """Area that each family covers, and what it has more than the baseline's."""
    rows = [["family", "axes", "area", "more than the baseline's"]]
    for one in report.get("hypervolumes", ()):
        more = _score([one["more"], one["more_low"], one["more_high"]])
        rows.append([one["family"], " × ".join(one["axes"]), f"{one['area']:.3f}", more])
    return rows


def _dials(report: dict[str, Any]) -> list[list[str]]:
    """How straight each dial is, and the cost of its worst setting."""
    rows = [["dial", "straightness R²", "least identity kept (share)", "worst change in prompt"]]
    for one in report.get("dials", ()):
        straight = f"{one['r_squared']:.3f} (≥ {one['r_squared_low']:.2f})"
        cost = _score(one["accuracy_change"])
        rows.append([one["family"], straight, f"{one['kept']:.3f}", cost])
    return rows


def _arms(report: dict[str, Any]) -> list[list[str]]:
    """A line for each arm, a column for each score that any of them has."""
    arms = report["arms"]
    names = list(dict.fromkeys(name for arm in arms for name in arm["scores"]))
    rows = [["arm", *(name.replace("_", " ") for name in names)]]
    for arm in arms:
        rows.append([arm["name"], *(_score(arm["scores"].get(name)) for name in names)])
    return rows


def _table(rows: list[list[str]]) -> str:
    """Markdown; the first row is the head."""
    lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    lines.insert(1, " | ".join(["---"] * len(rows[0])))
    return "\n".join(f"| {line} |" for line in lines)


def _score(found: list[float | None] | None) -> str:
    """`0.512 (0.49 to 0.53)`; a dash for what could not be measured."""
    if found is None or None in found:
        return "-"
    return "{:.3f} ({:.2f} to {:.2f})".format(*found)
