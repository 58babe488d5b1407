"""Adapters in the layouts of others, made as their own code makes them."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import torch
from accelerate.utils import other as accelerate_saving
from torch import Tensor, nn

from ipdiverse import ImagePromptAdapter
from ipdiverse.adapter import model
from tests import models

KINDS = ("base", "plus", "full-face", "faceid", "faceid-plus", "faceid-plus-v2")


_unet = functools.cache(models.unet)


def adapter(
    kind: str = "base", architecture: str = "sd1", **options: Any
) -> model.ImagePromptAdapter:
    return models.adapter(kind, _unet(architecture), **options)


def public(made: model.ImagePromptAdapter) -> ImagePromptAdapter:
    """The same, without low-rank changes, as the class that users have."""
    same = ImagePromptAdapter(made.image_proj, made.widths(), made.fusion)
    same.load_state_dict(made.state_dict())
    return same


def tensors_of(made: model.ImagePromptAdapter) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in made.state_dict().items()}


def nested(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """As published `.bin` files are."""
    result: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        top, _, rest = name.partition(".")
        result.setdefault(top, {})[rest] = tensor
    return result


class Trained(nn.Module):
    """What the original trainer hands to accelerate, the whole UNet included."""

    def __init__(self, unet: Any, made: model.ImagePromptAdapter) -> None:
        super().__init__()
        layers = made.layers()
        processors = {
            name: layers[number] if number in layers else nn.Module()
            for number, name in enumerate(unet.attn_processors)
        }
        unet.set_attn_processor(processors)
        self.unet = unet
        self.image_proj_model = made.image_proj
        self.adapter_modules = nn.ModuleList(unet.attn_processors.values())


def trained_state(made: model.ImagePromptAdapter, architecture: str = "sd1", **changes: Any) -> Any:
    """Names and tensors of that, shared tensors under both names."""
    return dict(Trained(models.unet(architecture, **changes), made).state_dict())


def without_shared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As newer accelerate saves it: of tensors with two names only the first is kept."""
    kept = dict(state)
    with mock.patch.object(accelerate_saving.logger, "warning"):  # it wants a running Accelerator
        accelerate_saving.clean_state_dict_for_safetensors(kept)
    return kept


def blend_layers(width: int) -> dict[str, Tensor]:
    """The first fusion project's layers."""
    torch.manual_seed(7)
    layers = {name: nn.Linear(width, width) for name in ("query", "key", "value")}
    return {
        f"{name}.{part}": tensor.detach()
        for name, layer in layers.items()
        for part, tensor in layer.state_dict().items()
    }


def flux_tensors() -> dict[str, Tensor]:
    layers = {
        f"double_blocks.{n}.processor.ip_adapter_double_stream_{p}_proj.{part}": torch.zeros(*shape)
        for n in range(3)
        for p in "kv"
        for part, shape in (("weight", (8, 16)), ("bias", (8,)))
    }
    return layers | {
        "ip_adapter_proj_model.proj.weight": torch.zeros(4 * 16, 12),
        "ip_adapter_proj_model.proj.bias": torch.zeros(4 * 16),
        "ip_adapter_proj_model.norm.weight": torch.zeros(16),
        "ip_adapter_proj_model.norm.bias": torch.zeros(16),
    }


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Same names, types and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
