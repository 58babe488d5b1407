"""ipdiverse: image prompts with variety, without losing what you asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ipdiverse.adapter.attach.attach import detach
    from ipdiverse.adapter.files.checkpoint import ImagePromptAdapter, load_adapter, save_adapter
    from ipdiverse.adapter.imagine import VariationSpace, load_space, save_space
    from ipdiverse.adapter.reference import Reference
    from ipdiverse.base.bases import load_base
    from ipdiverse.dial import Levers
    from ipdiverse.errors import IpdiverseError
    from ipdiverse.levers import Lever, StepContext, register_lever
    from ipdiverse.sampling.denoiser import release, steer
    from ipdiverse.sampling.diversify import attach, diversify, scale_references
    from ipdiverse.sampling.draw import Generation, generate
    from ipdiverse.sampling.request import Request
    from ipdiverse.training.fit import fit_space

_HOMES = {
    "adapter.attach.attach": ("detach",),
    "adapter.files.checkpoint": ("ImagePromptAdapter", "load_adapter", "save_adapter"),
    "adapter.imagine": ("VariationSpace", "load_space", "save_space"),
    "adapter.reference": ("Reference",),
    "base.bases": ("load_base",),
    "dial": ("Levers",),
    "errors": ("IpdiverseError",),
    "levers": ("Lever", "StepContext", "register_lever"),
    "sampling.denoiser": ("release", "steer"),
    "sampling.diversify": ("attach", "diversify", "scale_references"),
    "sampling.draw": ("Generation", "generate"),
    "sampling.request": ("Request",),
    "training.fit": ("fit_space",),
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
    "VariationSpace",
    "attach",
    "detach",
    "diversify",
    "fit_space",
    "generate",
    "load_adapter",
    "load_base",
    "load_space",
    "register_lever",
    "release",
    "save_adapter",
    "save_space",
    "scale_references",
    "steer",
]


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that `import ipdiverse` is instant."""
    from importlib import import_module

    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'ipdiverse' has no attribute {name!r}")
    return getattr(import_module(f"ipdiverse.{home}"), name)
