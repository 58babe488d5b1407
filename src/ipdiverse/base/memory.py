"""Where and how precisely a base runs, by what the device has: precision, offloading, tiling.

The decision is a pure function of facts about the device and the model; `arrange` carries it out.
Attention is never sliced: slices would bypass the image prompt, and PyTorch's fused attention never
holds the matrix that slicing is meant to avoid.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ipdiverse.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    import torch

Dtype = Literal["auto", "float32", "float16", "bfloat16"]
Offload = Literal["auto", "none", "model", "sequential"]
DTYPES: tuple[str, ...] = ("auto", "float32", "float16", "bfloat16")
OFFLOADS: tuple[str, ...] = ("auto", "none", "model", "sequential")

_KEPT_FREE = 0.1
"""Share of the memory for what is not ours: fragments, the driver, other programs."""
_TILE = 512
"""Height and width of the VAE's tiles, in pixels."""
_UNET_FIXED, _UNET_PER_PIXEL = 0.25e9, 1100
"""Bytes that a guided UNet call needs beside its weights in half precision."""
_DECODED_CHANNELS, _DECODED_COPIES = 256, 4
"""Channels of the VAE's decoder at full resolution, and how many such tensors live at once."""


@dataclass(frozen=True)
class MemoryOptions:
    """What the user wants; `auto` and None leave it to the device.

    Args:
        dtype: Precision of the whole pipeline.
        offload: `none` keeps every model on the device; `model` moves each there while it runs;
            `sequential` moves layer by layer, which needs least and is slowest.
        tiling: Decode large images in tiles, one image after the other.

    Raises:
        ArgumentError: A word that is not among these.
    """

    dtype: Dtype = "auto"
    offload: Offload = "auto"
    tiling: bool | None = None

    def __post_init__(self) -> None:
        for name, known in (("dtype", DTYPES), ("offload", OFFLOADS)):
            if (found := getattr(self, name)) not in known:
                raise ArgumentError(
                    "is unknown", where=name, expected=" | ".join(known), found=found
                )


@dataclass(frozen=True)
class Device:
    """Facts about where models run.

    Args:
        kind: `cuda`, `mps` or `cpu`.
        memory: Bytes for us: what is free on CUDA; on others, which swap, what there is.
        bfloat16: Whether it computes in bfloat16 natively.
    """

    kind: str
    memory: int
    bfloat16: bool = False


@dataclass(frozen=True)
class Sizes:
    """What a base weighs, in bytes of the precision it is loaded in.

    Args:
        unet: The UNet with its adapter.
        vae: The VAE.
        largest_other: The largest of the other models.
        total: All models together.
        pixels: Of one image.
        decoded: Bytes a number in the VAE's decoder: 4 where it must run in float32.
    """

    unet: int
    vae: int
    largest_other: int
    total: int
    pixels: int
    decoded: int = 2


@dataclass(frozen=True)
class Plan:
    """How a base runs.

    Args:
        device: `cuda`, `mps` or `cpu`.
        dtype: `float32`, `float16` or `bfloat16`.
        offload: `none`, `model` or `sequential`.
        tiling: Whether the VAE works in tiles.
        memory: Bytes that the plan was made for.
    """

    device: str
    dtype: str
    offload: str
    tiling: bool
    memory: int

    def line(self) -> str:
        """All of it in one line for people."""
        offload = {
            "none": "no offloading",
            "model": "models offloaded",
            "sequential": "layers offloaded",
        }
        tiles = "VAE in tiles" if self.tiling else "VAE whole"
        room = f"{self.memory / 2**30:.1f} GiB"
        return f"{self.device} ({room}), {self.dtype}, {offload[self.offload]}, {tiles}"


def plan_dtype(device: Device, wanted: str = "auto") -> str:
    """Half precision wherever the device computes in it: float16 on CUDA and MPS.

    On a CPU that is bfloat16, where it is native; float16 would be emulated there.
    """
    if wanted != "auto":
        return wanted
    if device.kind == "cpu":
        return "bfloat16" if device.bfloat16 else "float32"
    return "float16"


def plan_memory(device: Device, sizes: Sizes, options: MemoryOptions) -> Plan:
    """The fastest arrangement that fits.

    Tried in this order: everything on the device; that, with the VAE in tiles; one model at a time;
    that, in tiles; one layer at a time. Offloading needs an accelerator of its own memory: on CPU
    and MPS only tiling is left to choose.

    Raises:
        ArgumentError: Offloading is wanted where there is nothing to offload from.
    """
    accelerated = device.kind == "cuda"
    if options.offload not in ("auto", "none") and not accelerated:
        raise ArgumentError(
            "needs a CUDA device", where="offload", found=device.kind, fix="Leave it out."
        )
    kinds = ["none", "model", "sequential"] if accelerated else ["none"]
    ways = [
        (offload, tiling)
        for offload in (kinds if options.offload == "auto" else [options.offload])
        for tiling in ((False, True) if options.tiling is None else (options.tiling,))
    ]
    budget = (1 - _KEPT_FREE) * device.memory
    fitting = [way for way in ways if bytes_needed(sizes, *way) <= budget]
    offload, tiling = (fitting or ways[-1:])[0]
    dtype = plan_dtype(device, options.dtype)
    return Plan(device.kind, dtype, offload, tiling, device.memory)


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
        free, _ = torch.cuda.mem_get_info()
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
    import os

    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 8 * 2**30


def sizes_of(pipe: Any, adapter: int = 0) -> Sizes:
    """What an open pipeline weighs.

    Args:
        pipe: A Stable Diffusion pipeline of diffusers.
        adapter: Bytes of the adapter that will be put on it.
    """
    import torch

    parts = {
        name: sum(p.numel() * p.element_size() for p in part.parameters())
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
    }
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    forced = bool(getattr(pipe.vae.config, "force_upcast", False)) and "XL" in type(pipe).__name__
    rest = [size for name, size in parts.items() if name not in ("unet", "vae")]
    return Sizes(
        unet=parts["unet"] + adapter,
        vae=parts["vae"],
        largest_other=max(rest, default=0),
        total=sum(parts.values()) + adapter,
        pixels=side * side,
        decoded=4 if forced else next(pipe.vae.parameters()).element_size(),
    )


def arrange(pipe: Any, plan: Plan) -> None:
    """Put a pipeline where its plan says, with diffusers' own means.

    Args:
        pipe: A pipeline of diffusers; parts that it shares with one arranged before are left as
            they are where that is right.
        plan: What to do.
    """
    import torch

    device = torch.device(plan.device)
    if plan.offload == "none":
        pipe.to(device)
    elif plan.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        _offload_layers(pipe, device)
    if plan.tiling:
        _tile(pipe.vae)


def _offload_layers(pipe: Any, device: torch.device) -> None:
    """Each layer to the device while it runs.

    diffusers' group offloading, not `enable_sequential_cpu_offload`: that leaves no weights behind
    to attach an adapter to.
    """
    import torch
    from diffusers.hooks import apply_group_offloading

    kept = getattr(pipe, "_exclude_from_cpu_offload", ())
    for name, part in pipe.components.items():
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
    """The VAE in float32 for a `with` block, where float16 would overflow: SDXL's says so.

    Its pipelines do the same; this is for whoever calls the VAE beside them.
    """
    import torch

    dtype = vae.dtype
    upcast = dtype == torch.float16 and getattr(vae.config, "force_upcast", False)
    if upcast:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if upcast:
            vae.to(dtype)


def _tile(vae: Any) -> None:
    """Tiles of at most 512 pixels: SDXL's own are as large as its images, and so save nothing."""
    vae.enable_tiling()
    vae.enable_slicing()
    if not hasattr(vae, "tile_latent_min_size"):  # another kind of VAE, with tiles of its own
        return
    factor = vae.tile_sample_min_size // vae.tile_latent_min_size
    vae.tile_sample_min_size = min(vae.tile_sample_min_size, _TILE)
    vae.tile_latent_min_size = vae.tile_sample_min_size // factor
