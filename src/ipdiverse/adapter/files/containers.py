"""Open a checkpoint file, whoever made it, as a flat dict of tensors, and nothing but tensors.

What a file claims is checked against its size before anything is allocated, and before torch is
imported. Tensors of safetensors files and of torch's zips stay on disk until they are read: frozen
gigabytes cost nothing.
"""

from __future__ import annotations

import json
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from safetensors import safe_open

from ipdiverse.base.adapters import INDEX
from ipdiverse.errors import CheckpointError
from ipdiverse.loading import unbroken, what_is

if TYPE_CHECKING:
    from torch import Tensor

MAX_PICKLE_BYTES = 4 * 1024 * 1024
"""A whole SDXL UNet takes 0.3 MB."""
MAX_TENSORS = 20_000

_NUMBERS = {"BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4"}
_BY_STACK = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
_STORAGES = ("BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")
_ALLOWED = {
    "collections OrderedDict",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_tensor_v2",
    *map("torch {}Storage".format, _STORAGES),
}


def check_pickle(stream: IO[bytes], file: Path, size: int | None) -> list[str]:
    """Refuse a pickle that holds more than tensors, or claims more than `size` bytes.

    Returns:
        Every text in it, the tensors' names among them.
    """
    strings: list[str] = []
    number = claimed = 0
    for name, argument in _instructions(stream, file):
        if name == "GLOBAL" and argument not in _ALLOWED:
            raise _more_than_tensors(file, str(argument).replace(" ", ".", 1))
        if name in _BY_STACK:
            wanted = str(argument or ".".join(strings[-2:])).replace(" ", ".", 1)
            raise _more_than_tensors(file, wanted)
        if isinstance(argument, str):
            strings.append(argument)
        if name in _NUMBERS:
            number = int(argument)
            _check_claim(number, file, size)
        if name == "BINPERSID":  # a storage; its length is the last number before it
            claimed += number
            _check_claim(claimed, file, size)
    return strings


def _check_claim(number: int, file: Path, size: int | None) -> None:
    if size is not None and not 0 <= number <= max(size, 2**16):
        raise claims_too_much(file, f"numbers from 0 to the file's {size} bytes", number)


def _instructions(stream: IO[bytes], file: Path) -> Iterator[tuple[str, Any]]:
    with unbroken(file, "torch"):
        for code, argument, position in pickletools.genops(stream):
            if (position or 0) > MAX_PICKLE_BYTES:
                raise too_many(file)
            yield code.name, argument


def _more_than_tensors(file: Path, wanted: str) -> CheckpointError:
    return CheckpointError(
        "asks for more than tensors, which is never opened: it could run code",
        where=file,
        found=f"`{wanted}`",
        fix="Get the adapter as safetensors.",
    )


def too_many(file: Path) -> CheckpointError:
    """The error for a file that cannot be an adapter."""
    return CheckpointError(
        "holds too many tensors",
        where=file,
        expected=f"at most {MAX_TENSORS}",
        fix="It is not an adapter.",
    )


def first_of(names: list[str], most: int = 5) -> str:
    """The first names of a list that may be long, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def claims_too_much(file: Path, expected: str, found: object) -> CheckpointError:
    """The error for a file that claims more than it holds."""
    return CheckpointError(
        "claims more than it holds",
        where=file,
        expected=expected,
        found=found,
        fix="It may be cut off. Download it again.",
    )


MAX_HEADER_BYTES = 16_000_000
"""Of safetensors files and indexes; a whole SDXL model takes 0.4 MB."""
MAX_SHARDS = 64
MAX_DEPTH = 8
MAX_NAME = 300

_WRAPPED = re.compile(r"^state_dict\.|(?:^|(?<=\.))(?:module|_orig_mod)\.")
"""What DistributedDataParallel, `torch.compile` and Lightning put into names."""
_ZIP = b"PK\x03\x04"
# pickle protocol 2 and torch's magic number, 0x1950a86a20f9469cfc6c
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
_LEGACY_PICKLES = 5  # magic, protocol, system, content, storage keys


@dataclass(frozen=True)
class Contents:
    """What is in a checkpoint file."""

    file: Path
    container: str  # `safetensors`, `shards`, `torch zip` or `torch legacy`
    size: int  # in bytes
    tensors: dict[str, Tensor]  # nested dicts joined with dots; read from disk when used
    metadata: dict[str, str] = field(default_factory=dict)  # only safetensors files have any


def refuse_others(names: Iterable[str], where: object) -> None:
    """Refuse what the names in it show to be no adapter."""
    kind = what_is(names)
    if kind and kind[0] != "an IP-Adapter":
        raise CheckpointError(f"is {kind[0]}, not an adapter", where=where, fix=kind[1])


def check_is_adapter(file: Path) -> None:
    """Refuse a file that is something else, without torch, which takes seconds to import."""
    with _named(file):
        refuse_others(_open(file, read=False).tensors, file)


def open_checkpoint(file: Path) -> Contents:
    """Open a file without running anything in it, and without believing its claims."""
    with _named(file):
        contents = _open(file)
    plain = {_WRAPPED.sub("", name): tensor for name, tensor in contents.tensors.items()}
    if len(plain) < len(contents.tensors):
        raise CheckpointError(
            "holds a tensor twice, under `module.` or `_orig_mod.` and without", where=file
        )
    return replace(contents, tensors=plain)


def _open(file: Path, *, read: bool = True) -> Contents:
    """Open by the first bytes: names lie, as when a web page was saved as `*.safetensors`.

    Without `read` there are names, and nothing in the place of tensors.
    """
    size, start = _look(file)
    if start.startswith(_ZIP):
        return _open_zip(file, size, read)
    if start.startswith(_LEGACY):
        return _open_legacy(file, size, read)
    if start[8:9] == b"{":
        return _open_safetensors(file, size, int.from_bytes(start[:8], "little"), read)
    if start[:1] == b"{" and file.name.endswith(INDEX):
        return _open_shards(file, size, read)
    if start[:1] == b"\x80":
        with file.open("rb") as stream:
            check_pickle(stream, file, size)
    raise _unknown(file, start)


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Say what a refused pickle is, by what is written in its beginning."""
    try:
        yield
    except CheckpointError:
        beginning = b""
        with suppress(OSError, ValueError), file.open("rb") as stream:
            beginning = stream.read(MAX_PICKLE_BYTES)
        if beginning.startswith((_ZIP, b"\x80")):
            refuse_others([beginning.decode("latin-1")], file)
        raise


def _open_shards(file: Path, size: int, read: bool) -> Contents:
    """The files that an index names, all in its folder, as one."""
    if size > MAX_HEADER_BYTES:
        raise claims_too_much(file, f"at most {MAX_HEADER_BYTES} bytes", size)
    try:
        names = set(json.loads(file.read_text("utf-8"))["weight_map"].values())
        shards = [file.with_name(name) for name in sorted(names)]  # refuses names with a folder
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            "is not an index of shards", where=file, expected='{"weight_map": {tensor: file}}'
        ) from error
    if len(shards) > MAX_SHARDS or any(shard.name.endswith(INDEX) for shard in shards):
        raise CheckpointError(
            "names too many shards, or itself",
            where=file,
            expected=f"at most {MAX_SHARDS}",
            found=len(shards),
        )
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        opened = _open(shard, read=read)
        tensors |= opened.tensors
        size += opened.size
    if len(tensors) > MAX_TENSORS:
        raise too_many(file)
    return Contents(file, "shards", size, tensors)


def _look(file: Path) -> tuple[int, bytes]:
    """Size and first bytes."""
    try:
        if not file.is_file():
            raise CheckpointError("no such file", where=file, fix="Check the path.")
        with file.open("rb") as stream:
            return file.stat().st_size, stream.read(64)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError("cannot be read", where=file, found=reason) from error


def _unknown(file: Path, start: bytes) -> CheckpointError:
    found, fix = f"a file that starts with {start[:16]!r}", "Download it again."
    if not start:
        found = "an empty file"
    elif start.startswith(b"version https://git-lfs"):
        found, fix = "a Git LFS pointer", "Run `git lfs pull`, or download the file itself."
    elif start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        found, fix = "a web page", "Download the file itself, not the page about it."
    what = "is not a safetensors file, nor one that torch saved"
    return CheckpointError(what, where=file, found=found, fix=fix)


def _open_safetensors(file: Path, size: int, header: int, read: bool) -> Contents:
    if header > min(size - 8, MAX_HEADER_BYTES):
        limit = f"a header of at most {min(size - 8, MAX_HEADER_BYTES)} bytes"
        raise claims_too_much(file, limit, header)
    framework = "pt" if read else "np"
    with unbroken(file, "safetensors"), safe_open(file, framework=framework) as opened:
        names = opened.keys()
        if len(names) > MAX_TENSORS:
            raise too_many(file)
        tensors: Any = {name: opened.get_tensor(name) if read else None for name in names}
        return Contents(file, "safetensors", size, tensors, opened.metadata() or {})


def _open_zip(file: Path, size: int, read: bool) -> Contents:
    with (
        unbroken(file, "torch"),
        zipfile.ZipFile(file) as archive,
        archive.open(_pickle_of(archive, file, size)) as stream,
    ):
        names = check_pickle(stream, file, size)
    return _unpickled(file, size, "torch zip", names if not read else None)


def _pickle_of(archive: zipfile.ZipFile, file: Path, size: int) -> zipfile.ZipInfo:
    """The entry to unpickle, once no entry claims more than the file holds."""
    entries = archive.infolist()
    claimed = max(
        sum(e.file_size for e in entries), *(e.file_size + e.header_offset for e in entries), 0
    )
    if claimed > size:
        raise claims_too_much(file, f"at most {size} bytes", claimed)
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries):
        raise _not_torch(file, "compressed entries")
    if any(e.filename.endswith("/constants.pkl") for e in entries):
        raise _not_torch(file, "a TorchScript archive")
    pickles = [e for e in entries if e.filename.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1 or len({e.filename for e in entries}) != len(entries):
        raise _not_torch(file, f"{len(pickles)} entries `data.pkl` among {len(entries)}")
    return pickles[0]


def _open_legacy(file: Path, size: int, read: bool) -> Contents:
    with unbroken(file, "torch"), file.open("rb") as stream:
        # the first holds a number larger than any file
        limits = [None, *[size] * (_LEGACY_PICKLES - 1)]
        names = [name for limit in limits for name in check_pickle(stream, file, limit)]
    return _unpickled(file, size, "torch legacy", names if not read else None)


def _unpickled(file: Path, size: int, container: str, names: Any) -> Contents:
    if names is not None:
        return Contents(file, container, size, dict.fromkeys(names))  # type: ignore[arg-type]
    import torch

    # torch takes a path for what its name says it is, and maps zips alone
    lies = file.suffix == ".safetensors"
    with unbroken(file, "torch"), warnings.catch_warnings(), file.open("rb") as stream:
        warnings.simplefilter("ignore")  # on pickles that it then refuses, or reads well
        mmap = container == "torch zip" and not lies
        content = torch.load(
            stream if lies else file, map_location="cpu", weights_only=True, mmap=mmap
        )
    return Contents(file, container, size, _flat(content, file, size))


def _flat(content: object, file: Path, size: int) -> dict[str, Tensor]:
    """Nested dicts as one, keys joined with dots."""
    from torch import Tensor

    leaves = list(_leaves(content, file))
    flat = {name: leaf.detach() for name, leaf in leaves if isinstance(leaf, Tensor)}
    strange = [
        f"{name or 'the content'} ({type(leaf).__name__})"
        for name, leaf in leaves
        if not isinstance(leaf, Tensor)
    ]
    if strange:
        raise CheckpointError(
            "holds more than tensors",
            where=file,
            expected="dicts of tensors",
            found=first_of(strange),
        )
    _check_views(flat, file, size)
    return flat


def _leaves(content: object, file: Path) -> Iterator[tuple[str, object]]:
    """What is not a dict, with its path; a dict in itself, or very many times, does not hang it."""
    pending: list[tuple[tuple[str, ...], object]] = [((), content)]
    for _ in range(2 * MAX_TENSORS):
        if not pending:
            return
        path, node = pending.pop()
        if not isinstance(node, Mapping) or len(path) >= MAX_DEPTH:
            yield ".".join(path), node
            continue
        if len(pending) + len(node) > MAX_TENSORS:
            break
        pending += [((*path, _name(key, file)), value) for key, value in node.items()]
    raise too_many(file)


def _name(key: object, file: Path) -> str:
    if isinstance(key, str) and len(key) <= MAX_NAME:
        return key
    raise CheckpointError(
        "has a key that is not a tensor's name",
        where=file,
        expected=f"at most {MAX_NAME} characters",
        found=f"{len(key)}" if isinstance(key, str) else type(key).__name__,
    )


def _check_views(tensors: dict[str, Tensor], file: Path, size: int) -> None:
    """Refuse views that repeat a few bytes many times: reading them would take their whole size."""
    sizes = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    for name, tensor in tensors.items():
        if sizes[name] > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"`{name}` claims more than the file holds",
                where=file,
                expected=f"at most {tensor.untyped_storage().nbytes()} bytes",
                found=f"{sizes[name]} for {tuple(tensor.shape)}",
            )
    if sum(sizes.values()) > 4 * size:  # tensors that are shared count twice, honestly
        raise claims_too_much(file, f"at most {4 * size} bytes", sum(sizes.values()))


def _not_torch(file: Path, found: str) -> CheckpointError:
    return CheckpointError(
        "is a zip, but not one of tensors that torch saved",
        where=file,
        expected="one `data.pkl`, nothing compressed, no name twice",
        found=found,
    )
