"""`--ray` on a cluster: two nodes in one machine, a worker that dies, one process's result."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from ipdiverse.cli import main
from ipdiverse.commands import cluster
from ipdiverse.errors import ArgumentError
from tests.unit.test_parts import tree

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a cluster of two nodes with one core each."""
    pytest.importorskip("ray")
    import ray  # type: ignore[import-not-found]
    from ray.cluster_utils import Cluster  # type: ignore[import-not-found]

    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}{os.pathsep}{ROOT}")
    room: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    nodes = Cluster(initialize_head=True, head_node_args=room)
    try:
        nodes.add_node(**room)
        nodes.wait_for_nodes()
        yield str(nodes.address)
    finally:
        ray.shutdown()
        nodes.shutdown()


def killed_once() -> None:
    """Make the first actor that has stored something die in the middle, without a word."""
    from ipdiverse.data import prepare

    store, mark = prepare._store, Path("killed")
    stored: list[str] = []

    def stores(*given: Any) -> Any:
        found = store(*given)
        stored.append(found[0])
        if len(stored) == 3 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    prepare._store = stores  # type: ignore[assignment]


class Fragile(cluster._Worker):
    """A worker that dies once."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        killed_once()


@pytest.mark.slow
def test_a_cluster_that_loses_a_worker_makes_what_one_process_makes(
    two_nodes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cluster, "_Worker", Fragile)
    words = ["prepare", "critters", "-n", "60", "--no-pairs", "--out"]
    assert main([*words, "alone"]) == 0
    assert main([*words, "out", "--ray", two_nodes]) == 0
    assert Path("killed").exists(), "a worker has died"
    assert tree(Path("out")) == tree(Path("alone"))


def test_without_ray_the_fix_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cluster, "find_spec", lambda _: None)
    command: Any = type("Command", (), {"spread": cluster.Spread(ray="local"), "home": tmp_path})()
    with pytest.raises(ArgumentError, match=r"--ray: needs ray, which is not installed"):
        cluster.in_parts(command, lambda: None)


def test_what_workers_lack_is_installed_by_the_runtime_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[dict[str, Any]] = []

    def init(**given: Any) -> None:
        asked.append(given)
        raise ConnectionError("nobody is there")

    ray = SimpleNamespace(is_initialized=lambda: False, init=init)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(cluster, "find_spec", lambda _: True)
    for install in ("", "ipdiverse[ray]"):
        spread = cluster.Spread(ray="10.0.0.1:6379", ray_install=install)
        command: Any = SimpleNamespace(spread=spread, home=tmp_path)
        with pytest.raises(ArgumentError, match=r"10\.0\.0\.1:6379: not a cluster; .*nobody"):
            cluster.in_parts(command, lambda: None)
    assert [one["runtime_env"] for one in asked] == [None, {"pip": ["ipdiverse[ray]"]}]
    assert asked[0]["address"] == "10.0.0.1:6379"


def test_a_worker_opens_once_and_says_what_failed(tmp_path: Path) -> None:
    opened: list[int] = []

    class Command:
        def opened(self) -> Any:
            opened.append(1)

            def work(part: Any) -> None:
                if part.number == 2:
                    raise ArgumentError("is broken", where="row 5")

            return work

    worker = cluster._Worker(Command(), os.getcwd(), 3)  # type: ignore[arg-type]  # noqa: PTH109
    done = worker({"number": [1, 2, 3]})
    assert done == {"number": [1, 2, 3], "failed": ["", "2/3: row 5: is broken", ""]}
    assert opened == [1]
    assert json.dumps(done)
