"""Every block of every page runs, in order, in an empty folder, offline; a few are only read."""

from __future__ import annotations

import functools
import re
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ipdiverse.base.adapters import ADAPTERS
from ipdiverse.base.bases import load_base
from ipdiverse.commands.train import Critters
from ipdiverse.data.prepare import PrepareOptions
from ipdiverse.dial import Achieved, Levers
from ipdiverse.evaluation import calibrate
from ipdiverse.evaluation.study import Study, read_study
from ipdiverse.sampling.request import Request
from ipdiverse.training.config import TrainConfig
from tests import hub
from tests.fences import ROOT, RUN, SHOWN, Block, blocks, check_unrun, pages, run
from tests.needs import NEEDS, given
from workshop.arms import ARMS

ALL = {page.relative_to(ROOT).as_posix(): blocks(page) for page in pages()}
RUNNABLE = [name for name, found in ALL.items() if any(b.language in RUN for b in found)]
COMMAND = r"^(ipdiverse|python|pip|make|cp|git) "
TAKES = ("takes minutes", "takes an hour on two cores", "takes hours")
MARKED = [block for found in ALL.values() for block in found if block.marked]

LIMITS: dict[type, dict[str, Any]] = {
    Critters: {"n": 8},
    PrepareOptions: {"n": 24},
    Request: {"steps": 2},
    Study: {"pairs": 2, "images": 2, "steps": 2, "arms": 3},
    TrainConfig: {
        "steps": 2,
        "batch": 4,
        "num_validation_images": 1,
        "validate_every": 2,
        "num_images_per_prompt": 1,
        "validation_steps": 2,
    },
}
"""What pages ask for is cut down to this; an entry for a sequence is its length."""


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything as the page says, but little of it."""
    for kind, limits in LIMITS.items():
        monkeypatch.setattr(kind, "__init__", _limited(kind.__init__, limits))

    def climb(start, _ladders, measure, _say):  # two pairs are too few to climb by
        found = measure(start)
        return [(start, Achieved(0.2, found.retention)), (Levers(cads=0.5), Achieved(0.6, 0.9))]

    monkeypatch.setattr(calibrate, "climb", climb)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX, f"a page connects to {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def _limited(init: Callable[..., None], limits: dict[str, Any]) -> Callable[..., None]:
    def limited(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        for name, most in limits.items():
            value = getattr(self, name)
            few = value[:most] if isinstance(value, tuple) else min(value or most, most)
            object.__setattr__(self, name, few)

    return limited


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """The hub's local cache with what pages name, made once it is asked for."""

    @functools.cache
    def made() -> Path:
        full = tmp_path_factory.mktemp("hub")
        hub.fill(full, tmp_path_factory.mktemp("presets"))
        hub.fill_others(full, tmp_path_factory.mktemp("others"))
        return full

    return made


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_page_runs_from_top_to_bottom(
    name: str,
    few: None,
    offline: None,
    cache: Callable[[], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in ALL[name]:
        if not block.marked:
            with given(block.need, tmp_path, cache):
                run(block, tmp_path, names)


@pytest.mark.parametrize("block", MARKED, ids=lambda block: block.where)
def test_what_is_not_run_says_why_and_names_what_exists(block: Block) -> None:
    assert block.language in RUN
    assert len(block.options["no-run"]) >= len("takes hours")
    check_unrun(block)


def test_few_blocks_are_not_run() -> None:
    runnable = [b for found in ALL.values() for b in found if b.language in RUN]
    assert len(MARKED) < 0.15 * len(runnable)
    assert not [b.where for b in MARKED if b.page.startswith("docs/guides/")]
    assert {b.options["no-run"] for b in MARKED} <= {"installs packages", *TAKES}
    assert {b.need for b in runnable} == {"", *NEEDS}


@pytest.mark.parametrize("name", ALL)
def test_every_fence_says_what_it_is(name: str) -> None:
    for block in ALL[name]:
        assert block.language in RUN + SHOWN, block.where
        hidden = block.language == "text" and re.search(COMMAND, block.code, re.MULTILINE)
        assert not hidden, f"{block.where}: a command is bash; mark it if it cannot run"
        assert block.options.keys() <= {"title", "needs", "no-run"}, block.where


@pytest.mark.parametrize(
    ("language", "code", "wrong"),
    [
        ("python", "from ipdiverse import atach\n", "has no atach"),
        (
            "python",
            "import ipdiverse\nipdiverse.adapter.attach.attach.nothing()\n",
            "does not exist",
        ),
        ("python", "from ipdiverse import Reference\nReference(image=1)\n", "takes no image"),
        ("python", "x = = 1\n", "invalid syntax"),
        ("bash", "ipdiverse generate --imag a.png\n", "--imag"),
        ("bash", "ipdiverse nothing --image a.png\n", "no ipdiverse nothing"),
        ("bash", "ipdiverse critters make --m 3\n", "--m"),
        ("bash", "make nothing\n", "make nothing"),
        ("bash", "python benchmarks/inference.py --size 3\n", "has no --size"),
        ("bash", "sudo rm\n", "sudo"),
    ],
)
def test_reading_a_block_finds_what_is_wrong(language: str, code: str, wrong: str) -> None:
    block = Block("page.md", 1, language, {"no-run": "an example"}, code)
    with pytest.raises((AssertionError, SyntaxError)) as caught:
        check_unrun(block)
    assert wrong in str(caught.value)


def test_blocks_are_found_with_their_options(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("tests.fences.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        'a `code` b\n\n```bash no-run="takes hours"\nmake x \\\n    y\n```\n\n- item\n\n'
        '  ```toml title="a b.toml"\n  k = 1\n  ```\n\n```\nplain\n```\n'
    )
    assert blocks(page) == [
        Block("page.md", 4, "bash", {"no-run": "takes hours"}, "make x \\\n    y\n"),
        Block("page.md", 11, "toml", {"title": "a b.toml"}, "k = 1\n"),
        Block("page.md", 15, "", {}, "plain\n"),
    ]


def test_the_shipped_study_is_one() -> None:
    study = read_study(ROOT / "studies" / "variety.toml")
    families = {arm.family for arm in study.arms}
    assert {"plain, λ × guidance", "dial", "cads"} <= families
    assert {f"reference {kind}" for kind in ("self", "augmented", "paired")} <= families
    assert study.baseline_arm.name == study.baseline == "self-none", "plain IP-Adapter, by its name"
    assert not study.baseline_arm.settings, "at the default scale and guidance, 1 and 3"
    assert (study.pairs, study.images) == (200, 16)
    makefile = (ROOT / "Makefile").read_text()
    recipe = makefile.partition("--seeds 1 2 --arms")[2].partition("\n\t$")[0]
    several = recipe.replace("\\", " ").split()
    assert set(several) <= set(ARMS)
    runs = [(arm, seed) for arm in ARMS for seed in ((0, 1, 2) if arm in several else (0,))]
    made = {f"runs/adapters/{arm}-seed{seed}/adapter.safetensors" for arm, seed in runs}
    edits, steps = (read_study(ROOT / "studies" / f"{name}.toml") for name in ("edits", "steps"))
    assert edits.edits
    assert steps.steps == load_base().steps > study.steps
    every = (*study.arms, *edits.arms, *steps.arms)
    named = {source for arm in every for source in arm.sources}
    assert named <= made | set(ADAPTERS), "what `make adapters` makes, or what ships"


STUDIES = [b for found in ALL.values() for b in found if b.language == "toml"]


@pytest.mark.parametrize("block", STUDIES, ids=lambda block: block.where)
def test_studies_in_pages_are_read(block: Block, tmp_path: Path) -> None:
    file = tmp_path / block.options["title"]
    file.write_text(block.code)
    assert len(read_study(file).arms) >= 2


def test_a_page_is_one_world_and_a_fault_in_it_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}

    def does(language: str, code: str, **options: str) -> None:
        run(Block("page.md", 1, language, options, code), tmp_path, names)

    does("json", "[1, 2]\n", title="a.json")
    does(
        "python",
        "import json\nfrom pathlib import Path\nx = json.loads(Path('a.json').read_text())\n",
    )
    does("bash", "mkdir -p made  # a comment\ncp a.json \\\n    made/\n")
    does("python", "Path('made/b.json').write_text(str(sum(x)))\n")
    assert (tmp_path / "made" / "b.json").read_text() == "3"
    assert (tmp_path / "made" / "a.json").read_text() == "[1, 2]\n"
    with pytest.raises(subprocess.CalledProcessError):
        does("bash", "cp nothing.png made/\n")
    with pytest.raises(AssertionError, match=r"page\.md:1: ipdiverse inspect nothing"):
        does("bash", "ipdiverse inspect nothing.safetensors\n")
    with pytest.raises(NameError, match="y"):
        does("python", "print(y)\n")
