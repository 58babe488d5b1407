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
from ipdiverse.bases import CRITTERS_ORACLE, adapter_source, load_base
from ipdiverse.critters.oracle import load_oracle
from ipdiverse.loading import loading, quiet


@pytest.fixture(autouse=True)
def put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens here must not befall other tests."""
    monkeypatch.setattr(nn.Module, "register_parameter", nn.Module.register_parameter)


def test_bases_opened_by_two_threads_leave_later_modules_their_weights() -> None:
    both = threading.Barrier(2)

    def opened() -> set[str]:
        both.wait(60)
        pipe = load_base().pipe
        return {p.device.type for part in (pipe.unet, pipe.vae) for p in part.parameters()}

    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(opened) for _ in range(2)]
        assert [one.result() for one in found] == [{"cpu"}, {"cpu"}]
    assert nn.Linear(2, 2).weight.device.type == "cpu"


@pytest.mark.parametrize("kind", ["adapter", "oracle"])
def test_what_is_built_while_another_thread_loads_has_its_weights(kind: str) -> None:
    begun, looked = threading.Event(), threading.Event()

    def load() -> None:
        with loading(), init_empty_weights():
            begun.set()
            looked.wait(0.5)

    thread = threading.Thread(target=load)
    thread.start()
    assert begun.wait(60)
    if kind == "adapter":
        module: nn.Module = ImagePromptAdapter.from_pretrained(adapter_source("critters", "plus"))
    else:
        module = load_oracle(CRITTERS_ORACLE)
    looked.set()
    thread.join()
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}


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
