"""From any source to one folder: checked images, a manifest, a quarantine list and a report.

    OUT/images/3f/3fa1….jpg    every image once, named by what it shows
    OUT/metadata.jsonl         the manifest
    OUT/quarantine.jsonl       what could not be used, each with its reason
    OUT/report.json            counts, and advice on what will hurt training
    OUT/prepare.json           what the folder was prepared from
    OUT/prepare.journal.jsonl  what is known of each file, bound to its content

The journal makes the same command go on where it was interrupted, and afterwards take up what was
changed, added or removed. The manifest is written last.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageFilter

from ipdiverse.data.doctor import examine
from ipdiverse.data.files import CAPTION_BYTES, SETTINGS, inside
from ipdiverse.data.manifest import (
    MANIFEST,
    REPORT,
    PrepareOptions,
    Record,
    Square,
    manifest_records,
    manifest_text,
    read_report,
)
from ipdiverse.data.sources import open_source
from ipdiverse.errors import DataError, ImageError
from ipdiverse.image_io import content_hash, load_image_bytes
from ipdiverse.image_io.files import format_of
from ipdiverse.parts import WHOLE, Part, dealt_otherwise, forget_parts, holding_parts, part_of
from ipdiverse.writing import (
    append_text,
    ensure_writable_folder,
    file_hash,
    only_one,
    sealed,
    unsealed,
    write_bytes_atomic,
    write_text_atomic,
    writing,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ipdiverse.data.manifest import Item, Source

JOURNAL, QUARANTINE = "prepare.journal.jsonl", "quarantine.jsonl"
_CHUNK = 64
_FEWEST = 20
"""Items before the share of bad ones is judged, when the source does not know its size."""
_EXAMPLES = 5


@dataclass(frozen=True)
class Bad:
    """An image that could not be used: its name in the source, and why, in one line."""

    source: str
    reason: str


def prepare(source: str, out: Path, options: PrepareOptions, part: Part = WHOLE) -> dict[str, Any]:
    """Check every image of a source and write what is good.

    Args:
        source: A path, a hub id, or `critters` (`sources`).
        part: The share of the images that is stored. A part lists them in a journal of its own;
            the same call without it then decodes nothing twice, and writes the manifest.

    Returns:
        The report (`doctor.examine`), with `notes` and what was `unused`; of a part, counts.
    """
    if not part.whole:
        return _prepare_part(source, out, options, part)
    with only_one(out), holding_parts(out) as folders:
        opened = open_source(source, options)
        journal = _Journal(out / JOURNAL, folders)
        _claim(source, out, options, opened, journal)
        ensure_writable_folder(out / "images")
        records, bad = _run(opened, out, options, journal)
        write_text_atomic(out / QUARANTINE, "".join(json.dumps(asdict(b)) + "\n" for b in bad))
        if not records:
            found = _told(bad) or "nothing at all"
            raise DataError("holds no usable image", where=source, found=found)
        _check_share(bad, len(records) + len(bad), len(records) + len(bad), options.max_bad, out)
        notes = list(opened.notes)
        if not _write_manifest(out, manifest_text(records), options.keep_edits):
            notes.append(f"{MANIFEST} was edited after prepare wrote it, and is kept.")
        unused = {
            what: {"count": len(names), "examples": names[:_EXAMPLES]}
            for what, names in opened.unused().items()
        }
        report = {
            "source": _place(source, out),
            "kind": opened.kind,
            **examine(records, [asdict(b) for b in bad]),
            "notes": notes,
            "unused": unused,
            "manifest": file_hash(out / MANIFEST),
        }
        write_text_atomic(out / REPORT, sealed(report, indent=2))
        # last: a kill before this leaves files too many, never a record without its file
        journal.finish(out, {name for r in records for name in (r.file_name, r.reference)})
        forget_parts(out, JOURNAL)
        return report


def _prepare_part(source: str, out: Path, options: PrepareOptions, part: Part) -> dict[str, Any]:
    """Store the images of a part; whether too many are bad is judged of all of them."""
    stated = {**asdict(options), "root": _absolute(options.root)}
    about = {"kind": "prepare", "source": _absolute(source), "options": stated}
    with part_of(out, part, about) as home:
        opened = open_source(source, options)
        journal = _Journal(home / JOURNAL, [out, *dealt_otherwise(out, part)])
        _claim(source, out, options, opened, journal)
        ensure_writable_folder(out / "images")
        items = lambda: (item for item in opened.items() if part.takes(item.name))  # noqa: E731
        share = replace(opened, count=None, items=items)
        records, bad = _run(share, out, replace(options, max_bad=1.0), journal)
        return {"part": str(part), "images": len(records), "bad": len(bad)}


def _absolute(path: str | None) -> str | None:
    """A path for whoever merges, from whichever folder; any other word as it is."""
    return path if path is None or not os.path.exists(path) else os.path.abspath(path)  # noqa: PTH100, PTH110


def _told(bad: list[Bad]) -> str:
    """The first reasons, for an error."""
    return "; ".join(f"{b.source}: {b.reason}" for b in bad[:3])


def _place(path: str | None, out: Path) -> str | None:
    """A path as seen from the folder: however it was spelled, also when both have moved."""
    if path is None or not os.path.exists(path):  # noqa: PTH110
        return path
    place, home = Path(os.path.realpath(path)), os.path.realpath(out)
    shared = Path(os.path.commonpath((place, home))) if place.drive == Path(home).drive else None
    if shared in (None, Path(place.anchor)):
        # data sets are shared: no whole path of somebody's machine may stand in them
        return f"{place.name} ({hashlib.sha256(os.fsencode(place)).hexdigest()[:12]})"
    return Path(os.path.relpath(place, home)).as_posix()


def _claim(
    source: str, out: Path, options: PrepareOptions, opened: Source, journal: _Journal
) -> None:
    """Note what the folder is prepared from; refuse one that is not ours, or of something else."""
    file, home, target = out / SETTINGS, Path(source).resolve(), out.resolve()
    if home == target or home.is_relative_to(target / "images"):
        raise DataError("lies in the source", where=out, found=source, fix="Choose a new folder.")
    places = {"source": _place(source, out), "root": _place(options.root, out)}
    settings = {**asdict(options), **places}
    del settings["keep_edits"]  # of this one call, not of the folder
    if not file.is_file():
        images = out / "images"
        others = [n for n in (MANIFEST, QUARANTINE, REPORT, JOURNAL) if (out / n).exists()]
        others += ["images"] if images.is_dir() and any(images.iterdir()) else []
        if others:
            raise DataError(
                "holds files that prepare did not write",
                where=out,
                found=", ".join(others),
                fix="Choose a new folder.",
            )
        ensure_writable_folder(out)
        before: dict[str, Any] = {}
    else:
        before = _settings(file)
        # a folder of an older version lacks newer options, which then had today's default
        compared = asdict(PrepareOptions()) | before
        free = {"max_bad", "kind"} if (out / MANIFEST).exists() else asdict(options).keys()
        different = {k for k, v in settings.items() if compared.get(k) != v} - free
        place = str(before["source"])  # version 0.1 noted it as it was given
        spelled = {os.path.realpath(place), os.path.realpath(out / place)}
        is_same = os.path.realpath(source) in spelled
        if is_same or _is_moved(place, out, opened, journal):
            different -= {"source"}
        if different:
            first = min(different)
            raise DataError(
                "was prepared from something else",
                where=out,
                expected=f"{first} {compared.get(first)!r}",
                found=repr(settings[first]),
                fix="Choose a new folder.",
            )
    if before | settings != before:
        write_text_atomic(file, sealed(before | settings, indent=2))


def _settings(file: Path) -> dict[str, Any]:
    try:
        content = unsealed(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or "source" not in content:
        raise DataError(
            "was not written by prepare, or is broken", where=file, fix="Choose a new folder."
        )
    return content


def _is_moved(before: str, out: Path, opened: Source, journal: _Journal) -> bool:
    """Whether the place noted is gone, and this source has a file of it, with the same content."""
    if os.path.exists(out / before):  # noqa: PTH110
        return False
    for item in itertools.islice(opened.items(), _FEWEST):
        entry = journal.get(item.name)
        with contextlib.suppress(DataError):
            if entry and not item.problem and entry["content"] == _content(_load(item)):
                return True
    return False


class _Journal:
    """What is known of each file by its name: JSON lines, each with a checksum of its own.

    Lines are kept as text, since a data set may have millions.
    """

    def __init__(self, file: Path, others: Iterable[Path] = ()) -> None:
        self.file = file
        self.lines: dict[str, str] = {}
        self.stale: list[str] = []
        self.current: dict[str, str] = {}
        for one in dict.fromkeys((*(folder / JOURNAL for folder in others), file)):
            for line in one.read_text("utf-8", "replace").split("\n") if one.is_file() else ():
                if (entry := _entry(line)) is not None:
                    self.stale.append(self.lines.get(entry["source"], ""))
                    self.lines[entry["source"]] = line

    def get(self, name: str) -> dict[str, Any] | None:
        return _entry(self.lines.get(name, ""))

    def add(self, entries: Iterable[dict[str, Any]]) -> None:
        """Note what was found; what was known is not written again."""
        made = {entry["source"]: _line(entry) for entry in entries}
        fresh = [line for name, line in made.items() if self.lines.get(name) != line]
        self.current |= made
        if fresh:
            append_text(self.file, "".join(f"{line}\n" for line in fresh))

    def finish(self, out: Path, kept: set[str | None]) -> None:
        """Delete stored images that no record names any more, and forget what is not there."""
        gone = [line for name, line in self.lines.items() if self.current.get(name) != line]
        for entry in map(_entry, self.stale + gone):
            for name in {(entry or {}).get(key) for key in ("file_name", "reference")} - kept:
                if name and name.startswith("images/"):
                    inside(out, name).unlink(missing_ok=True)
        text = "".join(f"{line}\n" for line in self.current.values())
        if text.encode() != (self.file.read_bytes() if self.file.is_file() else b""):
            write_text_atomic(self.file, text)


def _line(entry: dict[str, Any]) -> str:
    text = json.dumps(entry)
    return json.dumps({**entry, "check": hashlib.sha256(text.encode()).hexdigest()[:16]})


def _entry(line: str) -> dict[str, Any] | None:
    """What a line says; None for one that was cut off or harmed."""
    try:
        entry = json.loads(line)
        del entry["check"]
    except (ValueError, RecursionError, TypeError, KeyError):
        return None
    return entry if _line(entry) == line else None


def _run(
    opened: Source, out: Path, options: PrepareOptions, journal: _Journal
) -> tuple[list[Record], list[Bad]]:
    """Go through all items; what the journal knows is not decoded again."""
    from tqdm import tqdm

    records: list[Record] = []
    bad: list[Bad] = []
    items = opened.items()
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=opened.count, unit="image", disable=None) as progress,
    ):

        def work(item: Item) -> tuple[Record | Bad, dict[str, Any] | None]:
            return _take(item, out, options.square, journal.get(item.name))

        while chunk := list(itertools.islice(items, _CHUNK)):
            done = list(pool.map(work, chunk))
            journal.add(entry for _, entry in done if entry)
            records += [result for result, _ in done if isinstance(result, Record)]
            bad += [result for result, _ in done if isinstance(result, Bad)]
            progress.update(len(chunk))
            seen = len(records) + len(bad)
            if (opened.count or seen) >= _FEWEST:
                _check_share(bad, seen, opened.count or seen, options.max_bad, out)
    return records, bad


def _check_share(bad: list[Bad], seen: int, total: int, allowed: float, out: Path) -> None:
    most = max(1, int(allowed * total)) if allowed else 0
    if len(bad) <= most:
        return
    needed = min(1.0, math.ceil(100 * len(bad) / seen) / 100)
    raise DataError(
        "too many images are bad",
        where=out,
        expected=f"at most {most} of {total} (--max-bad {allowed:g})",
        found=f"{len(bad)} of {seen} ({_told(bad)})",
        fix="Correct the source and run the same command again, or go on without them: "
        f"--max-bad {needed:g}.",
    )


def _take(
    item: Item, out: Path, square: Square, before: dict[str, Any] | None
) -> tuple[Record | Bad, dict[str, Any] | None]:
    """Check and store one item; what was known of the same content counts."""
    text = " ".join((item.text or "").split())
    reason = item.problem or _harm(text, "caption") or _harm(item.subject or "", "subject")
    if reason:
        return Bad(item.name, reason), None
    try:
        stamp = item.stamp() if item.stamp else None
        if before and before["square"] != square:
            before = None
        if before and stamp and before["stamp"] == stamp and _is_stored(before, out):
            entry = before
        else:
            entry = _look(item, out, square, before, stamp)
    except DataError as error:
        return Bad(item.name, str(error).removeprefix(f"{item.name}: ")), None
    if "reason" in entry:
        return Bad(item.name, entry["reason"]), entry
    about = {k: v for k, v in entry.items() if k not in ("stamp", "content", "square")}
    return Record(**about, text=text, subject=item.subject, repeats=item.repeats), entry


def _harm(text: str, what: str) -> str | None:
    """Why a text cannot be used: what no encoding holds, or what an earlier reader lost."""
    if any(c in "\0\ufffd" or "\ud800" <= c <= "\udfff" for c in text):
        return f"its {what} has characters that were lost or are none: {text!r:.60}"
    too_long = len(text) > CAPTION_BYTES
    return f"its {what} has over {CAPTION_BYTES} characters" if too_long else None


def _is_stored(entry: dict[str, Any], out: Path) -> bool:
    names = (entry.get("file_name"), entry.get("reference"))
    return all(os.path.isfile(out / name) for name in names if name)  # noqa: PTH113


def _load(item: Item) -> list[bytes]:
    """An item's image, and its reference if it has one."""
    return [load() for load in (item.load, item.load_reference) if load is not None]


def _content(files: list[bytes]) -> str:
    return "-".join(hashlib.sha256(data).hexdigest() for data in files)


def _look(
    item: Item, out: Path, square: Square, before: dict[str, Any] | None, stamp: str | None
) -> dict[str, Any]:
    """Decode and store one item, unless the journal knows its content."""
    data, *others = files = _load(item)
    content = _content(files)
    known = {"source": item.name, "stamp": stamp, "square": square, "content": content}
    if before and before["content"] == content and _is_stored(before, out):
        return before | known
    try:
        name, image = _store(data, item.name, out, square)
        stored = [_store(other, f"reference of {item.name}", out, square)[0] for other in others]
    except ImageError as error:
        return {**known, "reason": str(error).removeprefix(f"{item.name}: ")}
    made = {"file_name": name, "reference": next(iter(stored), None)}
    size = {"width": image.width, "height": image.height}
    return {**known, **made, "sha256": content_hash(image), **size}


def _write_manifest(out: Path, text: str, keep_edits: bool) -> bool:
    """Write the manifest, but never over one that somebody edited; whether it is ours."""
    file, settings = out / MANIFEST, _settings(out / SETTINGS)
    made = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
    ours = settings.get("manifests", [])
    if file.is_file() and (found := file_hash(file)) not in (made, *ours):
        known = found == (read_report(out) or {}).get("manifest")  # edits that were kept before
        if made in ours[:1] and (known or keep_edits):
            manifest_records(out)
            return False
        # nothing tells an edit from damage, so the user has to
        keep = "say --keep-edits, or " if made in ours[:1] else ""
        raise DataError(
            "was edited after prepare wrote it, is damaged, or is of an older version",
            where=file,
            found=f"another manifest ({found[:8]}) than the source gives now",
            fix=f"If you edited it, {keep}move it away; if not, delete it. Then run the same "
            "command again.",
        )
    if ours[:1] != [made]:  # noted first: after a kill between the two writes both are ours
        settings["manifests"] = [made, *ours[:1]]
        write_text_atomic(out / SETTINGS, sealed(settings, indent=2))
    if not file.is_file() or file_hash(file) != made:
        write_text_atomic(file, text)
    return True


def _store(data: bytes, name: str, out: Path, square: Square) -> tuple[str, Image.Image]:
    """Write an image, unless it is there; its name in the folder, and its pixels.

    A file that needs no change keeps its bytes. Its name is their hash, not that of its pixels, as
    several files may show the same picture.
    """
    image = load_image_bytes(data, name)
    shaped = to_square(image, square)
    suffix = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}.get(format_of(data) or "")
    if shaped is not image or suffix is None:
        buffer, suffix = BytesIO(), ".png"
        shaped.save(buffer, "PNG", compress_level=1)  # the default takes three times as long
        data = buffer.getvalue()
    digest = hashlib.sha256(data).hexdigest()
    relative = f"images/{digest[:2]}/{digest}{suffix}"
    target = out / relative
    if not target.is_file():
        with writing(target.parent):
            target.parent.mkdir(exist_ok=True)
        write_bytes_atomic(target, data)
    return relative, shaped


def to_square(image: Image.Image, how: Square) -> Image.Image:
    """Make an image square."""
    width, height = image.size
    if how == "keep" or width == height:
        return image
    if how == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return image.crop((left, top, left + side, top + side))
    side = max(width, height)
    backdrop = image.resize((side, side), Image.Resampling.BICUBIC)
    backdrop = backdrop.filter(ImageFilter.GaussianBlur(side / 16))
    backdrop.paste(image, ((side - width) // 2, (side - height) // 2))
    return backdrop
