"""The table of budgets in the docs says what the code checks."""

from __future__ import annotations

import re
from pathlib import Path

from ipdiverse import provenance
from ipdiverse.adapter import imagine
from ipdiverse.adapter.files import containers, layouts, structure
from ipdiverse.data import files as data
from ipdiverse.evaluation import pairs
from ipdiverse.image_io import files as pictures
from ipdiverse.sampling import request

DOCS = Path(__file__).parents[2] / "docs" / "formats.md"


def mib(count: int) -> str:
    assert count % 2**20 == 0
    return f"{count // 2**20:,} MiB"


def kib(count: int) -> str:
    assert count % 2**10 == 0
    return f"{count // 2**10} KiB"


def budgets() -> dict[tuple[str, str], str]:
    """What each row of the table must say, of the constants alone."""
    most = layouts.BOUNDS
    return {
        ("picture", "bytes"): mib(pictures.MAX_FILE_BYTES),
        ("picture", "side"): f"{pictures.MIN_SIDE:,} to {pictures.MAX_SIDE:,} px",
        ("picture", "pixels"): f"{pictures.MAX_DECODED_PIXELS:,}",
        ("picture", "pixels, a JPEG of one scan"): f"{pictures.MAX_DRAFT_PIXELS:,}",
        ("picture", "pixels after it is scaled down"): f"{pictures.MAX_PIXELS:,}",
        ("picture", "scans of a JPEG"): f"{pictures.MAX_JPEG_SCANS:,}",
        ("picture", "scans times pixels"): f"{pictures.MAX_SCANNED_PIXELS:,}",
        ("picture", "segments of a JPEG"): f"{pictures.MAX_SEGMENTS:,}",
        ("picture", "chunks of a PNG, strips of a TIFF"): f"{pictures.MAX_PARTS:,}",
        ("picture", "blocks of a GIF"): f"{pictures.MAX_BLOCKS:,}",
        ("picture", "pages of a TIFF"): f"{pictures.MAX_PAGES:,}",
        ("picture", "bytes of the record in it"): mib(provenance.MAX_RECORD_BYTES),
        ("list", "bytes, one row a line"): mib(data.LIST_BYTES),
        ("list", "bytes, anything else"): mib(data.WHOLE_BYTES),
        ("list", "lines"): f"{data.LINES:,}",
        ("list", "bytes of a line"): mib(data.LINE_BYTES),
        ("caption", "bytes"): kib(data.CAPTION_BYTES),
        ("prompts", "bytes"): mib(pairs.MAX_PROMPTS_BYTES),
        ("folder", "files, with all subfolders"): f"{data.ENTRIES:,}",
        ("archive", "members"): f"{data.ENTRIES:,}",
        ("archive", "members of a sample"): f"{data.PARTS:,}",
        ("archive", "bytes of an extra header"): kib(data.HEADER_BYTES),
        ("checkpoint", "bytes of the header or the index"): f"{containers.MAX_HEADER_BYTES:,}",
        ("checkpoint", "bytes of a pickle"): mib(containers.MAX_PICKLE_BYTES),
        ("checkpoint", "tensors"): f"{containers.MAX_TENSORS:,}",
        ("checkpoint", "dicts in dicts"): f"{containers.MAX_DEPTH:,}",
        ("checkpoint", "characters of a name"): f"{containers.MAX_NAME:,}",
        ("checkpoint", "shards"): f"{containers.MAX_SHARDS:,}",
        **{("adapter", name): f"{count:,}" for name, count in most.items()},
        ("adapter", "steps of its fusion"): f"{structure._MAX_STEPS:,}",
        ("variation space", "bytes of captions"): mib(imagine._MAX_CAPTIONS),
        ("request", "images"): f"{request.MAX_IMAGES:,}",
        ("request", "steps"): f"{request.MAX_STEPS:,}",
        ("request", "side"): f"{request.MAX_SIDE:,} px",
    }


def test_the_table_in_the_docs_is_that_of_the_code() -> None:
    section = DOCS.read_text("utf-8").split("## Budgets\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", section, re.MULTILINE)
    told = {(kind, what): most for kind, what, most in rows[1:] if not set(kind) <= set("-|")}
    assert told == budgets()
