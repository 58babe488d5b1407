"""The report on a data set: what it contains, and what will hurt training."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from ipdiverse.errors import quoted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ipdiverse.data.manifest import Record

LONG_WORDS = 55
"""CLIP's text encoders read 75 tokens; English has about four tokens in three words."""
_SMALL_SIDE = 64
_EXAMPLES = 5


def examine(records: Sequence[Record], bad: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Count and measure."""
    report: dict[str, Any] = {
        "images": len(records),
        "bad": {"count": len(bad), "examples": list(bad[:_EXAMPLES])},
        "sizes": _sizes(records),
        "duplicates": _duplicates(records),
        "captions": _captions(records),
        "subjects": _subjects(records),
        "references": sum(record.reference is not None for record in records),
    }
    return {**report, "advice": _advice(report)}


def as_text(report: dict[str, Any]) -> str:
    """The report for people."""
    sizes, captions, subjects = report["sizes"], report["captions"], report["subjects"]
    copies, unused = report["duplicates"]["images"], report.get("unused", {}).items()
    left = sum(found["count"] for what, found in unused if what.startswith("images"))
    left_out = f", {left} not used" if left else ""
    lines = [
        f"{report['images']} images, {report['bad']['count']} bad, {copies} duplicates{left_out}",
        f"shorter sides {sizes['min']} to {sizes['max']} px, median {sizes['median']:.0f}",
        f"{captions['distinct']} different captions of {captions['median_words']:.0f} words, "
        f"{captions['missing']} missing, {captions['long']} too long",
        f"{subjects['count']} subjects, {subjects['single']} of them with one image; "
        f"{report['references']} images have their own reference",
        *(f"bad: {item['source']}: {item['reason']}" for item in report["bad"]["examples"]),
        *(
            f"not used: {found['count']} {what} ({', '.join(map(quoted, found['examples']))}"
            + (", …)" if found["count"] > len(found["examples"]) else ")")
            for what, found in unused
        ),
        *(f"note: {line}" for line in report.get("notes", ())),
        *(f"advice: {line}" for line in report["advice"]),
    ]
    return "\n".join(lines)


def _sizes(records: Sequence[Record]) -> dict[str, Any]:
    short = np.array([min(record.width, record.height) for record in records])
    aspect = np.array([record.width / record.height for record in records])
    return {
        "min": int(short.min()),
        "median": float(np.median(short)),
        "max": int(short.max()),
        "small": int((short < _SMALL_SIDE).sum()),
        # by over a tenth, upright or across: training crops these
        "not_square": int((np.abs(np.log(aspect)) > np.log(1.1)).sum()),
    }


def _duplicates(records: Sequence[Record]) -> dict[str, Any]:
    """Images whose pixels are equal to an earlier one's."""
    groups: dict[str, list[str]] = {}  # by a hash of pixels: one picture in two formats is a copy
    for record in records:
        groups.setdefault(record.sha256, []).append(record.source)
    several = [names for names in groups.values() if len(names) > 1]
    return {"images": sum(map(len, several)) - len(several), "examples": several[:_EXAMPLES]}


def _captions(records: Sequence[Record]) -> dict[str, Any]:
    texts = [record.text for record in records]
    words = [len(text.split()) for text in texts]
    common, count = Counter(texts).most_common(1)[0]
    return {
        "missing": texts.count(""),
        "long": sum(number > LONG_WORDS for number in words),
        "distinct": len(set(texts)),
        "median_words": float(np.median(words)),
        "most_common": common,
        "most_common_count": count,
    }


def _subjects(records: Sequence[Record]) -> dict[str, Any]:
    counts = Counter(record.subject for record in records if record.subject is not None)
    return {
        "count": len(counts),
        "single": sum(count == 1 for count in counts.values()),
        "without": sum(record.subject is None for record in records),
        "largest": max(counts.values(), default=0),
    }


def _advice(report: dict[str, Any]) -> list[str]:
    """What will hurt training, worst first."""
    images, captions, subjects = report["images"], report["captions"], report["subjects"]
    missing, long, single = captions["missing"], captions["long"], subjects["single"]
    copies, small = report["duplicates"]["images"], report["sizes"]["small"]
    # where nothing can be paired, single subjects are not a second problem
    paired = bool(subjects["count"] > single or report["references"])
    alike = images > 1 and captions["distinct"] == 1 and not missing
    advice = {
        "No image has a caption: the adapter cannot learn from text.": missing == images,
        f"Captions that are missing, and train as empty prompts: {missing}.": 0 < missing < images,
        f"All captions are alike ({captions['most_common']!r}): the adapter cannot learn what text "
        "is for.": alike,
        f"Captions of over {LONG_WORDS} words, whose ends are cut: {long}.": long > 0,
        "No image has another of its subject: references can only be the image itself, augmented, "
        "which teaches more copying than pairs do.": not paired,
        f"Subjects with one image, which cannot be paired: {single}.": paired and single > 0,
        f"Images that repeat another: {copies}; remove them, or some scenes count twice.": copies
        > 0,
        f"Images with a side under {_SMALL_SIDE} px: {small}.": small > 0,
    }
    return [sentence for sentence, holds in advice.items() if holds]
