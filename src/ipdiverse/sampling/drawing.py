"""One request at work: everything opened and checked, images as they finish."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipdiverse.base.adapters import adapter_file, default_adapter
from ipdiverse.base.bases import Base, load_base
from ipdiverse.base.presets import PRESETS
from ipdiverse.errors import ArgumentError
from ipdiverse.image_io import load_image
from ipdiverse.loading import quiet
from ipdiverse.sampling.checks import check, faces_unread, reads_faces
from ipdiverse.sampling.generation import Generation
from ipdiverse.sampling.sample import Job, attached, levers_of, preview, sampled, set_scale
from ipdiverse.sampling.tasks import Task, task_for

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from PIL import Image
    from torch import Tensor

    from ipdiverse.adapter.attach.attach import Attachment
    from ipdiverse.adapter.reference import Reference
    from ipdiverse.base.presets import HubFile
    from ipdiverse.sampling.request import Request


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
        """Number and image of each job, as soon as it is there.

        Args:
            skip: Numbers of jobs that are not wanted. Levers on a set still need the whole set.
            progress: Show a bar on standard error; None does so on terminals only.
            on_step: Called after each denoising step with the number of images it was for; what
                it raises stops the drawing there.
        """
        whole = levers_of(self.request, self.attachment.adapters[0]).on_a_set
        numbers = [n for n in range(len(self.jobs)) if whole or n not in skip]
        wanted = [self.jobs[number] for number in numbers]
        drawn = sampled(
            self.task.base,
            wanted,
            self.request,
            self.attachment,
            progress,
            self.task,
            self.negative,
            on_step,
        )
        for number, (_, image) in zip(numbers, drawn, strict=True):
            if number not in skip:
                yield number, image

    def finished(self, images: list[Image.Image]) -> Generation:
        """All of its images with what was asked."""
        indices = [job.index for job in self.jobs]
        return Generation(self.request, self.references, images, self.notes, indices)


@contextmanager
def drawing(request: Request, loaded: Base | None = None) -> Iterator[Drawing]:
    """Open what a request needs; the adapter comes off at the end of the `with` block.

    Args:
        request: What is asked.
        loaded: An open base, in place of the request's; None opens that.

    Raises:
        IpdiverseError: An image, the base or the adapter is unusable.
    """
    check(request, opened=loaded is not None)
    references = [load_image(Path(file)) for file in request.image]
    reference = _reference(request, references)
    negative = load_image(Path(request.negative_image)) if request.negative_image else None
    request = replace(request, adapter=request.adapter or default_adapter(request.base))
    base = loaded or open_base(request)
    weights = adapter_file(request.base, request.adapter)
    request = settled(request, base)
    notes = [note for text in request.prompt for note in _cut_words(base, "prompt", text)]
    notes += _cut_words(base, "negative prompt", request.negative_prompt)
    notes += [f"memory: {base.plan.line()}"] if base.plan else []
    task = replace(task_for(base, request), notes=notes)
    with quiet(), attached(task.base, weights, request.image_encoder) as attachment:
        reference = _with_faces(reference, request, attachment.adapters[0].reads)
        set_scale(attachment, base, request)
        jobs = [
            Job(text, request.seed, index, reference)
            for text in request.prompt
            for index in range(request.candidates or request.n)
        ]
        jobs = _selected(jobs, request, task, attachment, negative)
        yield Drawing(request, references, notes, jobs, task, attachment, negative)


def open_base(request: Request) -> Base:
    """The base that a request names, placed as it asks.

    Raises:
        IpdiverseError: It cannot be opened or had, or its options do not fit it.
    """
    encoder = request.adapter if request.adapter in PRESETS else None
    return load_base(
        request.base,
        revision=request.revision,
        safety_checker=request.safety_checker,
        encoder="" if request.image_encoder else encoder,
        memory=request.memory(),
    )


def opening(request: Request) -> tuple[object, ...]:
    """What decides how `open_base` opens a base: requests that agree can share one.

    Raises:
        IpdiverseError: There is no such base, or nothing that prompts it.
    """
    adapter = request.adapter or default_adapter(request.base)
    encoder = request.image_encoder or (adapter if adapter in PRESETS else "")
    return (request.base, encoder, request.revision, request.safety_checker, request.memory())


def needed_files(request: Request) -> list[HubFile]:
    """What a request takes from the hub for the presets that it names."""
    base, adapter = PRESETS.get(request.base), PRESETS.get(request.adapter or request.base)
    files = (
        [] if base is None else base.base_files(request.revision, checker=request.safety_checker)
    )
    if adapter is not None:
        files += adapter.adapter_files()
    encoder = adapter or base
    return files if encoder is None or request.image_encoder else files + encoder.encoder_files()


def settled(request: Request, base: Base) -> Request:
    """The request with what it leaves to the base filled in, so that its record repeats it."""
    filled: dict[str, Any] = {
        name: getattr(base, name)
        for name in ("steps", "scale", "guidance_scale")
        if getattr(request, name) is None
    }
    if base.plan is not None:
        filled |= {"dtype": base.plan.dtype, "tiling": base.plan.tiling}
    if request.base in PRESETS and not request.revision:
        filled["revision"] = PRESETS[request.base].base.revision
    return replace(request, **filled)


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
    if levers_of(request, attachment.adapters[0]).on_a_set:
        raise ArgumentError(
            "does not go with levers that act on a set: its images would be others without those "
            "that are not chosen",
            where="candidates",
            fix="Leave out candidates, or repulsion, particle and sparke.",
        )
    from ipdiverse.sampling.selection import EARLY, judged, select

    guesses = preview(task.base, jobs, request, attachment, EARLY, task, negative)
    chosen: list[Job] = []
    for start in range(0, len(jobs), request.candidates or 1):
        part = jobs[start : start + (request.candidates or 1)]
        seen = guesses[start : start + len(part)]
        texts = [job.prompt for job in part]
        worth, apart = judged(attachment, seen, texts)
        chosen += [part[i] for i in select(worth, apart, request.n)]
    return chosen


def _reference(request: Request, images: list[Image.Image]) -> Reference:
    from ipdiverse.adapter.attach.face_embeddings import load_face_embeddings
    from ipdiverse.adapter.reference import Reference

    faces = load_face_embeddings(Path(request.faces)) if request.faces else None
    if faces is None and reads_faces(request):  # before a large base is opened
        faces = _faces_in(images)
    masks = [load_image(Path(file)) for file in request.mask] or None
    return Reference(images, faces, request.combine, request.weights or None, masks)  # type: ignore[arg-type]


def _with_faces(reference: Reference, request: Request, reads: tuple[str, ...]) -> Reference:
    """The reference with what an opened adapter reads of faces."""
    if "face" not in reads:
        if request.faces:
            raise faces_unread(request.adapter)
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
