"""Show what a block needs, or why the tests do not run it.

`needs="weights from the hub"` and `no-run="takes hours"` in a fence become its title.
"""

from __future__ import annotations

import re
from typing import Any

_MARKED = re.compile(r'^(\s*```\w+ )(no-run|needs)="([^"]+)"', re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Show both above the block."""
    return _MARKED.sub(_titled, markdown)


def _titled(found: re.Match[str]) -> str:
    before = "needs " if found[2] == "needs" else ""
    return f'{found[1]}title="{before}{found[3]}"'
