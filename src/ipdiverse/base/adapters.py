"""What users call an adapter, and the file that it is.

A name of the package, a preset, a file, a folder, or a repository of the Hugging Face hub.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ipdiverse.base.downloads import HUB_ID, fetch, first_line, reason, split_hub_id
from ipdiverse.base.pipelines import CRITTERS, CRITTERS_BASE, check_known
from ipdiverse.base.presets import PRESETS
from ipdiverse.errors import ArgumentError, CheckpointError, ModelError

_WEIGHTS = CRITTERS_BASE.parent
CRITTERS_ADAPTERS = _WEIGHTS / "adapters"
CRITTERS_SPACES = _WEIGHTS / "spaces"
PUBLISHED_SPACE = "space.safetensors"
"""The file that a repository is asked for if no other is named."""
SHIPPED_ADAPTERS = {
    "ip-adapter-diverse_critters": "diverse",
    "ip-adapter_critters": "base-plain",
    "ip-adapter-plus_critters": "plain",
}
"""Adapters in the package, and the arm of `workshop.arms` that each is."""
ADAPTERS = {
    "diverse": "ip-adapter-diverse_critters",
    "plus": "ip-adapter-plus_critters",
    "base": "ip-adapter_critters",
}
"""Short names of adapters in the package."""
DEFAULT_ADAPTER = "plus"
"""What prompts critters unless something else is asked for."""

PUBLISHED = "ip-adapter.safetensors"
"""The file that `push_to_hub` writes, and that a repository is asked for if none is named."""

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""Of files that may hold an adapter."""
INDEX = ".index.json"
"""How the name of the file ends that says which shard holds which tensor."""
_SHARD = re.compile(r"(.+)-[0-9]{5}-of-[0-9]{5}(\.safetensors|\.bin)")
# what trainers, accelerate's and transformers' among them, write beside an adapter
_STATES = ("training_state", "training_args", "optimizer", "scheduler", "scaler", "random_states")
_TRUE = {"1", "true", "yes", "on"}


def adapter_file(base: str, adapter: str = "", *, local_files_only: bool = False) -> Path:
    """The file of an adapter that a user names; downloaded if need be and allowed.

    Args:
        base: The base's name; `critters` has `diverse`, `plus` and `base` by name.
        adapter: One of those names, a preset's, a file, a folder, or a hub id with the file's path
            behind it; empty is the base's own, `default_adapter`.
        local_files_only: Never connect.

    Raises:
        ModelError: There is no such adapter, or it cannot be downloaded.
        CheckpointError: The file is missing.
        ArgumentError: None is named, and the base has no default.
    """
    check_adapter(base, adapter)
    adapter = adapter or default_adapter(base)
    if base == CRITTERS and (shipped := _shipped(adapter)):
        return shipped
    if adapter in PRESETS and not Path(adapter).exists():
        files = PRESETS[adapter].adapter_files()
        return fetch(files, adapter, local_files_only=local_files_only)[0]
    return _file(adapter, local_files_only)


def space_file(space: str, *, local_files_only: bool = False) -> Path:
    """The file of a variation space: a path, or a hub id with the file's path behind it.

    Raises:
        CheckpointError: There is none.
        ModelError: It cannot be downloaded.
    """
    if HUB_ID.match(space) and not Path(space).exists() and not space.endswith(SUFFIXES[0]):
        space = f"{space}/{PUBLISHED_SPACE}"
    return _file(space, local_files_only)


def _file(named: str, local_files_only: bool) -> Path:
    """The file of a path, or of a hub id with the file's path behind it."""
    if Path(named).exists() or not HUB_ID.match(named):
        found = find_checkpoint(Path(named))
    else:
        repository, name = split_hub_id(named)
        found = find_checkpoint(repository, weight_name=name, local_files_only=local_files_only)
    if not found.is_file():
        raise CheckpointError("no such file", where=found, fix="Check the path.")
    return found


def default_adapter(base: str) -> str:
    """What prompts a base unless something else is asked for: a preset has its own."""
    check_known(base)
    if base in PRESETS and PRESETS[base].adapter:
        return base
    if base == CRITTERS:
        return DEFAULT_ADAPTER
    fix = "Name one that fits: --adapter."
    raise ArgumentError("is missing", where="adapter", found=f"base {base}", fix=fix)


def check_adapter(base: str, adapter: str) -> None:
    """Refuse what cannot name an adapter of a base, before anything is opened or downloaded."""
    adapter = adapter or default_adapter(base)
    shipped = _shipped(adapter) is not None
    if (shipped and base == CRITTERS) or Path(adapter).exists():
        return
    if shipped:
        raise _of_another(adapter, CRITTERS, base)
    if adapter not in PRESETS and not HUB_ID.match(adapter):
        raise ModelError(
            "unknown adapter",
            where=adapter,
            expected=f"{', '.join(ADAPTERS)} (with the base {CRITTERS}), {', '.join(PRESETS)}, "
            "a file, a folder, or a hub id",
            fix="Check the path.",
        )
    if adapter not in PRESETS:
        return
    if PRESETS[adapter].adapter is None:
        raise ModelError("has no adapter of its own", where=adapter, fix="Name one: --adapter.")
    # of the same files is the same architecture: Flux.1 schnell takes what dev takes
    fits = base in PRESETS and PRESETS[base].files == PRESETS[adapter].files
    if base in (CRITTERS, *PRESETS) and not fits:
        raise _of_another(adapter, PRESETS[adapter].base.id, base)


def _shipped(adapter: str) -> Path | None:
    """The file in the package that a name of critters' adapters stands for."""
    file = CRITTERS_ADAPTERS / f"{ADAPTERS.get(adapter, adapter)}.safetensors"
    return file if "/" not in adapter and file.is_file() else None


def _of_another(adapter: str, owner: str, base: str) -> ModelError:
    own = f", or none: {base} has its own" if base in (CRITTERS, *PRESETS) else ""
    fix = f"Name one that fits with --adapter{own}."
    return ModelError(
        f"belongs to {owner}", where=f"adapter {adapter}", found=f"base {base}", fix=fix
    )


def copier_report(adapter: str) -> Path:
    """Where the shipped measurement of a critters adapter is."""
    return _WEIGHTS / f"copier-{Path(adapter).stem}.json"


def find_checkpoint(
    source: str | os.PathLike[str],
    *,
    weight_name: str | None = None,
    subfolder: str = "",
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """The local file that a source names, downloaded if need be and allowed.

    Args:
        weight_name: The file in a folder or repository. A folder with one such file needs none; of
            a repository None is `ip-adapter.safetensors`.
        local_files_only: Never connect; the environment's HF_HUB_OFFLINE does the same.
        token: Of the hub, for private repositories; None takes the one that is logged in.
        cache_dir: Where downloads are kept; None is the hub library's own place.
    """
    path = Path(source)
    if shard := _SHARD.fullmatch(path.name):  # one part of the weights: the index has all
        index = path.with_name(f"{shard[1]}{shard[2]}{INDEX}")
        return index if index.is_file() else path
    if path.is_dir():
        folder = path / subfolder
        return folder / weight_name if weight_name else _only_file(folder)
    is_id = isinstance(source, str) and HUB_ID.fullmatch(source) is not None
    if path.exists() or not is_id or path.suffix.lower() in SUFFIXES:
        return path
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in _TRUE
    options = {"subfolder": subfolder or None, "revision": revision, "token": token}
    options |= {"cache_dir": cache_dir, "local_files_only": local_files_only or offline}
    given = {name: value for name, value in options.items() if value is not None}
    return _download(str(source), weight_name, given)


def _only_file(folder: Path) -> Path:
    """The folder's weights; safetensors before anything that is pickled."""
    held = sorted(folder.iterdir()) if folder.is_dir() else []
    if any(f.name == "zero_to_fp32.py" or f.name.endswith("_optim_states.pt") for f in held):
        fix = "Run the zero_to_fp32.py that DeepSpeed put there, and give its result."
        raise CheckpointError("is a DeepSpeed checkpoint", where=folder, fix=fix)
    indexes = [file for file in held if file.name.endswith(INDEX)]
    weights = [file for file in held if file.suffix.lower() in SUFFIXES]
    files = [file for file in weights if not file.name.startswith(_STATES)]
    files = [file for file in files if file.suffix.lower() == ".safetensors"] or files
    for only in (indexes, files):
        if len(only) == 1:
            return only[0]
    what, fix = "does not hold a checkpoint", "Check the path."
    if files:
        what = "it is not clear which file is the adapter"
        fix = "Give the file's path, or weight_name in Python."
    one, found = "one .safetensors or .bin file", ", ".join(file.name for file in files) or "none"
    raise CheckpointError(what, where=folder, expected=one, found=found, fix=fix)


def _download(repository: str, weight_name: str | None, options: dict[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download

    name, offline = weight_name or PUBLISHED, options["local_files_only"]
    wanted = "/".join(part for part in (repository, options.get("subfolder"), name) if part)
    try:
        file = hf_hub_download(repository, name, **options)
    except Exception as error:  # whatever the hub's library or the network raises
        if weight_name is None and (offline or _is_absent(error)):
            raise CheckpointError(
                "no such file; a hub repository needs the file's name too",
                where=repository,
                expected=f"{PUBLISHED}, or the name of another",
                fix="Give the file's path behind it, as h94/IP-Adapter/models/"
                "ip-adapter_sd15.safetensors, or weight_name in Python.",
            ) from error
        known = None if offline else reason(error, repository)
        if known is not None:
            what = f"cannot be downloaded from the hub: {known.what}"
            raise CheckpointError(what, where=wanted, fix=known.fix) from error
        if offline:
            what = "is not a file here, nor in the local cache"
            fix = "Allow downloads once, or give a local file."
        else:
            what = "is not a file here, and cannot be downloaded from the hub"
            fix = "Check the name, the network and your access."
        found = first_line(error)
        raise CheckpointError(what, where=wanted, found=found, fix=fix) from error
    return Path(file)


def _is_absent(error: Exception) -> bool:
    """Whether the hub answered that there is no such file, rather than that it is not cached."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    return isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
