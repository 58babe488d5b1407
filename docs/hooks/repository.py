"""Show files outside docs/ as pages of the site, and make links between files links between pages.

In the sources every link is a path, so it works on code hosts too. A link to a file that the site
does not show becomes plain text.
"""

from __future__ import annotations

import ast
import json
import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
DOCS = "docs/"
PAGES = {
    "README.md": "project/readme.md",
    "ARCHITECTURE.md": "project/architecture.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
}
FOLDERS = {"examples": "examples/index.md", "docs/adr": "adr/index.md"}
_ORIGINS = {page: file for file, page in PAGES.items()}
_LINK = re.compile(r"(?P<image>!?)\[(?P<words>[^\]]*)\]\((?P<target>[^)\s]+)\)")
_FENCED = re.compile(r"(^\s*```.*?^\s*```\s*$)", re.MULTILINE | re.DOTALL)
_LOG = logging.getLogger("mkdocs.hooks.repository")


def on_config(config: Any) -> Any:
    """Spell out `FOLDER/*` in the navigation."""
    config.nav = _spelled_out(config.nav)
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made from other files."""
    made = {page: (ROOT / file).read_text("utf-8") for file, page in PAGES.items()}
    for example in _examples():
        made[f"examples/{example.stem}.md"] = example_page(example)
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        made[f"notebooks/{notebook.stem}.md"] = notebook_page(notebook)
    made["examples/index.md"] = _index("Examples", "examples", made)
    records = {f"adr/{file.name}": file.read_text("utf-8") for file in _records()}
    made["adr/index.md"] = _index("Decisions", "adr", records)
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files into links between pages."""
    uri: str = page.file.src_uri
    if page.file.generated_by and uri not in _ORIGINS:
        return markdown
    return relinked(markdown, _ORIGINS.get(uri, DOCS + uri), uri)


def relinked(markdown: str, origin: str, page: str) -> str:
    """Point every link to a file at its page instead.

    Args:
        markdown: Text with links as paths.
        origin: Where it stands in the repository.
        page: Where it is shown in the site.
    """

    def changed(link: re.Match[str]) -> str:
        target, hash_, anchor = link["target"].partition("#")
        if not target or "://" in target or target.startswith("mailto:"):
            return link[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        shown = _page_of(file)
        if shown is None:
            if not (ROOT / file).exists():
                _LOG.warning("%s: %s does not exist", origin, file)
            return link["words"]
        relative = posixpath.relpath(shown, posixpath.dirname(page) or ".")
        return f"{link['image']}[{link['words']}]({relative}{hash_}{anchor})"

    parts = _FENCED.split(markdown)
    return "".join(p if _FENCED.fullmatch(p) else _LINK.sub(changed, p) for p in parts)


def example_page(file: Path) -> str:
    """An example's first lines as text, and its code."""
    code = file.read_text("utf-8")
    first, _, rest = (ast.get_docstring(ast.parse(code)) or file.stem).partition("\n")
    shown = code.split('"""\n', 1)[1].strip()
    title = file.stem.replace("_", " ").capitalize()
    usage = _indented_commands(rest)
    return f"# {title}\n\n{first}\n\n{usage}\n\n```python\n{shown}\n```\n"


def notebook_page(file: Path) -> str:
    """A notebook's text and code, without what it printed."""
    cells = json.loads(file.read_text("utf-8"))["cells"]
    parts = []
    for cell in cells:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def _indented_commands(text: str) -> str:
    """Paragraphs of a docstring; those that are commands in a block."""
    paragraphs = [part.strip() for part in text.strip().split("\n\n") if part.strip()]
    return "\n\n".join(
        f"```text\n{part}\n```" if part.startswith("python ") else part for part in paragraphs
    )


def _page_of(file: str) -> str | None:
    """Where the site shows a file of the repository."""
    if file in PAGES or file in FOLDERS:
        return PAGES.get(file) or FOLDERS[file]
    if file.startswith(DOCS) and (ROOT / file).is_file():
        return file.removeprefix(DOCS)
    if re.fullmatch(r"(examples/\w+\.py|notebooks/\w+\.ipynb)", file) and (ROOT / file).is_file():
        return posixpath.splitext(file)[0] + ".md"
    return None


def _index(title: str, folder: str, pages: dict[str, str]) -> str:
    """A page that lists the others of its folder by their titles."""
    lines = [
        f"- [{text.partition(chr(10))[0].removeprefix('# ')}]({page.removeprefix(folder + '/')})"
        for page, text in pages.items()
        if page.startswith(f"{folder}/")
    ]
    return f"# {title}\n\n" + "\n".join(lines) + "\n"


def _spelled_out(nav: list[Any]) -> list[Any]:
    entries = []
    for entry in nav:
        ((title, value),) = entry.items()
        if isinstance(value, list):
            value = _spelled_out(value)
        elif value.endswith("/*"):
            value = _pages_of(value.removesuffix("/*"))
        entries.append({title: value})
    return entries


def _pages_of(folder: str) -> list[str]:
    names = {"adr": _records, "examples": _examples}[folder]()
    return [f"{folder}/index.md", *(f"{folder}/{file.stem}.md" for file in names)]


def _examples() -> list[Path]:
    return sorted((ROOT / "examples").glob("*.py"))


def _records() -> list[Path]:
    return sorted((ROOT / "docs" / "adr").glob("[0-9]*.md"))
