"""A page that is open while a file's tests run, and a client of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ipdiverse.ui.server import Page as Served
    from tests.e2e.ui_clients import Client


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    from ipdiverse.ui import Options
    from ipdiverse.ui.server import opened_page
    from tests.e2e.ui_clients import free_port

    with opened_page(Options(port=free_port(), reports=())) as page:
        yield page


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    from tests.e2e.ui_clients import Client, empty_line

    yield Client(served.url)
    empty_line(served)
