"""Opening models from several threads, though the libraries change the whole process meanwhile."""

from __future__ import annotations

import logging
import threading
import tomllib
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipdiverse.errors import CheckpointError, IpdiverseError, ModelError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_ADAPTER = ("image_proj", "ip_adapter", "to_k_ip", "adapter_modules", "redux_up.")
AS_BASE = "Give it with --base."  # what `foreign.toml` says of whole bases

_one_builds = threading.RLock()
_one_counts = threading.Lock()
_silent_blocks: list[None] = []
_as_before = ExitStack()


def what_is(names: Iterable[str]) -> tuple[str, str] | None:
    """What a file with these tensors is, and what to do with it; None if it is not known."""
    text = "\n".join(names)
    if any(part in text for part in _ADAPTER):
        return "an IP-Adapter", "Give it with --adapter."
    file = Path(__file__).with_name("foreign.toml")
    for kind in tomllib.loads(file.read_text("utf-8"))["kind"]:
        if any(part in text for part in kind["parts"].split()):
            return kind["what"], kind["fix"]
    return None


@contextmanager
def building() -> Iterator[None]:
    """Let one thread at a time build modules or load weights into them.

    diffusers loads inside accelerate's `init_empty_weights`, which replaces
    `torch.nn.Module.register_parameter` for the whole process and afterwards restores what it found
    there; transformers does the same with the default dtype. If two threads load at once, the later
    one restores the other's replacement, and from then on every module of the process is built
    without memory for its weights (device `meta`).
    """
    with _one_builds:
        yield


@contextmanager
def loading() -> Iterator[None]:
    """`building`, and the libraries are quiet: for whatever calls their `from_pretrained`."""
    with building(), quiet():
        yield


@contextmanager
def one_line(what: str, where: str) -> Iterator[None]:
    """Whatever a library raises in a `with` block, as a ModelError that names what it was for."""
    try:
        yield
    except IpdiverseError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(what, where=where, found=lines[0][:300]) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' progress bars and advice off the terminal; we say what matters.

    If blocks overlap, in one thread or several, the last to end restores them.
    """
    with _one_counts:
        if not _silent_blocks:
            _silence(_as_before)
        _silent_blocks.append(None)
    try:
        yield
    finally:
        with _one_counts:
            _silent_blocks.pop()
            if not _silent_blocks:
                _as_before.close()


def _silence(as_before: ExitStack) -> None:
    """Silence the libraries, and note how to restore each."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub import utils as hub
    from transformers.utils import logging as transformers_logging

    # transformers switches the hub's bars along with its own. So the hub's are pushed
    # first, and restored last: an exit stack unwinds backwards.
    off = hub.are_progress_bars_disabled()
    as_before.callback(hub.disable_progress_bars if off else hub.enable_progress_bars)
    libraries: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    for library in libraries:
        as_before.callback(library.set_verbosity, library.get_verbosity())
        if library.is_progress_bar_enabled():
            as_before.callback(library.enable_progress_bar)
        library.set_verbosity_error()
        library.disable_progress_bar()
        for handler in logging.getLogger(library.__name__.split(".")[0]).handlers:
            # diffusers logs an error that it also raises, which is one line of ours
            as_before.callback(handler.setLevel, handler.level)
            handler.setLevel(logging.CRITICAL)


@contextmanager
def unbroken(file: Path, container: str) -> Iterator[None]:
    """Whatever a library raises on a broken file, as the first line of what it said."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise CheckpointError(
            f"is a broken {container} file",
            where=file,
            found=lines[0][:200] if lines else type(error).__name__,
            fix="It may be cut off. Download it again.",
        ) from error
