"""Jobs to images: batch by batch through a stock pipeline, with the request's levers on it."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipdiverse.base.adapters import space_file
from ipdiverse.base.bases import Base, any_latents, load_image_encoder
from ipdiverse.dial import OFF, Dial, Levers, default_dial, dial_of
from ipdiverse.errors import DataError, ModelError, quoted
from ipdiverse.loading import one_line
from ipdiverse.provenance import derived_seed
from ipdiverse.sampling.task import Task, steps_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from PIL import Image
    from torch import Tensor

    from ipdiverse.adapter.attach.attach import Attachment
    from ipdiverse.adapter.imagine import VariationSpace
    from ipdiverse.adapter.model import ImagePromptAdapter
    from ipdiverse.adapter.reference import Reference
    from ipdiverse.sampling.denoiser import Steering
    from ipdiverse.sampling.request import Request


@dataclass(frozen=True)
class Job:
    """One image to make."""

    prompt: str
    seed: int
    index: int
    reference: Image.Image | Reference | None = None


def dial_for(adapter: ImagePromptAdapter, has_space: bool = False) -> Dial:
    """An adapter's own dial, or the default one if it has none, or none that can act here."""
    calibrated, fused = dial_of(adapter.spec, "adapter"), adapter.fusion is not None
    if calibrated is not None and (has_space or not _recombines(calibrated)):
        return calibrated
    return default_dial(fused, bool(adapter.base_weights), has_space, adapter.draws)


def _recombines(dial: Dial) -> bool:
    return any(levers.recombine for _, levers in dial.points)


def levers_of(
    request: Request, adapter: ImagePromptAdapter | None, has_space: bool = False
) -> Levers:
    """A request's levers: those of its dial, unless it sets them itself."""
    if request.diversity is None or adapter is None:
        return request.levers
    return dial_for(adapter, has_space).at(request.diversity) | request.levers


def space_of(named: str, adapter: ImagePromptAdapter) -> VariationSpace | None:
    """The variation space that a file or hub id names, or the package's own for an adapter."""
    from ipdiverse.adapter.imagine import load_space, space_at_hand

    return load_space(space_file(named)) if named else space_at_hand(adapter)


def imagine(attachment: Attachment, request: Request) -> list[str]:
    """Give an adapter a request's space and scenes; what the user should know of them."""
    adapter = attachment.adapters[0]
    calibrated = dial_of(adapter.spec, "adapter")
    dialled = bool(request.diversity) and (calibrated is None or _recombines(calibrated))
    if not (dialled or request.space or request.scenes or request.levers.recombine):
        return []  # a calibrated dial needs no space, and finding one takes a hash of the weights
    attachment.set_space(space_of(request.space, adapter))
    if request.scenes:
        attachment.set_scenes(*_pictures(request.scenes))
    levers = levers_of(request, adapter, attachment.scenes is not None)
    if not levers.recombine or attachment.scenes is None:
        unread = [name for name in ("space", "scenes") if getattr(request, name)]
        return [f"{name} has no effect while recombine is 0" for name in unread]
    shares = {prompt: attachment.scenes.share(prompt) for prompt in request.prompt}
    return [
        f"no scene is near to {quoted(prompt)}: {100 * share:.0f} % of one is imposed"
        for prompt, share in shares.items()
        if share < 1
    ]


def _pictures(folder: str) -> tuple[list[Image.Image], list[str]]:
    """Pictures of a folder, with their captions."""
    from ipdiverse.data.manifest import SourceOptions
    from ipdiverse.data.sources import open_source
    from ipdiverse.image_io import load_image_bytes

    if not Path(folder).is_dir():
        raise DataError("is not a folder", where="scenes", found=folder, fix="Check the path.")
    images, captions = [], []
    for item in open_source(folder, SourceOptions(kind="captions")).items():
        if item.problem:
            raise DataError(item.problem, where=f"{folder}/{item.name}")
        images.append(load_image_bytes(item.load(), item.name))
        captions.append(item.text or "")
    if len(images) < 2:
        what = "holds too few pictures to vary scenes"
        raise DataError(what, where=folder, expected="2 or more", found=len(images))
    return images, captions


def set_scale(attachment: Attachment, base: Base, request: Request) -> None:
    """Weigh the image prompt as a request asks, or else as the base does by default."""
    scale = base.scale if request.scale is None else request.scale
    attachment.set_scale(
        request.preset or scale, weight=scale, start_at=request.start_at, end_at=request.end_at
    )


def sampled(
    task: Task,
    jobs: Sequence[Job],
    request: Request,
    attachment: Attachment | None = None,
    negative: Image.Image | None = None,
    progress: bool | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Iterator[Image.Image]:
    """The image of each job, as its batch is finished; it depends on its own job alone."""
    from tqdm import tqdm

    hidden = None if progress is None else not progress  # None is tqdm's "unless on a terminal"
    levers = OFF if attachment is None else _levers_on(attachment, request)
    total = len(jobs) * steps_of(task.base, request)
    with tqdm(total=total, disable=hidden, unit="step") as bar:

        def advance(images: int) -> None:
            bar.update(images)
            if on_step is not None:
                on_step(images)

        for chunk, padded in _chunks(jobs, task.base.batch):
            _prompt(attachment, padded, levers, negative, request.fast)
            yield from _denoise(task, padded, request, advance, len(chunk))[: len(chunk)]


def preview(
    task: Task,
    jobs: Sequence[Job],
    request: Request,
    attachment: Attachment,
    negative: Image.Image | None,
    share: float,
) -> Tensor:
    """Clean-latent guesses after the first steps, (jobs, channels, height, width)."""
    import torch

    levers, guesses = _levers_on(attachment, request), []
    # image-to-image skips the steps that its strength leaves out
    steps = steps_of(task.base, request) * (request.strength if request.init_image else 1)
    last = max(1, round(share * steps)) - 1
    for chunk, padded in _chunks(jobs, task.base.batch):
        steering = _prompt(attachment, padded, levers, negative, request.fast, previews=True)
        _denoise(task, padded, request, None, len(chunk), last)
        if steering is None or steering.guess is None:
            raise AssertionError("a steered pipeline that called its UNet has a guess")
        guesses.append(steering.guess[: len(chunk)].cpu())
    return torch.cat(guesses)


def _levers_on(attachment: Attachment, request: Request) -> Levers:
    return levers_of(request, attachment.adapters[0], attachment.scenes is not None)


def _prompt(
    attachment: Attachment | None,
    jobs: list[Job],
    levers: Levers,
    negative: Image.Image | None,
    fast: int,
    previews: bool = False,
) -> Steering | None:
    """References and levers of one batch."""
    if attachment is None:
        return None
    from ipdiverse.sampling.denoiser import release, steer

    release(attachment)
    references: list[Any] = [job.reference for job in jobs]
    attachment.set_reference(references, negative=negative)
    seeds = [derived_seed(job.seed, job.index, "levers") for job in jobs]
    attachment.set_seeds(seeds)
    if levers == OFF and not previews and not fast:
        return None
    steering = steer(attachment, levers, seeds, [job.prompt for job in jobs], fast)
    steering.previews = previews
    return steering


def _chunks(jobs: Sequence[Job], size: int) -> Iterator[tuple[list[Job], list[Job]]]:
    """Batches of jobs, and each filled up to one size with its last job.

    Kernels differ with the batch size, and so do roundings: with one size for all, image i is the
    same to the bit however many are drawn.
    """
    for start in range(0, len(jobs), size):
        chunk = list(jobs[start : start + size])
        yield chunk, chunk + [chunk[-1]] * (size - len(chunk))


def _denoise(
    task: Task,
    jobs: list[Job],
    request: Request,
    advance: Callable[[int], None] | None,
    wanted: int,
    last: int | None = None,
) -> list[Image.Image]:
    """One batch of a fixed size; what pads it is thrown away by the caller.

    With `last`, nothing is denoised after that step, and the images are latents.
    """
    from ipdiverse.provenance import generator

    pipe: Any = task.base.pipe
    stopped: list[Exception] = []

    def on_step(_: Any, step: int, __: Any, arguments: dict[str, Any]) -> dict[str, Any]:
        if advance is not None:
            try:
                advance(wanted)
            except Exception as error:
                stopped.append(error)  # told apart from what the pipeline itself raises
                raise
        if step == last:
            pipe._interrupt = True  # the pipeline's own way to skip the steps that are left
        return arguments

    with any_latents(pipe), _one_line(task.base, stopped):
        output = pipe(
            prompt=[job.prompt for job in jobs],
            # of one type with `prompt`, or diffusers raises
            negative_prompt=[request.negative_prompt] * len(jobs),
            generator=[generator(job.seed, job.index) for job in jobs],
            num_inference_steps=steps_of(task.base, request),
            guidance_scale=request.guidance_scale,
            callback_on_step_end=on_step,
            output_type="pil" if last is None else "latent",
            **task.arguments(len(jobs)),
        )
    flagged = getattr(output, "nsfw_content_detected", None) or []  # bases without a checker
    task.notes.extend(
        f"the safety checker blacked out image {job.index} of {job.prompt!r}; others of this set, "
        "or another seed, may pass"
        for job, is_flagged in zip(jobs[:wanted], flagged, strict=False)
        if is_flagged
    )
    return output.images


@contextmanager
def _one_line(base: Base, stopped: list[Exception]) -> Iterator[None]:
    """What the pipeline raises as one line, and what the caller's own `advance` raised as it is."""
    import torch

    try:
        with one_line("cannot draw this", base.name):
            yield
    except ModelError as error:
        if stopped:
            raise stopped[0] from None
        if not isinstance(error.__cause__, torch.OutOfMemoryError):
            raise
        raise ModelError(
            "ran out of memory",
            where=base.name,
            found=base.plan.line() if base.plan else None,
            fix="Add --offload=model or --offload=sequential, or make smaller images.",
        ) from error


@contextmanager
def attached(
    base: Base, weights: Path | str, image_encoder: str | tuple[Any, Any] = ""
) -> Iterator[Attachment]:
    """An adapter on a base's pipeline for the length of a `with` block."""
    from ipdiverse.adapter.attach.attach import attach, detach
    from ipdiverse.adapter.files.checkpoint import load_adapter

    adapter = load_adapter(weights)
    if isinstance(image_encoder, str):
        image_encoder = load_image_encoder(image_encoder, base) if image_encoder else (None, None)
    encoder, processor = image_encoder
    attachment = attach(base.pipe, adapter, image_encoder=encoder, image_processor=processor)
    try:
        yield attachment
    finally:
        detach(base.pipe)
