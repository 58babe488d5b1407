"""The doctor's report on data with known faults."""

from __future__ import annotations

from typing import Any

from ipdiverse.data.doctor import as_text, examine
from ipdiverse.data.manifest import Record


def record(name: str, **changes: Any) -> Record:
    usual: dict[str, Any] = {
        "file_name": f"images/{name}.png",
        "text": f"a picture of {name}",
        "subject": None,
        "reference": None,
        "sha256": name,
        "width": 512,
        "height": 512,
        "source": name,
    }
    return Record(**(usual | changes))


def advice(*records: Record) -> str:
    return "\n".join(examine(records, [])["advice"])


def test_counts_and_sizes() -> None:
    records = [record("a", width=100), record("b", height=300), record("c", sha256="a")]
    report = examine(records, [{"source": "x", "reason": "broken"}])
    assert report["images"] == 3
    assert report["sizes"] == {"min": 100, "median": 300.0, "max": 512, "small": 0, "not_square": 2}
    assert report["duplicates"] == {"images": 1, "examples": [["a", "c"]]}
    assert report["bad"] == {"count": 1, "examples": [{"source": "x", "reason": "broken"}]}
    text = as_text(report)
    assert "3 images, 1 bad, 1 duplicates" in text
    assert "bad: x: broken" in text


def test_good_data_gets_no_advice() -> None:
    pair = [record("a", subject="s"), record("b", subject="s")]
    assert advice(*pair) == ""


def test_each_fault_is_named() -> None:
    pair = {"subject": "s"}
    assert "No image has a caption" in advice(record("a", text="", **pair), record("b", text=""))
    assert "are missing, and train as empty prompts: 1" in advice(record("a", text=""), record("b"))
    alike = advice(record("a", text="x", **pair), record("b", text="x", **pair))
    assert "All captions are alike ('x')" in alike
    assert "whose ends are cut: 1" in advice(record("a", text="word " * 56))
    assert "No image has another of its subject" in advice(record("a"), record("b", **pair))
    lonely = advice(record("a", **pair), record("b", **pair), record("c", subject="t"))
    assert "which cannot be paired: 1" in lonely
    assert "Images that repeat another: 1" in advice(record("a", **pair), record("a", **pair))
    assert "Images with a side under 64 px: 1" in advice(record("a", width=40))
    assert "another of its subject" not in advice(record("a", reference="images/r.png"))


def test_what_was_not_used_is_told_in_the_first_line() -> None:
    report = examine([record("a")], [])
    names = {"count": 6, "examples": ["a\x1b.heic"]}
    unused = {"images in a format that is not read (.heic)": names}
    first, *lines = as_text({**report, "unused": unused, "notes": ["n"]}).split("\n")
    assert first == "1 images, 0 bad, 0 duplicates, 6 not used"
    told = "not used: 6 images in a format that is not read (.heic) (a\\x1b.heic, …)"
    assert told in lines
    assert "note: n" in lines
