"""What can be prompted: the embedded `critters`, folders, hub ids, single files."""

from __future__ import annotations

import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipdiverse.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

CRITTERS = "critters"
HUB_BASES = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
"""Short names of bases on the hub."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WEIGHTS = Path(__file__).parent / "critters" / "weights"
CRITTERS_BASE = _WEIGHTS / "base"
CRITTERS_ORACLE = _WEIGHTS / "oracle.safetensors"
CRITTERS_ADAPTERS = _WEIGHTS / "adapters"
CRITTERS_PROVENANCE = _WEIGHTS / "provenance.json"
SHIPPED_ADAPTERS = {
    "ip-adapter_critters": "base-plain",
    "ip-adapter-plus_critters": "self-none",
}
"""Adapters in the package, and the arm of `training.arms` that each is."""
ADAPTERS = {"base": "ip-adapter_critters", "plus": "ip-adapter-plus_critters"}
"""Short names of adapters in the package."""
DEFAULT_ADAPTER = "plus"
"""What prompts critters unless something else is asked for."""


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
    pipe: Any
    guidance_scale: float
    batch: int


def load_base(name: str = CRITTERS, *, local_files_only: bool = False) -> Base:
    """Open a base model.

    Args:
        name: `critters`; `sd15` or `sdxl`; a folder that a diffusers pipeline wrote; a single
            `.safetensors` file; a hub id, `owner/name`.
        local_files_only: Use what is in the hub's local cache, and nothing else.

    Raises:
        ModelError: There is no such base, or it cannot be opened.
    """
    pipe = _open_pipeline(name, local_files_only)
    if getattr(pipe, "unet", None) is None:
        raise ModelError(
            "has no UNet",
            where=name,
            expected="Stable Diffusion 1.x, 2.x or XL",
            found=type(pipe).__name__,
        )
    pipe.set_progress_bar_config(disable=True)
    embedded = name == CRITTERS
    return Base(name, pipe, guidance_scale=3.0 if embedded else 7.5, batch=4 if embedded else 1)


def _open_pipeline(name: str, local_files_only: bool) -> Any:
    if name == CRITTERS and not (CRITTERS_BASE / "model_index.json").is_file():
        raise ModelError(
            "the embedded model is not in this installation",
            where=name,
            fix="Run `ipdiverse critters train-base`, or install a released package.",
        )
    source = CRITTERS_BASE if name == CRITTERS else Path(name)
    if (source / "model_index.json").is_file():
        return _opened(name, str(source), local_files_only=True)
    if source.is_file():
        return _single_file(source, local_files_only)
    if source.is_dir() or not (name in HUB_BASES or HUB_ID.fullmatch(name)):
        raise ModelError(
            "unknown base",
            where=name,
            expected=f"{', '.join((CRITTERS, *HUB_BASES))}, a folder with a model_index.json, "
            "a .safetensors file, or a hub id",
            found="a folder without one" if source.is_dir() else "neither",
        )
    return _opened(name, HUB_BASES.get(name, name), local_files_only=local_files_only)


def _opened(name: str, source: str, *, local_files_only: bool) -> Any:
    with quiet():
        import torch
        from diffusers import DiffusionPipeline, StableDiffusionPipeline

        # the class is stated where it is known: looking it up costs seconds of imports
        kind: Any = StableDiffusionPipeline if name == CRITTERS else DiffusionPipeline
        extra = {"safety_checker": None} if _has_part(source, "safety_checker") else {}
        try:
            return kind.from_pretrained(
                source,
                dtype=torch.float32,
                local_files_only=local_files_only,
                use_safetensors=True,
                **extra,
            )
        except Exception as error:  # whatever the libraries raise on a broken or absent source
            raise ModelError("cannot be opened", where=name, found=_first_line(error)) from error


def _has_part(source: str, part: str) -> bool:
    """Whether a local folder's index names a part; True for the hub, where it cannot be seen."""
    index = Path(source) / "model_index.json"
    return part in index.read_text() if index.is_file() else source == HUB_BASES["sd15"]


def _single_file(file: Path, local_files_only: bool) -> Any:
    """A checkpoint in the original layout, as model sites publish them."""
    if file.suffix != ".safetensors":
        raise ModelError(
            "is no safetensors file",
            where=file,
            found=file.suffix or "no extension",
            fix="Other single files are pickles, which can run code; look for a safetensors one.",
        )
    with quiet():
        import diffusers
        import torch
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as opened:
                names = list(opened.keys())
        except SafetensorError as error:
            raise ModelError("cannot be opened", where=file, found=_first_line(error)) from error
        large = any(key.startswith("conditioner.embedders.1.") for key in names)
        kind = "StableDiffusionXLPipeline" if large else "StableDiffusionPipeline"
        beside = file.with_suffix("")  # a folder of configs with the file's name, if there is one
        config = {"config": str(beside)} if beside.is_dir() else {}
        try:
            return getattr(diffusers, kind).from_single_file(
                str(file), torch_dtype=torch.float32, local_files_only=local_files_only, **config
            )
        except Exception as error:
            raise ModelError(
                "cannot be opened",
                where=file,
                found=_first_line(error),
                fix=f"Its configs come from the hub; offline, put them into {beside.name}/.",
            ) from error


def load_part(kind: str, source: str, base: Base, *, local_files_only: bool = False) -> Any:
    """Open one model beside a base: an image encoder, a ControlNet.

    Args:
        kind: The class in diffusers or transformers.
        source: A folder, or a hub id with an optional folder behind it, `owner/name/folder`.
        base: Whose device and dtype it takes.
        local_files_only: Use what is in the hub's local cache, and nothing else.

    Raises:
        ModelError: It cannot be opened.
    """
    with quiet():
        import diffusers
        import transformers

        library: Any = diffusers if hasattr(diffusers, kind) else transformers
        local = Path(source).exists()
        where, folder = (source, None) if local else split_hub_id(source)
        options: dict[str, Any] = {"local_files_only": local_files_only or local}
        if folder is not None:
            options["subfolder"] = folder
        try:
            part = getattr(library, kind).from_pretrained(where, **options)
        except Exception as error:
            raise ModelError(
                f"cannot be opened as a {kind}", where=source, found=_first_line(error)
            ) from error
    unet: Any = base.pipe.unet
    return part.to(unet.device, unet.dtype).eval() if hasattr(part, "parameters") else part


def split_hub_id(source: str) -> tuple[str, str | None]:
    """`owner/name/path/inside` as (`owner/name`, `path/inside`); anything shorter as it is."""
    parts = source.split("/", 2)
    return ("/".join(parts[:2]), parts[2]) if len(parts) == 3 else (source, None)


@contextmanager
def any_latents(pipe: Any) -> Iterator[None]:
    """Let diffusers' inpainting work on latents of any width, for the length of a `with` block.

    It tells UNets of 9 channels (latents, masked latents, mask) from those of 4 (latents) by that
    number. A UNet on exactly the VAE's latents, as the embedded one on 16, is of the second kind,
    and is called so meanwhile.
    """
    inpaints = "Inpaint" in type(pipe).__name__
    channels = pipe.unet.config.in_channels if inpaints else 4
    if channels in (4, 9) or channels != pipe.vae.config.latent_channels:
        yield
        return
    unet = pipe.unet
    unet.register_to_config(in_channels=4)
    try:
        yield
    finally:
        unet.register_to_config(in_channels=channels)


def copier_report(adapter: str) -> Path:
    """Where the shipped measurement of a critters adapter is."""
    return _WEIGHTS / f"copier-{Path(adapter).stem}.json"


def adapter_source(base: str, adapter: str) -> Path | str:
    """Where an adapter's weights are.

    Args:
        base: The base's name; `critters` has `base` and `plus` by name.
        adapter: One of those names, a file, a folder, or a hub id with the file's path behind it.

    Raises:
        ModelError: There is no such adapter.
    """
    named = {file.stem: file for file in sorted(CRITTERS_ADAPTERS.glob("*.safetensors"))}
    if base == CRITTERS and ADAPTERS.get(adapter, adapter) in named:
        return named[ADAPTERS.get(adapter, adapter)]
    if Path(adapter).exists():
        return Path(adapter)
    if HUB_ID.match(adapter):
        return adapter
    raise ModelError(
        "unknown adapter",
        where=adapter,
        expected=f"{', '.join(ADAPTERS)} (with the base {CRITTERS}), a file, a folder, or a hub id",
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
