"""What can be prompted: the embedded `critters`, or any folder that diffusers saved."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ipdiverse.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffusers import StableDiffusionPipeline

CRITTERS = "critters"
_WEIGHTS = Path(__file__).parent / "critters" / "weights"
CRITTERS_BASE = _WEIGHTS / "base"
CRITTERS_ORACLE = _WEIGHTS / "oracle.safetensors"
CRITTERS_ADAPTERS = _WEIGHTS / "adapters"
CRITTERS_PROVENANCE = _WEIGHTS / "provenance.json"


@dataclass(frozen=True)
class Base:
    """A pretrained text-to-image pipeline, ready to prompt.

    Args:
        name: As the user gave it.
        pipe: A stock diffusers pipeline.
        guidance_scale: A good default for this base.
        batch: Images denoised together. A call is always padded to a whole batch, because
            processors round differently at different batch sizes: image i must not depend on n.
    """

    name: str
    pipe: StableDiffusionPipeline
    guidance_scale: float
    batch: int


def load_base(name: str = CRITTERS) -> Base:
    """Open a base model.

    Args:
        name: `critters`, or a folder that `StableDiffusionPipeline.save_pretrained` wrote.

    Raises:
        ModelError: There is no such base, or the folder holds no pipeline.
    """
    folder = CRITTERS_BASE if name == CRITTERS else Path(name)
    if name == CRITTERS and not (folder / "model_index.json").is_file():
        raise ModelError(
            "the embedded model is not in this installation",
            where=name,
            fix="Run `ipdiverse critters train-base`, or install a released package.",
        )
    if not (folder / "model_index.json").is_file():
        raise ModelError(
            "unknown base",
            where=name,
            expected=f"`{CRITTERS}` or a folder with a model_index.json",
            found="a folder without one" if folder.is_dir() else "neither",
        )
    with quiet():
        import torch
        from diffusers import StableDiffusionPipeline

        try:
            pipe = StableDiffusionPipeline.from_pretrained(
                folder, dtype=torch.float32, local_files_only=True, safety_checker=None
            )
        except Exception as error:  # whatever the libraries raise on a broken folder
            raise ModelError("cannot be opened", where=name, found=_first_line(error)) from error
    pipe.set_progress_bar_config(disable=True)
    embedded = name == CRITTERS
    return Base(name, pipe, guidance_scale=3.0 if embedded else 7.5, batch=4 if embedded else 1)


def copier_report(adapter: str) -> Path:
    """Where the shipped measurement of a critters adapter is."""
    return _WEIGHTS / f"copier-{Path(adapter).stem}.json"


def adapter_file(base: str, adapter: str) -> Path:
    """Where an adapter's weights are.

    Args:
        base: The base's name; `critters` has `base` and `plus` by name.
        adapter: One of those names, or a file.

    Raises:
        ModelError: There is no such adapter.
    """
    named = {file.stem: file for file in sorted(CRITTERS_ADAPTERS.glob("*.safetensors"))}
    short = {"base": "ip-adapter_critters", "plus": "ip-adapter-plus_critters"}
    if base == CRITTERS and short.get(adapter, adapter) in named:
        return named[short.get(adapter, adapter)]
    if Path(adapter).is_file():
        return Path(adapter)
    raise ModelError(
        "unknown adapter",
        where=adapter,
        expected=f"{' or '.join(short)} (with the base {CRITTERS}), or a safetensors file",
        fix="Check the path.",
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' progress bars and advice off the terminal; we say what matters."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [(lib, lib.get_verbosity()) for lib in (diffusers_logging, transformers_logging)]
    bars = transformers_logging.is_progress_bar_enabled()
    for library, _ in before:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity in before:
            library.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
            diffusers_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
