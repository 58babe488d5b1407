"""What the pages for contributors say of the code's layout is so."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "ipdiverse"
PAGE = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
TREE = PAGE.split("src/ipdiverse/\n")[1].split("```")[0]
ENTRY = re.compile(r"^( +)([\w.]+?/?)  +", re.MULTILINE)
MODULES = [
    file.relative_to(SOURCE)
    for file in sorted(SOURCE.rglob("*.py"))
    if not file.name.startswith("__")
]


def entries() -> dict[str, str]:
    """What the tree says of each folder, by its path; of what lies in none, under an empty one."""
    told: dict[str, str] = {"": ""}
    outer, now = "", ""
    for line in TREE.splitlines():
        found = ENTRY.match(line)
        if found and len(found[1]) <= 4:
            inside, name = len(found[1]) == 4, found[2]
            now = (f"{outer}{name}" if inside else name) if name.endswith("/") else ""
            outer = outer if inside else now
        told[now] = told.get(now, "") + line + "\n"
    return told


def named() -> list[str]:
    """Every file of Python that the page names, `{a,b}.py` as two."""
    return [
        before + part + ".py"
        for before, several, one in re.findall(r"((?:\w+/)*)(?:\{([\w,]+)\}|(\w+))\.py\b", PAGE)
        for part in (several or one).split(",")
    ]


def test_every_file_that_the_page_names_exists() -> None:
    places = ("src", "tests", "integrations", "studies", "benchmarks", "docs")
    there = [file.as_posix() for place in places for file in (ROOT / place).rglob("*.py")]
    gone = [name for name in named() if not any(file.endswith(f"/{name}") for file in there)]
    assert len(named()) > 100
    assert not gone


def test_every_module_is_named_where_its_folder_is() -> None:
    told = entries()
    folders = [f"{file.parent.as_posix()}/".removeprefix("./") for file in MODULES]
    unnamed = [
        str(file)
        for file, folder in zip(MODULES, folders, strict=True)
        if not re.search(rf"\b{file.stem}\b", told.get(folder, ""))
    ]
    assert not unnamed


def test_contributors_are_told_every_layer() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    told = page.split("```\ncli >")[1].split("```")[0]
    assert re.findall(r"\w+", " ".join(layers)) == ["cli", *re.findall(r"\w+", told)]
