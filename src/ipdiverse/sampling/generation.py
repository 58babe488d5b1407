"""The images of one request with their record, and how they are written."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipdiverse.image_io import content_hash
from ipdiverse.sampling.request import Request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

_LARGE_SHEET = 200
"""Above so many images a contact sheet has smaller cells."""


@dataclass(frozen=True)
class Generation:
    """The images of one request.

    Args:
        request: What was asked, defaults filled in.
        references: The decoded reference images.
        images: Prompt by prompt; image i of a prompt belongs to (seed, i).
        notes: What the user should know, such as words that were cut from the prompt.
        indices: Each image's number among those begun, which with the seed decides it.
    """

    request: Request
    references: list[Image.Image]
    images: list[Image.Image]
    notes: list[str]
    indices: list[int]

    def record(self, out: str = "out") -> dict[str, Any]:
        """Everything needed to repeat this exactly, ready for JSON."""
        return {
            "tool": "ipdiverse",
            "prompt": " | ".join(self.request.prompt),
            "command": self.request.command(out),
            "request": asdict(self.request),
            "reference_sha256": [content_hash(image) for image in self.references],
            "image_sha256": [content_hash(image) for image in self.images],
            "image_indices": self.indices,
            "versions": versions(),
            "notes": self.notes,
        }

    def save(self, out: Path | str, named: str | None = None) -> dict[str, Any]:
        """Write images, contact sheet and JSON into a folder, each file whole or not at all.

        Args:
            out: The folder.
            named: What the recorded command calls it; None is as it is.

        Returns:
            The record, with the written files' names.

        Raises:
            OutputError: The folder cannot be written.
        """
        import json

        from ipdiverse.contact_sheet import contact_sheet
        from ipdiverse.provenance import save_png
        from ipdiverse.writing import ensure_writable_folder, write_text_atomic

        folder = Path(out)
        ensure_writable_folder(folder)
        record = self.record(str(out) if named is None else named)
        names = [f"{index:04d}.png" for index in range(len(self.images))]
        sheet = contact_sheet(
            side_by_side(self.references),
            self.images,
            self._captions(),
            title=" | ".join(self.request.prompt),
            cell=192 if len(self.images) <= _LARGE_SHEET else 96,
        )
        _clear(folder, set(names))
        for index, (image, name) in enumerate(zip(self.images, names, strict=True)):
            save_png(image, folder / name, {**record, "image_index": index})
        save_png(sheet, folder / "contact_sheet.png", record)
        record = {**record, "files": [*names, "contact_sheet.png", "generation.json"]}
        write_text_atomic(folder / "generation.json", json.dumps(record, indent=2) + "\n")
        return record

    def _captions(self) -> list[str]:
        n, seed, prompts = self.request.n, self.request.seed, self.request.prompt
        if len(prompts) == 1:
            return [f"seed {seed}, image {i}" for i in self.indices]
        each = [prompt for prompt in prompts for _ in range(n)]
        numbered = zip(each, self.indices, strict=True)
        return [f"{prompt}, seed {seed}, image {i}" for prompt, i in numbered]


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Several pictures as one, all as high as the first; one stays as it is."""
    from PIL import Image

    if len(images) == 1:
        return images[0]
    if not images:  # a face given as an embedding
        return Image.new("RGB", (64, 64), (224, 224, 224))
    height = images[0].height
    scaled = [im.resize((max(1, im.width * height // im.height), height)) for im in images]
    whole = Image.new("RGB", (sum(im.width for im in scaled), height))
    left = 0
    for image in scaled:
        whole.paste(image, (left, 0))
        left += image.width
    return whole


def versions() -> dict[str, str]:
    """Versions of this package and of what decides its pixels."""
    from importlib.metadata import version

    return {name: version(name) for name in ("ipdiverse", "torch", "diffusers", "transformers")}


def _clear(folder: Path, kept: set[str]) -> None:
    """Remove an earlier call's record first, and its images that this one does not replace.

    Interrupted, the folder then holds images without a record, never a record of other images.
    """
    (folder / "generation.json").unlink(missing_ok=True)
    for file in folder.glob("[0-9][0-9][0-9][0-9].png"):
        if file.name not in kept:
            file.unlink()
