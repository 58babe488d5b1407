"""Where and how precisely a base runs, by what the device has: precision, offloading, tiling.

The decision is a pure function of facts about the device and the model; `arrange` carries it out.
Attention is never sliced: diffusers' slicing replaces the attention processors, and with them the
image prompt, and PyTorch's fused attention never holds the matrix that slicing is meant to avoid.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_args

from ipdiverse.base.pipelines import native_side
from ipdiverse.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
Offload = Literal["auto", "none", "model", "sequential"]
Quantize = Literal["none", "int8", "nf4"]

_LIBRARIES = {"int8": "torchao", "nf4": "bitsandbytes"}
_KEPT_FREE = 0.1
"""Share of the memory left to others: fragments, the driver, other programs."""
_TILE = 512
"""Height and width of the VAE's tiles, in pixels."""
_UNET_FIXED, _UNET_PER_PIXEL = 0.25e9, 1100
"""Bytes that a guided UNet call needs on top of its weights, in half precision."""
_DECODED_CHANNELS, _DECODED_COPIES = 256, 4
"""Channels of the VAE's decoder at full resolution, and how many such tensors live at once."""


@dataclass(frozen=True)
class MemoryOptions:
    """The user's wishes; `auto` and None leave the choice to the device.

    Args:
        dtype: Precision of the whole pipeline.
        offload: `none` keeps every model on the device; `model` moves each there while it runs;
            `sequential` moves layer by layer, which needs least and is slowest.
        tiling: Decode large images in tiles, one image after the other.
        quantize: How Flux.1 and SD 3.5 keep their transformer and T5: `int8` takes half the memory
            (torchao), `nf4` a quarter (bitsandbytes, on CUDA), both at a loss.
    """

    dtype: Dtype = "auto"
    offload: Offload = "auto"
    tiling: bool | None = None
    quantize: Quantize = "none"

    def __post_init__(self) -> None:
        kinds = {"dtype": Dtype, "offload": Offload, "quantize": Quantize}
        for name, kind in kinds.items():
            known, found = get_args(kind), getattr(self, name)
            if found not in known:
                words = " | ".join(known)
                raise ArgumentError("is unknown", where=name, expected=words, found=found)


USUAL = MemoryOptions()
"""No wishes."""


@dataclass(frozen=True)
class Device:
    """Facts about where models run."""

    kind: str
    memory: int
    bfloat16: bool = False


@dataclass(frozen=True)
class Sizes:
    """Sizes of a base in bytes, in the precision it is loaded in.

    `unet` is with its adapter, `largest_other` the largest model but UNet and VAE, `pixels` those
    of one image, `decoded` the bytes of a number in the VAE's decoder: 4 where float16 overflows.
    """

    unet: int
    vae: int
    largest_other: int
    total: int
    pixels: int
    decoded: int = 2


@dataclass(frozen=True)
class Plan:
    """How a base runs."""

    device: str
    dtype: str
    offload: str
    tiling: bool
    memory: int
    quantize: str = "none"

    def line(self) -> str:
        """All of it in one line for people."""
        moved = {"none": "no offloading", "model": "models offloaded"}
        offload = moved.get(self.offload, "layers offloaded")
        tiles = "VAE in tiles" if self.tiling else "VAE whole"
        dtype = self.dtype + (f" with {self.quantize} weights" if self.quantize != "none" else "")
        return f"{self.device} ({self.memory / 2**30:.1f} GiB), {dtype}, {offload}, {tiles}"


def plan_dtype(device: Device, wanted: str = "auto", half: str = "float16") -> str:
    """Half precision where the device computes in it: `half`, or on a CPU bfloat16."""
    if wanted == "float16" and device.kind == "cpu":
        fix = "Leave it out, or choose float32 or bfloat16."
        raise ArgumentError("is not computed in on a CPU", where="dtype", found=wanted, fix=fix)
    if wanted != "auto":
        return wanted
    if device.kind != "cpu":
        return half
    return "bfloat16" if device.bfloat16 else "float32"


def check_quantize(wanted: str, base: str, *, transformer: bool) -> None:
    """Refuse weights that this base, this device or what is installed cannot have."""
    if wanted == "none":
        return
    library = _LIBRARIES[wanted]
    if not transformer:
        what, fix = "is for Flux.1 and Stable Diffusion 3.5", "Leave it out."
        raise ArgumentError(what, where="quantize", found=base, fix=fix)
    if find_spec(library) is None:
        fix = f"pip install {library}"
        raise ArgumentError(f"{wanted} needs {library}", where="quantize", fix=fix)
    if wanted == "nf4" and (kind := this_device().kind) != "cuda":
        fix = "int8 is for every device."
        raise ArgumentError("nf4 needs a CUDA device", where="quantize", found=kind, fix=fix)


def plan_memory(device: Device, sizes: Sizes, options: MemoryOptions) -> Plan:
    """The fastest arrangement that fits: all on the device, model by model, or layer by layer."""
    accelerated = device.kind == "cuda"
    if options.offload not in ("auto", "none") and not accelerated:
        raise ArgumentError(
            "needs a CUDA device", where="offload", found=device.kind, fix="Leave it out."
        )
    # CPU and MPS compute in the main memory, so there is nothing to offload to
    kinds = ["none", "model", "sequential"] if accelerated else ["none"]
    if options.quantize == "nf4":  # the scales of bitsandbytes' weights do not move layer by layer
        if options.offload == "sequential":
            fix = "Choose model, or int8."
            raise ArgumentError("sequential does not go with nf4", where="offload", fix=fix)
        kinds = ["none", "model"]
    ways = [  # from the fastest to the slowest; tiles cost less than moving models does
        (offload, tiling)
        for offload in (kinds if options.offload == "auto" else [options.offload])
        for tiling in ((False, True) if options.tiling is None else (options.tiling,))
    ]
    budget = (1 - _KEPT_FREE) * device.memory
    fitting = (way for way in ways if bytes_needed(sizes, *way) <= budget)
    offload, tiling = next(fitting, ways[-1])
    dtype = plan_dtype(device, options.dtype)
    return Plan(device.kind, dtype, offload, tiling, device.memory, options.quantize)


def bytes_needed(sizes: Sizes, offload: str, tiling: bool) -> float:
    """An estimate of the most that is on the device at once."""
    unet = _UNET_FIXED + _UNET_PER_PIXEL * sizes.pixels
    shown = min(sizes.pixels, _TILE**2) if tiling else sizes.pixels
    decode = shown * _DECODED_CHANNELS * _DECODED_COPIES * sizes.decoded
    if offload == "none":
        return sizes.total + max(unet, decode)
    if offload == "model":
        return max(sizes.unet + unet, sizes.vae + decode, sizes.largest_other)
    return max(unet, decode)


def this_device() -> Device:
    """Facts about the best device of this machine: CUDA before MPS before the CPU."""
    import torch

    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()  # other programs have the rest
        return Device("cuda", free, torch.cuda.is_bf16_supported())
    if torch.backends.mps.is_available():
        return Device("mps", torch.mps.recommended_max_memory())
    return Device("cpu", _main_memory(), bf16_is_fast())


def bf16_is_fast() -> bool:
    """Whether this CPU multiplies bf16 natively (AVX512-BF16 or AMX); never assume it."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return any(bool(capabilities.get(name)) for name in ("avx512_bf16", "amx_bf16"))


def autocast() -> AbstractContextManager[Any]:
    """bf16 where the CPU is fast at it, else plain fp32."""
    import torch

    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16_is_fast())


def _main_memory() -> int:
    """Bytes of main memory; 8 GiB where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return 8 * 2**30


def sizes_of(pipe: Any, adapter: int = 0) -> Sizes:
    """Sizes of an open pipeline."""
    import torch

    parts = {
        name: sum(map(_bytes, part.parameters()))
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
    }
    side = native_side(pipe)
    denoiser = "transformer" if getattr(pipe, "unet", None) is None else "unet"
    # diffusers' default is True, also for SD 1.x, but only SDXL's pipelines look at it
    forced = getattr(pipe.vae.config, "force_upcast", False) and "XL" in type(pipe).__name__
    rest = [size for name, size in parts.items() if name not in (denoiser, "vae")]
    return Sizes(
        unet=parts[denoiser] + adapter,
        vae=parts["vae"],
        largest_other=max(rest, default=0),
        total=sum(parts.values()) + adapter,
        pixels=side * side,
        decoded=4 if forced else next(pipe.vae.parameters()).element_size(),
    )


def _bytes(weight: Any) -> int:
    # torchao's tensors say the size that they would have unquantised
    inner = weight.__tensor_flatten__()[0] if hasattr(weight, "__tensor_flatten__") else ()
    return sum(getattr(weight, name).nbytes for name in inner) or weight.nbytes


def arrange(pipe: Any, plan: Plan) -> None:
    """Put a pipeline where its plan says, with diffusers' own means."""
    if plan.offload == "none":
        pipe.to(plan.device)
    elif plan.offload == "model":
        pipe.enable_model_cpu_offload(device=plan.device)
    else:
        _offload_layers(pipe, plan.device)
    if plan.tiling:
        _tile(pipe.vae)


def _offload_layers(pipe: Any, kind: str) -> None:
    """Each layer to the device while it runs."""
    import torch
    from diffusers.hooks import apply_group_offloading

    # group offloading and not `enable_sequential_cpu_offload`, which leaves weights on the device
    # `meta`, where no adapter can read them
    kept, device = getattr(pipe, "_exclude_from_cpu_offload", ()), torch.device(kind)
    for name, part in pipe.components.items():
        # several pipelines may share parts, and hooks of the same name are refused
        if not isinstance(part, torch.nn.Module) or getattr(part, _ARRANGED, False):
            continue
        if name in kept:
            part.to(device)
        else:
            apply_group_offloading(part, onload_device=device, offload_type="leaf_level")
        setattr(part, _ARRANGED, True)


_ARRANGED = "_ipdiverse_layers_offloaded"


@contextmanager
def full_range(vae: Any) -> Iterator[None]:
    """The VAE in float32 for a `with` block, where float16 overflows (SDXL's says so itself)."""
    import torch

    # diffusers' pipelines do the same; this is for our own calls of the VAE
    if vae.dtype != torch.float16 or not getattr(vae.config, "force_upcast", False):
        yield
        return
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(torch.float16)


def _tile(vae: Any) -> None:
    """Tiles of at most 512 pixels: SDXL's own are as large as its images, which saves nothing."""
    vae.enable_tiling()
    vae.enable_slicing()
    if not hasattr(vae, "tile_latent_min_size"):  # another kind of VAE, with tiles of its own
        return
    factor = vae.tile_sample_min_size // vae.tile_latent_min_size
    vae.tile_sample_min_size = min(vae.tile_sample_min_size, _TILE)
    vae.tile_latent_min_size = vae.tile_sample_min_size // factor
