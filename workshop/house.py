"""`make house`: count the files, lines, import circles and files that one image walks through.

Fails where a number is over its bound. Why these bounds: docs/adr/0015-one-house.md.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import grimp

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "ipdiverse"

BOUNDS: dict[str, tuple[str, float]] = {
    "source files": ("<=", 115),
    "source lines": ("<=", 28_600),  # wanted: 21,000; until then it may only fall
    "import circles": ("<=", 0),
    "upward imports": ("<=", 0),
    "files that one image walks through": ("<=", 35),
    "test lines per source line": (">=", 0.7),
}
"""What each number must be."""

_WALK = """
import inspect, sys
from ipdiverse.cli import main

source, walked = sys.argv[1], set()

def seen(frame, event, argument):
    code = frame.f_code
    is_function = code.co_flags & inspect.CO_OPTIMIZED  # modules and class bodies are not
    if event == "call" and is_function and code.co_filename.startswith(source):
        walked.add(code.co_filename)

sys.setprofile(seen)
code = main(sys.argv[2:])
sys.setprofile(None)
sys.exit(code) if code else print("\\n".join(sorted(walked)))
"""


def circles(modules: Iterable[str], imports: Callable[[str], Iterable[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others (Tarjan, 1972).

    Args:
        modules: By name.
        imports: The modules that one imports.
    """
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in imports(module):
            if other not in index:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == index[module]:
            at = stack.index(module)
            group = stack[at:]
            del stack[at:]
            if len(group) > 1 or module in imports(module):
                found.append(sorted(group))

    for module in sorted(modules):
        if module not in index:
            visit(module)
    return found


def upward(graph: grimp.ImportGraph) -> list[str]:
    """Imports from a lower layer of pyproject.toml's to a higher one."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    layers = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    names = [[word.strip("() ") for word in row.replace("|", ":").split(":")] for row in layers]
    rank = {name: number for number, row in enumerate(names) for name in row}

    def room(module: str) -> str:
        return module.split(".")[1] if "." in module else ""

    return [
        f"{module} -> {other}"
        for module in sorted(graph.modules)
        for other in sorted(graph.find_modules_directly_imported_by(module))
        if rank.get(room(module), -1) > rank.get(room(other), len(rank))
    ]


def walked() -> list[str]:
    """Files of which `ipdiverse generate` on the embedded base calls a function."""
    with tempfile.TemporaryDirectory() as folder:
        from ipdiverse.critters.make import make_dataset

        make_dataset(Path(folder, "refs"), 1, False, 64, 0, "train")
        reference = str(Path(folder, "refs", "images", "0000000.png"))
        words = ["generate", "--image", reference, "--prompt", "a critter in the snow", "-n", "1"]
        words += ["--steps", "2", "--diversity", "0.5", "--out", str(Path(folder, "out"))]
        done = subprocess.run(  # noqa: S603 - our own command line
            [sys.executable, "-c", _WALK, f"{SOURCE}/", *words],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"generate failed: {done.stderr.strip()}")
    return [line for line in done.stdout.splitlines() if line.startswith(str(SOURCE))]


def lines(folder: Path) -> int:
    """Lines of Python below a folder."""
    return sum(len(file.read_text("utf-8").splitlines()) for file in folder.rglob("*.py"))


def measure() -> tuple[dict[str, float], list[str]]:
    """Every number, and the names behind those that should be 0 or few."""
    graph = grimp.build_graph("ipdiverse", cache_dir=None, exclude_type_checking_imports=False)
    rings = circles(graph.modules, graph.find_modules_directly_imported_by)
    rising, walk = upward(graph), walked()
    source = lines(SOURCE)
    numbers = {
        "source files": len(list(SOURCE.rglob("*.py"))),
        "source lines": source,
        "import circles": len(rings),
        "upward imports": len(rising),
        "files that one image walks through": len(walk),
        "test lines per source line": round(lines(ROOT / "tests") / source, 2),
    }
    details = ["circle: " + ", ".join(ring) for ring in rings]
    details += [f"upward: {one}" for one in rising]
    details += [f"walk: {Path(file).relative_to(SOURCE)}" for file in walk]
    return numbers, details


def main() -> int:
    """Print the numbers; 1 where one is over its bound, and then what is behind them."""
    numbers, details = measure()
    holds = {
        name: numbers[name] <= bound if sign == "<=" else numbers[name] >= bound
        for name, (sign, bound) in BOUNDS.items()
    }
    for name, (sign, bound) in BOUNDS.items():
        word = "ok" if holds[name] else "OVER"
        sys.stdout.write(f"{name:36} {numbers[name]:>8,g}   {sign} {bound:<8,g} {word}\n")
    if all(holds.values()):
        return 0
    sys.stdout.write("\n".join(["", *details, ""]))
    return 1


if __name__ == "__main__":
    sys.exit(main())
