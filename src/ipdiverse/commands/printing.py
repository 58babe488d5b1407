"""What commands print and write."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def say(text: str) -> None:
    """Print a line."""
    sys.stdout.write(text + "\n")


def say_json(content: Any) -> None:
    """Print a value as JSON."""
    say(json.dumps(content, indent=2))


def check_target(out: str | None) -> None:
    """Refuse a file that cannot be written before hours are spent on its content."""
    if out is not None:
        from ipdiverse.writing import ensure_writable_folder

        ensure_writable_folder(Path(out).parent)


def write_json(out: str | None, content: Any) -> None:
    """Write a value as JSON, whole or not at all; to None, nowhere."""
    if out is not None:
        from ipdiverse.writing import write_text_atomic

        write_text_atomic(Path(out), json.dumps(content, indent=2) + "\n")
