"""What libraries change in the whole process while they load stays between begin and end."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from accelerate import init_empty_weights
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers.utils import logging as transformers_logging

from ipdiverse import ImagePromptAdapter
from ipdiverse.base.adapters import adapter_file
from ipdiverse.base.bases import CRITTERS_ORACLE, load_base
from ipdiverse.critters.oracle import load_oracle
from ipdiverse.loading import loading, quiet

PATIENCE = 300
"""Seconds that anything may take on a busy machine."""


class TellingLock:
    """As the one that loading holds; says when somebody waits for it."""

    def __init__(self) -> None:
        self.awaited = threading.Event()
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self.awaited.set()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


@pytest.fixture(autouse=True)
def put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens here must not befall other tests."""
    monkeypatch.setattr(nn.Module, "register_parameter", nn.Module.register_parameter)


def test_bases_opened_by_two_threads_leave_later_modules_their_weights() -> None:
    both = threading.Barrier(2)

    def opened() -> set[str]:
        both.wait(PATIENCE)
        pipe = load_base().pipe
        return {p.device.type for part in (pipe.unet, pipe.vae) for p in part.parameters()}

    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(opened) for _ in range(2)]
        assert [one.result() for one in found] == [{"cpu"}, {"cpu"}]
    assert nn.Linear(2, 2).weight.device.type == "cpu"


@pytest.mark.parametrize("kind", ["adapter", "oracle"])
def test_what_is_built_while_another_thread_loads_has_its_weights(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = TellingLock()
    monkeypatch.setattr("ipdiverse.loading._one_builds", lock)

    def build() -> nn.Module:
        if kind == "adapter":
            return ImagePromptAdapter.from_pretrained(adapter_file("critters", "plus"))
        return load_oracle(CRITTERS_ORACLE)

    with ThreadPoolExecutor(1) as pool:
        with loading(), init_empty_weights():
            built = pool.submit(build)
            built.add_done_callback(lambda _: lock.awaited.set())
            assert lock.awaited.wait(PATIENCE)
            assert not built.done(), "it waits for who loads"
        found = built.result(PATIENCE)
    assert {parameter.device.type for parameter in found.parameters()} == {"cpu"}


def test_the_last_of_overlapping_quiet_blocks_brings_the_libraries_back() -> None:
    libraries = (diffusers_logging, transformers_logging)
    before = [library.get_verbosity() for library in libraries]
    assert diffusers_logging.ERROR not in before
    one, other = quiet(), quiet()
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert {library.get_verbosity() for library in libraries} == {diffusers_logging.ERROR}
    other.__exit__(None, None, None)
    assert [library.get_verbosity() for library in libraries] == before
    assert transformers_logging.is_progress_bar_enabled()
