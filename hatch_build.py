"""The description for a package index: the README, with no link that leads nowhere there."""

from __future__ import annotations

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)]+)\)")


class CustomMetadataHook(MetadataHookInterface):
    """Fills in `readme` and, where an address is known, `urls`."""

    def update(self, metadata: dict) -> None:
        """Change the project's table in place.

        Where `source` is empty, as no address is public yet, words of links stay and pictures go.
        """
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        source = self.config.get("source", "").rstrip("/")
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute(text, source)}
        if source:
            metadata["urls"] = {
                "Source": source,
                "Documentation": f"{source}/tree/main/docs",
                "Changelog": f"{source}/blob/main/CHANGELOG.md",
                "Issues": f"{source}/issues",
            }


def absolute(text: str, source: str) -> str:
    """Markdown whose relative links and pictures are absolute, or words where none is known."""

    def written(link: re.Match[str]) -> str:
        picture, words, path = link.groups()
        if source:
            return f"{picture}[{words}]({source}/{'raw' if picture else 'blob'}/main/{path})"
        return "" if picture else words

    return _LINK.sub(written, text)
