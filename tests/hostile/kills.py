"""Ends ipdiverse at the k-th change below a folder, as `kill -9`, a cut write or a full disk would.

A process of its own imports everything once and forks for each command, so that a kill costs what
the command costs, without the imports:

    with Killer() as killer:
        done = killer.run(folder, ["prepare", "pictures", "--out", "data"])
        killer.run(folder, [...], "kill", at=7)
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

End = Literal["kill", "cut", "full"]
"""Killed before a change; killed inside the write that follows it; from it on, nothing fits."""
_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CUT = 40
"""Bytes of a file that are written before the cut."""


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code, changes below the folder, what was printed."""

    code: int
    changes: int
    printed: str


class Killer:
    """Runs commands in forks of one process that has everything imported."""

    def __enter__(self) -> Killer:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.kills"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()  # type: ignore[union-attr]
        self._server.wait()

    def run(self, folder: Path, arguments: list[str], end: End = "kill", at: int = 0) -> Ended:
        """Run a command in a folder; `at` 0 lets it finish."""
        asked = json.dumps([str(folder), arguments, end, at])
        self._server.stdin.write(asked + "\n")  # type: ignore[union-attr]
        self._server.stdin.flush()  # type: ignore[union-attr]
        return Ended(*json.loads(self._server.stdout.readline()))  # type: ignore[union-attr]


def _serve() -> None:
    import ipdiverse.evaluation.calibrate
    import ipdiverse.evaluation.report
    import ipdiverse.training.trainer  # noqa: F401
    from ipdiverse.evaluation import bootstrap

    # draws take most of a small study's time, and change no file but at its end
    for slow in (bootstrap.leak_interval, bootstrap.js_interval):
        slow.__defaults__ = (2, *slow.__defaults__[1:])  # type: ignore[misc]
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        folder, arguments, end, at = json.loads(line)
        # pipes: a limit on the size of files holds for the child's output too
        (read, printed), (marks, counted) = os.pipe(), os.pipe()
        if (child := os.fork()) == 0:
            os.dup2(printed, 1)
            os.dup2(printed, 2)
            os._exit(_command(folder, arguments, end, at, counted))
        os.close(printed)
        os.close(counted)
        with os.fdopen(read, errors="replace") as output, os.fdopen(marks) as changes:
            told, count = output.read(), len(changes.read())
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        answers.write(json.dumps([code, count, told]) + "\n")
        answers.flush()


def _command(folder: str, arguments: list[str], end: End, at: int, counted: int) -> int:
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if end == "cut":
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    count = 0

    def change() -> None:
        nonlocal count
        count += 1
        os.write(counted, b".")
        if count == at and end == "kill":
            os._exit(137)
        if count == at:
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (_CUT if end == "cut" else 0, most))

    def watch(event: str, values: Any) -> None:
        changing = event in _CHANGES or (event == "open" and values[2] & _WRITES)
        # a path may be bytes; an int is a file that is open already
        if changing and not isinstance(values[0], int) and _below(os.fsdecode(values[0]), folder):
            change()

    sync = os.fsync

    def synced(descriptor: int) -> None:
        change()
        sync(descriptor)

    os.fsync = synced
    sys.addaudithook(watch)
    from ipdiverse.cli import main

    try:
        return main(arguments)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _below(path: str, folder: str) -> bool:
    return os.path.realpath(path).startswith(os.path.realpath(folder) + os.sep)


if __name__ == "__main__":
    _serve()
