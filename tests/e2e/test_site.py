"""The site builds without a warning, needs no other server, and shows what the code has now."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from html import unescape
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import ipdiverse
from ipdiverse.cli import COMMANDS
from ipdiverse.commands.cluster import Spread
from ipdiverse.commands.generate import Generate
from ipdiverse.evaluation.report import write_report
from ipdiverse.evaluation.running import Runner
from ipdiverse.evaluation.study import Arm, Study
from ipdiverse.levers import LEVERS
from ipdiverse.sampling.request import Request
from tests.fences import ROOT, pages

DOCS = ROOT / "docs"
CHROMIUM = Path("/usr/bin/chromium")
QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
METRICS = ("metrics.leak", "metrics.vendi", "sets.score_sets", "bootstrap.hypervolume")


def build(folder: Path, config: Path) -> subprocess.CompletedProcess[str]:
    words = ["mkdocs", "build", "--strict", "--config-file", str(config), "--site-dir", str(folder)]
    return subprocess.run(
        [sys.executable, "-m", *words],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(folder, ROOT / "mkdocs.yml")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def hook(request: pytest.FixtureRequest) -> ModuleType:
    """A hook by name: hooks are files that mkdocs loads, not a package."""
    file = DOCS / "hooks" / f"{request.param}.py"
    spec = importlib.util.spec_from_file_location(f"docs_{request.param}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_there_and_can_be_searched(site: Path) -> None:
    wanted = {file.relative_to(DOCS).with_suffix(".html").as_posix() for file in pages()[1:]}
    wanted |= {f"examples/{file.stem}.html" for file in (ROOT / "examples").glob("*.py")}
    wanted |= {f"project/{name}.html" for name in ("readme", "architecture", "changelog")}
    built = {file.relative_to(site).as_posix() for file in site.rglob("*.html")}
    assert wanted <= built
    index = json.loads((site / "search" / "search_index.json").read_text("utf-8"))
    found = {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert wanted <= found
    home = (site / "index.html").read_text("utf-8")
    linked = set(re.findall(r'href="([^"#:]+\.html)', home))
    assert wanted - {"index.html"} <= linked, "every page is in the menu"


def test_nothing_comes_from_another_server(site: Path) -> None:
    loads = re.compile(
        r"<(?:script|img|iframe|source|video|audio|embed|object)\b[^>]*\b(?:src|data)=[\"']?(?:https?:)?//"
        r"|<link\b(?![^>]*rel=[\"']?canonical)[^>]*\bhref=[\"']?(?:https?:)?//"
    )
    for file in site.rglob("*.html"):
        assert not loads.search(file.read_text("utf-8")), file
    fetched = re.compile(r"(url\([\"']?|@import\s+[\"'])(https?:)?//")
    for file in [*site.rglob("*.css"), *site.rglob("*.svg")]:
        assert not fetched.search(file.read_text("utf-8")), file


def test_the_reference_has_everything_public(site: Path) -> None:
    html = (site / "reference" / "python.html").read_text("utf-8")
    for name in ipdiverse.__all__:
        thing = getattr(ipdiverse, name)
        assert f'id="{thing.__module__}.{thing.__qualname__}"' in html, name
    html = (site / "reference" / "measures.html").read_text("utf-8")
    for name in METRICS:
        assert f'id="ipdiverse.evaluation.{name}"' in html, name


def test_the_command_line_is_that_of_the_parsers(site: Path) -> None:
    html = unescape((site / "reference" / "command-line.html").read_text("utf-8"))
    assert "generate" in COMMANDS
    for name in COMMANDS:
        assert f"usage: ipdiverse {name} [-h]" in html, name
    names = [field.name for kind in (Request, Generate, Spread) for field in fields(kind)]
    for name in {*names, *LEVERS} - {"request", "levers", "spread"}:
        assert f"--{name.replace('_', '-')}" in html, name


def test_a_mistake_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# Home\n\n[gone](gone.md)\n")
    (tmp_path / "docs" / "lost.md").write_text("# In no menu\n")
    config = (ROOT / "mkdocs.yml").read_text("utf-8")
    kept = config.partition("hooks:\n")[0] + config[config.index("markdown_extensions:") :]
    kept = kept.partition("nav:\n  -")[0] + "nav:\n  - Home: index.md\n"
    (tmp_path / "mkdocs.yml").write_text(kept)
    done = build(tmp_path / "site", tmp_path / "mkdocs.yml")
    assert done.returncode == 1
    assert "gone.md" in done.stderr
    assert "lost.md" in done.stderr


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_work_where_the_sources_are_shown(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_gates_are_those_of_the_shipped_model() -> None:
    page = (DOCS / "critters.md").read_text("utf-8").partition("<!-- gates -->")[2]
    shown = dict(re.findall(r"^\| (\w+) \| ([\d.]+) \|", page.partition("\n##")[0], re.MULTILINE))
    weights = ROOT / "src" / "ipdiverse" / "critters" / "weights"
    gates = json.loads((weights / "provenance.json").read_text("utf-8"))["gates"]
    # validity was read by the oracle that these gates were measured with, which was nearly blind
    figures = {n: value for n, value in gates["figures"].items() if "invalid" not in n}
    assert shown.keys() == figures.keys()
    for name, value in figures.items():
        assert float(shown[name]) == pytest.approx(value, rel=1e-3, abs=1e-4), name
    assert f"{gates['images']} images, {gates['steps']} steps" in page


@pytest.mark.parametrize("hook", ["repository"], indirect=True)
def test_links_to_files_become_links_to_pages(
    hook: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    def shown(text: str, origin: str = "docs/guides/vary.md", page: str = "guides/vary.md") -> str:
        return hook.relinked(text, origin, page)

    assert shown("[e](../../examples/face.py)") == "[e](../examples/face.md)"
    assert shown("[v](../variety.md#levers)") == "[v](../variety.md#levers)"
    assert shown("[a](../adr)") == "[a](../adr/index.md)"
    assert shown("[s](../../src/ipdiverse/cli.py)") == "s", "not shown in the site"
    assert shown("[h](https://a.b/c) [#](#levers)") == "[h](https://a.b/c) [#](#levers)"
    assert shown("```\n[x](gone.md)\n```") == "```\n[x](gone.md)\n```"
    assert shown("[d](docs/faq.md)", "README.md", "project/readme.md") == "[d](../faq.md)"
    assert not caplog.records
    shown("[x](gone.md)")
    assert "docs/guides/gone.md does not exist" in caplog.text, "mkdocs counts it as a warning"


@pytest.mark.parametrize("hook", ["repository"], indirect=True)
def test_a_notebook_becomes_a_page(hook: ModuleType, tmp_path: Path) -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "text"]},
        {"cell_type": "code", "source": ["x = 1\n", "x"], "outputs": [{"text": "1"}]},
    ]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}))
    page = hook.notebook_page(tmp_path / "a.ipynb")
    assert page == "# Title\ntext\n\n```python\nx = 1\nx\n```\n"


@pytest.mark.parametrize("hook", ["fences"], indirect=True)
def test_what_a_block_needs_or_why_it_is_not_run_is_its_title(hook: ModuleType) -> None:
    text = '```bash no-run="takes hours"\nmake study\n```\n'
    assert hook.on_page_markdown(text) == text.replace("no-run", "title")
    text = '- x\n\n  ```python needs="weights"\n  x\n  ```\n'
    assert hook.on_page_markdown(text) == text.replace('needs="', 'title="needs ')


@pytest.mark.parametrize("hook", ["study"], indirect=True)
def test_the_study_is_read_from_its_folder(
    hook: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hook, "FOLDER", tmp_path)
    page = SimpleNamespace(file=SimpleNamespace(src_uri="study/index.md"))
    text = f"{hook.MARK}\n\n{hook.CURVE}"
    assert hook.on_page_markdown(text, page) == f"{hook.ABSENT}\n\n{hook.ABSENT}"

    arms = [
        {"name": "plain | 1", "scores": {"entropy": [0.25, 0.2, 0.3], "leak": [None, None, None]}},
        {"name": "dial", "scores": {"entropy": [0.5, 0.45, 0.55]}},
    ]
    study = {"pairs": 7, "images": 5, "steps": 3, "base": "critters"}
    more = {"more": 0.04, "more_low": 0.01, "more_high": 0.07}
    areas = [{"family": "dial", "axes": ["entropy", "retention"], "area": 0.4, **more}]
    dial = {"family": "dial", "r_squared": 0.98, "r_squared_low": 0.91, "kept": 0.97}
    report = {
        "study": study,
        "baseline": "plain | 1",
        "arms": arms,
        "hypervolumes": areas,
        "dials": [{**dial, "accuracy_change": None}],
    }
    (tmp_path / "results.json").write_text(json.dumps(report))
    for name in (
        "entropy-prompt.svg",
        "entropy-retention.svg",
        "entropy-retention.png",
        "report.html",
    ):
        (tmp_path / name).write_text("x")
    shown = hook.on_page_markdown(text, page)
    assert "7 pairs of a prompt and a reference, 5 images of each, 3 steps" in shown
    assert shown.count("![entropy retention](../study/entropy-retention.svg)") == 2
    assert "| plain \\| 1 | 0.250 (0.20 to 0.30) | - |" in shown
    assert "| dial | 0.500 (0.45 to 0.55) | - |" in shown
    assert "| dial | entropy × retention | 0.400 | 0.040 (0.01 to 0.07) |" in shown
    assert "| dial | 0.980 (≥ 0.91) | 0.970 | - |" in shown
    assert "](../study/report.html)" in shown


@pytest.mark.parametrize("hook", ["study"], indirect=True)
def test_what_evaluate_writes_is_what_the_page_reads(hook: ModuleType, tmp_path: Path) -> None:
    arms = tuple(Arm(f"dial {x}", "dial", {"diversity": x}, at=x) for x in (0.0, 0.5, 1.0))
    study = Study(arms, pairs=2, images=2, steps=2)
    done = Runner(study, tmp_path, progress=False).run()
    write_report(study, done, tmp_path)
    shown = hook.results(tmp_path, "study/")
    assert "2 pairs of a prompt and a reference, 2 images of each, 2 steps" in shown
    for text in (
        "](study/entropy-retention.svg)",
        "## Areas",
        "## Dials",
        "| dial 0.5 | ",
        "| leak",
    ):
        assert text in shown, text


@pytest.mark.skipif(not CHROMIUM.exists(), reason="Chromium is not installed")
def test_it_opens_from_the_disk_and_searches(site: Path) -> None:
    sync = pytest.importorskip("playwright.sync_api")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=list(QUIET))
        page = browser.new_page(viewport={"width": 390, "height": 844})
        outside: list[str] = []
        wrong: list[str] = []
        page.on("request", lambda r: r.url.startswith(("http", "ws")) and outside.append(r.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        for name in ("index", "how-it-works", "formats", "reference/python", "guides/masks"):
            page.goto((site / f"{name}.html").as_uri())
            wider = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert page.evaluate(wider) <= 0, f"{name} is wider than a telephone"
        page.set_viewport_size({"width": 1280, "height": 900})
        page.goto((site / "guides" / "scene.html").as_uri())
        page.click("input.md-search__input")
        page.keyboard.type("same creature elsewhere", delay=20)
        page.wait_for_selector(".md-search-result__link", timeout=30_000)
        links = page.locator(".md-search-result__link").all()
        assert any("scene.html" in str(link.get_attribute("href")) for link in links)
        assert not outside
        assert not wrong
        browser.close()
