"""`fit`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from ipdiverse.commands.console import agree_to_encoders, check_target, note, say, say_json
from ipdiverse.training.config import CacheConfig
from ipdiverse.training.fit import FitOptions

_FEW = 300
"""Pairs below which a space keeps notably less of a subject; `docs/guides/adapters-you-have.md`."""


@dataclass(frozen=True)
class Fit:
    """Find what is the scene's in an adapter's image tokens, so that each image can have its own.

    Nothing is trained, and only the image encoder and the adapter's projection run. The file fits
    every adapter with the same projection.

    Args:
        folder: A folder that `prepare` wrote, with subjects of several pictures or with pairs.
        out: The file to write, `.safetensors`.
        adapter: Of kind base or plus: a name, a file, a folder, or a hub id followed by the path.
        cache: The base, its image encoder, and how pictures were embedded if they are already.
        fit: How it is fitted.
        local_files_only: Never connect.
        json: Print the report as JSON.
        yes: Download what a preset needs without asking.
    """

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    out: str
    adapter: str = ""
    cache: CacheConfig = field(default_factory=CacheConfig)
    fit: FitOptions = field(default_factory=FitOptions)
    local_files_only: bool = False
    json: bool = False
    yes: bool = False

    def run(self) -> None:
        """Fit, write and report."""
        from ipdiverse.adapter.files.checkpoint import load_adapter
        from ipdiverse.adapter.imagine import save_space
        from ipdiverse.base.adapters import adapter_file, default_adapter
        from ipdiverse.data.manifest import read_manifest
        from ipdiverse.training.fit import check_kind, fit_space
        from ipdiverse.training.frozen import Preprocessing, open_encoders

        check_target(self.out)
        read_manifest(Path(self.folder))
        base, encoder = self.cache.base, self.cache.image_encoder
        named = self.adapter or default_adapter(base)
        agree_to_encoders(base, encoder, self.yes, named)
        file = adapter_file(base, named, local_files_only=self.local_files_only)
        adapter = load_adapter(file)
        check_kind(adapter)
        encoders = open_encoders(base, encoder, local_files_only=self.local_files_only, unet=False)
        shown = Preprocessing.of(self.cache, encoders.resolution)
        about = {"base": base, "adapter": named if file.name != named else file.name}
        space = fit_space(Path(self.folder), encoders, adapter, shown, self.fit, about)
        save_space(space, Path(self.out))
        if self.json:
            say_json(space.spec | {"file": self.out})
            return
        say(f"{as_text(space.spec)}\nwrote {self.out}")
        if space.spec["pairs"] < _FEW:
            note(f"fitted on {space.spec['pairs']} pairs; from {_FEW} on more of a subject is kept")


def as_text(spec: dict) -> str:
    """What a space is, in lines."""
    held_out, directions = spec["held_out"], spec["directions"]
    return (
        f"fitted on {spec['pictures']} pictures of {spec['subjects']} subjects with several, "
        f"{spec['pairs']} pairs\n"
        f"{directions['identity']} directions are the subject's and {directions['scene']} the "
        f"scene's; they explain {100 * spec['explained']:.1f} % of the image tokens\n"
        f"on held-out pairs, {100 * held_out['identity_kept']:.0f} % of what tells subjects apart is "
        f"kept and {100 * held_out['scene_replaced']:.0f} % of what differs within one replaced\n"
        f"{spec['bank']} scenes, found by "
        + ("what they show" if spec["keys"] == "image" else "their captions")
    )
