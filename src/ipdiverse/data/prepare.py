"""From any source to one folder: checked images, a manifest, a quarantine list and a report.

    OUT/images/3f/3fa1….jpg   every image once, named by what it shows
    OUT/metadata.jsonl        the manifest
    OUT/quarantine.jsonl      what could not be used, each with its reason
    OUT/report.json           counts, and advice on what will hurt training

Each finished image is noted in a journal, so an interrupted run is resumed; the manifest is written
last.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal

from ipdiverse.data.manifest import (
    MANIFEST,
    REPORT,
    Record,
    is_whole,
    manifest_text,
    read_report,
)
from ipdiverse.data.sources import SourceOptions, open_source
from ipdiverse.errors import DataError, ImageError, check_range
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
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from PIL import Image

    from ipdiverse.data.manifest import Item

Square = Literal["keep", "pad", "crop"]
JOURNAL, SETTINGS, QUARANTINE = "prepare.partial.jsonl", "prepare.json", "quarantine.jsonl"
_CHUNK = 64
_FEWEST = 20
"""Items before the share of bad ones is judged, when the source does not know its size."""


@dataclass(frozen=True)
class PrepareOptions(SourceOptions):
    """How a source is read and what is kept of it.

    Args:
        square: `keep` the shape; `pad` shows all of the image on a blurred copy of itself; `crop`
            takes the centre and may cut the subject.
        max_bad: Share of bad images above which the command stops.
    """

    square: Square = "keep"
    max_bad: float = 0.05

    def __post_init__(self) -> None:
        check_range("max_bad", self.max_bad, 0, 1)
        check_range("edits", self.edits, 0, 1)


@dataclass(frozen=True)
class Bad:
    """An image that could not be used.

    Args:
        source: Its name in the source.
        reason: Why, one line.
    """

    source: str
    reason: str


def prepare(source: str, out: Path, options: PrepareOptions) -> dict[str, Any]:
    """Check every image of a source and write what is good.

    Args:
        source: A path, a hub id, or `critters` (`sources`).
        out: Target folder, new or of an interrupted run of the same.
        options: How.

    Returns:
        The report (`doctor.examine`).

    Raises:
        DataError: The source cannot be read, nothing in it is good, too much of it is bad, or the
            folder was prepared from something else.
        OutputError: The folder cannot be written.
    """
    with only_one(out):
        return _prepare(source, out, options)


def _prepare(source: str, out: Path, options: PrepareOptions) -> dict[str, Any]:
    from ipdiverse.data.doctor import examine

    opened = open_source(source, options)
    ensure_writable_folder(out / "images")
    _claim(out, {"source": source, "kind": opened.kind, **asdict(options)})
    if (report := read_report(out)) is not None and is_whole(out):
        (out / JOURNAL).unlink(missing_ok=True)  # a kill may have left it
        return report
    records, bad = _run(opened.items(), opened.count, out, options)
    write_text_atomic(out / QUARANTINE, "".join(json.dumps(asdict(b)) + "\n" for b in bad))
    if not records:
        reasons = "; ".join(f"{b.source}: {b.reason}" for b in bad[:3])
        raise DataError("holds no usable image", where=source, found=reasons or "nothing at all")
    _check_share(len(bad), len(records) + len(bad), options.max_bad, bad, out)
    report = {"source": source, "kind": opened.kind, **examine(records, [asdict(b) for b in bad])}
    write_text_atomic(out / MANIFEST, manifest_text(records))
    report["manifest"] = file_hash(out / MANIFEST)
    write_text_atomic(out / REPORT, sealed(report, indent=2))
    (out / JOURNAL).unlink(missing_ok=True)
    return report


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Note what the folder is prepared from; refuse a folder prepared from something else."""
    file = out / SETTINGS
    if not file.is_file():
        write_text_atomic(file, sealed(settings, indent=2))
        return
    # a folder of an older version lacks newer options, which then had today's default
    try:
        before = asdict(PrepareOptions()) | unsealed(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        fix = "Remove it, and run the same command again."
        raise DataError("is damaged", where=file, found=error, fix=fix) from error
    different = sorted(
        key for key in settings if before.get(key) != settings[key] and key != "max_bad"
    )
    if different:
        first = different[0]
        raise DataError(
            "was prepared from something else",
            where=out,
            expected=f"{first} {before.get(first)!r}",
            found=repr(settings[first]),
            fix="Choose a new folder.",
        )


def _run(
    items: Iterator[Item], count: int | None, out: Path, options: PrepareOptions
) -> tuple[list[Record], list[Bad]]:
    """Go through all items; those of the journal are not read again."""
    from tqdm import tqdm

    known = _journal(out / JOURNAL)
    results: list[Record | Bad] = []
    bad: list[Bad] = []
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=count, unit="image", disable=None) as progress,
    ):

        def work(item: Item) -> Record | Bad:
            return known.get(item.name) or _take(item, out, options.square)

        while chunk := list(itertools.islice(items, _CHUNK)):
            done = list(pool.map(work, chunk))
            fresh = [r for item, r in zip(chunk, done, strict=True) if item.name not in known]
            append_text(out / JOURNAL, "".join(sealed(asdict(result)) for result in fresh))
            results += done
            progress.update(len(chunk))
            bad += [result for result in done if isinstance(result, Bad)]
            if (total := count or len(results)) >= _FEWEST:
                _check_share(len(bad), total, options.max_bad, bad, out)
    records = [result for result in results if isinstance(result, Record)]
    return records, bad


def _journal(file: Path) -> dict[str, Record | Bad]:
    """What an interrupted run finished, by name; lines cut off or damaged are left out."""
    if not file.is_file():
        return {}
    finished = {}
    for text in file.read_text("utf-8", "replace").split("\n"):
        with suppress(ValueError, TypeError):
            line = unsealed(text)
            result = Bad(**line) if "reason" in line else Record(**line)
            finished[result.source] = result
    return finished


def _check_share(bad: int, total: int, allowed: float, examples: Iterable[Bad], out: Path) -> None:
    if bad <= allowed * total:
        return
    first = "; ".join(f"{b.source}: {b.reason}" for b in itertools.islice(examples, 3))
    raise DataError(
        "too many images are bad",
        where=out,
        expected=f"at most {allowed:.0%}",
        found=f"{bad} of {total} ({first})",
        fix="Correct the source, or raise --max-bad.",
    )


def _take(item: Item, out: Path, square: Square) -> Record | Bad:
    """Check and store one item."""
    from ipdiverse.image_io import content_hash

    if item.problem:
        return Bad(item.name, item.problem)
    try:
        name, image = _store(item.load(), item.name, out, square)
        reference = None
        if item.load_reference is not None:
            where = f"reference of {item.name}"
            reference = _store(item.load_reference(), where, out, square)[0]
    except (ImageError, DataError) as error:
        return Bad(item.name, str(error))
    text = " ".join((item.text or "").split())
    return Record(
        file_name=name,
        text=text,
        subject=item.subject,
        reference=reference,
        sha256=content_hash(image),
        width=image.width,
        height=image.height,
        source=item.name,
    )


def _store(data: bytes, name: str, out: Path, square: Square) -> tuple[str, Image.Image]:
    """Write an image, unless it is there; its name in the folder, and its pixels.

    A file that needs no change keeps its bytes. Its name is their hash, not that of its pixels, as
    several files may show the same picture.
    """
    from ipdiverse.image_io import load_image_bytes
    from ipdiverse.image_io.files import format_of

    image = load_image_bytes(data, name)
    shaped = to_square(image, square)
    suffix = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}.get(format_of(data) or "")
    if shaped is not image or suffix is None:
        data, suffix = _as_png(shaped), ".png"
    digest = hashlib.sha256(data).hexdigest()
    relative = f"images/{digest[:2]}/{digest}{suffix}"
    target = out / relative
    if not target.is_file():
        with writing(target.parent):
            target.parent.mkdir(exist_ok=True)
        write_bytes_atomic(target, data)
    return relative, shaped


def _as_png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def to_square(image: Image.Image, how: Square) -> Image.Image:
    """Make an image square.

    Args:
        image: RGB.
        how: `keep` leaves it alone; `pad` shows all of it, on a blurred copy of itself, so that no
            subject is cut and no hard bar is learnt; `crop` takes the centre.
    """
    from PIL import Image, ImageFilter

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
