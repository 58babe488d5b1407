"""Libraries are quiet while we load; afterwards each says as much as its user let it."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import utils as hub
from transformers.utils import logging as transformers_logging

from ipdiverse.loading import quiet

if TYPE_CHECKING:
    from collections.abc import Iterator


def bars() -> tuple[bool, bool, bool]:
    """Whether diffusers, transformers and the hub show theirs."""
    libraries: tuple[Any, Any] = (diffusers_logging, transformers_logging)
    diffusers, transformers = (library.is_progress_bar_enabled() for library in libraries)
    return diffusers, transformers, not hub.are_progress_bars_disabled()


def show(diffusers: bool, transformers: bool, of_hub: bool) -> None:
    for library, shown in ((diffusers_logging, diffusers), (transformers_logging, transformers)):
        (library.enable_progress_bar if shown else library.disable_progress_bar)()
    (hub.enable_progress_bars if of_hub else hub.disable_progress_bars)()


@pytest.fixture
def put_back() -> Iterator[None]:
    before = bars()
    yield
    show(*before)


@pytest.mark.usefixtures("put_back")
@pytest.mark.parametrize("shown", list(itertools.product([False, True], repeat=3)))
def test_bars_are_back_where_their_user_had_them(shown: tuple[bool, bool, bool]) -> None:
    show(*shown)
    with quiet():
        assert bars() == (False, False, False)
    assert bars() == shown
