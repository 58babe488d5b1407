"""The pages for contributors name files, functions and layers that exist."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "ipdiverse"
PAGE = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
TREE = PAGE.split("```\nsrc/ipdiverse/\n")[1].split("```")[0]
FILE = re.compile(r"`([\w./]+(?:/|\.(?:py|md|toml|yml)))`")
NAME_IN_FILE = re.compile(r"`(\w+)` (?:in|\() ?`([\w./]+\.py)`")


def named_in_tree(tree: str) -> list[Path]:
    """Every folder and file that the picture of the rooms names, by its indentation."""
    found: list[Path] = []
    above: dict[int, Path] = {0: SOURCE}
    for line in re.sub(r"\[[^\]]*\]", "", f"{tree}").splitlines():
        indent = len(line) - len(line.lstrip())
        words = line.replace("|", " ").split()
        if line.startswith("workshop/"):
            above = {0: ROOT / "workshop"}
            found.append(above[0])
            continue
        parent = above[max(level for level in above if level < indent or level == 0)]
        for word in words:
            path = parent / word.rstrip("/") if word.endswith("/") else parent / f"{word}.py"
            found.append(path)
        if len(words) == 1 and words[0].endswith("/"):
            above = {level: path for level, path in above.items() if level < indent}
            above[indent] = found[-1]
    return found


def where(name: str) -> Path | None:
    """A file or folder that the page names, from the repository or from the package."""
    return next((at / name for at in (ROOT, SOURCE) if (at / name).exists()), None)


def test_every_file_and_folder_in_the_picture_exists() -> None:
    named = named_in_tree(TREE)
    assert len(named) > 50
    assert not [str(path.relative_to(ROOT)) for path in named if not path.exists()]


def test_every_room_is_in_the_picture() -> None:
    rooms = {file.parent for file in SOURCE.rglob("*.py")} - {SOURCE}
    rooms |= {file.parent for file in (ROOT / "workshop").rglob("*.py")}
    assert not rooms - set(named_in_tree(TREE))


def test_every_file_in_the_text_exists() -> None:
    names = FILE.findall(PAGE)
    assert len(names) > 30
    assert not [name for name in names if where(name) is None]


@pytest.mark.parametrize(("name", "file"), NAME_IN_FILE.findall(PAGE))
def test_every_definition_in_the_text_is_in_its_file(name: str, file: str) -> None:
    path = where(file)
    assert path is not None, file
    defined = rf"^\s*(?:def|class) {name}\b|^{name}\b.*="
    assert re.search(defined, path.read_text("utf-8"), re.MULTILINE)


def test_the_page_is_one_page() -> None:
    assert len(PAGE.splitlines()) <= 100


def test_contributors_are_told_every_layer() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    told = page.split("```\ncli >")[1].split("```")[0]
    assert re.findall(r"\w+", " ".join(layers)) == ["cli", *re.findall(r"\w+", told)]
