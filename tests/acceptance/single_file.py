"""Writes a pipeline as one file in the layout of the original Stable Diffusion repository."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def write_single_file(pipe: Any, file: Path) -> None:
    """Stable Diffusion 1.x: UNet, VAE and text encoder, renamed to the original's keys."""
    state = {f"model.diffusion_model.{k}": t for k, t in _unet(pipe.unet).items()}
    state |= {f"first_stage_model.{k}": t for k, t in _vae(pipe.vae).items()}
    for key, tensor in pipe.text_encoder.state_dict().items():
        name = "text_model." + key.removeprefix("text_model.")
        state[f"cond_stage_model.transformer.{name}"] = tensor
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, file)


def _unet(unet: Any) -> dict[str, Tensor]:
    depth, levels = unet.config.layers_per_block + 1, len(unet.config.block_out_channels)
    return {
        _renamed(_unet_key(key, depth, levels), _RESNET if ".resnets." in key else {}): tensor
        for key, tensor in unet.state_dict().items()
    }


def _unet_key(key: str, depth: int, levels: int) -> str:
    """Blocks are counted through: every resnet and every resizing is a block of its own."""
    for name, theirs in _UNET.items():
        if key.startswith(f"{name}."):
            return key.replace(name, theirs, 1)
    parts = key.split(".")
    if parts[0] == "mid_block":
        place = 1 if parts[1] == "attentions" else 2 * int(parts[2])
        return ".".join(["middle_block", str(place), *parts[3:]])
    block, kind, index, *rest = int(parts[1]), parts[2], int(parts[3]), *parts[4:]
    if parts[0] == "down_blocks":
        if kind == "downsamplers":
            return ".".join([f"input_blocks.{block * depth + depth}.0.op", *rest[1:]])
        return ".".join([f"input_blocks.{1 + block * depth + index}", _place(kind), *rest])
    if kind == "upsamplers":
        place = "1" if block == 0 else "2"  # after the attention, where there is one
        return ".".join([f"output_blocks.{block * depth + depth - 1}.{place}", *rest])
    return ".".join([f"output_blocks.{block * depth + index}", _place(kind), *rest])


def _place(kind: str) -> str:
    return "0" if kind == "resnets" else "1"


def _vae(vae: Any) -> dict[str, Tensor]:
    levels = len(vae.config.block_out_channels)
    state = {}
    for key, tensor in vae.state_dict().items():
        name = _renamed(key, {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut"})
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
        for index in (0, 1):
            name = name.replace(f"mid_block.resnets.{index}", f"mid.block_{index + 1}")
        for index in range(levels):
            name = name.replace(f"down_blocks.{index}.", f"down.{index}.")
            name = name.replace(f"up_blocks.{index}.", f"up.{levels - 1 - index}.")
        name = name.replace("resnets.", "block.")
        name = name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
        attention = "attn_1" in name
        matrix = attention and tensor.ndim == 2
        state[_renamed(name, _VAE_ATTENTION if attention else {})] = (
            tensor[:, :, None, None] if matrix else tensor
        )
    return state


def _renamed(key: str, names: dict[str, str]) -> str:
    for mine, theirs in names.items():
        key = key.replace(f".{mine}.", f".{theirs}.")
    return key


_SD3 = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
_SD3_BLOCK = {
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}


def write_sd3_transformer(transformer: Any, file: Path) -> None:
    """Stable Diffusion 3's transformer alone, renamed to the original's keys."""
    weights, state = transformer.state_dict(), {}
    last = f"transformer_blocks.{transformer.config.num_layers - 1}.norm1_context."
    for key, given in weights.items():
        name, _, kind = key.rpartition(".")
        swapped = name.startswith("norm_out.") or key.startswith(last)  # scale and shift
        tensor = torch.cat(given.chunk(2)[::-1]) if swapped else given
        if not name.startswith("transformer_blocks."):
            state[_SD3[key] if key in _SD3 else f"{_SD3[name]}.{kind}"] = tensor
        elif (inner := name.split(".", 2)[2]) in _SD3_BLOCK:
            state[f"joint_blocks.{name.split('.')[1]}.{_SD3_BLOCK[inner]}.{kind}"] = tensor
    for number in range(transformer.config.num_layers):
        for block, names in (("x", "to_{}"), ("context", "add_{}_proj")):
            for kind in ("weight", "bias"):
                home = f"transformer_blocks.{number}.attn.{names}.{kind}"
                parts = [weights[home.format(part)] for part in "qkv"]
                state[f"joint_blocks.{number}.{block}_block.attn.qkv.{kind}"] = torch.cat(parts)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, file)
