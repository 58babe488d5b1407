"""Writes docs/acceptance.md: `python -m tests.acceptance.table`."""

from __future__ import annotations

from pathlib import Path

from tests.acceptance.cells import CELLS, TITLES

FILE = Path(__file__).parents[2] / "docs" / "acceptance.md"

_HEAD = """\
# Where an image prompt works

One row for each cell that the tests run, on randomly initialised models of the real
architectures: block types, layers and their numbering are the originals', only widths are small.
Written by `python -m tests.acceptance.table`; a test fails when this page and the tests differ. A
row is a test that passes: `pytest "tests/acceptance/test_pipelines.py::test_cell[ID]"`; those
marked slow need `-m slow`.

**The five** are asserted of every task:

1. the image prompt changes the output, and another reference changes it again;
2. at scale 0 the output is that of the stock pipeline without adapter, bit for bit;
3. each item of a batch with references of its own equals the item alone, up to rounding;
4. levers (factorised guidance in an interval, noised tokens) change the
   output, an item with its seed is the same alone, and off or released they leave no bit behind;
5. detaching restores output, processors and weights exactly.

| architecture | feature | shown | result | id |
|---|---|---|---|---|
"""

_TAIL = """
## Equal to stock diffusers

`tests/parity` compares latents with stock diffusers' own IP-Adapter, in fp32, with and without
guidance, on all four architectures: base, plus, full-face, FaceID (with and without its LoRA),
FaceID-Plus 1 and 2. The difference is at most 1e-5 of the larger of 1 and the largest latent. The
full SD 1.5 architecture with random weights is marked `slow`.

On other bases the difference is at most 1e-5 of the largest latent, and each of these tests
asserts that scale 0 is no adapter and that detaching puts stock back, to the bit:

PARITY

The original's adapters for bigG (`vit-G`, `ip-adapter_sdxl`), `light` and full-face differ from the
tested kinds in widths and weights alone.

Where stock is wrong, it is not the reference:

| stock diffusers 0.42 | compared with instead |
|---|---|
| mixes the references of a batch: item 1's changes item 0 | each item alone |
| reads every `proj.weight` as 4 tokens | the mathematics, written out by hand |
| ignores masks on Flux.1 and SD 3 | white = no mask, black = no reference |
| shrinks masks by bicubic interpolation, beyond 0 and 1 | white = no mask, black = no reference |

## Not shown

- `enable_sequential_cpu_offload`: attaching to such a pipeline is refused. Without an accelerator
  the stock pipeline does not run so either.
- An accelerator. Offloading runs with the CPU as its execution device: what hooks do, and in which
  order, is the same; what moves is not.
- FaceID checkpoints with LoRA keys change the UNet's own projections too. As in stock diffusers,
  that part stays on at scale 0; detaching takes it off.
"""


_TASKS = "text-to-image, image-to-image, inpainting, ControlNet"
_PARITY = (
    ("Kolors, plus, with and without guidance", "stock", "test_stock_scripts.py -k kolors"),
    ("Flux.1, XLabs, without and with a negative prompt", "stock", "xlabs_equals"),
    ("Flux.1, XLabs' second adapter, 16 tokens", "stock", "second_adapter"),
    (f"Flux.1, XLabs: {_TASKS}, Kontext", "stock", '"diversified and flux"'),
    ("Flux.1, XLabs: scales by block and step, several adapters", "stock", "scales_by_block"),
    ("Flux.1, InstantX", "its equations, by hand: stock has none", "instantx"),
    ("Flux.1, Redux", "stock's prior pipeline", "redux"),
    ("Stable Diffusion 3.5, InstantX, with and without guidance", "stock", "sd3_equals"),
    ("Stable Diffusion 3.5 medium, two attentions in a block", "stock", "second_attention"),
    (f"Stable Diffusion 3.5: {_TASKS}", "stock", '"diversified and sd3"'),
)
"""What is compared, with what, and the tests: an expression for `test_transformers.py`."""


def _parity() -> str:
    rows = ["| base and adapter | compared with | tests in `tests/parity` |", "|---|---|---|"]
    for what, stock, tests in _PARITY:
        named = tests if ".py" in tests else f"test_transformers.py -k {tests}"
        rows.append(f"| {what} | {stock} | `{named}` |")
    return "\n".join(rows)


def page() -> str:
    """The whole page."""
    rows = [
        f"| {TITLES[cell.architecture]} | {cell.feature} | {cell.shows} "
        f"| passes{' (slow)' if cell.slow else ''} | `{cell.name}` |"
        for cell in CELLS
    ]
    return _HEAD + "\n".join(rows) + "\n" + _TAIL.replace("PARITY", _parity())


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
