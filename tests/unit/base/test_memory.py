"""Precision, offloading and tiling by what the device has."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ipdiverse.adapter.attach.attach import attach
from ipdiverse.base.memory import (
    Device,
    MemoryOptions,
    Plan,
    Sizes,
    arrange,
    autocast,
    bf16_is_fast,
    bytes_needed,
    full_range,
    plan_dtype,
    plan_memory,
    sizes_of,
    this_device,
)
from ipdiverse.base.presets import PRESETS
from ipdiverse.errors import ArgumentError
from tests import models

GIB = 2**30
# float16 weights of the published models in bytes; SDXL's VAE decodes in float32
SD15 = Sizes(
    unet=1_820_000_000,
    vae=167_000_000,
    largest_other=1_264_000_000,
    total=4_105_000_000,
    pixels=512 * 512,
)
SDXL = Sizes(
    unet=5_983_000_000,
    vae=167_000_000,
    largest_other=1_389_000_000,
    total=9_050_000_000,
    pixels=1024 * 1024,
    decoded=4,
)


@pytest.mark.parametrize(
    ("gib", "sizes", "offload", "tiling"),
    [
        (4, SD15, "model", False),
        (6, SD15, "none", False),
        (8, SD15, "none", False),
        (12, SD15, "none", False),
        (24, SD15, "none", False),
        (2, SD15, "sequential", False),
        (6, SDXL, "sequential", False),
        (4, SDXL, "sequential", True),
        (8, SDXL, "model", False),
        (12, SDXL, "none", True),
        (24, SDXL, "none", False),
    ],
)
def test_cuda_takes_the_fastest_that_fits(
    gib: int, sizes: Sizes, offload: str, tiling: bool
) -> None:
    device = Device("cuda", gib * GIB, bfloat16=True)
    plan = plan_memory(device, sizes, MemoryOptions())
    assert (plan.dtype, plan.offload, plan.tiling) == ("float16", offload, tiling)
    assert bytes_needed(sizes, offload, tiling) <= gib * GIB


@pytest.mark.parametrize(
    ("device", "sizes", "dtype", "tiling"),
    [
        (Device("mps", 16 * GIB), SD15, "float16", False),
        (Device("mps", 12 * GIB), SDXL, "float16", True),
        (Device("mps", 32 * GIB), SDXL, "float16", False),
        (Device("cpu", 16 * GIB, bfloat16=True), SD15, "bfloat16", False),
        (Device("cpu", 16 * GIB, bfloat16=False), SD15, "float32", False),
        (Device("cpu", 12 * GIB, bfloat16=False), SDXL, "float32", True),
    ],
)
def test_without_a_memory_of_its_own_nothing_is_offloaded(
    device: Device, sizes: Sizes, dtype: str, tiling: bool
) -> None:
    plan = plan_memory(device, sizes, MemoryOptions())
    assert (plan.device, plan.dtype, plan.offload, plan.tiling) == (
        device.kind,
        dtype,
        "none",
        tiling,
    )


def test_more_memory_never_makes_it_slower() -> None:
    order = ["none", "model", "sequential"]
    for sizes in (SD15, SDXL):
        plans = [
            plan_memory(Device("cuda", gib * GIB), sizes, MemoryOptions()) for gib in range(1, 33)
        ]
        ranks = [2 * order.index(plan.offload) + plan.tiling for plan in plans]
        assert ranks == sorted(ranks, reverse=True)


def test_what_is_stated_holds() -> None:
    large = Device("cuda", 24 * GIB)
    options = MemoryOptions(dtype="float32", offload="sequential", tiling=True)
    plan = plan_memory(large, SD15, options)
    assert (plan.dtype, plan.offload, plan.tiling) == ("float32", "sequential", True)
    small = Device("cuda", 1 * GIB)
    assert plan_memory(small, SDXL, MemoryOptions(offload="none", tiling=False)).offload == "none"
    assert plan_memory(Device("cuda", 12 * GIB), SDXL, MemoryOptions(tiling=False)).offload == (
        "model"
    )
    assert plan_dtype(large, "bfloat16") == "bfloat16"


def test_four_bits_do_not_move_layer_by_layer() -> None:
    small, nf4 = Device("cuda", 2 * GIB), MemoryOptions(quantize="nf4")
    plan = plan_memory(small, SDXL, nf4)
    assert (plan.offload, plan.tiling, plan.quantize) == ("model", True, "nf4")
    assert plan.line() == "cuda (2.0 GiB), float16 with nf4 weights, models offloaded, VAE in tiles"
    assert plan_memory(small, SDXL, MemoryOptions(quantize="int8")).offload == "sequential"
    with pytest.raises(ArgumentError, match="offload: sequential does not go with nf4"):
        plan_memory(small, SDXL, MemoryOptions(offload="sequential", quantize="nf4"))


def _published(name: str, quantize: str) -> Sizes:
    """Sizes of a preset from those of its files; nf4 has a number for every 64 weights too."""
    preset: Any = PRESETS[name]
    parts: dict[str, float] = {"image_encoder": preset.encoder.weights[1] / 2}  # published in fp32
    for file, size in preset.files:
        part = file.partition("/")[0]
        parts[part] = parts.get(part, 0) + size
    for part in ("transformer", "text_encoder_2" if "flux" in name else "text_encoder_3"):
        parts[part] *= {"none": 1, "int8": 0.5, "nf4": 0.28}[quantize]
    texts = [size for part, size in parts.items() if "encoder" in part]
    adapter = preset.weights[1]
    total = int(sum(parts.values()) + adapter)
    unet = int(parts["transformer"] + adapter)
    return Sizes(unet, int(parts["vae"]), int(max(texts)), total, preset.resolution**2)


def test_the_guide_has_the_plans_of_large_presets() -> None:
    words = {"none": "all on the device", "model": "models offloaded"}
    guide = (Path(__file__).parents[3] / "docs" / "bases.md").read_text("utf-8")
    for gib in (48, 24, 16, 12):
        row = f"| {gib} GiB |"
        for name in ("flux-dev", "sd35-large"):
            for kind in ("none", "int8", "nf4"):
                sizes, device = _published(name, kind), Device("cuda", gib * GIB, bfloat16=True)
                plan = plan_memory(device, sizes, MemoryOptions("bfloat16", quantize=kind))
                assert bytes_needed(sizes, plan.offload, plan.tiling) <= gib * GIB
                tiles = ", VAE in tiles" if plan.tiling else ""
                row += f" {words.get(plan.offload, 'layers offloaded')}{tiles} |"
        assert row in guide


@pytest.mark.parametrize("kind", ["cpu", "mps"])
def test_there_is_nothing_to_offload_from_without_cuda(kind: str) -> None:
    with pytest.raises(ArgumentError, match=f"offload: needs a CUDA device; found {kind}"):
        plan_memory(Device(kind, 8 * GIB), SD15, MemoryOptions(offload="model"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "half"}, r"dtype: is unknown; expected auto \| float32 .*; found half"),
        ({"offload": "disk"}, r"offload: is unknown; expected auto \| none .*; found disk"),
        ({"quantize": "fp8"}, r"quantize: is unknown; expected none \| int8 \| nf4; found fp8"),
    ],
)
def test_unknown_words_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        MemoryOptions(**options)


def test_a_plan_is_said_in_one_line() -> None:
    plan = Plan("cuda", "float16", "model", True, 8 * GIB)
    assert plan.line() == "cuda (8.0 GiB), float16, models offloaded, VAE in tiles"


def test_the_best_device_is_taken_with_the_memory_that_is_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * GIB, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 5 * GIB)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": 2**20, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert this_device() == Device("cuda", 3 * GIB, bfloat16=True), "what is free of it"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert this_device() == Device("mps", 5 * GIB)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert this_device() == Device("cpu", 4 * GIB)
    monkeypatch.delattr("os.sysconf")
    assert this_device() == Device("cpu", 8 * GIB), "where the system does not say"


def test_sizes_are_those_of_the_weights() -> None:
    pipe = models.pipeline("sdxl")
    sizes = sizes_of(pipe, adapter=10)
    assert sizes.unet == 10 + 4 * sum(p.numel() for p in pipe.unet.parameters())
    assert sizes.pixels == 64 * 64
    assert sizes.total > sizes.unet + sizes.vae + sizes.largest_other


@pytest.mark.parametrize("offload", ["none", "model", "sequential"])
def test_an_arranged_pipeline_draws_the_same(offload: str) -> None:
    """The execution device is the CPU here; hooks and their order are those of an accelerator."""
    pictures = [_drawn(Plan("cpu", "float32", way, False, 0)) for way in ("none", offload)]
    np.testing.assert_array_equal(*pictures)


def _drawn(plan: Plan) -> np.ndarray:
    pipe = models.pipeline("sd1", fresh=True)
    arrange(pipe, plan)
    arrange(pipe, plan)  # as a second pipeline on the same parts does
    with attach(pipe, models.adapter("plus", pipe.unet)) as attachment:
        attachment.set_reference(models.picture(0))
        images = [
            pipe(
                "a cat",
                num_inference_steps=2,
                generator=torch.Generator().manual_seed(0),
                output_type="np",
            ).images
            for _ in range(2)
        ]
    np.testing.assert_array_equal(*images)
    return images[0]


def test_tiles_are_smaller_than_the_images_of_large_bases() -> None:
    """SDXL's own tiles are as large as its images, so that diffusers' switch alone does nothing."""
    vae = models.vae()
    vae.tile_sample_min_size, vae.tile_latent_min_size = 1024, 256
    arrange(
        SimpleNamespace(vae=vae, to=lambda device: None), Plan("cpu", "float32", "none", True, 0)
    )
    assert vae.use_tiling
    assert vae.use_slicing
    assert (vae.tile_sample_min_size, vae.tile_latent_min_size) == (512, 128)


@pytest.mark.parametrize(
    ("dtype", "inside"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_a_vae_that_overflows_in_float16_is_called_in_float32(
    dtype: torch.dtype, inside: torch.dtype
) -> None:
    vae = models.vae().to(dtype)
    vae.register_to_config(force_upcast=True)
    with full_range(vae):
        assert vae.dtype == inside
    assert vae.dtype == dtype


@pytest.mark.parametrize(
    ("found", "fast"),
    [
        ({}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"avx2": True}, False),
    ],
)
def test_a_cpu_computes_in_bf16_where_it_says_so(
    found: dict[str, bool], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert bf16_is_fast() == fast
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert this_device().bfloat16 == fast
    with autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if fast else torch.float32)
