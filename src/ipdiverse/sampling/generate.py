"""The main job: a reference image and a text prompt in, a set of images and their record out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipdiverse.bases import Base, adapter_source, load_base, quiet
from ipdiverse.errors import ArgumentError
from ipdiverse.image_io import content_hash, load_image
from ipdiverse.sampling.request import Request
from ipdiverse.sampling.sample import Job, attached, preview, sample
from ipdiverse.sampling.tasks import Task, task_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from ipdiverse.adapter.attach import Attachment
    from ipdiverse.adapter.reference import Reference


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

    def save(self, out: Path | str) -> dict[str, Any]:
        """Write images, contact sheet and JSON into a folder, each file whole or not at all.

        Returns:
            The record, with the written files' names.

        Raises:
            OutputError: The folder cannot be written.
        """
        import json

        from ipdiverse.contact_sheet import contact_sheet
        from ipdiverse.provenance import ensure_writable_folder, save_png, write_text_atomic

        folder = Path(out)
        ensure_writable_folder(folder)
        record = self.record(str(out))
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


def generate(
    image: str | Path | Sequence[str | Path],
    prompt: str | Sequence[str] = "",
    *,
    loaded: Base | None = None,
    **options: Any,
) -> Generation:
    """Generate images from a reference and a prompt.

    Args:
        image: The reference image's file; several are one reference together.
        prompt: What to show; several get `n` images each.
        loaded: An open base, to reuse between calls and in place of `base`; None opens `base`.
        options: The other fields of `Request`.

    Raises:
        IpdiverseError: An argument, an image, the base or the adapter is unusable.
    """
    if loaded is not None:
        options["base"] = loaded.name
    files = [image] if isinstance(image, (str, Path)) else list(image)
    texts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
    request = Request(image=tuple(str(file) for file in files), prompt=texts, **options)
    if not request.image and not request.faces:
        raise ArgumentError("is missing", where="image", fix="Give a reference: --image FILE.")
    references = [load_image(Path(file)) for file in request.image]
    reference = _reference(request, references)
    negative = load_image(Path(request.negative_image)) if request.negative_image else None
    base = loaded or load_base(request.base)
    weights = adapter_source(request.base, request.adapter)
    request = _with_defaults(request, base)
    task = task_for(base, request)
    notes = [note for text in request.prompt for note in _cut_words(base, "prompt", text)]
    notes += _cut_words(base, "negative prompt", request.negative_prompt)
    with quiet(), attached(task.base, weights, request.image_encoder) as attachment:
        _set_scale(attachment, request)
        jobs = [
            Job(text, request.seed, index, reference)
            for text in request.prompt
            for index in range(request.candidates or request.n)
        ]
        jobs = _selected(jobs, request, task, attachment, negative)
        images = sample(task.base, jobs, request, attachment, task=task, negative=negative)
    return Generation(request, references, images, notes, [job.index for job in jobs])


def _selected(
    jobs: list[Job],
    request: Request,
    task: Task,
    attachment: Attachment,
    negative: Image.Image | None,
) -> list[Job]:
    """Of each prompt's candidates the best group; all of them where there are no more."""
    if request.candidates in (None, request.n):
        return jobs
    from ipdiverse.sampling.selection import EARLY, judged, select

    guesses = preview(task.base, jobs, request, attachment, EARLY, task, negative)
    chosen: list[Job] = []
    for start in range(0, len(jobs), request.candidates or 1):
        part = jobs[start : start + (request.candidates or 1)]
        seen = guesses[start : start + len(part)]
        texts = [job.prompt for job in part]
        worth, apart = judged(task.base.pipe, attachment.image_encoder, seen, texts)
        chosen += [part[i] for i in select(worth, apart, request.n)]
    return chosen


def _reference(request: Request, images: list[Image.Image]) -> Reference:
    from ipdiverse.adapter.face_embeddings import load_face_embeddings
    from ipdiverse.adapter.reference import Reference

    faces = load_face_embeddings(Path(request.faces)) if request.faces else None
    masks = [load_image(Path(file)) for file in request.mask] or None
    return Reference(images, faces, request.combine, request.weights or None, masks)  # type: ignore[arg-type]


def _set_scale(attachment: Attachment, request: Request) -> None:
    attachment.set_scale(
        request.preset or request.scale,
        weight=request.scale,
        start=request.start,
        end=request.end,
    )


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


def _with_defaults(request: Request, base: Base) -> Request:
    from dataclasses import replace

    guidance = base.guidance_scale if request.guidance_scale is None else request.guidance_scale
    return replace(request, guidance_scale=guidance)


def _cut_words(base: Base, name: str, prompt: str) -> list[str]:
    """Say what the text encoder cannot read."""
    tokenizer = base.pipe.tokenizer
    limit = tokenizer.model_max_length
    with quiet():
        ids = tokenizer(prompt).input_ids
    if len(ids) <= limit:
        return []
    cut = tokenizer.decode(ids[limit - 1 : -1])
    return [f"the {name} is longer than {limit} tokens; cut: {cut!r}"]
