"""The main job: a reference image and a text prompt in, a set of images and their record out."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipdiverse.bases import Base, adapter_source, load_base, load_part, quiet, split_hub_id
from ipdiverse.errors import ArgumentError
from ipdiverse.image_io import content_hash, load_image
from ipdiverse.sampling.request import Request
from ipdiverse.sampling.tasks import Task, task_for

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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
    """

    request: Request
    references: list[Image.Image]
    images: list[Image.Image]
    notes: list[str]

    def record(self, out: str = "out") -> dict[str, Any]:
        """Everything needed to repeat this exactly, ready for JSON."""
        return {
            "tool": "ipdiverse",
            "prompt": " | ".join(self.request.prompt),
            "command": self.request.command(out),
            "request": asdict(self.request),
            "reference_sha256": [content_hash(image) for image in self.references],
            "image_sha256": [content_hash(image) for image in self.images],
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
            return [f"seed {seed}, image {i}" for i in range(n)]
        return [f"{prompt}, seed {seed}, image {i}" for prompt in prompts for i in range(n)]


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
            for index in range(request.n)
        ]
        images = sample(task.base, jobs, request, attachment, task=task, negative=negative)
    return Generation(request, references, images, notes)


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


@dataclass(frozen=True)
class Job:
    """One image to make.

    Args:
        prompt: Its text.
        seed: The set's seed.
        index: Its number in the set.
        reference: Its image prompt; None for text alone.
    """

    prompt: str
    seed: int
    index: int
    reference: Image.Image | Reference | None = None


def sample(
    base: Base,
    jobs: Sequence[Job],
    request: Request,
    attachment: Attachment | None = None,
    progress: bool | None = None,
    task: Task | None = None,
    negative: Image.Image | None = None,
) -> list[Image.Image]:
    """Denoise jobs batch by batch; each image depends on its own job alone.

    Args:
        base: An open base.
        jobs: What to make, in order.
        request: Steps, guidance and negative prompt.
        attachment: The attached adapter; None for text alone.
        progress: Show a bar on standard error; None does so on terminals only.
        task: What the pipeline is given besides prompts; None is text-to-image.
        negative: The negative reference of every job.
    """
    from tqdm import tqdm

    show = sys.stderr.isatty() if progress is None else progress
    images: list[Image.Image] = []
    task = task or Task(base)
    with tqdm(total=len(jobs) * request.steps, disable=not show, unit="step") as bar:
        for chunk in _chunks(jobs, base.batch):
            padded = chunk + [chunk[-1]] * (base.batch - len(chunk))
            if attachment is not None:
                references: list[Any] = [job.reference for job in padded]
                attachment.set_reference(references, negative=negative)
            images += _denoise(task, padded, request, bar, len(chunk))[: len(chunk)]
    return images


def _chunks(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
    for start in range(0, len(jobs), size):
        yield list(jobs[start : start + size])


def _denoise(
    task: Task, jobs: list[Job], request: Request, bar: Any, wanted: int
) -> list[Image.Image]:
    """One batch of the base's fixed size; what pads it is thrown away by the caller."""
    from ipdiverse.seeding import generator

    def on_step(*arguments: Any) -> dict[str, Any]:
        bar.update(wanted)
        return arguments[-1]

    pipe: Any = task.base.pipe
    output = pipe(
        prompt=[job.prompt for job in jobs],
        negative_prompt=[request.negative_prompt] * len(jobs),
        generator=[generator(job.seed, job.index) for job in jobs],
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        callback_on_step_end=on_step,
        **task.arguments(len(jobs)),
    )
    return output.images


class attached:  # noqa: N801 - reads as a verb: `with attached(base, file) as attachment`
    """An adapter on a base's pipeline for the length of a `with` block.

    Args:
        base: An open base.
        weights: The adapter's file, folder or hub id.
        image_encoder: Folder or hub id of the image encoder; empty takes the base's.
    """

    def __init__(self, base: Base, weights: Path | str, image_encoder: str = "") -> None:
        self._base, self._weights, self._encoder = base, weights, image_encoder

    def __enter__(self) -> Attachment:
        """Attach."""
        from ipdiverse.adapter.attach import attach
        from ipdiverse.adapter.checkpoint import load_adapter

        if isinstance(self._weights, Path):
            adapter = load_adapter(self._weights)
        else:
            repository, file = split_hub_id(self._weights)
            adapter = load_adapter(repository, weight_name=file)
        if not self._encoder:
            return attach(self._base.pipe, adapter)
        return attach(
            self._base.pipe,
            adapter,
            image_encoder=load_part("CLIPVisionModelWithProjection", self._encoder, self._base),
            image_processor=load_part("CLIPImageProcessor", self._encoder, self._base),
        )

    def __exit__(self, *_: object) -> None:
        """Detach."""
        from ipdiverse.adapter.attach import detach

        detach(self._base.pipe)


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
