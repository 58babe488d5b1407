"""Blocks that the tests only read say why: `no-run="REASON"` in the fence becomes its title."""

from __future__ import annotations

import re
from typing import Any

_MARKED = re.compile(r'^(\s*```\w+ )no-run="([^"]+)"', re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Show the reason above the block."""
    return _MARKED.sub(r'\1title="\2"', markdown)
