"""Opening models from several threads, though the libraries change the whole process meanwhile."""

from __future__ import annotations

import threading
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from ipdiverse.errors import IpdiverseError, ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

_one_builds = threading.RLock()


@contextmanager
def building() -> Iterator[None]:
    """Let one thread at a time build modules or load weights into them, for a `with` block.

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
    _silence.begin()
    try:
        yield
    finally:
        _silence.end()


class _Silence:
    """How many blocks want silence, and how to end it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted = 0
        self._before = ExitStack()

    def begin(self) -> None:
        from diffusers.utils import logging as diffusers_logging
        from huggingface_hub import utils as hub
        from transformers.utils import logging as transformers_logging

        with self._lock:
            self._wanted += 1
            if self._wanted > 1:
                return
            # transformers switches the hub's bars along with its own. So the hub's are pushed
            # first, and restored last: an exit stack unwinds backwards.
            off = hub.are_progress_bars_disabled()
            self._before.callback(hub.disable_progress_bars if off else hub.enable_progress_bars)
            libraries: tuple[Any, ...] = (diffusers_logging, transformers_logging)
            for library in libraries:
                self._before.callback(library.set_verbosity, library.get_verbosity())
                if library.is_progress_bar_enabled():
                    self._before.callback(library.enable_progress_bar)
                library.set_verbosity_error()
                library.disable_progress_bar()

    def end(self) -> None:
        with self._lock:
            self._wanted -= 1
            if self._wanted == 0:
                self._before.close()


_silence = _Silence()
