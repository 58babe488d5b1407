"""From a request to its images and their record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipdiverse.base.adapters import adapter_file, default_adapter
from ipdiverse.base.bases import Base
from ipdiverse.errors import ArgumentError
from ipdiverse.image_io import content_hash
from ipdiverse.loading import quiet
from ipdiverse.sampling.request import Request
from ipdiverse.sampling.sample import Job, attached, sampled, set_scale
from ipdiverse.sampling.task import Pictures, Task, decoded, open_base, settled, task_for

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from PIL import Image
    from torch import Tensor

    from ipdiverse.adapter.attach.attach import Attachment
    from ipdiverse.adapter.reference import Reference

_HOW_OPENED = ("revision", "safety_checker", "dtype", "offload", "tiling")
"""Fields that say how a base is opened."""
_LARGE_SHEET = 200
"""Above this many images a contact sheet has smaller cells."""


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
        options: The other fields of `Request`, and levers by name; with `loaded` none that say how
            a base is opened.

    Raises:
        IpdiverseError: An argument, an image, the base or the adapter is unusable.
    """
    if loaded is not None:
        _check_open(loaded, options)
        options["base"] = loaded.name
    if isinstance(image, str) or not isinstance(image, Sequence):
        image = [image]
    texts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
    images = tuple(_file(one) for one in image)
    request = Request.of({"image": images, "prompt": texts, **options}, "generate")
    return drawn(request, loaded)


def drawn(
    request: Request,
    loaded: Base | None = None,
    before_opening: Callable[[Request], None] = lambda _: None,
) -> Generation:
    """Draw all images of a request (arguments as `drawing`)."""
    with drawing(request, loaded, before_opening) as work:
        return work.finished([image for _, image in work.images()])


@dataclass(frozen=True)
class Drawing:
    """A request whose base, adapter and pictures are open.

    Args:
        request: Defaults filled in.
        references: The decoded reference images.
        notes: What the user should know, such as words that were cut from the prompt.
        jobs: Every image, prompt by prompt.
        task: The pipeline.
        attachment: The adapter on it.
        negative: The negative reference.
    """

    request: Request
    references: list[Image.Image]
    notes: list[str]
    jobs: list[Job]
    task: Task
    attachment: Attachment
    negative: Image.Image | None

    def images(
        self,
        skip: Collection[int] = (),
        progress: bool | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[int, Image.Image]]:
        """Number and image of each job, as soon as it is finished.

        Args:
            skip: Numbers of jobs that are not wanted.
            progress: Show a bar on standard error; None does so on terminals only.
            on_step: Called after each denoising step with the number of images it was for; what
                it raises stops the drawing there.
        """
        numbers = [number for number in range(len(self.jobs)) if number not in skip]
        images = sampled(
            self.task.base,
            [self.jobs[number] for number in numbers],
            self.request,
            self.attachment,
            progress,
            self.task,
            self.negative,
            on_step,
        )
        for number, (_, image) in zip(numbers, images, strict=True):
            yield number, image

    def finished(self, images: list[Image.Image]) -> Generation:
        """All of its images with what was asked."""
        indices = [job.index for job in self.jobs]
        return Generation(self.request, self.references, images, self.notes, indices)


@contextmanager
def drawing(
    request: Request,
    loaded: Base | None = None,
    before_opening: Callable[[Request], None] = lambda _: None,
) -> Iterator[Drawing]:
    """Open what a request needs; the adapter comes off at the end of the `with` block.

    Args:
        request: What is asked.
        loaded: An open base, in place of the request's; None opens that.
        before_opening: Called once the request is checked and its pictures are decoded, before a
            base is downloaded or opened; what it raises ends the drawing.

    Raises:
        IpdiverseError: An image, the base or the adapter is unusable.
    """
    request.check(opened=loaded is not None)
    pictures = decoded(request)
    reference = _reference(request, pictures)
    before_opening(request)
    request = replace(request, adapter=request.adapter or default_adapter(request.base))
    base = loaded or open_base(request)
    weights = adapter_file(request.base, request.adapter)
    request = settled(request, base)
    notes = [note for text in request.prompt for note in _cut_words(base, "prompt", text)]
    notes += _cut_words(base, "negative prompt", request.negative_prompt)
    notes += [f"memory: {base.plan.line()}"] if base.plan else []
    task = task_for(base, request, pictures)
    notes += task.notes
    task = replace(task, notes=notes)
    negative = pictures.images[request.negative_image] if request.negative_image else None
    with quiet(), attached(task.base, weights, request.image_encoder) as attachment:
        reference = _with_faces(reference, request, attachment.adapters[0].reads)
        set_scale(attachment, base, request)
        jobs = [
            Job(text, request.seed, index, reference)
            for text in request.prompt
            for index in range(request.candidates or request.n)
        ]
        if request.candidates not in (None, request.n):
            from ipdiverse.sampling.selection import chosen

            jobs = chosen(jobs, request, task, attachment, negative)
        images = [pictures.images[file] for file in request.image]
        yield Drawing(request, images, notes, jobs, task, attachment, negative)


def _reference(request: Request, pictures: Pictures) -> Reference:
    from ipdiverse.adapter.attach.face_embeddings import load_face_embeddings
    from ipdiverse.adapter.reference import Reference

    faces = load_face_embeddings(Path(request.faces)) if request.faces else None
    images = [pictures.images[file] for file in request.image]
    if faces is None and request.reads_faces:  # before a large base is opened
        faces = _faces_in(images)
    masks = [pictures.masks[file] for file in request.mask] or None
    return Reference(images, faces, request.combine, request.weights or None, masks)  # type: ignore[arg-type]


def _with_faces(reference: Reference, request: Request, reads: tuple[str, ...]) -> Reference:
    """The reference with what an opened adapter reads of faces."""
    if "face" not in reads:
        if request.faces:
            raise request.faces_unread()
        return reference
    if reference.faces is not None:
        return reference
    return replace(reference, faces=_faces_in(reference.images))


def _faces_in(images: Sequence[Image.Image]) -> Tensor:
    import torch

    from ipdiverse.adapter.attach.face_embeddings import detect_face

    return torch.cat([detect_face(image) for image in images])


def _cut_words(base: Any, name: str, prompt: str) -> list[str]:
    """Say what the text encoder cannot read."""
    tokenizer = base.pipe.tokenizer
    limit = tokenizer.model_max_length
    with quiet():
        ids = tokenizer(prompt).input_ids
    if len(ids) <= limit:
        return []
    cut = tokenizer.decode(ids[limit - 1 : -1])
    return [f"the {name} is longer than {limit} tokens; cut: {cut!r}"]


def _file(image: object) -> str:
    if isinstance(image, (str, Path)):
        return str(image)
    raise ArgumentError(
        "is not a file's path",
        where="image",
        expected="a str or Path, which the record repeats",
        found=type(image).__name__,
        fix="Save it first, or give it to `attach(pipe, adapter).set_reference`.",
    )


def _check_open(loaded: Base, options: Mapping[str, Any]) -> None:
    """Refuse options that have no effect on a base that is open already.

    Raises:
        ArgumentError: One is given.
    """
    idle = {name: getattr(Request, name) for name in _HOW_OPENED} | {"base": loaded.name}
    for name, value in idle.items():
        if options.get(name, value) != value:
            raise ArgumentError(
                "does not go with loaded, which is open already",
                where=name,
                found=options[name],
                fix="Give it to load_base, or leave loaded out.",
            )


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
            "request": self.request.flat(),
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
