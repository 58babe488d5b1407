"""`--ray` on a cluster: two nodes in one machine, a worker that dies, one process's result."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from ipdiverse.cli import main
from ipdiverse.commands import cluster, console
from ipdiverse.errors import ArgumentError, DataError
from tests.unit.test_parts import tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).parents[2]


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Callable[[], None]]]:
    """The address of a cluster of two nodes with one core each, and what takes one away."""
    pytest.importorskip("ray")
    import ray  # type: ignore[import-not-found]
    from ray.cluster_utils import Cluster  # type: ignore[import-not-found]

    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "180")  # other tests may run beside it
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}{os.pathsep}{ROOT}")
    room: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    nodes = Cluster(initialize_head=True, head_node_args=room)
    try:
        second = nodes.add_node(**room)
        nodes.wait_for_nodes()
        yield str(nodes.address), lambda: nodes.remove_node(second)
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


WORDS = ["prepare", "critters", "-n", "60", "--no-pairs", "--out"]
Nodes = tuple[str, "Callable[[], None]"]


@pytest.mark.slow
def test_a_cluster_that_loses_a_worker_makes_what_one_process_makes(
    two_nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cluster, "_Worker", Fragile)
    assert main([*WORDS, "alone"]) == 0
    assert main([*WORDS, "out", "--ray", two_nodes[0]]) == 0
    assert Path("killed").exists(), "a worker has died"
    assert tree(Path("out")) == tree(Path("alone"))


class Waiting(cluster._Worker):
    """A worker that marks each part that it begins, and is still at work when its node is lost."""

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        Path(f"began-{os.getpid()}-{batch['number'][0]}").touch()
        time.sleep(3)
        return super().__call__(batch)


@pytest.mark.slow
def test_a_lost_node_s_parts_are_done_by_another_and_kept_in_a_store(
    two_nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, lose = two_nodes
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cluster, "_Worker", Waiting)
    assert main([*WORDS, "alone"]) == 0
    lost = threading.Event()

    def watch() -> None:
        while len({one.name.split("-")[1] for one in Path().glob("began-*")}) < 2:
            time.sleep(0.1)
        lose()
        lost.set()

    threading.Thread(target=watch, daemon=True).start()
    to = (tmp_path / "store").as_uri()
    assert main([*WORDS, "out", "--ray", address, "--to", to]) == 0
    assert lost.is_set()
    began = [one.name.split("-")[2] for one in Path().glob("began-*")]
    assert len(began) > len(set(began)), "one part was begun twice"
    assert tree(Path("store")) == tree(Path("out")) == tree(Path("alone"))


def nothing() -> Any:
    return lambda _: None


def test_without_ray_the_fix_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(console, "find_spec", lambda _: None)
    with pytest.raises(ArgumentError, match=r"--ray: needs ray, which is not installed"):
        cluster.in_parts(cluster.Spread(ray="local"), tmp_path, nothing, nothing)


def test_what_workers_lack_is_installed_by_the_runtime_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[dict[str, Any]] = []

    def init(**given: Any) -> None:
        asked.append(given)
        raise ConnectionError("nobody is there")

    ray = SimpleNamespace(is_initialized=lambda: False, init=init)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(console, "find_spec", lambda _: True)
    for install in ("", "ipdiverse[ray]"):
        spread = cluster.Spread(ray="10.0.0.1:6379", ray_install=install)
        with pytest.raises(ArgumentError, match=r"10\.0\.0\.1:6379: not a cluster; .*nobody"):
            cluster.in_parts(spread, tmp_path, nothing, nothing)
    assert [one["runtime_env"] for one in asked] == [None, {"pip": ["ipdiverse[ray]"]}]
    assert asked[0]["address"] == "10.0.0.1:6379"


@pytest.mark.parametrize(
    ("there", "spread", "workers", "gpus"),
    [
        ({"CPU": 16.0}, {}, 16, None),
        ({"CPU": 16.0, "GPU": 4.0}, {}, 4, 1.0),
        ({"CPU": 16.0, "GPU": 4.0}, {"ray_gpus": 0.5}, 8, 0.5),
        ({"CPU": 3.0, "GPU": 4.0}, {"ray_gpus": 0.5}, 3, 0.5),  # each takes a core too
        ({"CPU": 16.0, "GPU": 4.0}, {"ray_gpus": 2.0}, 2, 2.0),
        ({"CPU": 16.0, "GPU": 4.0}, {"ray_gpus": 0.0}, 16, None),
        ({"CPU": 16.0}, {"ray_workers": 5}, 5, None),
    ],
)
def test_workers_are_as_many_as_there_is_room_for(
    there: dict[str, float],
    spread: dict[str, Any],
    workers: int,
    gpus: float | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    asked: dict[str, Any] = {}
    rows = [{"number": 1, "failed": "1/20: x.png: is broken"}, {"number": 2, "failed": ""}]

    class Data:
        @staticmethod
        def from_items(numbers: list[Any], **_: Any) -> type[Data]:
            asked["parts"] = len(numbers)
            return Data

        @staticmethod
        def map_batches(_: Any, **given: Any) -> Any:
            asked.update(given)
            return SimpleNamespace(iter_rows=lambda: rows)

        ActorPoolStrategy = staticmethod(lambda size: size)

    ray = SimpleNamespace(is_initialized=lambda: True, cluster_resources=lambda: there, data=Data)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(console, "find_spec", lambda _: True)
    with pytest.raises(DataError, match=rf"1 of {4 * workers} parts failed; found 1/20: x\.png"):
        cluster.in_parts(cluster.Spread(ray="local", **spread), tmp_path, nothing, nothing)
    assert (asked["compute"], asked["num_gpus"], asked["parts"]) == (workers, gpus, 4 * workers)


def test_a_worker_opens_once_and_says_what_failed(tmp_path: Path) -> None:
    opened: list[int] = []

    def opens() -> Any:
        opened.append(1)

        def work(part: Any) -> None:
            if part.number == 2:
                raise ArgumentError("is broken", where="row 5")

        return work

    worker = cluster._Worker(opens, nullcontext, os.getcwd(), 3)  # noqa: PTH109
    done = worker({"number": [1, 2, 3]})
    assert done == {"number": [1, 2, 3], "failed": ["", "2/3: row 5: is broken", ""]}
    assert opened == [1]
    assert json.dumps(done)
