"""From a request to its images and their record."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipdiverse.base.adapters import adapter_file, default_adapter
from ipdiverse.base.bases import Base
from ipdiverse.errors import ArgumentError, Interrupted
from ipdiverse.image_io import content_hash
from ipdiverse.loading import quiet
from ipdiverse.sampling.request import Request
from ipdiverse.sampling.sample import Job, attached, imagine, sampled, set_scale
from ipdiverse.sampling.saving import Run, fingerprint, open_run, versions
from ipdiverse.sampling.task import Pictures, Task, decoded, open_base, settled, task_for

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

    from PIL import Image
    from torch import Tensor

    from ipdiverse.adapter.attach.attach import Attachment
    from ipdiverse.adapter.reference import Reference

_HOW_OPENED = ("revision", "safety_checker", "dtype", "offload", "tiling", "quantize")
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
    with drawing(request, loaded) as work:
        return work.finished([image for _, image in work.images()])


def draw_into(
    out: Path,
    request: Request,
    *,
    overwrite: bool = False,
    before_opening: Callable[[Request], None] = lambda _: None,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Draw what a folder lacks of a request, each image written as it is finished.

    `before_opening` may refuse by an error that a base is downloaded or opened.
    """
    pictures = checked_pictures(request)
    total, used = request.n * len(request.prompt), request.picture_files
    run_id = fingerprint(request)
    with open_run(out, run_id, total, overwrite=overwrite, used=used) as run:
        if run.folder != out:
            tell(f"{out} holds something else; the images go to {run.folder}")
        if run.images:
            tell(f"{len(run.images)} of {total} images are in {run.folder} already")
        if not run.complete:
            with _interrupted_between(run, tell):
                before_opening(request)
                with drawing(request, pictures=pictures, indices=run.indices) as work:
                    # the command repeats the folder that was asked for, not the free one it got
                    run.begin(work.finished([]).record(str(out)))
                    for number, image in work.images(skip=set(run.images)):
                        run.add(number, image)
                    made = work.finished([run.images[number] for number in range(total)])
                    run.finish(made.sheet(), made.notes)
        return run.record | {"out": str(run.folder)}


@contextmanager
def _interrupted_between(run: Run, tell: Callable[[str], None]) -> Iterator[None]:
    """Say what is there when something ends a run early; a run without images leaves nothing."""
    try:
        yield
    except BaseException as error:
        run.give_up()
        if run.images:
            tell(f"{len(run.images)} of {run.total} images are in {run.folder}")
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(signal.SIGINT) from error
        raise


@dataclass(frozen=True)
class Drawing:
    """A request whose base, adapter and pictures are open."""

    request: Request
    references: list[Image.Image]
    notes: list[str]
    jobs: list[Job]
    task: Task
    attachment: Attachment
    negative: Image.Image | None
    asked: Request

    def images(
        self,
        skip: Collection[int] = (),
        progress: bool | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[int, Image.Image]]:
        """Number and image of each job as it is finished; what `on_step` raises stops it."""
        numbers = [number for number in range(len(self.jobs)) if number not in skip]
        jobs = [self.jobs[number] for number in numbers]
        asked = (self.task, jobs, self.request, self.attachment, self.negative)
        return zip(numbers, sampled(*asked, progress, on_step), strict=True)

    def finished(self, images: list[Image.Image]) -> Generation:
        """All of its images with what was asked."""
        indices = [job.index for job in self.jobs]
        return Generation(self.request, self.references, images, self.notes, indices, self.asked)


@contextmanager
def drawing(
    request: Request,
    loaded: Base | None = None,
    *,
    pictures: Pictures | None = None,
    indices: Sequence[int] | None = None,
) -> Iterator[Drawing]:
    """Open what a request needs; the adapter comes off at the end of the `with` block.

    Args:
        pictures: From `checked_pictures`; without them the request is checked here.
        indices: Of candidates that an interrupted run chose; without them they are chosen here.
    """
    from ipdiverse.sampling.fast import few_steps

    asked = request
    if pictures is None:
        pictures = checked_pictures(request, opened=loaded is not None)
    # what is wrong with faces or masks is said before gigabytes are downloaded
    reference = _reference(request, pictures)
    # defaults go into the record, which then repeats the images when a later version has others
    request = replace(request, adapter=request.adapter or default_adapter(request.base))
    base = loaded or open_base(request)
    weights = adapter_file(request.base, request.adapter)
    request = settled(request, base)
    task, few = task_for(base, request, pictures), request.few()
    negative = pictures.images[request.negative_image] if request.negative_image else None
    # on the task's pipeline: image-to-image, inpainting and ControlNets have their own
    with (
        quiet(),
        few_steps(task.base.pipe, few, request.base) if few else nullcontext({}) as settings,
        attached(task.base, weights, request.image_encoder) as attachment,
    ):
        task.settings.update(settings)
        if "face" in attachment.adapters[0].reads:
            faces = _faces_in(reference.images) if reference.faces is None else reference.faces
            reference = replace(reference, faces=faces)
        elif request.faces:
            raise request.faces_unread()
        set_scale(attachment, base, request)
        task.notes.extend(imagine(attachment, request))
        begun = request.n if indices else request.candidates or request.n
        texts = [text for text in request.prompt for _ in range(begun)]
        numbers = indices or [*range(begun)] * len(request.prompt)
        numbered = zip(texts, numbers, strict=True)
        jobs = [Job(text, request.seed, index, reference) for text, index in numbered]
        if begun > request.n:
            from ipdiverse.sampling.selection import chosen

            jobs = chosen(jobs, request, task, attachment, negative)
        images = [pictures.images[file] for file in request.image]
        yield Drawing(request, images, task.notes, jobs, task, attachment, negative, asked)


def checked_pictures(request: Request, *, opened: bool = False) -> Pictures:
    """Decode a request's pictures and check the rest of it, the quickest first."""
    request.check_files()
    pictures = decoded(request)
    request.check(opened=opened)  # imports torch, which takes seconds
    return pictures


def _reference(request: Request, pictures: Pictures) -> Reference:
    from ipdiverse.adapter.attach.face_embeddings import load_face_embeddings
    from ipdiverse.adapter.reference import Reference

    faces = load_face_embeddings(Path(request.faces)) if request.faces else None
    images = [pictures.images[file] for file in request.image]
    if faces is None and request.reads_faces:  # before a large base is opened
        faces = _faces_in(images)
    masks = [pictures.masks[file] for file in request.mask] or None
    return Reference(images, faces, request.combine, request.weights or None, masks)  # type: ignore[arg-type]


def _faces_in(images: Sequence[Image.Image]) -> Tensor:
    import torch

    from ipdiverse.adapter.attach.face_embeddings import detect_face

    return torch.cat([detect_face(image) for image in images])


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
    """Refuse options that have no effect on a base that is open already."""
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
        asked: The request before defaults were filled in; None is `request`.
    """

    request: Request
    references: list[Image.Image]
    images: list[Image.Image]
    notes: list[str]
    indices: list[int]
    asked: Request | None = None

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

    def save(
        self, out: Path | str, named: str | None = None, *, overwrite: bool = False
    ) -> dict[str, Any]:
        """Write images, contact sheet and JSON into a folder, each file whole or not at all.

        Nothing that another run or anybody else wrote is replaced: where the folder holds such
        files, the images go to a new one beside it, `out-2` and so on, with a warning.

        Args:
            out: The folder.
            named: What the recorded command calls it; None is as it is.
            overwrite: Replace another run that is there; any other file is still left alone.

        Returns:
            The record, with the written files' names, and the folder as `out`.

        Raises:
            OutputError: The folder cannot be written.
        """
        # of what was asked, so that the same call finds its images before a base is opened
        run_id, total = fingerprint(self.asked or self.request), len(self.images)
        used = self.request.picture_files
        with open_run(Path(out), run_id, total, overwrite=overwrite, used=used) as run:
            if run.folder != Path(out):
                warnings.warn(f"{out} holds something else: saved in {run.folder}", stacklevel=2)
            if not run.complete:
                run.begin(self.record(str(out) if named is None else named))
                for number, image in enumerate(self.images):
                    if number not in run.images:
                        run.add(number, image)
                run.finish(self.sheet(), self.notes)
            return run.record | {"out": str(run.folder)}

    def sheet(self) -> Image.Image:
        """The references and all images, with captions."""
        from ipdiverse.contact_sheet import contact_sheet

        return contact_sheet(
            side_by_side(self.references),
            self.images,
            self._captions(),
            title=" | ".join(self.request.prompt),
            cell=192 if len(self.images) <= _LARGE_SHEET else 96,
        )

    def _captions(self) -> list[str]:
        n, seed, prompts = self.request.n, self.request.seed, self.request.prompt
        if len(prompts) == 1:
            return [f"seed {seed}, image {i}" for i in self.indices]
        each = [prompt for prompt in prompts for _ in range(n)]
        numbered = zip(each, self.indices, strict=True)
        return [f"{prompt}, seed {seed}, image {i}" for prompt, i in numbered]


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Several pictures as one, all as high as the first; one stays as it is."""
    import numpy as np
    from PIL import Image

    if len(images) == 1:
        return images[0]
    if not images:  # a face given as an embedding
        return Image.new("RGB", (64, 64), (224, 224, 224))
    height = images[0].height
    scaled = [im.resize((max(1, im.width * height // im.height), height)) for im in images]
    return Image.fromarray(np.hstack([np.asarray(image) for image in scaled]))
