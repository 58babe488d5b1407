"""Pairs of a prompt and a reference, from folders."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image

from ipdiverse.evaluation.pairs import folder_pairs, open_references, read_prompts

if TYPE_CHECKING:
    from pathlib import Path


def test_a_reference_that_pairs_share_is_opened_once(tmp_path: Path) -> None:
    for name in "ab":
        Image.new("RGB", (16, 16), "red").save(tmp_path / f"{name}.png")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    first, second, again, _ = open_references(folder_pairs(tmp_path, prompts, 9))
    assert first is again
    assert first is not second


def test_prompts_end_where_lines_do(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("a cat\u2028in snow\r\n\n# none\na\x0bdog".encode())
    assert read_prompts(file) == ["a cat\u2028in snow", "a\x0bdog"]
