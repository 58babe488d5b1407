"""Bases to prompt: the embedded `critters`, presets, folders, hub ids, single files."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipdiverse.base.downloads import HUB_ID, cannot_be_opened, split_hub_id
from ipdiverse.base.memory import (
    USUAL,
    MemoryOptions,
    Plan,
    arrange,
    check_quantize,
    plan_dtype,
    plan_memory,
    sizes_of,
    this_device,
)
from ipdiverse.base.pipelines import (
    CRITTERS,
    CRITTERS_BASE,
    SUPPORTED,
    Opening,
    clip_processor,
    denoiser_of,
    is_transformer,
    open_pipeline,
)
from ipdiverse.base.presets import PRESETS
from ipdiverse.errors import ArgumentError, ModelError
from ipdiverse.loading import loading, one_line, quiet

if TYPE_CHECKING:
    from collections.abc import Iterator

_WEIGHTS = CRITTERS_BASE.parent
CRITTERS_ORACLE = _WEIGHTS / "oracle.safetensors"
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
        steps: A good default.
        scale: A good default of the image prompt's weight.
        plan: Where and how precisely it runs; None as it was opened, in float32 on the CPU.
    """

    name: str
    pipe: Any
    guidance_scale: float
    batch: int
    steps: int = 25
    scale: float = 1.0
    plan: Plan | None = None


@dataclass(frozen=True)
class Defaults:
    """Good settings for a base, to begin with."""

    steps: int = 25
    scale: float = 1.0
    guidance_scale: float = 7.5


def defaults_of(base: str) -> Defaults:
    """A preset's own; for other bases diffusers' defaults, for critters with lower guidance."""
    if base in PRESETS:
        one = PRESETS[base]
        return Defaults(one.steps, one.scale, one.guidance_scale)
    return Defaults(guidance_scale=3.0) if base == CRITTERS else Defaults()


def load_base(
    name: str = CRITTERS,
    *,
    local_files_only: bool = False,
    revision: str = "",
    safety_checker: bool = True,
    encoder: str | None = None,
    memory: MemoryOptions | None = None,
    unet: bool = True,
) -> Base:
    """Open a base model; files of a preset or a hub id that are not in the local cache come first.

    The pipeline is as diffusers opens it. Its safety checker is there if it was published with one;
    SDXL marks its images if `invisible-watermark` is installed.

    Args:
        name: `critters`; a preset (`presets.PRESETS`), whose image encoder comes along; a folder
            that a diffusers pipeline wrote; a single `.safetensors` file; a hub id, `owner/name`.
        local_files_only: Use the hub's local cache, and download nothing.
        revision: Branch, tag or commit of the base's repository; empty is the preset's pin, or
            `main`.
        safety_checker: False opens Stable Diffusion 1.x without its safety checker.
        encoder: The preset whose image encoder comes along; None is this preset's own, empty none.
        memory: Place the pipeline by what the device has, within these wishes; None leaves it in
            float32 on the CPU, for the caller to move. `critters` always stays there.
        unet: False leaves the UNet's weights for `pipelines.load_unet`, and those of a transformer
            and of T5 out; a single file's come along.

    Raises:
        ModelError: There is no such base, or it cannot be opened or had.
        ArgumentError: A revision of a base that has none, or memory options that do not fit.
    """
    embedded = name == CRITTERS
    if embedded and memory not in (None, USUAL):
        what, fix = "always runs in float32 on the CPU", "Leave dtype, offload and tiling out."
        raise ArgumentError(what, where=name, fix=fix)
    device = None if embedded or memory is None else this_device()
    joint = is_transformer(name, revision, local_files_only=local_files_only)
    half = "bfloat16" if joint else "float16"  # Flux and SD 3 leave float16's range
    quantize = "none" if memory is None else memory.quantize
    if quantize != "none":
        check_quantize(quantize, name, transformer=joint)
    placed = None if device is None or memory is None else (device, memory.dtype, half)
    dtype = "float32" if placed is None else plan_dtype(*placed)
    opening = Opening(local_files_only, revision, safety_checker, encoder, dtype, unet, quantize)
    pipe, plan = open_pipeline(name, opening), None
    with one_line("cannot be used", name):
        _check_parts(name, pipe)
        pipe = _as_text_to_image(name, pipe)
        pipe.set_progress_bar_config(disable=True)
        if device is not None and memory is not None:
            # the adapter is opened later, and has to fit too
            adapter = PRESETS[name].weights[1] if name in PRESETS else 0
            plan = plan_memory(device, sizes_of(pipe, adapter), replace(memory, dtype=dtype))
            arrange(pipe, plan)
    usual, batch = defaults_of(name), 4 if embedded else 1
    return Base(name, pipe, usual.guidance_scale, batch, usual.steps, usual.scale, plan)


_NEEDED = ("vae", "text_encoder", "tokenizer", "scheduler")


def _check_parts(name: str, pipe: Any) -> None:
    """Refuse a pipeline that opened and cannot draw, or draws nonsense."""
    lacking = ["UNet or transformer"] if denoiser_of(pipe) is None else []
    lacking += [part for part in _NEEDED if getattr(pipe, part, None) is None]
    if lacking:
        what = f"has no {lacking[0]}"
        raise ModelError(what, where=name, expected=SUPPORTED, found=type(pipe).__name__)
    read = signature(type(pipe).__call__).parameters.get("max_sequence_length")
    for suffix in ("", "_2", "_3"):
        encoder = getattr(pipe, f"text_encoder{suffix}", None)
        tokenizer = getattr(pipe, f"tokenizer{suffix}", None)
        if encoder is None or tokenizer is None:
            continue
        words, known = len(tokenizer), encoder.config.vocab_size
        # without its vocabulary a tokenizer opens all the same, with its few special tokens alone
        if not min(known / 2, 100) <= words <= known:
            what, wanted = f"its tokenizer{suffix} does not fit its text encoder", f"{known} tokens"
            fix = f"Copy every file of tokenizer{suffix} again: vocab.json and merges.txt."
            raise ModelError(what, where=name, expected=wanted, found=words, fix=fix)
        # without its config it believes that a text may have any length
        # T5 and ChatGLM have no limit of their own: the pipeline says how far it reads
        longest = getattr(encoder.config, "max_position_embeddings", read and read.default)
        tokenizer.model_max_length = min(tokenizer.model_max_length, longest)


def _as_text_to_image(name: str, pipe: Any) -> Any:
    """The text-to-image pipeline of what may have been saved as one of another task."""
    if "image" not in signature(type(pipe).__call__).parameters:
        return pipe
    from diffusers import AutoPipelineForText2Image

    try:
        with quiet():
            made: Any = AutoPipelineForText2Image.from_pipe(pipe)
    except (ValueError, TypeError) as error:
        what, kind = "is a pipeline of another task", type(pipe).__name__
        raise ModelError(what, where=name, expected=SUPPORTED, found=kind) from error
    if hasattr(pipe, "unet_later"):
        made.unet_later = pipe.unet_later
    return made


def load_part(kind: str, source: str, base: Base, *, local_files_only: bool = False) -> Any:
    """Open one more model for a base, of a folder or a hub id, perhaps `owner/name/folder`."""
    check_part(source)
    with loading():
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
            raise cannot_be_opened(f"cannot be opened as a {kind}", source, error) from error
        pipe: Any = base.pipe
        if not hasattr(part, "parameters"):
            return part
        # not the denoiser's device: its weights may be left for later
        return part.to(pipe.vae.device, denoiser_of(pipe).dtype).eval()


def check_part(source: str) -> None:
    """Refuse a source that `load_part` cannot open, without opening it."""
    # `match` and not `fullmatch`: a folder of the repository may follow
    if not Path(source).is_dir() and not HUB_ID.match(source):
        raise ModelError(
            "no such folder", where=source, expected="a folder, or a hub id", fix="Check the path."
        )


def load_image_encoder(
    source: str, base: Base, *, local_files_only: bool = False
) -> tuple[Any, Any]:
    """Open CLIP's or SigLIP's image encoder for a base, with its preprocessing."""
    options = {"local_files_only": local_files_only}
    try:
        siglip = load_part("AutoConfig", source, base, **options).model_type.startswith("siglip")
    except ModelError:  # said of the encoder itself, below
        siglip = False
    kind = "SiglipVisionModel" if siglip else "CLIPVisionModelWithProjection"
    encoder = load_part(kind, source, base, **options)
    if siglip:
        return encoder, clip_processor(encoder)
    try:
        return encoder, load_part("CLIPImageProcessor", source, base, **options)
    except ModelError as error:
        if "preprocessor_config.json" not in str(error.__cause__):
            raise
        # h94/IP-Adapter, and folders copied from it, hold the encoder alone
        return encoder, clip_processor(encoder)


@contextmanager
def any_latents(pipe: Any) -> Iterator[None]:
    """Let diffusers' inpainting work on latents of any width, for the length of a `with` block.

    It knows UNets with 9 input channels (latents, masked latents, mask) and with 4 (latents), and
    refuses others. A UNet that takes just the VAE's latents, as the embedded one with 16 channels,
    is of the second kind, so its config says 4 meanwhile. SD 3's ControlNets encode their picture
    with noise of no seed, which gets one here, so that images can be repeated.
    """
    if type(pipe).__name__.startswith("StableDiffusion3ControlNet"):
        import torch

        with torch.random.fork_rng():
            torch.manual_seed(0)
            yield
        return
    inpaints = "Inpaint" in type(pipe).__name__ and getattr(pipe, "unet", None) is not None
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
