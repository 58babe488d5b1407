"""Random models with the architectures of Flux.1 and Stable Diffusion 3.5 in small."""

from __future__ import annotations

import copy
import functools
import inspect
from pathlib import Path
from typing import Any

import torch

from ipdiverse.adapter.files.checkpoint import adapter_from_tensors
from ipdiverse.adapter.files.layouts import normalise
from ipdiverse.adapter.generative import GenerativeFusion
from ipdiverse.adapter.imagine import SceneBank, VariationSpace, projection_hash
from ipdiverse.adapter.model import ImagePromptAdapter
from ipdiverse.data.manifest import Record
from ipdiverse.training.fit import fit_directions
from tests import models
from workshop.base.tokenizer import build_tokenizer

HEADS, HEAD_DIM, TEXT_WIDTH = 2, 16, 32
WIDTH = HEADS * HEAD_DIM
DOUBLE, SINGLE, SD3_BLOCKS = 2, 2, 3
ARCHITECTURES = ("flux", "sd3")


def flux(**changes: Any) -> Any:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(21)
    build: Any = FluxTransformer2DModel
    sizes = {
        "in_channels": 16,
        "num_layers": DOUBLE,
        "num_single_layers": SINGLE,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS,
        "joint_attention_dim": TEXT_WIDTH,
        "pooled_projection_dim": 64,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    }
    return _stirred(build(**{**sizes, **changes}))


def sd3(**changes: Any) -> Any:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(22)
    build: Any = SD3Transformer2DModel
    sizes = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": SD3_BLOCKS,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": HEADS,
        "joint_attention_dim": TEXT_WIDTH,
        "caption_projection_dim": WIDTH,
        "pooled_projection_dim": 128,
        "pos_embed_max_size": 16,
        "qk_norm": "rms_norm",
    }
    return _stirred(build(**{**sizes, **changes}))


def _stirred(model: Any) -> Any:
    """Gates that are open: as they are initialised, hardly anything passes a block."""
    for name, parameter in model.named_parameters():
        if "norm" in name and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(23)
    config = T5Config(
        vocab_size=len(build_tokenizer()),
        d_model=TEXT_WIDTH,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
    )
    return T5EncoderModel(config).eval()


def vae(**changes: Any) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(2)
    build: Any = AutoencoderKL.from_config
    made = build({**models.vae().config, **changes}).eval()
    made.register_to_config(shift_factor=0.0)
    return made


@functools.cache
def _components(name: str) -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    tokenizer = build_tokenizer()
    words = len(tokenizer)
    common = {
        "transformer": flux() if name == "flux" else sd3(),
        "vae": vae(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "tokenizer_3": tokenizer,
        "feature_extractor": models.image_processor(),
        "image_encoder": models.image_encoder(),
    }
    if name == "flux":
        return common | {"text_encoder": models.text_encoder(64, words), "text_encoder_2": t5()}
    clip = functools.partial(models.text_encoder, 16, words, projects=True)
    return common | {"text_encoder": clip(), "text_encoder_2": clip(), "text_encoder_3": t5()}


def pipeline(name: str, task: str = "", *, fresh: bool = False, **others: Any) -> Any:
    """A pipeline of `flux` or `sd3`; `task` is what stands before `Pipeline` in its class."""
    import diffusers

    prefix = "Flux" if name == "flux" else "StableDiffusion3"
    build: Any = getattr(diffusers, f"{prefix}{task}Pipeline")
    takes = inspect.signature(build).parameters
    kept = {key: part for key, part in _components(name).items() if key in takes}
    kept["scheduler"] = copy.deepcopy(kept["scheduler"])
    pipe = build(**(copy.deepcopy(kept) if fresh else kept) | others)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _drawn(*shape: int, std: float = 0.3) -> torch.Tensor:
    return torch.randn(*shape) * std


def xlabs_tensors(num_tokens: int = 4, seed: int = 5) -> dict[str, torch.Tensor]:
    """An adapter in XLabs' layout."""
    torch.manual_seed(seed)
    tensors = {
        "ip_adapter_proj_model.proj.weight": _drawn(num_tokens * TEXT_WIDTH, models.CLIP_DIM),
        "ip_adapter_proj_model.proj.bias": _drawn(num_tokens * TEXT_WIDTH),
        "ip_adapter_proj_model.norm.weight": 1 + _drawn(TEXT_WIDTH),
        "ip_adapter_proj_model.norm.bias": _drawn(TEXT_WIDTH),
    }
    for number in range(DOUBLE):
        for part in "kv":
            name = f"double_blocks.{number}.processor.ip_adapter_double_stream_{part}_proj"
            tensors |= {f"{name}.weight": _drawn(WIDTH, TEXT_WIDTH), f"{name}.bias": _drawn(WIDTH)}
    return tensors


def instantx_tensors(num_tokens: int = 6, seed: int = 6) -> dict[str, torch.Tensor]:
    """An adapter for Flux in InstantX's layout."""
    torch.manual_seed(seed)
    inner, rows = 2 * models.CLIP_DIM, num_tokens * TEXT_WIDTH
    tensors = {
        "image_proj.proj.0.weight": _drawn(inner, models.CLIP_DIM),
        "image_proj.proj.0.bias": _drawn(inner),
        "image_proj.proj.2.weight": _drawn(rows, inner),
        "image_proj.proj.2.bias": _drawn(rows),
        "image_proj.norm.weight": 1 + _drawn(TEXT_WIDTH),
        "image_proj.norm.bias": _drawn(TEXT_WIDTH),
    }
    for number in range(DOUBLE + SINGLE):
        for part in "kv":
            name = f"ip_adapter.{number}.to_{part}_ip.weight"
            tensors[name] = _drawn(WIDTH, TEXT_WIDTH)
    return tensors


def sd3_tensors(layers: int = SD3_BLOCKS, seed: int = 7) -> dict[str, torch.Tensor]:
    """An adapter for SD 3.5 in InstantX's layout; two rounds, where published ones have four."""
    torch.manual_seed(seed)
    inner, frequencies = 64, 32
    sizes = {
        "latents": (1, 8, inner),
        "time_embedding.linear_1": (inner, frequencies),
        "time_embedding.linear_2": (inner, inner),
        "proj_in": (inner, models.CLIP_WIDTH),
        "proj_out": (WIDTH, inner),
        "norm_out": (WIDTH,),
    }
    for i in range(4):
        sizes |= {
            f"layers.{i}.0.norm1": (inner,),
            f"layers.{i}.0.norm2": (inner,),
            f"layers.{i}.0.to_q": (inner, inner),
            f"layers.{i}.0.to_kv": (2 * inner, inner),
            f"layers.{i}.0.to_out": (inner, inner),
            f"layers.{i}.1.0": (inner,),
            f"layers.{i}.1.1": (4 * inner, inner),
            f"layers.{i}.1.3": (inner, 4 * inner),
            f"layers.{i}.2.1": (4 * inner, inner),
        }
    plain = ("0.to_q", "0.to_kv", "0.to_out", "1.1", "1.3")  # without a bias
    tensors: dict[str, torch.Tensor] = {}
    for name, size in sizes.items():
        key = f"image_proj.{name}"
        if name == "latents":
            tensors[key] = _drawn(*size)
            continue
        tensors[f"{key}.weight"] = 1 + _drawn(*size) if len(size) == 1 else _drawn(*size, std=0.1)
        if name.split(".", 2)[-1] not in plain:
            tensors[f"{key}.bias"] = _drawn(size[0], std=0.1)
    for number in range(layers):
        key = f"ip_adapter.{number}"
        tensors |= {
            f"{key}.norm_ip.linear.weight": _drawn(2 * WIDTH, inner, std=0.1),
            f"{key}.norm_ip.linear.bias": _drawn(2 * WIDTH),
            f"{key}.to_k_ip.weight": _drawn(WIDTH, WIDTH),
            f"{key}.to_v_ip.weight": _drawn(WIDTH, WIDTH),
        }
        for norm in ("norm_q", "norm_k", "norm_ip_k"):
            tensors[f"{key}.{norm}.weight"] = 1 + _drawn(HEAD_DIM)
    return tensors


def adapter(tensors: dict[str, torch.Tensor]) -> ImagePromptAdapter:
    return adapter_from_tensors(normalise(tensors, "test").tensors, "test").eval()


def nested(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """As stock's `load_ip_adapter` takes it."""
    found: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in normalise(tensors, "test").tensors.items():
        top, _, rest = name.partition(".")
        found[top][rest] = tensor
    return found


def space(adapter: ImagePromptAdapter) -> VariationSpace:
    """A space of random embeddings, two of each subject, and scenes of random tokens."""
    torch.manual_seed(31)
    shape = (models.CLIP_DIM,) if adapter.reads == ("pooled",) else (16, models.CLIP_WIDTH)
    rows, read = torch.randn(48, *shape), adapter.reads[0]
    data: Any = {f"{i}.png": {read: row} for i, row in enumerate(rows)}
    records = [Record(n, "", str(i // 2), None, "0" * 64, 8, 8, n) for i, n in enumerate(data)]
    mean, directions, deviations, scene = fit_directions(data, records, adapter, Path("random"))
    with torch.no_grad():
        tokens = adapter.tokens(rows[:20]).flatten(1)
    scenes = (tokens - mean) @ directions / deviations
    bank = SceneBank(scenes, torch.zeros(20, 0), ("",) * 20)
    keys = torch.zeros(2, 4), torch.zeros(4, 0)
    spec = {"projection": projection_hash(adapter)}
    return VariationSpace(mean, directions, deviations, scene, bank, *keys, spec)


def flow(adapter: ImagePromptAdapter, directions: int = 5) -> GenerativeFusion:
    """A generative fusion whose weights do something; its image encoder has 16 states."""
    tokens, width = adapter.image_proj.num_tokens or 16, adapter.token_width
    fusion = GenerativeFusion(width, tokens, directions, depth=1, steps=2, text_width=TEXT_WIDTH)
    torch.manual_seed(0)
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    basis = torch.linalg.qr(torch.randn(tokens * width, directions))[0]
    scale = 2 * torch.ones(directions)
    fusion.variation.set(torch.zeros(tokens * width), basis, scale, torch.eye(directions))
    return fusion.requires_grad_(False)


def redux_tensors(seed: int = 8) -> dict[str, torch.Tensor]:
    """Flux Redux, as published."""
    torch.manual_seed(seed)
    return {
        "redux_up.weight": _drawn(3 * TEXT_WIDTH, models.CLIP_WIDTH),
        "redux_up.bias": _drawn(3 * TEXT_WIDTH),
        "redux_down.weight": _drawn(TEXT_WIDTH, 3 * TEXT_WIDTH),
        "redux_down.bias": _drawn(TEXT_WIDTH),
    }


@functools.cache
def siglip() -> Any:
    """The image encoder of InstantX' adapters and of Redux; in small it has 16 states."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(24)
    config = SiglipVisionConfig(
        hidden_size=models.CLIP_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    return SiglipVisionModel(config).eval()


def flux2_pipeline() -> Any:
    """Flux.2 klein without its text encoder: give it `prompt_embeds`."""
    import diffusers

    torch.manual_seed(31)
    build: Any = diffusers.Flux2Transformer2DModel
    transformer = build(
        in_channels=16,
        num_layers=DOUBLE,
        num_single_layers=SINGLE,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    for name, parameter in transformer.named_parameters():
        if "modulation" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    kind: Any = diffusers.AutoencoderKLFlux2
    make: Any = diffusers.Flux2KleinPipeline
    pipe = make(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=kind(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            latent_channels=4,
        ).eval(),
        text_encoder=None,
        tokenizer=None,
        transformer=transformer.eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
