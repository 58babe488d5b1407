"""A small stand-in for ComfyUI, which calls patches the way its own code does.

The UNet is one of diffusers' with its blocks in ComfyUI's order, so that both can be compared on
the same weights. Patches get what ComfyUI gives them: names of blocks, projected query, key and
value, one dict of options for all patches of a layer, rows as chunks of `cond_or_uncond` with the
unconditional first, sigmas and the sampler's own.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import types
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import pytest

FOLDER = Path(__file__).parents[1] / "integrations" / "comfyui"
COND, UNCOND = 0, 1


# --- the nodes, as ComfyUI loads them --------------------------------------------------------


def load_pack(name: str = "custom_nodes_x_ipdiverse") -> Any:
    """Import the folder under a name of ComfyUI's making."""
    place = FOLDER / "__init__.py"
    spec = importlib.util.spec_from_file_location(name, place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def install(monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    """ComfyUI's modules that nodes import when they run."""
    attention: Any = types.ModuleType("comfy.ldm.modules.attention")
    attention.optimized_attention = optimized_attention
    for name in ("comfy", "comfy.ldm", "comfy.ldm.modules"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    lora: Any = types.ModuleType("comfy.lora")
    lora.load_lora = load_lora
    monkeypatch.setitem(sys.modules, lora.__name__, lora)
    sys.modules["comfy"].lora = lora  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, attention.__name__, attention)
    folders: Any = types.ModuleType("folder_paths")
    folders.models_dir = str(models)
    folders.folder_names_and_paths = {"clip_vision": ([str(models / "clip_vision")], set())}

    def add_model_folder_path(name: str, path: str, is_default: bool = False) -> None:
        folders.folder_names_and_paths[name] = ([path], set())

    def get_filename_list(name: str) -> list[str]:
        (path,), _ = folders.folder_names_and_paths[name]
        return sorted(file.name for file in Path(path).iterdir())

    def get_full_path_or_raise(name: str, file: str) -> str:
        (path,), _ = folders.folder_names_and_paths[name]
        return str(Path(path) / file)

    for function in (add_model_folder_path, get_filename_list, get_full_path_or_raise):
        setattr(folders, function.__name__, function)
    monkeypatch.setitem(sys.modules, "folder_paths", folders)


# --- MODEL -----------------------------------------------------------------------------------


def optimized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: Any = None,
    **options: Any,
) -> Tensor:
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def load_lora(lora: dict[str, Tensor], to_load: dict[str, str]) -> dict[str, Any]:
    """Changes by the weight that they are of."""
    assert {name.partition(".lora_")[0] for name in lora} == to_load.keys()
    return {
        key: (lora[f"{name}.lora_up.weight"], lora[f"{name}.lora_down.weight"])
        for name, key in to_load.items()
    }


@contextmanager
def patched_weights(patcher: ModelPatcher) -> Iterator[None]:
    """The model with the changes of its weights."""
    weights = dict(patcher.model.diffusion_model.named_parameters())
    before = {}
    for key, (up, down) in patcher.patches.items():
        weight = weights[key.removeprefix("diffusion_model.")]
        before[key] = weight, weight.data
        weight.data = weight.data + (up @ down).view_as(weight)
    yield
    for weight, data in before.values():
        weight.data = data


class CrossAttention(nn.Module):
    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.heads = theirs.heads
        self.to_q, self.to_k, self.to_v = theirs.to_q, theirs.to_k, theirs.to_v
        self.to_out = nn.Sequential(*theirs.to_out)

    def forward(self, x: Tensor, context: Tensor | None = None, value: Tensor | None = None) -> Any:
        context = x if context is None else context
        value = context if value is None else value
        out = optimized_attention(self.to_q(x), self.to_k(context), self.to_v(value), self.heads)
        return self.to_out(out)


class BasicTransformerBlock(nn.Module):
    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = theirs.norm1, theirs.norm2, theirs.norm3
        self.attn1, self.attn2 = CrossAttention(theirs.attn1), CrossAttention(theirs.attn2)
        self.ff = theirs.ff
        self.n_heads = theirs.attn2.heads
        self.d_head = theirs.attn2.to_q.out_features // self.n_heads

    def forward(self, x: Tensor, context: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        patches = transformer_options.get("patches", {})
        replaced = transformer_options.get("patches_replace", {}).get("attn2", {})
        hidden = ("patches", "patches_replace")
        options = {k: v for k, v in transformer_options.items() if k not in hidden}
        options |= {"n_heads": self.n_heads, "dim_head": self.d_head, "attn_precision": None}
        x = self.attn1(self.norm1(x)) + x
        n, value = self.norm2(x), None
        for patch in patches.get("attn2_patch", []):
            value = context if value is None else value
            n, context, value = patch(n, context, value, options)
        block = transformer_options["block"]
        whole = (*block, transformer_options["block_index"])
        key = whole if whole in replaced else block
        if key in replaced:
            value = context if value is None else value
            q, k, v = self.attn2.to_q(n), self.attn2.to_k(context), self.attn2.to_v(value)
            n = self.attn2.to_out(replaced[key](q, k, v, options))
        else:
            n = self.attn2(n, context, value)
        x = n + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.norm, self.proj_in, self.proj_out = theirs.norm, theirs.proj_in, theirs.proj_out
        self.use_linear = isinstance(theirs.proj_in, nn.Linear)
        blocks = [BasicTransformerBlock(block) for block in theirs.transformer_blocks]
        self.transformer_blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, context: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        before, (_, _, height, width) = x, x.shape
        x = self.norm(x)
        x = x if self.use_linear else self.proj_in(x)
        x = x.movedim(1, 3).flatten(1, 2)
        x = self.proj_in(x) if self.use_linear else x
        for index, block in enumerate(self.transformer_blocks):
            transformer_options["block_index"] = index
            x = block(x, context, transformer_options)
        x = self.proj_out(x) if self.use_linear else x
        x = x.unflatten(1, (height, width)).movedim(3, 1)
        return (x if self.use_linear else self.proj_out(x)) + before


class ResBlock(nn.Module):
    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.theirs = theirs


class Downsample(nn.Module):
    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.op = theirs

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(Downsample):
    pass


class UNetModel(nn.Module):
    """ComfyUI's UNet with diffusers' weights."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.theirs = [unet]  # for its time embedding; not a submodule
        self.input_blocks = nn.ModuleList([nn.ModuleList([unet.conv_in])])
        for block in unet.down_blocks:
            self.input_blocks.extend(_layers(block))
            for sampler in block.downsamplers or []:
                self.input_blocks.append(nn.ModuleList([Downsample(sampler)]))
        first, last = (ResBlock(block) for block in unet.mid_block.resnets)
        middle = SpatialTransformer(unet.mid_block.attentions[0])
        self.middle_block = nn.ModuleList([first, middle, last])
        self.output_blocks = nn.ModuleList()
        for block in unet.up_blocks:
            layers = _layers(block)
            for sampler in block.upsamplers or []:
                layers[-1].append(Upsample(sampler))
            self.output_blocks.extend(layers)
        self.out = nn.Sequential(unet.conv_norm_out, unet.conv_act, unet.conv_out)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        y: dict[str, Tensor] | None = None,
        transformer_options: dict[str, Any] | None = None,
    ) -> Tensor:
        (unet,), options = self.theirs, dict(transformer_options or {})
        options |= {"original_shape": list(x.shape), "transformer_index": 0}
        emb = unet.time_embedding(unet.time_proj(timesteps).to(x.dtype))
        if y is not None:
            emb = emb + unet.get_aug_embed(emb, context, y)
        skips = []
        for number, block in enumerate(self.input_blocks):
            options["block"] = ("input", number)
            x = _run(block, x, emb, context, options)
            skips.append(x)
        options["block"] = ("middle", 0)
        x = _run(self.middle_block, x, emb, context, options)
        for number, block in enumerate(self.output_blocks):
            options["block"] = ("output", number)
            x = _run(block, torch.cat([x, skips.pop()], dim=1), emb, context, options)
        return self.out(x)


def _layers(block: Any) -> list[nn.ModuleList]:
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    return [
        nn.ModuleList([ResBlock(res), *([] if a is None else [SpatialTransformer(a)])])
        for res, a in zip(block.resnets, attentions, strict=True)
    ]


def _run(block: Any, x: Tensor, emb: Tensor, context: Tensor, options: dict[str, Any]) -> Tensor:
    for layer in block:
        if isinstance(layer, ResBlock):
            x = layer.theirs(x, emb)
        elif isinstance(layer, SpatialTransformer):
            x = layer(x, context, options)
            options["transformer_index"] += 1
        else:
            x = layer(x)
    return x


class ModelSampling:
    """ComfyUI's `model_sampling`: noise levels of shares of the schedule.

    ComfyUI's own counts 999 parts, so that a share is a step only within a thousandth. Here it is
    one exactly, so that diffusers' shares of steps are the same.
    """

    def __init__(self, log_sigmas: Tensor) -> None:
        self.log_sigmas = log_sigmas
        self.sigma_max, self.sigma_min = log_sigmas[-1].exp(), log_sigmas[0].exp()

    def percent_to_sigma(self, percent: float) -> float:
        if percent <= 0.0:
            return 999999999.9
        if percent >= 1.0:
            return 0.0
        at = max((1 - percent) * 1000 - 1, 0.0)
        low = int(at)
        share = at - low
        both = self.log_sigmas[low], self.log_sigmas[min(low + 1, 999)]
        return float(((1 - share) * both[0] + share * both[1]).exp().float())


class BaseModel:
    """What ComfyUI's samplers call: noisy latents and σ in, clean latents out."""

    scale_factor = 0.5

    def __init__(self, unet: Any, scheduler: Any) -> None:
        self.diffusion_model = UNetModel(unet).eval()
        self.kind = scheduler.config.prediction_type
        alphas = scheduler.alphas_cumprod.double()
        self.log_sigmas = ((1 - alphas) / alphas).sqrt().log()
        self.model_sampling = ModelSampling(self.log_sigmas)

    def process_latent_in(self, latent: Tensor) -> Tensor:
        return latent * self.scale_factor

    def apply_model(
        self, x: Tensor, t: Tensor, c_crossattn: Tensor, y: Any, transformer_options: dict[str, Any]
    ) -> Tensor:
        sigma = t[:, None, None, None]
        steps = (self.log_sigmas[None] - t.double().log()[:, None]).abs().argmin(1)
        out = self.diffusion_model(
            x / (sigma**2 + 1).sqrt(), steps, c_crossattn, y, transformer_options
        )
        if self.kind == "epsilon":
            return x - out * sigma
        return x / (sigma**2 + 1) - out * sigma / (sigma**2 + 1).sqrt()


class ModelPatcher:
    def __init__(self, model: BaseModel) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.patches: dict[str, tuple[Tensor, Tensor]] = {}

    def clone(self) -> ModelPatcher:
        made = ModelPatcher(self.model)
        made.model_options = copy.deepcopy(self.model_options)
        made.patches = dict(self.patches)
        return made

    def add_patches(self, patches: dict[str, Any]) -> None:
        self.patches |= patches

    def get_model_object(self, name: str) -> Any:
        return getattr(self.model, name)

    def set_model_attn2_patch(self, patch: Callable[..., Any]) -> None:
        patches = self.model_options["transformer_options"].setdefault("patches", {})
        patches["attn2_patch"] = [*patches.get("attn2_patch", []), patch]

    def set_model_attn2_replace(
        self, patch: Any, block_name: str, number: int, transformer_index: int | None = None
    ) -> None:
        there = self.model_options["transformer_options"].setdefault("patches_replace", {})
        key = (block_name, number)
        key = key if transformer_index is None else (*key, transformer_index)
        there.setdefault("attn2", {})[key] = patch

    def set_model_sampler_post_cfg_function(self, function: Callable[..., Any]) -> None:
        there = self.model_options.get("sampler_post_cfg_function", [])
        self.model_options["sampler_post_cfg_function"] = [*there, function]


def _copied(value: Any) -> Any:
    """As ComfyUI copies options: dicts and lists are new, what is in them is not."""
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    return [_copied(part) for part in value] if isinstance(value, list) else value


# --- sampling --------------------------------------------------------------------------------

Cond = tuple[Tensor, "dict[str, Tensor] | None"]
"""Text (1, tokens, width) and SDXL's additional inputs."""


def predict(
    patcher: ModelPatcher,
    conds: list[Cond],
    x: Tensor,
    sigma: Tensor,
    sample_sigmas: Tensor,
    together: bool = True,
) -> list[Tensor]:
    """Clean latents by each cond, in one call as with enough memory, or else one by one."""
    chunks = [list(reversed(range(len(conds))))] if together else [[i] for i in range(len(conds))]
    found: dict[int, Tensor] = {}
    for chunk in chunks:
        options = _copied(patcher.model_options["transformer_options"])
        options |= {"cond_or_uncond": chunk, "sigmas": sigma, "sample_sigmas": sample_sigmas}
        text = torch.cat([conds[i][0].expand(len(x), -1, -1) for i in chunk])
        more = [conds[i][1] for i in chunk]
        y = None
        if more[0] is not None:
            y = {
                name: torch.cat([one[name].expand(len(x), -1) for one in more if one])
                for name in more[0]
            }
        rows, sigmas = torch.cat([x] * len(chunk)), sigma.expand(len(x) * len(chunk))
        with patched_weights(patcher):
            output = patcher.model.apply_model(rows, sigmas, text, y, options)
        found |= dict(zip(chunk, output.chunk(len(chunk)), strict=True))
    return [found[i] for i in range(len(conds))]


def sample(
    patcher: ModelPatcher,
    positive: Cond,
    negative: Cond,
    cfg: float,
    noise: Tensor,
    sigmas: Tensor,
    together: bool = True,
) -> Tensor:
    """Euler's method, as KSampler calls it."""
    x = noise
    for now, then in pairwise(sigmas):
        sigma = now[None].expand(len(x))[:1]
        cond, uncond = predict(patcher, [positive, negative], x, sigma, sigmas, together)
        guess = uncond + (cond - uncond) * cfg
        for function in patcher.model_options.get("sampler_post_cfg_function", []):
            guess = function(
                {
                    "denoised": guess,
                    "cond_denoised": cond,
                    "uncond_denoised": uncond,
                    "sigma": sigma,
                    "model": patcher.model,
                    "input": x,
                }
            )
        x = x + (x - guess) / now * (then - now)
    return x


# --- CLIP_VISION and CLIP --------------------------------------------------------------------


class Output:
    """What CLIP Vision Encode gives."""

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key)


class ClipVision:
    def __init__(self, encoder: Any) -> None:
        self.encoder, self.image_size = encoder, encoder.config.image_size
        self.load_device = torch.device("cpu")

    def model(self, pixel_values: Tensor, intermediate_output: int) -> tuple[Tensor, ...]:
        out = self.encoder(pixel_values, output_hidden_states=True)
        states = out.hidden_states[intermediate_output]
        return out.last_hidden_state, states, out.image_embeds

    def encode_image(self, image: Tensor, crop: bool = True) -> Output:
        size = (self.image_size, self.image_size)
        pixels = F.interpolate(image.movedim(-1, 1), size, mode="bicubic", antialias=True)
        last, penultimate, embeds = self.model((pixels.clip(0, 1) - 0.5) / 0.27, -2)
        output = Output()
        output.__dict__ |= {
            "last_hidden_state": last,
            "penultimate_hidden_states": penultimate,
            "image_embeds": embeds,
        }
        return output


class Clip:
    """Tokens as ComfyUI has them: chunks of (id, weight)."""

    def __init__(self, tokenizer: Any, key: str = "l", width: int = 8) -> None:
        self.tokenizer, self.key, self.width = tokenizer, key, width

    def tokenize(self, text: str) -> dict[str, list[list[tuple[int, float]]]]:
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(text, padding="max_length", max_length=length, truncation=True)
        return {self.key: [[(number, 1.0) for number in ids.input_ids]]}

    def encode_from_tokens_scheduled(self, tokens: Any) -> list[list[Any]]:
        """Not of any text encoder: the nodes hand it on."""
        ids = torch.tensor([[number for number, _ in chunk] for chunk in tokens[self.key]])
        return [[ids.float()[..., None], {"pooled_output": ids[:, : self.width].float()}]]
