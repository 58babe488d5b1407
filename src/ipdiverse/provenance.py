"""What repeats an image: its seeds, and the record inside each PNG of how it was made.

Image i is the same alone or among n, and the step number decides the seed of a step.
"""

from __future__ import annotations

import hashlib
import io
import json
import shlex
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ipdiverse.errors import ArgumentError, ImageError, OutputError, quoted
from ipdiverse.writing import AnyPath, without_folders, write_bytes_atomic

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch
    from PIL import Image


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed from any numbers and words, the same for all versions and machines.

    Not Python's `hash`, which differs from one process to the next.
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, image_index: int) -> torch.Generator:
    """The random source of one image, independent of the others of its set.

    Args:
        seed: The user's seed.
        image_index: The image's number in the set.

    Returns:
        A CPU generator, so that a seed gives the same noise on every device.
    """
    import torch

    return torch.Generator("cpu").manual_seed(derived_seed(seed, image_index))


def noise(name: str, seeds: Iterable[int], shape: Sequence[int]) -> torch.Tensor:
    """Standard normal noise, (seeds, *shape), each row of its own seed and a name alone."""
    import torch

    drawn = [
        torch.randn(
            tuple(shape),
            # on the CPU: other devices draw other numbers from the same seed
            generator=torch.Generator().manual_seed(derived_seed(seed, name)),
            # transformers changes the default dtype while another thread loads a model
            dtype=torch.float32,
        )
        for seed in seeds
    ]
    return torch.stack(drawn)


RECORD_KEY = "ipdiverse"
SUMMARY_KEY = "parameters"
"""The key that other image tools, such as WebUI, read and show."""
MAX_RECORD_BYTES = 1024 * 1024
PLACES = (
    *("image", "mask", "negative_image", "faces", "init_image", "mask_image", "control_image"),
    *("base", "adapter", "image_encoder", "controlnet", "space", "scenes"),
)
"""Fields of a request that may name files."""

_PLACE_FLAGS = {f"--{name.replace('_', '-')}" for name in (*PLACES, "out")}
_PREFIX = RECORD_KEY.encode() + b"\0"
_MAX_CHUNK = MAX_RECORD_BYTES + 256  # flags and keywords come before the text
_MAX_SUMMARY = 2000


def save_png(image: Image.Image, path: AnyPath, record: Mapping[str, Any]) -> None:
    """Write a PNG that carries the record of how it was made, whole or not at all.

    Of absolute paths it has the names alone: images are shown to others, folders at home are not.
    """
    if Path(path).suffix.lower() != ".png":
        raise OutputError(
            "the image is written as PNG only",
            where=path,
            expected="a name that ends in .png",
            found=Path(path).suffix or "no extension",
            fix="Change the extension.",
        )
    from PIL.PngImagePlugin import PngInfo  # here, so that a seed does not need Pillow

    record = _without_home(record)
    chunks = PngInfo()
    chunks.add_itxt(RECORD_KEY, _as_json(record))
    chunks.add_itxt(SUMMARY_KEY, _summary(record))
    buffer = io.BytesIO()  # in memory first: the file is then written whole or not at all
    try:
        image.save(buffer, "PNG", pnginfo=chunks)
    except (OSError, ValueError) as error:
        raise OutputError("the image cannot be stored as PNG", where=path, found=error) from error
    write_bytes_atomic(path, buffer.getvalue())


def read_provenance(path: AnyPath) -> dict[str, Any]:
    """Read back the record that `save_png` wrote, without decoding the image.

    Args:
        path: A PNG file.

    Returns:
        The record.

    Raises:
        ImageError: The file cannot be read, is not a PNG, is broken, or has no valid record.
    """
    from ipdiverse.image_io.files import opened

    with opened(path) as file:
        text = _find_record(file, path)
    if text is None:
        raise ImageError(
            "the image has no record of how it was made",
            where=path,
            expected=f'a PNG text chunk "{RECORD_KEY}"',
            found="none",
            fix="Only PNG files that ipdiverse wrote have one; editing or uploading may remove it.",
        )
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken("damaged", "JSON", error, path) from error
    if not isinstance(record, dict):
        raise _broken("damaged", "a JSON object", type(record).__name__, path)
    return record


def as_text(record: Mapping[str, Any]) -> str:
    """A record for people: one line for each field that is not empty, those of the request too."""
    rows: dict[str, Any] = {}
    for name, value in record.items():
        rows |= value if name == "request" and isinstance(value, dict) else {name: value}
    shown = {
        quoted(name): _shown(value)
        for name, value in rows.items()
        if value not in (None, "", [], {})
    }
    width = max(map(len, shown), default=0)
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in shown.items())


def _without_home(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without the folders of the files that its request, and its command, name."""
    told, request = dict(record), record.get("request")
    if isinstance(request, Mapping):
        shown = {name: without_folders(request[name]) for name in PLACES if name in request}
        told["request"] = {**request, **shown}
    with suppress(ValueError):  # quotes that do not match: no command of ours
        if isinstance(command := told.get("command"), str):
            told["command"] = " ".join(map(_without_place, shlex.split(command)))
    return told


def _without_place(word: str) -> str:
    flag, equals, value = word.partition("=")
    if not equals or not flag.startswith("--"):
        return shlex.quote(word)
    return f"{flag}={shlex.quote(without_folders(value) if flag in _PLACE_FLAGS else value)}"


def _as_json(record: Mapping[str, Any]) -> str:
    """The record as JSON in ASCII, so that even broken Unicode from a command line is kept."""
    try:
        text = json.dumps(dict(record), ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ArgumentError(
            "the record cannot be stored as JSON", where="record", found=error
        ) from error
    if len(text) > MAX_RECORD_BYTES:
        raise ArgumentError(
            "the record is too large",
            where="record",
            expected=f"at most {MAX_RECORD_BYTES} bytes of JSON",
            found=len(text),
        )
    return text


def _summary(record: Mapping[str, Any]) -> str:
    """The prompt, then every plain value, on one line."""
    plain = {key: value for key, value in record.items() if isinstance(value, str | int | float)}
    prompt = str(plain.pop("prompt", ""))
    settings = ", ".join(f"{key}: {value}" for key, value in plain.items())
    line = " ".join(" | ".join(part for part in (prompt, settings) if part).split())
    return quoted(line, _MAX_SUMMARY)


def _shown(value: Any, depth: int = 5) -> str:
    if isinstance(value, dict | list) and not depth:
        return "…"  # what we write is never so deep; anybody may have written this
    if isinstance(value, dict):
        return ", ".join(f"{quoted(k)} {_shown(part, depth - 1)}" for k, part in value.items())
    if isinstance(value, list):
        return ", ".join(_shown(part, depth - 1) for part in value)
    return quoted(value, _MAX_SUMMARY)


def _find_record(file: IO[bytes], path: AnyPath) -> bytes | None:
    """The record's text, stepping over pixels and the text of other tools.

    Not Pillow's `Image.text`: it decodes all pixels for a record that follows them, and fails on
    any other tool's text of over 1 MiB.
    """
    from ipdiverse.image_io.files import PNG_SIGNATURE, png_chunks

    if file.read(len(PNG_SIGNATURE)) != PNG_SIGNATURE:
        raise ImageError(
            "this is not a PNG file",
            where=path,
            expected="a PNG that ipdiverse wrote",
            fix="Only PNG files carry a record.",
        )
    for kind, _, length in png_chunks(file):
        body = file.read(min(length, _MAX_CHUNK)) if kind == b"iTXt" else b""
        if not body.startswith(_PREFIX):
            continue
        if length > _MAX_CHUNK:
            raise _broken("too large", f"at most {MAX_RECORD_BYTES} bytes", length, path)
        if zlib.crc32(kind + body).to_bytes(4, "big") != file.read(4):
            raise _broken("damaged", "a matching checksum", None, path)
        return _text_of(body.removeprefix(_PREFIX), path)
    return None


def _text_of(body: bytes, path: AnyPath) -> bytes:
    """Source: PNG specification, third edition, 11.3.3.4: flag, method, language, keyword, text."""
    # `save_png` does not compress, but tools that optimise PNGs may
    compressed, rest = body[:1] == b"\x01", body[2:]
    text = rest.split(b"\0", 2)[-1]
    if not compressed:
        return text
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(text, MAX_RECORD_BYTES)
    except zlib.error as error:
        raise _broken("damaged", "compressed text", error, path) from error
    if inflater.unconsumed_tail:
        raise _broken("too large", f"at most {MAX_RECORD_BYTES} bytes", "more", path)
    return text


def _broken(how: str, expected: str, found: object, path: AnyPath) -> ImageError:
    return ImageError(
        f"the record of how the image was made is {how}",
        where=path,
        expected=expected,
        found=found,
        fix="Use the original file.",
    )
