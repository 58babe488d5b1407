"""Find out what kind of source a path or a name is, and read it.

| kind | what it looks like |
|---|---|
| `metadata` | a folder with `metadata.jsonl` or `.csv` (`file_name`, `text`), or such a file |
| `json` | the original trainer's `output.json`: a list of `image_file` and `text` |
| `captions` | a folder of images, each with its caption in a `.txt` of the same name, or without |
| `subjects` | a folder with one folder of images for each subject |
| `webdataset` | a `.tar`, or a folder of them: members of one stem are one sample |
| `hub` | a data set of `datasets`: a hub id, or a local repository of parquet or arrow files |
| `critters` | the word `critters`: scenes rendered and captioned on the fly |

What lies in a folder and is not used is counted and named.
"""

from __future__ import annotations

import json
import re
import unicodedata
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ipdiverse.config import decoded
from ipdiverse.data.files import (
    CAPTION_BYTES,
    Listing,
    is_file,
    is_folder,
    list_files,
    read_below,
    remote,
)
from ipdiverse.data.lists import IMAGE_COLUMNS, TEXT_COLUMNS, list_source, matching, read_rows
from ipdiverse.data.manifest import MAX_REPEATS, Item, Source, SourceOptions, file_item
from ipdiverse.data.packed import HUB_FILES, hub_files, hub_source, tar_files, webdataset
from ipdiverse.errors import DataError, check_range
from ipdiverse.image_io.files import OTHER_SUFFIXES, SUFFIXES, as_on_disk

if TYPE_CHECKING:
    from collections.abc import Iterator

_LISTS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_LIST_NAMES = ("metadata", "captions")
"""Lists of these names must be readable; others are used if they name images that are there."""
_TEXTS = (".txt", ".caption", ".text", ".json")
_ARCHIVES = (".tar", ".zip", ".gz", ".tgz", ".xz", ".zst", ".7z", ".rar", ".parquet", ".arrow")
_SPLITS = ("train", "test", "val", "valid", "validation", "dev", "eval")
_NO_SUBJECTS = (*_SPLITS, "images", "image", "imgs", "img", "pictures", "photos", "data", "reg")
"""Folders whose name says nothing of what their images show; kohya's `reg` lies beside `img`."""
_KOHYA = re.compile(r"(\d{1,4})_(.*\S.*)")
"""kohya's trainers repeat the images of a folder `10_corgi dog` ten times."""


def open_source(source: str, options: SourceOptions) -> Source:
    """Open a source."""
    kind = options.kind if options.kind != "auto" else kind_of(source, options.split)
    path = Path(source)
    if kind == "critters":
        return _critters(options)
    if kind == "hub":
        return _hub(source, options)
    if kind in ("metadata", "json") and not is_folder(path):
        return list_source(path, options)
    if kind == "webdataset" and not is_folder(path):
        return webdataset(path.parent, [path.name])
    folder = Folder(list_files(path), options)
    if kind in ("metadata", "json"):
        return folder.table()
    return folder.archives() if kind == "webdataset" else folder.images(kind == "subjects")


def kind_of(source: str, split: str = "train") -> str:
    """The kind of a source, recognised by its files."""
    path = Path(source)
    if source == "critters" and not path.exists():
        return "critters"
    if is_file(path):
        suffix = path.suffix.lower()
        kinds = dict.fromkeys(_LISTS, "metadata") | {".json": "json", ".tar": "webdataset"}
        if suffix in kinds:
            return kinds[suffix]
        expected, unpack = f"{', '.join(_LISTS)} or .tar", "Unpack it, and prepare the folder."
        fix = unpack if suffix in _ARCHIVES else None
        raise DataError("is not a data set", where=path, expected=expected, found=suffix, fix=fix)
    if is_folder(path):
        return Folder(list_files(path), SourceOptions(split=split)).kind()
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        return "hub"
    raise DataError(
        "is an address" if source.startswith(("http://", "https://")) else "does not exist",
        where=source,
        expected="a folder, a file, a hub id or `critters`",
        fix="Check the path for a typing error; a hub id is OWNER/NAME.",
    )


class Folder:
    """What a folder of images holds, and which of it was used."""

    def __init__(self, listing: Listing, options: SourceOptions) -> None:
        self.root, self.listing, self.options = listing.root, listing, options
        self.used: set[str] = set()
        self._files = set(listing.files)
        # of names that differ in case or in Unicode's form alone the first counts
        self._folded = {_folded(name): name for name in reversed(listing.files)}
        self.pictures = [name for name in listing.files if name.lower().endswith(SUFFIXES)]

    def kind(self) -> str:
        """The kind of source that the folder is."""
        if self.pictures and self.list_name():
            return "metadata"
        if tar_files(self.listing.files):
            return "webdataset"
        packed = any(PurePosixPath(n).match(p) for n in self.listing.files for p in HUB_FILES)
        if packed and not remote(self.root):
            return "hub"
        if self.pictures:
            at_top = any("/" not in name for name in self.pictures)
            named = any(self._home(name) for name in self.pictures)
            return "subjects" if named and not at_top else "captions"
        raise DataError(
            "holds no data set of a known kind",
            where=self.root,
            expected="images, folders of images, metadata.jsonl, parquet or tar files",
            found="; ".join(f"{len(n)} {what}" for what, n in self.unused().items()) or "no files",
            fix="Name the kind with --kind.",
        )

    def list_name(self) -> str | None:
        """The list that says what the images show: `metadata` or `captions`, or the only one."""
        stems = {name.rpartition(".")[0].casefold() for name in self.pictures}
        homes = ("", self.options.split + "/")
        lists = [
            name
            for home in homes
            for suffix in _LISTS
            for name in self.listing.files
            if name.lower().endswith(suffix)
            and name == home + PurePosixPath(name).name
            and not {name.rpartition(".")[0].casefold(), name.casefold()[: -len(suffix)]} & stems
        ]
        named = [n for n in lists if PurePosixPath(n).stem.casefold() in _LIST_NAMES]
        if named:
            return named[0]
        # each is opened to look; of more than one that fits none is taken, so ten are enough
        fitting = [name for name in lists[:10] if self._names_pictures(name)]
        return fitting[0] if len(fitting) == 1 else None

    def table(self) -> Source:
        """The images that the folder's list names."""
        name = self.list_name()
        if name is None:
            raise DataError("holds no list", where=self.root, expected="metadata.jsonl or .csv")
        self.used.add(name)
        return list_source(self.root / name, self.options, self.root, self.used, self.unused)

    def archives(self) -> Source:
        """The samples of the folder's tar files."""
        names = tar_files(self.listing.files)
        self.used.update(names)
        return webdataset(self.root, names, self.unused)

    def images(self, by_subject: bool) -> Source:
        """Every image below the folder, with its caption; by subject, or all alike."""
        pictures, notes = self._of_split(), {}
        classes = self._classes() if by_subject else {}

        def items() -> Iterator[Item]:
            for name in pictures:
                self.used.add(name)
                home = self._home(name) if by_subject else ""
                kohya = _KOHYA.fullmatch(home)
                repeats = int(kohya[1]) if kohya and 0 < int(kohya[1]) <= MAX_REPEATS else 1
                subject = kohya[2] if kohya and repeats == int(kohya[1]) else home
                about: dict[str, Any] = {"subject": subject or None, "repeats": repeats}
                if repeats > 1:
                    note = f"Each image of {home!r} is shown {repeats} times, as its name says."
                    notes[note] = None
                try:
                    text = self._caption(name)
                except DataError as error:
                    yield Item(name, bytes, problem=f"caption {error}")
                    continue
                if not text and subject:
                    # the name of a subject may mean nothing to CLIP; that of its class does
                    words = classes.get(home) or subject_class(subject)
                    is_caption = re.match(r"(an?|the) |\w+ of ", words, re.IGNORECASE)
                    text = words if is_caption else f"a photo of a {words}"
                    if not any(note.startswith("Captions are made") for note in notes):
                        made = f"as {text!r} for {name!r}; write your own in .txt files with the"
                        start = "Captions are made from names of folders where there is none, "
                        notes[f"{start}{made} images' names."] = None
                yield file_item(self.root, name, text=text, **about)

        kind = "subjects" if by_subject else "captions"
        return Source(kind, len(pictures), items, notes, self.unused)

    def unused(self) -> dict[str, list[str]]:
        """What was not used, by kind."""
        groups = {reason: list(names) for reason, names in self.listing.skipped.items()}
        for name in self.listing.files:
            if name not in self.used:
                groups.setdefault(self._group(name), []).append(name)
        return groups

    def _group(self, name: str) -> str:
        suffix = PurePosixPath(name).suffix.lower()
        if name in self.pictures:
            return "images that no list names, or of another split"
        if suffix in OTHER_SUFFIXES:
            plugin = " without pillow-heif" * suffix.startswith(".hei")
            return f"images in a format that is not read{plugin} ({suffix})"
        groups = {"lists": _LISTS, "caption files": _TEXTS, "archives": _ARCHIVES}
        return next(
            (group for group, suffixes in groups.items() if suffix in suffixes), "other files"
        )

    def _names_pictures(self, name: str) -> bool:
        try:
            rows = (row for _, row in read_rows(self.root, name, self.options.encoding))
            row = next((row for row in rows if isinstance(row, dict)), {})
        except DataError:
            return False
        columns = matching(row, IMAGE_COLUMNS)
        home = Path(self.options.root or self.root, name).parent
        return bool(columns) and is_file(Path(home, as_on_disk(str(row[columns[0]]).strip(), home)))

    def _of_split(self) -> list[str]:
        """The images, of the split alone where the folder has nothing but splits."""
        tops = {name.split("/")[0].casefold() for name in self.pictures}
        split = self.options.split.casefold()
        if split in tops <= {*_SPLITS, split}:
            return [name for name in self.pictures if name.split("/")[0].casefold() == split]
        return self.pictures

    def _home(self, picture: str) -> str:
        """The folder that says what an image shows, or ""."""
        folders = picture.split("/")[:-1]
        while folders and folders[0].casefold() in _NO_SUBJECTS and self._only_wrappers:
            folders = folders[1:]
        return folders[0] if folders else ""

    @cached_property
    def _only_wrappers(self) -> bool:
        """Whether no folder right in this one tells a subject; next to `cat`, `train` does too."""
        return {name.split("/")[0].casefold() for name in self.pictures} <= set(_NO_SUBJECTS)

    def _caption(self, picture: str) -> str:
        """The first caption file of an image that is not empty."""
        stem = picture.rpartition(".")[0]
        for wanted in (name + suffix for suffix in _TEXTS for name in (picture, stem)):
            name = wanted if wanted in self._files else self._folded.get(_folded(wanted))
            if name is not None:
                self.used.add(name)
                if text := self._caption_of(name).strip():
                    return text
        return ""

    def _caption_of(self, name: str) -> str:
        """The text of a caption file; of JSON, the first of the usual keys that has one."""
        try:
            text = decoded(read_below(self.root, name, CAPTION_BYTES), self.options.encoding)
            if not name.lower().endswith(".json"):
                return text
            about = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(
                "cannot be read",
                where=name,
                found=error,
                fix="Save it as UTF-8, or name its encoding with --encoding.",
            ) from error
        keys = matching(about, TEXT_COLUMNS) if isinstance(about, dict) else []
        return next((about[key] for key in keys if isinstance(about[key], str)), "")

    def _classes(self) -> dict[str, str]:
        """Lines `subject,class` of DreamBooth's `prompts_and_classes.txt`, or of `classes.csv`."""
        found, homes = {}, {self._home(name) for name in self.pictures}
        for name in {"classes.csv", "prompts_and_classes.txt"} & self._files:
            self.used.add(name)
            for line in self._caption_of(name).split("\n"):
                subject, comma, words = line.partition(",")
                if comma and subject.strip() in homes - {""}:
                    found[subject.strip()] = words.strip()
        return found


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def subject_class(subject: str) -> str:
    """A subject's name as words: `bear_plushie` is "bear plushie", `dog2` is "dog"."""
    return re.sub(r"[\s_-]+", " ", re.sub(r"\d+$", "", subject)).strip() or subject


def _hub(source: str, options: SourceOptions) -> Source:
    used: set[str] = set()

    def unused() -> dict[str, list[str]]:
        folder = Folder(hub_files(source, options.revision), options)
        folder.used |= used
        return folder.unused()

    return hub_source(source, options, used, unused)


def _critters(options: SourceOptions) -> Source:
    """Scenes of the training identities, rendered when they are read."""
    from ipdiverse.critters.make import example, png

    check_range("n", options.n, 1, 10_000_000)

    def item(index: int) -> Item:
        made = example(index, options.seed, "train", options.edits)
        return Item(
            f"critter-{index:07d}",
            lambda: png(made.scene, made.seed),
            made.text,
            made.scene.subject,
            (lambda: png(made.other, made.other_seed)) if options.pairs else None,
            stamp=lambda: f"{options.seed} {options.edits} {options.pairs}",
        )

    return Source("critters", options.n, lambda: map(item, range(options.n)))
