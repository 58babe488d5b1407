"""One JSON and one page of what every benchmark found.

    python benchmarks/page.py FOLDER --json benchmarks.json --page benchmarks.md

FOLDER holds what the other scripts wrote with `--out`. Every ratio in them becomes a row, with its
interval, its peer and its machine; nothing is typed by hand.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

PEERS = {
    "inference": "stock diffusers' IP-Adapter, the same weights",
    "dial": "stock diffusers' IP-Adapter, the same weights",
    "training": "the original trainer's step, written again",
    "attention": "PyTorch's fused attention",
}
"""Where a file does not say it itself."""
_HEAD = """# Benchmarks

Ratios of times, peer / ours: above 1 ours is faster. Each is the median of rounds that alternate
in one process, with a 95 % bootstrap interval; "operations" is the same ratio of operations.
`make benchmarks` measures all of it anew and writes this page; nothing here is from a GPU. Other
work ran beside some of it, which ratios bear better than seconds do.

| what | ratio | 95 % | operations | rounds | peer | machine |
|---|---|---|---|---|---|---|
"""
_ABOUT = ("what", "architecture", "size", "diversity", "level", "name")
_CONTEXT = ("peer", "machine", "instructions", "threads", "torch", "rounds", "architecture", "what")


def rows(found: Any, part: str, context: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every ratio in a report, with what the tables around it say."""
    if isinstance(found, list):
        for one in found:
            yield from rows(one, part, context)
    if not isinstance(found, dict):
        return
    context = context | {name: found[name] for name in _CONTEXT if name in found}
    if {"ratio", "low", "high"} <= found.keys():
        about = {name: value for name, value in found.items() if name in _ABOUT}
        numbers = {name: found[name] for name in ("ratio", "low", "high")}
        yield {"part": part, **context, **about, **numbers, **counted(found)}
    if "not_at_hand" in found:
        yield {"part": part, **context, "not_at_hand": found["not_at_hand"]}
    for name, one in found.items():
        if name.startswith("of_"):  # against another of our own, not the peer
            continue
        inner = context
        if isinstance(one, dict):
            inner = context | {"name": " ".join(filter(None, [str(context.get("name", "")), name]))}
        yield from rows(one, part, inner)


def counted(cell: dict[str, Any]) -> dict[str, float]:
    """The ratio of operations, in whichever way a report has it."""
    if "operations_ratio" in cell:
        return {"operations_ratio": cell["operations_ratio"]}
    if "operations" in cell:  # ours / stock
        return {"operations_ratio": 1 / cell["operations"]}
    if "stock_gflop" in cell and "ours_gflop" in cell:
        return {"operations_ratio": cell["stock_gflop"] / cell["ours_gflop"]}
    return {}


def collected(folder: Path) -> list[dict[str, Any]]:
    """The rows of every report in a folder."""
    return [
        row
        for file in sorted(folder.glob("*.json"))
        for row in rows(json.loads(file.read_text()), file.stem, {"peer": PEERS.get(file.stem, "")})
    ]


def _label(row: dict[str, Any]) -> str:
    words = [row["part"], row.get("name"), row.get("architecture"), row.get("what")]
    words += [f"{row['size']} px"] if "size" in row else []
    words += [f"diversity {row['diversity']}"] if "diversity" in row else []
    words += [f"level {row['level']}"] if "level" in row else []
    return ": ".join(str(word) for word in dict.fromkeys(words) if word)


SCORES = {
    "prompt_accuracy": "prompt",
    "retention": "identity",
    "worst attribute": "its worst attribute",
    "entropy": "variety",
    "invalid_rate": "invalid",
}


def fast_table(report: dict[str, Any]) -> str:
    """What each level of fast mode saves and loses, of `benchmarks/fast.py`'s report."""
    counted = {(one["size"], one["level"]): one for one in report["sd15"]["counted"]}
    steps = {one["level"]: one for one in report.get("sd15 steps", {}).get("cells", [])}
    critters = {one["level"]: one for one in report.get("critters", {}).get("cells", [])}
    lines = [
        "| level | 256 px, counted | 512 px, counted | 256 px, timed | critters, timed | "
        + " | ".join(SCORES.values())
        + " |",
        "|---" * (5 + len(SCORES)) + "|",
    ]
    for change in report["losses"]["changes"]:
        level, scores = change["level"], change["scores"]
        kept = {name: one for name, one in scores.items() if name.startswith("retention ")}
        worst = min(kept, key=lambda name: kept[name][0])
        shown = scores | {"worst attribute": kept[worst]}
        cells = [f"{level}"]
        cells += [f"{counted[size, level]['operations_ratio']:.2f}" for size in (256, 512)]
        cells += [_with_interval(one.get(level)) for one in (steps, critters)]
        cells += [
            f"{shown[name][0]:+.3f} ({shown[name][1]:+.3f} to {shown[name][2]:+.3f})"
            for name in SCORES
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _with_interval(cell: dict[str, Any] | None) -> str:
    return "" if cell is None else f"{cell['ratio']:.2f} ({cell['low']:.2f} to {cell['high']:.2f})"


def page(found: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = []
    for row in found:
        operations = f"{row['operations_ratio']:.2f}" if "operations_ratio" in row else ""
        where = [row.get("machine"), row.get("instructions")]
        where += [f"{row['threads']} threads"] if "threads" in row else []
        absent = "not_at_hand" in row
        cells = [
            _label(row),
            "not at hand" if absent else f"{row['ratio']:.2f}",
            row["not_at_hand"] if absent else f"{row['low']:.2f} to {row['high']:.2f}",
            operations,
            str(row.get("rounds", "")),
            row["peer"],
            ", ".join(str(one) for one in where if one),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return _HEAD + "\n".join(lines) + "\n"


def main() -> None:
    """Write both."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--page", type=Path, required=True)
    chosen = parser.parse_args()
    found = collected(chosen.folder)
    chosen.json.write_text(json.dumps(found, indent=1) + "\n")
    chosen.page.write_text(page(found))


if __name__ == "__main__":
    main()
