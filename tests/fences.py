"""Code blocks of Markdown pages: find them, run them as a reader would, or at least check them."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import threading
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
RUN = ("bash", "python")
SERVES = "Ctrl-C to end it"
"""Need of a command that serves until it is interrupted."""
SHOWN = ("text", "toml", "json")
"""Languages of blocks that are files or output; a block with a title is a file of that name."""
_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<code>.*?)^ *```[ ]*$", re.MULTILINE | re.DOTALL
)
_OPTION = re.compile(r'([\w-]+)="([^"]*)"')
_FLAG = re.compile(r"--[a-z][a-z0-9-]*")
_OTHERS = ("accelerate", "cp", "pip", "python")
_OPEN = re.compile(r"open http://\S+ \(Ctrl-C ends it\)")
_STEPS = re.compile(r"\bnum_inference_steps=\d+")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        page: The file it is in, relative to the repository.
        line: Number of its first line of code.
        language: First word of the fence; empty without one.
        options: `title`, `needs`, `no-run`.
        code: Its text.
    """

    page: str
    line: int
    language: str
    options: dict[str, str]
    code: str

    @property
    def marked(self) -> bool:
        return "no-run" in self.options

    @property
    def need(self) -> str:
        """What it needs in addition to an empty folder (`tests.needs`)."""
        return self.options.get("needs", "")

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """README and every page of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text, name = page.read_text("utf-8"), page.relative_to(ROOT).as_posix()
    return [
        Block(
            name,
            text.count("\n", 0, found.start()) + 2,
            (found["info"].split() or [""])[0],
            dict(_OPTION.findall(found["info"])),
            "".join(line.removeprefix(found["indent"]) for line in found["code"].splitlines(True)),
        )
        for found in _FENCE.finditer(text)
    ]


def run(block: Block, folder: Path, names: dict[str, Any]) -> None:
    """Run a block as a reader does.

    Args:
        block: Python is executed, commands are run one after another, a file is written.
        folder: The working directory.
        names: What the page's Python has defined so far; changed.
    """
    if block.language == "python":
        code = _STEPS.sub("num_inference_steps=2", block.code)
        exec(compile("\n" * (block.line - 1) + code, block.page, "exec"), names)  # noqa: S102
    elif block.language == "bash":
        for command in commands(block):
            if block.need == SERVES:
                serve_and_interrupt(command)
            else:
                run_command(command, block.where)
    elif "title" in block.options:
        (folder / block.options["title"]).write_text(block.code, "utf-8")


def commands(block: Block) -> list[str]:
    """Lines of a shell block, continued ones as one, without comments."""
    lines = block.code.replace("\\\n", " ").splitlines()
    return [line for line in lines if shlex.split(line, comments=True)]


def run_command(command: str, where: str) -> None:
    """Run a line: our own commands and scripts in this process, as starting one takes seconds."""
    words = shlex.split(command, comments=True)
    if words[0] == "ipdiverse":
        from ipdiverse.cli import main

        assert main(words[1:]) == 0, f"{where}: {command}"
    elif words[0] == "python":
        with mock.patch.object(sys, "argv", words[1:]):
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    else:
        subprocess.run(["bash", "-ec", command], check=True, timeout=60)


def serve_and_interrupt(command: str) -> None:
    """Run a command of ours that serves, until its page is open; then Ctrl-C.

    Whatever the page says, it listens on a free port, and for this machine only.
    """
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    words = shlex.split(command.replace("0.0.0.0", "127.0.0.1"), comments=True)  # noqa: S104
    served = [sys.executable, "-m", *words, "--port", str(port)]
    with subprocess.Popen(served, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        watchdog = threading.Timer(120, process.kill)
        watchdog.start()
        try:
            line = process.stdout.readline()
            assert _OPEN.search(line), f"{command}: {line}"
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0, command
        finally:
            watchdog.cancel()
            process.kill()


def check_unrun(block: Block) -> None:
    """Check a block that is not run: what it names must exist."""
    if block.language == "python":
        check_names(compile(block.code, block.where, "exec", ast.PyCF_ONLY_AST), block.where)
        return
    for command in commands(block):
        check_command(command, block.where)


def check_names(tree: ast.AST, where: str) -> None:
    """Every name imported from ipdiverse exists, and so do the keywords of calls."""
    known: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ipdiverse":
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name), f"{where}: {node.module} has no {alias.name}"
                known[alias.asname or alias.name] = getattr(module, alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "ipdiverse":
                    known[alias.asname or "ipdiverse"] = importlib.import_module(alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            _resolved(node, known, where)
        elif isinstance(node, ast.Call):
            _check_keywords(node, known, where)


def _resolved(node: ast.expr, known: dict[str, Any], where: str) -> Any:
    """The object that a dotted name of ours means; None for the names of others."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if not isinstance(node, ast.Attribute):
        return None
    owner = _resolved(node.value, known, where)
    if owner is None:
        return None
    assert hasattr(owner, node.attr), f"{where}: {ast.unparse(node)} does not exist"
    return getattr(owner, node.attr)


def _check_keywords(call: ast.Call, known: dict[str, Any], where: str) -> None:
    import inspect

    called = _resolved(call.func, known, where)
    if not callable(called):
        return
    taken = inspect.signature(called).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        return
    for keyword in call.keywords:
        assert keyword.arg in taken, f"{where}: {ast.unparse(call.func)} takes no {keyword.arg}"


def check_command(command: str, where: str) -> None:
    """A command of ours exists with every flag, as do a script and a target of `make`."""
    words = shlex.split(command, comments=True)
    if words[0] == "ipdiverse":
        known = _flags_of(words[1])
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= known, f"{where}: {sorted(given - known)} unknown to {words[:2]}"
    elif words[0] == "python" and words[1] != "-m":
        script = (ROOT / words[1]).read_text("utf-8")
        for flag in _FLAG.findall(command):
            assert f'"{flag}"' in script, f"{where}: {words[1]} has no {flag}"
    elif words[0] == "make":
        makefile = (ROOT / "Makefile").read_text("utf-8")
        for target in words[1:]:
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{where}: make {target}"
    else:
        assert words[0] in _OTHERS, f"{where}: unknown command {words[0]}"


@cache
def _flags_of(*command: str) -> frozenset[str]:
    from ipdiverse.cli import main

    printed = StringIO()
    with redirect_stdout(printed), suppress(SystemExit):
        main([*command, "--help"])
    usage = " ".join(("usage: ipdiverse", *command, "["))
    assert printed.getvalue().startswith(usage), f"no ipdiverse {' '.join(command)}"
    return frozenset(_FLAG.findall(printed.getvalue()))
