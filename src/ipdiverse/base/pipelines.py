"""Opening stock diffusers pipelines: presets, folders, single files, hub ids."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipdiverse.base.downloads import (
    HUB_ID,
    cached,
    cannot_be_opened,
    fetch,
    first_line,
    snapshot,
)
from ipdiverse.base.presets import PRESETS, Preset
from ipdiverse.errors import ArgumentError, ModelError
from ipdiverse.loading import AS_BASE, loading, one_line, what_is

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from ipdiverse.base.presets import HubFile

CRITTERS = "critters"
CRITTERS_BASE = Path(__file__).parents[1] / "critters" / "weights" / "base"


SUPPORTED = "Stable Diffusion 1.x, 2.x, XL, 3.x, Kolors or Flux.1"
_FAMILIES = ("StableDiffusion", "Kolors", "Flux", "LatentConsistency")
_NOT_THOSE = ("Flux2", "StableDiffusion3D")


def denoiser_of(pipe: Any) -> Any:
    """A pipeline's UNet or transformer; None if it has neither."""
    unet = getattr(pipe, "unet", None)
    return getattr(pipe, "transformer", None) if unet is None else unet


def native_side(pipe: Any) -> int:
    """Height and width in pixels that a pipeline draws unless it is asked for others."""
    # Flux' transformer has no size of its own, and its pipeline says which
    latents = getattr(pipe, "default_sample_size", None) or denoiser_of(pipe).config.sample_size
    return latents * pipe.vae_scale_factor


def is_transformer(name: str, revision: str = "", *, local_files_only: bool = False) -> bool:
    """Whether a base's denoiser is a transformer, as far as is known before it is opened."""
    if name in PRESETS:
        return PRESETS[name].variant is None
    if Path(name).suffix == ".safetensors" and Path(name).is_file():
        return bool(_joint_preset(_tensor_names(Path(name))))
    return "transformer" in _index(name, revision, local_files_only=local_files_only)


def check_trainable(name: str, *, local_files_only: bool = False) -> None:
    """Refuse a base that adapters cannot be trained for, before it is opened."""
    if is_transformer(name, local_files_only=local_files_only):
        what, wanted = "cannot be trained for", "a base with a UNet"
        raise ModelError(what, where=name, expected=wanted, found="a transformer")


def _index(name: str, revision: str, *, local_files_only: bool) -> dict[str, Any]:
    """What a folder or a repository says of the pipeline in it; empty for anything else."""
    file = Path(name) / "model_index.json"
    try:
        if not Path(name).exists() and HUB_ID.fullmatch(name):
            from huggingface_hub import hf_hub_download

            given: dict[str, Any] = {"local_files_only": local_files_only}
            file = Path(hf_hub_download(name, file.name, revision=revision or None, **given))
        found = json.loads(file.read_text("utf-8"))
    except Exception:  # diffusers says what is wrong with it, or the hub why it is not to be had
        return {}
    return found if isinstance(found, dict) else {}


def _check_family(name: str, opening: Opening) -> None:
    """Refuse another architecture before its gigabytes are downloaded or read."""
    index = _index(name, opening.revision, local_files_only=opening.local_files_only)
    kind = str(index.get("_class_name", _FAMILIES[0]))
    if not kind.startswith(_FAMILIES) or kind.startswith(_NOT_THOSE):
        what = "is a base of an unknown architecture"
        raise ModelError(what, where=name, expected=SUPPORTED, found=kind)


_CACHES = (
    "faster_cache",
    "fbc",
    "mag_cache",
    "pyramid_attention",
    "sea_cache",
    "taylorseer",
    "text_kv",
)
"""What the names of the hooks of diffusers' caches begin with."""


def check_caches(unet: Any) -> None:
    """Refuse diffusers' caches: they fail with image prompts, cache nothing, or leak into calls."""
    for module in unet.modules():
        registry = getattr(module, "_diffusers_hook", None)
        for name in () if registry is None else registry.hooks:
            if name.startswith(_CACHES):
                raise ModelError(
                    "does not work with an image prompt",
                    where="pipeline",
                    found=f"the cache {name} of diffusers",
                    fix="Open the pipeline without it; `--fast 1` to 3 (`fast=`) works with one.",
                )


@dataclass(frozen=True)
class Opening:
    """How a pipeline is opened: options of `load_base`, and the type of its weights."""

    local_files_only: bool
    revision: str
    safety_checker: bool
    encoder: str | None
    dtype: str
    unet: bool = True
    quantize: str = "none"


def open_pipeline(name: str, opening: Opening) -> Any:
    """Open the pipeline that a name stands for."""
    if name == CRITTERS and not (CRITTERS_BASE / "model_index.json").is_file():
        fix = "Run `make base` in a checkout, or install a released package."
        raise ModelError("the embedded model is not in this installation", where=name, fix=fix)
    if name in PRESETS:
        return _open_preset(PRESETS[name], opening)
    source = CRITTERS_BASE if name == CRITTERS else Path(name)
    if opening.revision and source.exists():  # the embedded one too
        raise ArgumentError(
            "has no revisions", where=name, found=opening.revision, fix="Leave revision out."
        )
    if (source / "model_index.json").is_file():
        _check_family(str(source), opening)
        pipe = _opened(name, str(source), opening, local_files_only=True)
    elif source.is_file():
        pipe = _single_file(source, opening)
    else:
        check_known(name)
        _check_family(name, opening)
        options = {"local_files_only": opening.local_files_only}
        revision = {"revision": opening.revision} if opening.revision else {}
        pipe = _opened(name, name, opening, **options, **revision)
    return _with_encoder(pipe, opening, opening.encoder or "")


def check_known(name: str) -> None:
    """Refuse a name that cannot be a base's, without opening it."""
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
    # opened as a folder: given the hub id, diffusers would ask the hub for its list of files
    folder = snapshot(found[0], files[0])
    variant = {"variant": preset.variant} if preset.variant else {}
    pipe = _opened(preset.name, str(folder), opening, local_files_only=True, **variant)
    import diffusers

    kind = getattr(diffusers, preset.scheduler)
    pipe.register_modules(scheduler=kind.from_config(pipe.scheduler.config))
    encoder = preset.name if opening.encoder is None else opening.encoder
    return _with_encoder(pipe, opening, encoder)


def _with_encoder(pipe: Any, opening: Opening, encoder_of: str) -> Any:
    """The pipeline, with a preset's image encoder in place of its own."""
    wanted = PRESETS[encoder_of].encoder if encoder_of in PRESETS else None
    if wanted is None:
        return pipe
    files = wanted.files()
    found = fetch(files, encoder_of, local_files_only=opening.local_files_only)
    with loading():
        import torch
        import transformers

        kind: Any = getattr(transformers, wanted.kind)
        with one_line("its image encoder cannot be opened", encoder_of):
            dtype = getattr(torch, opening.dtype)
            encoder = kind.from_pretrained(found[0].parent, dtype=dtype, local_files_only=True)
        parts = {"image_encoder": encoder.eval()}
        # one that is there is CLIP's, which the safety checker reads too
        if getattr(pipe, "feature_extractor", None) is None or "Siglip" in wanted.kind:
            parts["feature_extractor"] = clip_processor(encoder)
        if wanted.text:  # of the encoder, so that it stays with it whichever pipeline takes it
            encoder.text_half = cache(partial(_text_half, wanted.text))
    pipe.register_modules(**parts)
    return pipe


def _text_half(files: tuple[HubFile, ...]) -> tuple[Any, Any] | None:
    """Tokenizer and text encoder of these files, in float32 on the CPU; None if one is missing.

    Never downloaded by itself: only variation spaces ask for it, and their captions serve too.
    """
    found = [cached(file) for file in files]
    paths = [path for path in found if path is not None]
    if len(paths) < len(files):
        return None
    with loading():
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer

        variant: dict[str, Any] = {"variant": "fp16"} if ".fp16." in files[0].name else {}
        encoder = CLIPTextModelWithProjection.from_pretrained(
            paths[0].parent, dtype="float32", local_files_only=True, **variant
        )
        tokenizer = CLIPTokenizer.from_pretrained(paths[-1].parent, local_files_only=True)
    longest = encoder.config.max_position_embeddings
    tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
    return tokenizer, encoder.eval()


def clip_processor(encoder: Any) -> Any:
    """CLIP's or SigLIP's own preprocessing at the encoder's size, where none was published."""
    # Pillow's resampling, as in training; the default of transformers 5, torchvision's, differs
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    side = encoder.config.image_size
    if "Siglip" in type(encoder).__name__:
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        return SiglipImageProcessorPil(size={"height": side, "width": side})
    crop = {"height": side, "width": side}
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=crop)


def _opened(name: str, source: str, opening: Opening, **options: Any) -> Any:
    with loading():
        import torch
        from diffusers import DiffusionPipeline, StableDiffusionPipeline

        # the class is stated where it is known: looking it up costs seconds of imports
        kind: Any = StableDiffusionPipeline if name == CRITTERS else DiffusionPipeline
        options |= {"dtype": getattr(torch, opening.dtype), "use_safetensors": True}
        without = {"safety_checker": None, "requires_safety_checker": False}
        parts: dict[str, Any] = {} if opening.safety_checker else without
        if opening.quantize != "none":
            parts["quantization_config"] = _quantization(opening)
        try:
            if not opening.unet:
                parts |= _without_weights(source, opening, options)
            pipe = kind.from_pretrained(source, **options, **parts)
            if "unet" in parts:
                later = type(pipe.unet).from_pretrained
                pipe.unet_later = partial(later, source, subfolder="unet", **options)
            return pipe
        except Exception as error:  # whatever the libraries raise on a broken or absent source
            raise cannot_be_opened("cannot be opened", name, error) from error


def _quantization(opening: Opening) -> Any:
    """What makes diffusers quantise the transformer and T5 while it reads them."""
    import diffusers
    import torch
    import transformers
    from diffusers.quantizers import PipelineQuantizationConfig

    kind, given = "BitsAndBytesConfig", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    given["bnb_4bit_compute_dtype"] = getattr(torch, opening.dtype)
    if opening.quantize == "int8":
        from torchao.quantization import (  # pyright: ignore[reportMissingImports]
            Int8WeightOnlyConfig,
        )

        kind, given = "TorchAoConfig", {"quant_type": Int8WeightOnlyConfig()}
    # one by one: by a backend's name it is refused where both libraries' classes differ (torchao's)
    mapping: dict[str, Any] = {"transformer": getattr(diffusers, kind)(**given)}
    for part in ("text_encoder_2", "text_encoder_3"):
        mapping[part] = getattr(transformers, kind)(**given)
    return PipelineQuantizationConfig(quant_mapping=mapping)


def _without_weights(source: str, opening: Opening, options: dict[str, Any]) -> dict[str, Any]:
    """A denoiser's layers and config, without memory for weights; and no T5, which is as large."""
    import diffusers
    import torch

    where = {k: options[k] for k in ("local_files_only", "revision") if k in options}
    index = _index(source, opening.revision, local_files_only=opening.local_files_only)
    parts: dict[str, Any] = {n: None for n, told in index.items() if "T5EncoderModel" in str(told)}
    for name in {"unet", "transformer"} & (index.keys() - options.keys()):
        kind = getattr(diffusers, index[name][1])
        config = kind.load_config(source, subfolder=name, **where)
        with torch.device("meta"):
            parts[name] = kind.from_config(config)
    return parts


def load_unet(pipe: Any) -> None:
    """Load a UNet that was left for later (`Opening.unet`); any other pipeline stays as it is."""
    later = getattr(pipe, "unet_later", None)
    if later is None or pipe.unet.device.type != "meta":
        return
    with loading():
        try:
            pipe.register_modules(unet=later().eval())
        except Exception as error:
            raise cannot_be_opened("its UNet cannot be opened", later.args[0], error) from error


def _tensor_names(file: Path) -> list[str]:
    from safetensors import safe_open

    with one_line("cannot be opened", str(file)), safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _joint_preset(names: Iterable[str]) -> str:
    """The preset with the architecture of a single file; empty for one with a UNet."""
    text = "\n".join(names)
    if "joint_blocks." in text:
        return "sd35-large" if "joint_blocks.37." in text else "sd35-medium"
    if "double_blocks." not in text and "single_transformer_blocks." not in text:
        return ""
    guided = "guidance_in." in text or "guidance_embedder." in text
    return "flux-dev" if guided else "flux-schnell"


def _single_file(file: Path, opening: Opening) -> Any:
    """A checkpoint in the original layout, as model sites publish them."""
    if file.suffix != ".safetensors":
        found = file.suffix or "no extension"
        fix = "Other single files are pickles, which can run code; look for a safetensors one."
        raise ModelError("is not a safetensors file", where=file, found=found, fix=fix)
    names = _tensor_names(file)
    kind = what_is(names)
    if kind and kind[1] != AS_BASE:
        raise ModelError(f"is {kind[0]}, not a base", where=file, fix=kind[1])
    beside = file.with_suffix("")  # a folder of configs with the file's name, if there is one
    joint = _joint_preset(names)
    with loading():
        import diffusers
        import torch

        options: dict[str, Any] = {"torch_dtype": getattr(torch, opening.dtype)}
        if joint:
            return _with_transformer(file, joint, beside, opening, options)
        # the second text encoder, which of these only SDXL has, under the original layout's name
        large = any(key.startswith("conditioner.embedders.1.") for key in names)
        kind = "StableDiffusionXLPipeline" if large else "StableDiffusionPipeline"
        options |= {"config": str(beside)} if beside.is_dir() else {}
        try:
            return getattr(diffusers, kind).from_single_file(
                str(file), local_files_only=opening.local_files_only, **options
            )
        except Exception as error:
            found = first_line(error)
            fix = f"Its configs come from the hub; offline, put them into {beside.name}/."
            raise ModelError("cannot be opened", where=file, found=found, fix=fix) from error


def _with_transformer(
    file: Path, joint: str, folder: Path, opening: Opening, options: dict[str, Any]
) -> Any:
    """Flux or SD 3 with a single file's transformer: most hold nothing else of their own.

    The rest is that of the folder beside it, if there is one, or of the preset.
    """
    import diffusers

    if not folder.is_dir():
        files = PRESETS[joint].base_files(opening.revision)
        files = [one for one in files if not (one.size and one.name.startswith("transformer/"))]
        found = fetch(files, joint, local_files_only=opening.local_files_only)
        folder = snapshot(found[0], files[0])
    kind = "FluxTransformer2DModel" if joint.startswith("flux") else "SD3Transformer2DModel"
    options |= {"config": str(folder), "subfolder": "transformer", "local_files_only": True}
    if opening.quantize != "none":
        options["quantization_config"] = _quantization(opening).quant_mapping["transformer"]
    with one_line("cannot be opened", str(file)):
        transformer = getattr(diffusers, kind).from_single_file(str(file), **options)
    given = {"local_files_only": True, "transformer": transformer}
    return _opened(str(file), str(folder), opening, **given)


def fingerprint(module: torch.nn.Module) -> str:
    """Twelve hex digits of a module's weights, to name what was computed with them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        # in float32, as numpy has no bfloat16
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
