"""ipdiverse: image prompts with variety, without losing what you asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ipdiverse.adapter.attach.attach import detach
    from ipdiverse.adapter.files.checkpoint import (
        ImagePromptAdapter,
        load_adapter,
        save_adapter,
    )
    from ipdiverse.adapter.reference import Reference
    from ipdiverse.base.bases import load_base
    from ipdiverse.dial import Levers
    from ipdiverse.errors import IpdiverseError
    from ipdiverse.levers import Lever, StepContext, register_lever
    from ipdiverse.sampling.denoiser import release, steer
    from ipdiverse.sampling.diversify import attach, diversify
    from ipdiverse.sampling.draw import Generation, generate
    from ipdiverse.sampling.request import Request

_HOMES = {
    "Generation": "sampling.draw",
    "ImagePromptAdapter": "adapter.files.checkpoint",
    "IpdiverseError": "errors",
    "Lever": "levers",
    "Levers": "dial",
    "Reference": "adapter.reference",
    "Request": "sampling.request",
    "StepContext": "levers",
    "attach": "sampling.diversify",
    "detach": "adapter.attach.attach",
    "diversify": "sampling.diversify",
    "generate": "sampling.draw",
    "load_adapter": "adapter.files.checkpoint",
    "load_base": "base.bases",
    "register_lever": "levers",
    "release": "sampling.denoiser",
    "save_adapter": "adapter.files.checkpoint",
    "steer": "sampling.denoiser",
}

__all__ = [
    "Generation",
    "ImagePromptAdapter",
    "IpdiverseError",
    "Lever",
    "Levers",
    "Reference",
    "Request",
    "StepContext",
    "attach",
    "detach",
    "diversify",
    "generate",
    "load_adapter",
    "load_base",
    "register_lever",
    "release",
    "save_adapter",
    "steer",
]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that `import ipdiverse` is instant."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ipdiverse' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"ipdiverse.{_HOMES[name]}"), name)
