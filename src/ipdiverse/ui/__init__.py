"""The web page: how it is served, and what it offers. Only this package imports gradio.

server.py opens, bounds and closes it, safety.py says who may ask for what, visitors.py how
much of the machine each may hold. page.py puts the tabs of tabs.py
together, which are made of uploads.py and inputs.py (what a visitor gives) and results.py (what
comes back). queue.py draws, one visitor at a time; status.py and closeness.py say what came out,
results.py also how to repeat it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ipdiverse.base.adapters import ADAPTERS, DEFAULT_ADAPTER, SUFFIXES, find_checkpoint
from ipdiverse.base.bases import CRITTERS
from ipdiverse.base.downloads import missing
from ipdiverse.base.presets import PRESETS
from ipdiverse.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Options:
    """How the page is served.

    Args:
        host: Address to listen on; any but this machine's own needs a password.
        port: Port to listen on.
        user: Name to log in with, where there is a password.
        password: To log in with. Better set it in the environment variable IPDIVERSE_UI_PASSWORD,
            which other users of this machine cannot see. On a terminal it is asked for.
        reports: Folders to search for reports of `evaluate`.
        bases: More bases to offer: folders and single files.
        adapters: More adapters to offer: files and folders.
        waiting: How many drawings may wait for their turn; more are told to come back.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    user: str = "ipdiverse"
    password: str = ""
    reports: tuple[str, ...] = ("out",)
    bases: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    waiting: int = 5


@dataclass(frozen=True)
class Installed:
    """Bases and adapters on this machine, by the labels that a visitor reads.

    Args:
        bases: As `Request.base` names them, by label.
        presets: Whose files are all in the hub's local cache.
        named: Adapters that the user named, as `Request.adapter` does, by label; for any base.
    """

    bases: dict[str, str]
    presets: tuple[str, ...] = ()
    named: dict[str, str] | None = None

    def adapters_of(self, base: str) -> dict[str, str]:
        """Adapters that may fit a base, by label; the most usual first."""
        if base == CRITTERS:
            own = sorted(ADAPTERS, key=lambda name: name != DEFAULT_ADAPTER)
        elif base in PRESETS:
            own = [name for name in self.presets if PRESETS[name].files == PRESETS[base].files]
        else:
            own = list(self.presets)
        return {name: name for name in own} | (self.named or {})


def find_installed(bases: Sequence[str] = (), adapters: Sequence[str] = ()) -> Installed:
    """Look at the package, the hub's local cache, and what the user named; download nothing."""
    for name in bases:
        _check_exists("base", name)
        if Path(name).is_dir() and not (Path(name) / "model_index.json").is_file():
            raise ModelError(
                "is not a base", where=name, expected="a model_index.json, as diffusers saves one"
            )
        _check_suffix("base", Path(name), (".safetensors",))
    for name in adapters:
        _check_exists("adapter", name)
        _check_suffix("adapter", find_checkpoint(Path(name)), SUFFIXES)
    complete = (name for name, one in PRESETS.items() if not missing(one.all_files()))
    presets = tuple(name for name in complete if PRESETS[name].adapter)
    # presets that share a base are one base and several adapters: the first gives it its name
    first = {PRESETS[name].base.id: name for name in reversed(presets)}
    return Installed(
        {_label(name): name for name in (CRITTERS, *reversed(first.values()), *bases)},
        presets,
        {_label(name): name for name in adapters},
    )


def _check_exists(kind: str, name: str) -> None:
    if Path(name).exists():
        return
    if name in PRESETS:
        raise ModelError(
            "is a preset, not a file or a folder",
            where=f"{kind} {name}",
            fix="Leave it out: presets are on the page once their files are in the local cache. "
            f"`ipdiverse generate --base {name} --image FILE` downloads them.",
        )
    raise ModelError("does not exist", where=f"{kind} {name}", fix="Give a file or a folder.")


def _check_suffix(kind: str, path: Path, known: Sequence[str]) -> None:
    if path.is_file() and path.suffix.lower() not in known:
        raise ModelError(
            f"cannot be {'an' if kind == 'adapter' else 'a'} {kind}",
            where=path,
            expected=" | ".join(known),
            found=path.suffix or "no extension",
        )


def _label(name: str) -> str:
    """A path by its last two parts: a visitor need not see where things lie on the machine."""
    return "/".join(Path(name).parts[-2:]) if Path(name).is_absolute() else name
