"""Sources that pack many images into one file.

`hub` is a data set that `datasets` opens, by hub id or from a local repository of parquet or arrow
files; `webdataset` is tar files whose members of one stem are one sample.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import os
import tarfile
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from ipdiverse.config import decoded
from ipdiverse.data.files import (
    CAPTION_BYTES,
    ENTRIES,
    HEADER_BYTES,
    PARTS,
    Listing,
    check_budget,
    inside,
    list_files,
    open_below,
    read_below,
    stamp_of,
)
from ipdiverse.data.lists import TEXT_COLUMNS, matching
from ipdiverse.data.manifest import Item, Source
from ipdiverse.errors import DataError
from ipdiverse.image_io.files import MAX_FILE_BYTES, SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from ipdiverse.data.manifest import SourceOptions

HUB_FILES = ("*.parquet", "*.arrow", "state.json")
"""Files by which a local repository, or a folder that `save_to_disk` wrote, is recognised."""
_SAVED = ("state.json", "dataset_info.json", "../dataset_dict.json")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd", b"PK": "zip"}
_TAR_BYTES = 1 << 50
_TEXT_SUFFIXES = (".txt", ".caption", ".text")


def hub_files(source: str, revision: str | None) -> Listing:
    """The files of a data set, here or on the hub; none where the hub cannot be asked."""
    from huggingface_hub import HfApi

    if os.path.isdir(source):  # noqa: PTH112
        return list_files(Path(source))
    try:
        names = HfApi().list_repo_files(source, repo_type="dataset", revision=revision)
    except Exception:  # whatever it raises: without a connection a cached data set still opens
        names = []
    return Listing(Path(source), tuple(n for n in names if not n.startswith(".")), {})


def hub_source(
    source: str, options: SourceOptions, used: set[str], unused: Callable[[], dict[str, list[str]]]
) -> Source:
    """Open a data set; images stay undecoded until they are read.

    Code that comes with a data set is never run.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "needs the package datasets, which is not installed",
            where=source,
            fix="pip install 'ipdiverse[hub-data]'.",
        ) from error

    table = _load(source, options, used)
    columns: dict[str, Any] = dict(table.features)
    image = options.image_column or _image_column(columns, source)
    text = options.text_column
    for wanted, what in ((image, "image"), (text, "text")):
        if wanted and wanted not in columns:
            raise DataError(
                f"has no column {wanted!r}",
                where=source,
                found=", ".join(columns),
                fix=f"Name the right one with --{what}-column.",
            )
    halves = text is None and isinstance(columns.get("description"), dict)
    halves = halves and {"description_0", "description_1"} <= columns["description"].keys()
    text = _text_column(columns, source) if text is None and not halves else text
    reference = "reference" if isinstance(columns.get("reference"), datasets.Image) else None
    for name in (image, reference):
        # undecoded: `datasets` would decode without the limits of `image_io`
        if isinstance(columns.get(name or ""), datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))

    roots = _roots(source)

    if halves:
        told = [name for name in ("description", "quality_assessment") if name in columns]
        good = [i for i, about in enumerate(table.select_columns(told)) if _good(about)]
        left = f"left out {len(table) - len(good)} of {len(table)} pairs, which are noted as poor"
        pairs = partial(map, partial(_two_items, image, roots), good, table.select(good))
        both = itertools.chain.from_iterable
        notes = dict.fromkeys([left] if len(good) < len(table) else [])
        return Source("hub", 2 * len(good), lambda: both(pairs()), notes, unused)

    def item(number: int, row: dict[str, Any]) -> Item:
        name, words, subject = f"row-{number:07d}", row.get(text or ""), row.get("subject")
        prompt = row[reference] if reference else None
        return Item(
            name,
            lambda: _bytes(row[image], name, roots),
            words if isinstance(words, str) else None,
            subject if isinstance(subject, str) else None,
            (lambda: _bytes(prompt, name, roots)) if prompt else None,
        )

    return Source("hub", len(table), lambda: map(item, itertools.count(), table), unused=unused)


_GOOD = 5
"""Of `quality_assessment`'s notes from 0 to 5: what the authors of Subjects200K train on."""


def _two_items(
    image: str, roots: tuple[Path, ...], number: int, row: dict[str, Any]
) -> Iterator[Item]:
    """Both pictures of a row that shows one subject twice, side by side, each with its caption.

    The layout of Subjects200K (arXiv:2411.15098): `description` holds the subject's name and
    `description_0`, `description_1`.
    """
    for half in (0, 1):
        name, text = f"row-{number:07d}-{half}", row["description"][f"description_{half}"]
        load = partial(_half, row[image], name, roots, half)
        yield Item(name, load, text or None, f"row-{number:07d}")


def _good(about: dict[str, Any]) -> bool:
    """Whether the authors found that both pictures show one subject, and well."""
    described = about["description"] or {}
    notes = (about.get("quality_assessment") or {}).values()
    told = described.get("description_valid", True) and described.get("description_0")
    return bool(told) and all(note is not None and note >= _GOOD for note in notes)


def _half(stored: Any, name: str, roots: tuple[Path, ...], half: int) -> bytes:
    """One of two square pictures that stand side by side with a border around each, as PNG.

    Borders are shared, so that with pictures of s and borders of b pixels the whole has 2s + 3b by
    s + 2b: its size tells both.
    """
    from ipdiverse.image_io import load_image_bytes  # here: help needs no Pillow

    whole = load_image_bytes(_bytes(stored, name, roots), name)
    border = 2 * whole.height - whole.width
    edge = whole.height - 2 * border
    if border < 0 or edge < 4 * border or edge < 1:
        raise DataError(
            "does not show two pictures side by side",
            where=name,
            expected="twice as wide as high, but for a border",
            found=f"{whole.width} x {whole.height}",
            fix="Give --text-column, and its pictures are taken as they are.",
        )
    left = border + half * (edge + border)
    file = io.BytesIO()
    whole.crop((left, border, left + edge, border + edge)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _load(source: str, options: SourceOptions, used: set[str]) -> Any:
    """Open the data set's table, and note which files it is made of."""
    import datasets

    split, revision = options.split, options.revision
    saved = [p for p in (Path(source), Path(source, split)) if (p / "state.json").is_file()]
    try:
        with _silent("datasets"):
            if saved:
                state = json.loads(read_below(saved[0], "state.json", CAPTION_BYTES))
                names = [file["filename"] for file in state["_data_files"]]
                files = [*(saved[0] / n for n in _SAVED), *(inside(saved[0], n) for n in names)]
                used.update(os.path.relpath(f, source).replace(os.sep, "/") for f in files)
                return datasets.load_from_disk(saved[0])
            builder = datasets.load_dataset_builder(source, revision=revision)
            # what a README lists may be anywhere: it is looked at before anything is read
            listed = builder.config.data_files or {}
            names = {part: [_own(str(f), source) for f in files] for part, files in listed.items()}
            used.update(*([names[split]] if split in names else names.values()))
            return datasets.load_dataset(source, split=split, revision=revision)
    except DataError:
        raise
    except Exception as error:  # whatever network, hub, arrow and parquet code raise
        message = str(error).splitlines()
        raise DataError(
            "cannot be opened as a data set",
            where=source,
            found=message[0] if message else type(error).__name__,
            fix="Check the path of a folder, or the name, split and connection of the hub's.",
        ) from error


@contextlib.contextmanager
def _silent(library: str) -> Iterator[None]:
    """Without what a library logs of an error that is ours to tell."""
    logger = logging.getLogger(library)
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


def _own(file: str, source: str) -> str:
    """The name of a data file in its data set; refuses a file that is not the data set's own."""
    hub = f"hf://datasets/{source}"
    if file.startswith((f"{hub}@", f"{hub}/")) and ".." not in file.split("/"):
        return file.removeprefix(hub).partition("/")[2]
    for root in _roots(source)[:2]:
        if name := _relative(file, root):
            return name
    raise DataError("the path leaves its root", where=source, found=file)


def _relative(file: str, root: Path) -> str | None:
    """A file's path below a root after links are followed; None if it is not there."""
    way = os.path.relpath(os.path.realpath(file), os.path.realpath(root)).replace(os.sep, "/")
    return None if way.startswith("../") or way == ".." else way


def _image_column(columns: dict[str, Any], source: str) -> str:
    import datasets

    for name, kind in columns.items():
        if isinstance(kind, datasets.Image) and name != "reference":
            return name
    found = ", ".join(f"{name}: {getattr(kind, 'dtype', kind)}" for name, kind in columns.items())
    fix = "Name it with --image-column."
    raise DataError("has no column of images", where=source, found=found, fix=fix)


def _text_column(columns: dict[str, Any], source: str) -> str | None:
    texts = [name for name, kind in columns.items() if getattr(kind, "dtype", None) == "string"]
    others = [name for name in texts if name != "subject"]
    usual = matching(texts, TEXT_COLUMNS)
    if len(others) > 1 and not usual:
        raise DataError(
            "has several columns of text",
            where=source,
            found=", ".join(others),
            fix="Name the captions' with --text-column, which may be '' for no captions.",
        )
    return next(iter(usual or others), None)


def _roots(source: str) -> tuple[Path, ...]:
    """Where files that a table names may be: the data set's own folder and its caches."""
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub.constants import HF_HUB_CACHE

    if not Path(source).is_dir():
        own = Path(HF_HUB_CACHE, f"datasets--{source.replace('/', '--')}")
        return (own, own, Path(HF_DATASETS_CACHE))
    # a snapshot of the hub's cache consists of links to the blobs of its repository
    home = Path(source).resolve()
    is_snapshot = home.parent.name == "snapshots" and home.is_relative_to(
        Path(HF_HUB_CACHE).resolve()
    )
    return (home, home.parents[1] if is_snapshot else home)


def _bytes(cell: Any, name: str, roots: tuple[Path, ...]) -> bytes:
    """The encoded image of a cell: its bytes, or the file that it names, below one of the roots."""
    if isinstance(cell, bytes):
        return cell
    if isinstance(cell, dict) and cell.get("bytes"):
        return cell["bytes"]
    if isinstance(cell, dict) and isinstance(cell.get("path"), str):
        for root in roots:
            if way := _relative(cell["path"], root):
                return read_below(root, way, MAX_FILE_BYTES)
        raise DataError("the path leaves its root", where=name, found=cell["path"])
    raise DataError("holds no image", where=name, found=type(cell).__name__)


def tar_files(names: Iterable[str]) -> list[str]:
    """The tar files right in a folder."""
    return [name for name in names if name.lower().endswith(".tar") and "/" not in name]


def webdataset(
    root: Path, names: Sequence[str], unused: Callable[[], dict[str, list[str]]] = dict
) -> Source:
    """The samples of plain tar files: members that share everything before their first dot.

    Members are read where they lie in the file, and nothing is unpacked to disk, so neither their
    names nor links among them can reach anything.
    """
    if not names:
        raise DataError("holds no tar file", where=root, expected=".tar")
    for name in names:
        if packing := _COMPRESSED.get(_head(root, name)):  # members cannot be read where they lie
            raise DataError(
                "is compressed",
                where=root / name,
                expected="a plain tar file",
                found=packing,
                fix="Unpack it into a folder, and prepare that.",
            )

    def items() -> Iterator[Item]:
        return itertools.chain.from_iterable(_samples(root, name) for name in names)

    return Source("webdataset", None, items, unused=unused)


def _head(root: Path, name: str) -> bytes:
    """The first two bytes; none of a file that cannot be opened, which its item tells."""
    with contextlib.suppress(DataError), open_below(root, name, _TAR_BYTES) as file:
        return file.read(2)
    return b""


class _Headers:
    """A tar file as `tarfile` sees it: it reads headers alone, and none may claim much memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= HEADER_BYTES:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        return self._read(size)


def _samples(root: Path, name: str) -> Iterator[Item]:
    """The samples of one tar file; where it breaks off, the last item says so."""
    parts: list[tarfile.TarInfo] = []
    stem, count, reason = "", 0, ""
    try:
        with open_below(root, name, _TAR_BYTES) as file:
            for member in _members(file):
                count += 1
                check_budget(count, ENTRIES, name, "members")
                base, suffix = _split(member.name)
                if not member.isfile() or not suffix:
                    continue
                if base != stem and parts:
                    yield _sample(root, name, stem, parts)
                    parts = []
                stem = base
                if len(parts) <= PARTS:
                    parts.append(member)
    except Exception as error:  # tarfile raises nearly anything on hostile headers
        reason = f"the tar file is broken after {stem!r}: {error or type(error).__name__}"
    if parts:
        yield _sample(root, name, stem, parts)
    if reason:
        yield Item(f"{name}/", bytes, problem=reason)


def _members(file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    headers: Any = _Headers(file)
    with tarfile.open(fileobj=headers, mode="r:") as archive:
        held: list[Any] = vars(archive)["members"]
        while (member := archive.next()) is not None:
            held.clear()  # tarfile would keep all of them
            yield member
        file.seek(archive.offset)
        if any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError("what follows is not a header")


def _split(name: str) -> tuple[str, str]:
    """`a/b.seg.jpg` is sample `a/b`, part `.seg.jpg`."""
    path = PurePosixPath(name)
    stem, dot, suffix = path.name.partition(".")
    return str(path.with_name(stem)) if stem else name, (dot + suffix).lower()


def _sample(root: Path, file: str, stem: str, parts: Sequence[tarfile.TarInfo]) -> Item:
    name = f"{file}/{stem}"
    by_suffix = {_split(part.name)[1]: part for part in parts}

    def problem(reason: str) -> Item:
        return Item(name, bytes, problem=reason)

    def load(suffix: str, most: int = MAX_FILE_BYTES) -> bytes:
        part = by_suffix[suffix]
        check_budget(part.size, most, part.name)
        with open_below(root, file, _TAR_BYTES) as opened:
            opened.seek(part.offset_data)
            return opened.read(part.size)

    if len(parts) > PARTS:
        return problem(f"has over {PARTS} parts")
    if len(by_suffix) < len(parts):
        return problem("has two parts of one name")
    if any(part.issparse() for part in parts):
        return problem("is stored as a sparse file")
    image = next((s for s in SUFFIXES if s in by_suffix), None)
    if image is None:
        return problem(f"no image among {', '.join(sorted(by_suffix))}")
    try:
        text = next((load(s, CAPTION_BYTES) for s in _TEXT_SUFFIXES if s in by_suffix), b"")
        about = json.loads(load(".json", CAPTION_BYTES)) if ".json" in by_suffix else {}
        caption, about = decoded(text), about if isinstance(about, dict) else {}
    except (DataError, ValueError, RecursionError) as error:
        return problem(f"its text cannot be read: {error}")
    usual = [about[k] for k in matching(about, TEXT_COLUMNS) if isinstance(about[k], str)]
    subject = about.get("subject")
    reference = next((f".reference{s}" for s in SUFFIXES if f".reference{s}" in by_suffix), None)
    return Item(
        name,
        lambda: load(image),
        next((words for words in (caption, *usual) if words.strip()), None),
        subject if isinstance(subject, str) else None,
        None if reference is None else (lambda: load(reference)),
        stamp=lambda: f"{stamp_of(root, file)} {by_suffix[image].offset_data}",
    )
