"""`bases`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ipdiverse.base.downloads import missing
from ipdiverse.base.presets import PRESETS, Preset, as_size, total
from ipdiverse.commands.console import say, say_json


@dataclass(frozen=True)
class Bases:
    """List the bases that have a short name: size, whether they are downloaded, licence, link.

    Args:
        json: Print everything as JSON.
    """

    json: bool = False

    def run(self) -> None:
        """Look into the local cache and print; connects to nothing."""
        presets = [_described(preset) for preset in PRESETS.values()]
        if self.json:
            say_json({"embedded": ["critters"], "presets": presets})
            return
        say("critters: in the package, nothing to download")
        for preset in presets:
            say("\n" + _as_text(preset))
        say("\nSizes are approximate. Presets share files, which are downloaded once.")


def _described(preset: Preset) -> dict[str, Any]:
    files = preset.all_files()
    lacking = missing(files)
    encoder = preset.encoder_files()
    parts = {"base": preset.base, "adapter": preset.adapter, "image_encoder": preset.encoder}
    return {
        "name": preset.name,
        "about": preset.about,
        "bytes": total(files),
        "bytes_missing": total(lacking),
        "cached": not lacking,
        "files_missing": [f"{file.repository.id}/{file.name}" for file in lacking],
        "repositories": {
            part: {n: getattr(repository, n) for n in ("id", "revision", "license", "link")}
            for part, repository in parts.items()
            if repository is not None
        },
        "adapter": preset.weights[0],
        "image_encoder": encoder[0].name.rpartition("/")[0] if encoder else None,
        "scheduler": preset.scheduler,
        "resolution": preset.resolution,
        "steps": preset.steps,
        "guidance_scale": preset.guidance_scale,
        "scale": preset.scale,
        "reads_faces": preset.faces,
    }


def _as_text(preset: dict[str, Any]) -> str:
    left = as_size(preset["bytes_missing"])
    state = "in the local cache" if preset["cached"] else f"{left} to download"
    repositories = {r["id"]: r for r in preset["repositories"].values()}.values()
    return "\n".join(
        [
            f"{preset['name']}: {preset['about']}",
            f"  {as_size(preset['bytes'])}, {state}; {preset['resolution']} px, "
            f"{preset['steps']} steps, guidance {preset['guidance_scale']:g}, "
            f"scale {preset['scale']:g}",
            *(f"  {r['link']} ({r['license']})" for r in repositories),
        ]
    )
