"""Runs the acceptance table, and keeps the page that shows it up to date."""

from __future__ import annotations

import pytest

from ipdiverse.adapter.attach.attach import attach
from ipdiverse.errors import ModelError
from tests import models
from tests.acceptance.cells import CELLS, Cell
from tests.acceptance.table import FILE, page


@pytest.mark.parametrize(
    "cell",
    [pytest.param(c, id=c.name, marks=[pytest.mark.slow] if c.slow else []) for c in CELLS],
)
def test_cell(cell: Cell) -> None:
    cell.run()


def test_the_page_is_up_to_date() -> None:
    assert FILE.read_text(encoding="utf-8") == page(), "run: python -m tests.acceptance.table"


def test_names_are_unique() -> None:
    assert len({cell.name for cell in CELLS}) == len(CELLS)


@pytest.mark.parametrize(
    ("name", "layers", "last"), [("sd1", 16, 31), ("sd2", 16, 31), ("sdxl", 70, 139)]
)
def test_the_small_models_are_numbered_as_the_originals(name: str, layers: int, last: int) -> None:
    from ipdiverse.adapter.model import cross_attention_layers

    numbers = cross_attention_layers(models.unet(name))
    assert list(numbers) == list(range(1, 2 * layers, 2))
    assert max(numbers) == last
    assert numbers[last].startswith("mid_block")


def test_offloading_layer_by_layer_is_refused() -> None:
    """Its weights are nowhere between calls, and an adapter sent after them would be lost."""
    pipe = models.pipeline("sd1", fresh=True)
    adapter = models.adapter("base", pipe.unet)
    pipe.unet.to("meta")
    with pytest.raises(ModelError, match=r"layer by layer\. Call enable_model_cpu_offload"):
        attach(pipe, adapter)
    assert not any(parameter.is_meta for parameter in adapter.parameters())
