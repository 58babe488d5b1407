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

`tests/parity/test_transformers.py` does so for Flux.1 (XLabs with 4 and 16 tokens; text-to-image,
image-to-image, inpainting, ControlNet and Kontext; with and without a negative prompt; scales by
block and step; several adapters and references) and Stable Diffusion 3.5 (with one attention in a
block, and with two), at 1e-5 of the largest latent. InstantX' adapter for Flux.1 is compared with
its equations, as stock has none.

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


def page() -> str:
    """The whole page."""
    rows = [
        f"| {TITLES[cell.architecture]} | {cell.feature} | {cell.shows} "
        f"| passes{' (slow)' if cell.slow else ''} | `{cell.name}` |"
        for cell in CELLS
    ]
    return _HEAD + "\n".join(rows) + "\n" + _TAIL


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
