"""The main job: a reference image and a text prompt in, a set of images and their record out."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipdiverse.bases import Base, adapter_file, load_base, quiet
from ipdiverse.image_io import content_hash, load_image
from ipdiverse.sampling.request import Request

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from PIL import Image

    from ipdiverse.adapter.attach import Attachment


_LARGE_SHEET = 200
"""Above so many images a contact sheet has smaller cells."""


@dataclass(frozen=True)
class Generation:
    """The images of one request.

    Args:
        request: What was asked, defaults filled in.
        reference: The decoded reference.
        images: In order; image i belongs to (seed, i).
        notes: What the user should know, such as words that were cut from the prompt.
    """

    request: Request
    reference: Image.Image
    images: list[Image.Image]
    notes: list[str]

    def record(self, out: str = "out") -> dict[str, Any]:
        """Everything needed to repeat this exactly, ready for JSON."""
        return {
            "tool": "ipdiverse",
            "prompt": self.request.prompt,
            "command": self.request.command(out),
            "request": asdict(self.request),
            "reference_sha256": content_hash(self.reference),
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
        captions = [f"seed {self.request.seed}, image {i}" for i in range(len(self.images))]
        sheet = contact_sheet(
            self.reference,
            self.images,
            captions,
            title=self.request.prompt,
            cell=192 if len(self.images) <= _LARGE_SHEET else 96,
        )
        _clear(folder, set(names))
        for index, (image, name) in enumerate(zip(self.images, names, strict=True)):
            save_png(image, folder / name, {**record, "image_index": index})
        save_png(sheet, folder / "contact_sheet.png", record)
        record = {**record, "files": [*names, "contact_sheet.png", "generation.json"]}
        write_text_atomic(folder / "generation.json", json.dumps(record, indent=2) + "\n")
        return record


def generate(
    image: str | Path, prompt: str = "", *, loaded: Base | None = None, **options: Any
) -> Generation:
    """Generate images from a reference and a prompt.

    Args:
        image: The reference image's file.
        prompt: What to show.
        loaded: An open base, to reuse between calls and in place of `base`; None opens `base`.
        options: The other fields of `Request`.

    Raises:
        IpdiverseError: An argument, the image, the base or the adapter is unusable.
    """
    if loaded is not None:
        options["base"] = loaded.name
    request = Request(image=str(image), prompt=prompt, **options)
    reference = load_image(Path(request.image))
    base = loaded or load_base(request.base)
    weights = adapter_file(request.base, request.adapter)
    request = _with_defaults(request, base)
    notes = _cut_words(base, "prompt", request.prompt)
    notes += _cut_words(base, "negative prompt", request.negative_prompt)
    with quiet(), attached(base, weights) as attachment:
        attachment.set_scale(request.scale)
        jobs = [Job(request.prompt, request.seed, index, reference) for index in range(request.n)]
        images = sample(base, jobs, request, attachment)
    return Generation(request, reference, images, notes)


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
    reference: Image.Image | None = None


def sample(
    base: Base,
    jobs: Sequence[Job],
    request: Request,
    attachment: Attachment | None = None,
    progress: bool | None = None,
) -> list[Image.Image]:
    """Denoise jobs batch by batch; each image depends on its own job alone.

    Args:
        base: An open base.
        jobs: What to make, in order.
        request: Steps, guidance and negative prompt.
        attachment: The attached adapter; None for text alone.
        progress: Show a bar on standard error; None does so on terminals only.
    """
    from tqdm import tqdm

    show = sys.stderr.isatty() if progress is None else progress
    images: list[Image.Image] = []
    with tqdm(total=len(jobs) * request.steps, disable=not show, unit="step") as bar:
        for chunk in _chunks(jobs, base.batch):
            images += _denoise(base, chunk, request, attachment, bar)
    return images


def _chunks(jobs: Sequence[Job], size: int) -> Iterator[list[Job]]:
    for start in range(0, len(jobs), size):
        yield list(jobs[start : start + size])


def _denoise(
    base: Base, jobs: list[Job], request: Request, attachment: Attachment | None, bar: Any
) -> list[Image.Image]:
    """One batch, padded to `base.batch` with repeats that are thrown away."""
    from ipdiverse.seeding import generator

    padded = jobs + [jobs[-1]] * (base.batch - len(jobs))
    if attachment is not None:
        attachment.set_reference([job.reference for job in padded])  # type: ignore[misc]

    def on_step(*arguments: Any) -> dict[str, Any]:
        bar.update(len(jobs))
        return arguments[-1]

    pipe: Any = base.pipe
    output = pipe(
        prompt=[job.prompt for job in padded],
        negative_prompt=[request.negative_prompt] * len(padded),
        generator=[generator(job.seed, job.index) for job in padded],
        num_inference_steps=request.steps,
        guidance_scale=request.guidance_scale,
        callback_on_step_end=on_step,
    )
    return output.images[: len(jobs)]


class attached:  # noqa: N801 - reads as a verb: `with attached(base, file) as attachment`
    """An adapter on a base's pipeline for the length of a `with` block.

    Args:
        base: An open base.
        weights: The adapter's file.
    """

    def __init__(self, base: Base, weights: Path) -> None:
        self._base, self._weights = base, weights

    def __enter__(self) -> Attachment:
        """Attach."""
        from ipdiverse.adapter.attach import attach
        from ipdiverse.adapter.checkpoint import load_adapter

        return attach(self._base.pipe, load_adapter(self._weights))

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
