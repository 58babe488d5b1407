"""What adapter a set of tensors describes. Every size is read from shapes; no tensor is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from ipdiverse.adapter.files.layouts import BASE_WEIGHTS
from ipdiverse.adapter.fusion import BlendFusion, Fusion, GatedFusion
from ipdiverse.adapter.generative import GenerativeFusion
from ipdiverse.adapter.model import ImagePromptAdapter, Joint, LoraShapes, shared_parts
from ipdiverse.adapter.projection import (
    FaceIDPlusProjection,
    FaceIDProjection,
    FullFaceProjection,
    LinearProjection,
    PooledProjection,
    Projection,
    ReduxProjection,
    ResamplerProjection,
    TimeResamplerProjection,
)
from ipdiverse.errors import CheckpointError
from ipdiverse.loading import building

Tensors = Mapping[str, Tensor]
Adapter = TypeVar("Adapter", bound=ImagePromptAdapter)

DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
"""What weights may be stored as."""

_BRANCH = re.compile(r"ip_adapter\.([0-9]{1,4})\.to_[kv]_ip\.weight")
_LORA = re.compile(r"ip_adapter\.([0-9]{1,4})\.(to_(?:q|k|v|out)_lora)\.down\.weight")
_MAX_STEPS = 1000
_FAMILIES = {(768, 16): "SD 1.x", (1024, 16): "SD 2.x", (2048, 70): "SDXL"}


def skeleton(
    make: type[Adapter],
    tensors: Tensors,
    where: object,
    spec: Mapping[str, Any],
    shortcut: bool = False,
) -> Adapter:
    """The adapter that these tensors describe, without memory for weights (device `meta`)."""
    try:
        # a file's claims cost no memory before they are checked
        with building(), torch.device("meta"):
            widths = _widths(tensors)
            redux = "image_proj.redux_up.weight" in tensors
            joint = Joint("redux") if redux else _joint(tensors, widths)
            pooled = joint is not None and joint.style == "instantx"
            projection = _projection(tensors, where, shortcut, pooled)
            fusion = _fusion(tensors, spec)
            adapter = make(projection, widths, fusion, _lora(tensors), joint)
    except (ValueError, IndexError, ArithmeticError, RuntimeError, TypeError) as error:
        raise CheckpointError(
            "its tensors do not describe an adapter", where=where, found=f"{error}"[:200]
        ) from error
    if not adapter.widths() and adapter.kind != "redux":
        raise CheckpointError("has no `ip_adapter.N.to_k_ip.weight`", where=where)
    return adapter


def misfits(tensors: Tensors, adapter: ImagePromptAdapter) -> dict[str, list[str]]:
    """How tensors differ from what the adapter they describe must have."""
    expected = adapter.state_dict()
    if any(key.startswith(BASE_WEIGHTS) for key in tensors):
        expected |= {BASE_WEIGHTS + key: one for key, one in shared_parts(expected).items()}
    both = sorted(expected.keys() & tensors.keys())
    mismatched = [
        f"{key} is {tuple(tensors[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in both
        if tensors[key].shape != expected[key].shape
    ]
    mismatched += [
        f"{key} is {dtype_name(tensors[key])}, expected floating point"
        for key in both
        if tensors[key].dtype not in DTYPES
    ]
    return {
        "missing": sorted(expected.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - expected.keys()),
        "mismatched": mismatched + _disagreements(adapter),
    }


def describe(adapter: ImagePromptAdapter) -> dict[str, Any]:
    """What a file's spec says of an adapter, so that it is loaded exactly."""
    projection, fusion = adapter.image_proj, adapter.fusion
    spec: dict[str, Any] = {
        "kind": adapter.kind,
        "family": base_family(adapter),
        "fusion": None if fusion is None else {"kind": fusion.kind},
        "dims": {
            "num_tokens": projection.num_tokens,
            "token_width": adapter.token_width,
            "clip_dim": adapter.clip_dim,
            "face_dim": projection.face_dim,
            "layers": len(adapter.widths()),
        },
    }
    if isinstance(fusion, GatedFusion):
        spec["fusion"]["heads"] = fusion.heads
    if isinstance(fusion, GenerativeFusion):
        spec["fusion"] |= {"steps": fusion.steps, "guidance": fusion.guidance}
    if isinstance(projection, FaceIDPlusProjection):
        spec["shortcut"] = projection.shortcut
    return spec


def base_family(adapter: ImagePromptAdapter) -> str:
    """Which base models it most likely fits: `SD 1.x`, `SDXL`, `Flux.1` and others, or `custom`."""
    if adapter.joint is not None:
        return "SD 3.5" if adapter.joint.style == "sd3" else "Flux.1"
    numbers = list(adapter.widths())
    if numbers != list(range(1, 2 * len(numbers), 2)):  # there, every second one is self-attention
        return "custom"
    found = _FAMILIES.get((adapter.token_width, len(numbers)), "custom")
    # Kolors' have SDXL's layout, and read an encoder that no other published adapter reads
    kolors = (found, adapter.kind, adapter.clip_dim) == ("SDXL", "plus", 1024)
    return "Kolors" if kolors else found


def stock_notes(adapter: ImagePromptAdapter) -> list[str]:
    """What stock diffusers 0.42 takes for granted, instead of reading it, and gets wrong here."""
    projection = adapter.image_proj
    part, count = "", 4
    if isinstance(projection, LinearProjection):
        # XLabs' second adapter, of 16 tokens, is told by its size
        known = projection.proj.out_features == 65536
        part, count = "image tokens", 4 if known else projection.num_tokens
    elif isinstance(projection, ResamplerProjection):
        part, count = "resampler layers", len(projection.layers)
    return [] if count == 4 else [f"stock diffusers takes 4 {part} for granted; this has {count}"]


def _projection(tensors: Tensors, where: object, shortcut: bool, pooled: bool) -> Projection:
    """The projection; names that only one kind has tell which, for `pooled` the layers do."""
    if "image_proj.redux_up.weight" in tensors:
        inner, clip_dim = _shape(tensors, "image_proj.redux_up.weight")
        token_width = _shape(tensors, "image_proj.redux_down.weight")[0]
        return ReduxProjection(clip_dim, token_width, inner)
    if "image_proj.latents" in tensors:
        return _plus(tensors)
    if "image_proj.proj.weight" in tensors and "image_proj.norm.weight" in tensors:
        rows, clip_dim = tensors["image_proj.proj.weight"].shape
        token_width = _shape(tensors, "image_proj.norm.weight")[0]
        return LinearProjection(clip_dim, token_width, rows // token_width)
    if "image_proj.proj.3.weight" in tensors:
        inner, clip_dim = _shape(tensors, "image_proj.proj.0.weight")
        return FullFaceProjection(clip_dim, _shape(tensors, "image_proj.proj.3.weight")[0], inner)
    if "image_proj.proj.0.weight" in tensors:
        return _face(tensors, shortcut, pooled)
    raise CheckpointError(
        "holds no known image projection",
        where=where,
        expected="`image_proj.proj.*` (base, faces) or `image_proj.latents` (plus)",
        found=", ".join(sorted(tensors)[:3]) or "nothing",
    )


def _plus(tensors: Tensors) -> ResamplerProjection | TimeResamplerProjection:
    if len(latents := tensors["image_proj.latents"].shape) != 3:
        raise ValueError(f"image_proj.latents is {(*latents,)}, expected (1, tokens, width)")
    _, num_tokens, width = latents
    _check_heads("image_proj.latents", width)
    clip_dim = _shape(tensors, "image_proj.proj_in.weight")[1]
    token_width = _shape(tensors, "image_proj.proj_out.weight")[0]
    depth = _depth(tensors, "image_proj")
    sizes = (clip_dim, token_width, num_tokens, width, depth)
    if (time := tensors.get("image_proj.time_embedding.linear_1.weight")) is not None:
        return TimeResamplerProjection(*sizes, frequencies=time.shape[1])
    return ResamplerProjection(*sizes)


def _face(
    tensors: Tensors, shortcut: bool, pooled: bool
) -> FaceIDProjection | FaceIDPlusProjection:
    inner, face_width = _shape(tensors, "image_proj.proj.0.weight")
    token_width = _shape(tensors, "image_proj.norm.weight")[0]
    num_tokens = _shape(tensors, "image_proj.proj.2.weight")[0] // token_width
    if pooled:
        return PooledProjection(face_width, token_width, num_tokens, inner)
    resampler = "image_proj.perceiver_resampler"
    if not any(key.startswith(resampler) for key in tensors):
        return FaceIDProjection(face_width, token_width, num_tokens, inner)
    _check_heads("image_proj.norm.weight", token_width)
    clip_dim = _shape(tensors, f"{resampler}.proj_in.weight")[1]
    depth = _depth(tensors, resampler)
    return FaceIDPlusProjection(
        face_width, clip_dim, token_width, num_tokens, depth, inner, shortcut
    )


def _check_heads(key: str, width: int) -> None:
    if width < 64 or width % 64:
        raise ValueError(f"{key}: a width of {width} is not a multiple of 64, the width of a head")


def _depth(tensors: Tensors, prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"\.layers\.[0-9]+\.0\.to_q\.weight")
    return sum(pattern.fullmatch(key) is not None for key in tensors)


def _widths(tensors: Tensors) -> dict[int, tuple[int, int]]:
    """Token and query width of each layer with an image branch, from its keys or its values."""
    widths: dict[int, tuple[int, int]] = {}
    for key in sorted(tensors, reverse=True):  # keys after values, so theirs win
        if found := _BRANCH.fullmatch(key):
            rows, columns = tensors[key].shape
            widths[int(found[1])] = (columns, rows)
    return dict(sorted(widths.items()))


def _joint(tensors: Tensors, widths: Mapping[int, tuple[int, int]]) -> Joint | None:
    """How it acts in a transformer; None for a UNet's, whose even slots are self-attention."""
    if not widths or 0 not in widths:
        return None
    if "ip_adapter.0.to_k_ip.bias" in tensors:
        return Joint("xlabs")
    if "ip_adapter.0.norm_ip.linear.weight" not in tensors:
        return Joint("instantx")
    time_width = tensors["ip_adapter.0.norm_ip.linear.weight"].shape[1]
    return Joint("sd3", time_width, _shape(tensors, "ip_adapter.0.norm_q.weight")[0])


def _lora(tensors: Tensors) -> dict[int, LoraShapes]:
    lora: dict[int, LoraShapes] = {}
    for key, down in tensors.items():
        if found := _LORA.fullmatch(key):
            rank, width_in = down.shape
            up = tensors.get(key.replace(".down.", ".up."), down.T)
            lora.setdefault(int(found[1]), {})[found[2]] = (width_in, rank, up.shape[0])
    return lora


def _fusion(tensors: Tensors, spec: Mapping[str, Any]) -> Fusion | None:
    if "fusion.query.weight" in tensors:
        return BlendFusion(_shape(tensors, "fusion.query.weight")[0])
    if "fusion.place" in tensors:
        return _generative(tensors, spec)
    if "fusion.gate" not in tensors:
        return None
    token_width = _shape(tensors, "fusion.norm_image.weight")[0]
    inner = _shape(tensors, "fusion.to_q.weight")[0]
    stored = spec.get("fusion")
    heads = stored.get("heads") if isinstance(stored, Mapping) else None
    if not isinstance(heads, int) or heads < 1:
        # shapes do not tell the heads, and this file's spec does not either
        heads = inner // 64 if inner % 64 == 0 and inner else 1
    return GatedFusion(token_width, _shape(tensors, "fusion.gate")[0], heads, inner)


def _generative(tensors: Tensors, spec: Mapping[str, Any]) -> GenerativeFusion:
    num_tokens, width = _shape(tensors, "fusion.place")
    words, text_width = _shape(tensors, "fusion.no_text")
    block = re.compile(r"fusion\.blocks\.[0-9]+\.to_out\.weight")
    stored = spec.get("fusion")
    told = stored if isinstance(stored, Mapping) else {}
    steps, guidance = told.get("steps", 8), told.get("guidance", 1.0)
    # a file may say anything: a million steps would not be told from a program that hangs
    if not isinstance(steps, int) or not 1 <= steps <= _MAX_STEPS:
        raise ValueError(f"fusion steps: {steps}, expected 1 to {_MAX_STEPS}")
    if not isinstance(guidance, int | float) or not -100 <= guidance <= 100:
        raise ValueError(f"fusion guidance: {guidance}, expected -100 to 100")
    return GenerativeFusion(
        _shape(tensors, "fusion.image_in.weight")[1],
        num_tokens,
        _shape(tensors, "fusion.variation.deviations")[0],
        words,
        width,
        sum(block.fullmatch(key) is not None for key in tensors),
        steps,
        float(guidance),
        text_width,
    )


def _shape(tensors: Tensors, key: str) -> torch.Size:
    if key not in tensors:
        raise ValueError(f"missing {key}")
    return tensors[key].shape


def _disagreements(adapter: ImagePromptAdapter) -> list[str]:
    """Parts that fit their own tensors, but not each other."""
    projection, fusion = adapter.image_proj, adapter.fusion
    width = projection.token_width
    wrong = [
        f"ip_adapter.{number} reads tokens of width {found}, expected the projection's {width}"
        for number, (found, _) in adapter.widths().items()
        if found != width
    ]
    for name in ("gate", "place"):  # of these a fusion has a row for each image token
        held = getattr(fusion, name, None)
        if held is not None and projection.num_tokens not in {None, len(held)}:
            wrong.append(f"fusion.{name} has {len(held)} tokens, expected {projection.num_tokens}")
    for name in ("image_in", "to_q", "query"):  # reads them, by the kind of fusion
        found = getattr(getattr(fusion, name, None), "in_features", width)
        if found != width:
            wrong.append(f"fusion reads tokens of width {found}, expected the projection's {width}")
    return wrong


def dtype_name(tensor: Tensor) -> str:
    """Without torch's prefix: `float16`."""
    return str(tensor.dtype).removeprefix("torch.")
