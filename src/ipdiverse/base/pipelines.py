"""Opening stock diffusers pipelines: presets, folders, single files, hub ids."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipdiverse.base.downloads import fetch, reason, snapshot
from ipdiverse.base.presets import PRESETS, Preset
from ipdiverse.errors import ArgumentError, ModelError
from ipdiverse.loading import loading

if TYPE_CHECKING:
    import torch

CRITTERS = "critters"
CRITTERS_BASE = Path(__file__).parents[1] / "critters" / "weights" / "base"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class Opening:
    """How a pipeline is opened.

    Args:
        local_files_only: Use what is in the hub's local cache, and nothing else.
        revision: Of its repository; empty is the preset's, or `main`.
        safety_checker: With it, if there is one.
        encoder: The preset whose image encoder comes along; None is its own, empty none.
        dtype: `float32`, `float16` or `bfloat16`.
        unet: False leaves the UNet's weights for `load_unet`, where the pipeline is a folder or a
            repository.
    """

    local_files_only: bool
    revision: str
    safety_checker: bool
    encoder: str | None
    dtype: str
    unet: bool = True

    def options(self) -> dict[str, Any]:
        """What `from_pretrained` is given from wherever."""
        import torch

        without: dict[str, Any] = {"safety_checker": None, "requires_safety_checker": False}
        given = {} if self.safety_checker else without
        return {"dtype": getattr(torch, self.dtype), "use_safetensors": True, **given}


def open_pipeline(name: str, opening: Opening) -> Any:
    """Open what a name stands for.

    Raises:
        ModelError: There is no such base, or it cannot be opened or had.
        ArgumentError: A revision of what has none.
    """
    if name == CRITTERS and not (CRITTERS_BASE / "model_index.json").is_file():
        raise ModelError(
            "the embedded model is not in this installation",
            where=name,
            fix="Run `make base` in a checkout, or install a released package.",
        )
    if name in PRESETS:
        return _open_preset(PRESETS[name], opening)
    source = CRITTERS_BASE if name == CRITTERS else Path(name)
    if opening.revision and source.exists():  # the embedded one too
        raise ArgumentError(
            "has no revisions", where=name, found=opening.revision, fix="Leave revision out."
        )
    if (source / "model_index.json").is_file():
        return _with_encoder(_opened(name, str(source), opening, local_files_only=True), opening)
    if source.is_file():
        return _with_encoder(_single_file(source, opening), opening)
    check_known(name)
    revision = {"revision": opening.revision} if opening.revision else {}
    pipe = _opened(name, name, opening, local_files_only=opening.local_files_only, **revision)
    return _with_encoder(pipe, opening)


def check_known(name: str) -> None:
    """Refuse what cannot name a base, without opening it.

    Raises:
        ModelError: It is no preset's name, folder with a pipeline, file or hub id.
    """
    source = Path(name)
    known = name == CRITTERS or name in PRESETS or source.is_file()
    folder = source.is_dir() and not (source / "model_index.json").is_file()
    if folder or not (known or source.is_dir() or HUB_ID.fullmatch(name)):
        raise ModelError(
            "unknown base",
            where=name,
            expected=f"{', '.join((CRITTERS, *PRESETS))}, a folder with a model_index.json, "
            "a .safetensors file, or a hub id",
            found="a folder without one" if folder else "neither",
        )


def _open_preset(preset: Preset, opening: Opening) -> Any:
    files = preset.base_files(opening.revision, checker=opening.safety_checker)
    found = fetch(files, preset.name, local_files_only=opening.local_files_only)
    folder = snapshot(found[0], files[0])
    pipe = _opened(preset.name, str(folder), opening, local_files_only=True, variant="fp16")
    import diffusers

    kind = getattr(diffusers, preset.scheduler)
    pipe.register_modules(scheduler=kind.from_config(pipe.scheduler.config))
    return _with_encoder(pipe, opening, preset)


def _with_encoder(pipe: Any, opening: Opening, own: Preset | None = None) -> Any:
    """The pipeline with the image encoder of a preset in its own place for one."""
    preset = own if opening.encoder is None else PRESETS.get(opening.encoder)
    files = [] if preset is None else preset.encoder_files()
    if preset is None or not files:
        return pipe
    found = fetch(files, preset.name, local_files_only=opening.local_files_only)
    with loading():
        import torch
        import transformers

        kind: Any = transformers.CLIPVisionModelWithProjection
        try:
            encoder = kind.from_pretrained(
                found[0].parent, dtype=getattr(torch, opening.dtype), local_files_only=True
            )
        except Exception as error:  # whatever the library raises on a broken file
            raise ModelError(
                "its image encoder cannot be opened", where=preset.name, found=first_line(error)
            ) from error
        parts = {"image_encoder": encoder.eval()}
        if getattr(pipe, "feature_extractor", None) is None:
            parts["feature_extractor"] = clip_processor(encoder)
    pipe.register_modules(**parts)
    return pipe


def clip_processor(encoder: Any) -> Any:
    """CLIP's own preprocessing at the encoder's size, for encoders published without."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    side = encoder.config.image_size
    return CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )


def _opened(name: str, source: str, opening: Opening, **options: Any) -> Any:
    with loading():
        from diffusers import DiffusionPipeline, StableDiffusionPipeline

        # the class is stated where it is known: looking it up costs seconds of imports
        kind: Any = StableDiffusionPipeline if name == CRITTERS else DiffusionPipeline
        try:
            options |= opening.options()
            if opening.unet:
                return kind.from_pretrained(source, **options)
            later = _UnetLater(source, options)
            pipe = kind.from_pretrained(source, unet=later.skeleton(), **options)
            pipe.unet_later = later
            return pipe
        except Exception as error:  # whatever the libraries raise on a broken or absent source
            raise cannot_be_opened("cannot be opened", name, error) from error


class _UnetLater:
    """A UNet whose weights are loaded when the others' may be gone.

    Args:
        source: A folder or hub id.
        options: Of `from_pretrained`.
    """

    def __init__(self, source: str, options: dict[str, Any]) -> None:
        self.source = source
        known = ("dtype", "use_safetensors", "variant", "local_files_only", "revision")
        self.options = {name: options[name] for name in known if name in options}
        self.options["torch_dtype"] = self.options.pop("dtype")

    def skeleton(self) -> Any:
        """Its layers and config, without memory for weights."""
        import torch
        from diffusers import UNet2DConditionModel as Unet

        where = {k: v for k, v in self.options.items() if k in ("local_files_only", "revision")}
        config: Any = Unet.load_config(self.source, subfolder="unet", **where)
        with torch.device("meta"):
            return Unet.from_config(config)

    def load(self) -> Any:
        """The whole."""
        from diffusers import UNet2DConditionModel as Unet

        return Unet.from_pretrained(self.source, subfolder="unet", **self.options)


def load_unet(pipe: Any) -> None:
    """Load a UNet that was left for later (`Opening.unet`); any other pipeline stays as it is.

    Raises:
        ModelError: It cannot be opened.
    """
    later = getattr(pipe, "unet_later", None)
    if later is None or pipe.unet.device.type != "meta":
        return
    with loading():
        try:
            pipe.register_modules(unet=later.load().eval())
        except Exception as error:
            raise cannot_be_opened("its UNet cannot be opened", later.source, error) from error


def cannot_be_opened(what: str, where: str, error: Exception) -> ModelError:
    """What the hub's libraries say, in a line, with what mends it where that is known."""
    local = Path(where).exists() or not HUB_ID.match(where)
    known = None if local else reason(error, split_hub_id(where)[0])
    if known is None:
        return ModelError(what, where=where, found=first_line(error))
    return ModelError(f"{what}: {known.what}", where=where, fix=known.fix)


def _single_file(file: Path, opening: Opening) -> Any:
    """A checkpoint in the original layout, as model sites publish them."""
    if file.suffix != ".safetensors":
        raise ModelError(
            "is no safetensors file",
            where=file,
            found=file.suffix or "no extension",
            fix="Other single files are pickles, which can run code; look for a safetensors one.",
        )
    with loading():
        import diffusers
        import torch
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt") as opened:
                names = list(opened.keys())
        except SafetensorError as error:
            raise ModelError("cannot be opened", where=file, found=first_line(error)) from error
        large = any(key.startswith("conditioner.embedders.1.") for key in names)
        kind = "StableDiffusionXLPipeline" if large else "StableDiffusionPipeline"
        beside = file.with_suffix("")  # a folder of configs with the file's name, if there is one
        config = {"config": str(beside)} if beside.is_dir() else {}
        try:
            return getattr(diffusers, kind).from_single_file(
                str(file),
                torch_dtype=getattr(torch, opening.dtype),
                local_files_only=opening.local_files_only,
                **config,
            )
        except Exception as error:
            raise ModelError(
                "cannot be opened",
                where=file,
                found=first_line(error),
                fix=f"Its configs come from the hub; offline, put them into {beside.name}/.",
            ) from error


def fingerprint(module: torch.nn.Module) -> str:
    """Twelve hex digits of a module's weights, to name what was computed with them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def split_hub_id(source: str) -> tuple[str, str | None]:
    """`owner/name/path/inside` as (`owner/name`, `path/inside`); anything shorter as it is."""
    parts = source.split("/", 2)
    return ("/".join(parts[:2]), parts[2]) if len(parts) == 3 else (source, None)


def first_line(error: Exception) -> str:
    """What a library says, without the rest of it."""
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
