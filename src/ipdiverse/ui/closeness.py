"""What images look like while they are drawn, and how close they are to reference and prompt.

A cosine tells a reader nothing, and every encoder has its own scale of them. So closeness to the
reference is told in bands, and closeness to the prompt as a rank: how many of other texts fit the
image less well.

A band cannot say that the subject was kept: of 1,000 rendered held-out pairs that differ in one
attribute of the critter's identity, the encoder of the embedded base calls 94 % close (at 0.66),
and 42 % copies. So for critters another net, the oracle, reads the attributes, and what lost one is
never called close.
"""

from __future__ import annotations

import math
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, wraps
from html import escape
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.nn import functional as F

from ipdiverse.adapter.attach.stock import shadow
from ipdiverse.base.bases import CRITTERS, CRITTERS_ORACLE
from ipdiverse.base.memory import full_range
from ipdiverse.evaluation.features import COPY, FeatureEncoder
from ipdiverse.sampling.denoiser import FlowNoise, clean_guess
from ipdiverse.sampling.selection import joint_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from PIL import Image
    from torch import Tensor

    from ipdiverse.adapter.attach.attach import Attachment
    from ipdiverse.base.bases import Base
    from ipdiverse.sampling.request import Request


_SIGHT = 32
"""Previews are of latents scaled down to this side."""
_COLOURS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""Of VAEs that have decoded something: what `colours` found."""


@contextmanager
def watched(base: Base) -> Iterator[Callable[[int], list[Image.Image]]]:
    """What a batch looks like so far: small pictures of its first images, when called.

    A guess of the clean latents, decoded. It only reads what the scheduler and the VAE are given
    and give, so the images stay the same to the bit. There are none where a base cannot show them.
    """
    pipe: Any = base.pipe
    step, decode, called = pipe.scheduler.step, pipe.vae.decode, list[Any]()
    # offloaded, the VAE would push the denoiser out; what it made before tells how to do without
    offloaded = base.plan is not None and base.plan.offload != "none"

    @wraps(step)
    def noted(model_output: Any, timestep: Any, sample: Any, *given: Any, **named: Any) -> Any:
        scaled = getattr(pipe.scheduler, "scale_model_input", lambda sample, _: sample)
        called[:] = model_output, timestep, scaled(sample, timestep)  # its step counts on after it
        return step(model_output, timestep, sample, *given, **named)

    @wraps(decode)
    def learned(latents: Any, *given: Any, **named: Any) -> Any:
        output = decode(latents, *given, **named)
        _COLOURS[pipe.vae] = colours(latents, output[0])
        return output

    def guessed(images: int) -> list[Image.Image]:
        if not called or (offloaded and pipe.vae not in _COLOURS):
            return []
        latents = _clean_latents(pipe, *called, images=images)
        if offloaded:
            seen = (_rows(latents) @ _COLOURS[pipe.vae].to(latents.device)).movedim(-1, 1)
        else:
            with full_range(pipe.vae):
                seen = decode(latents.to(pipe.vae.dtype)).sample
        return pipe.image_processor.postprocess(seen) if seen.isfinite().all() else []

    undo = [shadow(pipe.scheduler, "step", noted)]
    undo += [shadow(pipe.vae, "decode", learned)] if offloaded else []
    try:
        yield guessed
    finally:
        for one in undo:
            one()


def _clean_latents(pipe: Any, predicted: Any, timestep: Any, sample: Any, images: int) -> Any:
    """What a scheduler's step says the clean latents are, small, as the VAE reads them."""
    schedule, scale = pipe.scheduler, pipe.vae.config
    if hasattr(pipe, "unet"):
        alpha, kind = schedule.alphas_cumprod[int(timestep)], schedule.config.prediction_type
        clean = clean_guess(kind, sample[:images], predicted[:images], float(alpha))
    else:  # transformers are flows, whose timestep says how much of the noise is left
        noise = FlowNoise(float(timestep) / schedule.config.num_train_timesteps)
        clean = noise.clean(sample[:images], predicted[:images])
    if clean.ndim == 3:  # Flux packs 2x2 latents into a token
        side = math.isqrt(clean.shape[1]) * 2 * pipe.vae_scale_factor  # the page draws squares
        clean = pipe._unpack_latents(clean, side, side, pipe.vae_scale_factor)
    if (longest := max(clean.shape[-2:])) > _SIGHT:  # a decoder's time grows with the area
        clean = F.interpolate(clean, scale_factor=_SIGHT / longest, mode="area")
    return clean / scale.scaling_factor + (getattr(scale, "shift_factor", None) or 0)


def colours(latents: Tensor, pixels: Tensor) -> Tensor:
    """The linear map from latents (batch, n, …), and 1, to the RGB that a VAE made, (n + 1, 3)."""
    small = F.interpolate(pixels.float(), latents.shape[-2:], mode="area").movedim(1, -1)
    given, wanted = (one.flatten(0, -2).cpu() for one in (_rows(latents), small))
    return torch.linalg.lstsq(given, wanted).solution


def _rows(latents: Tensor) -> Tensor:
    last = latents.float().movedim(1, -1)
    return torch.cat([last, torch.ones_like(last[..., :1])], -1)


@dataclass(frozen=True)
class Bands:
    """Cosines of an encoder from which images are related, close, and copies.

    Args:
        related: The same kind of subject.
        close: Other pictures of the same subject are seldom so close.
        copy: Two drawings of the very same scene.
        narrow: Mean cosine over the pairs of a set above which its images are alike.
    """

    related: float
    close: float
    copy: float
    narrow: float


CRITTER_BANDS = Bands(related=0.25, close=0.66, copy=0.85, narrow=0.66)
"""Measured on 96 rendered pairs: other critters reach 0.40 in 95 of 100 cases; the same critter in
another scene lies between 0.27 and 0.66 in 90; the same scene drawn again is above 0.84 in 95."""
BANDS = Bands(related=0.6, close=0.75, copy=COPY, narrow=0.85)
"""For photos. Measured with the encoder of the embedded base on 103 photos of 20 subjects: 23 of
100 pairs of one subject are close, 4 of two; copies 9, and 1 in 1,000. Thresholds that 5 % of other
subjects reach in ten of the subjects are reached by 6 % in the other ten (200 splits)."""
_RESTS = (
    "a net that reads attributes: of 2,000 rendered pairs that differ in one, it took none for the "
    "same critter",
    "103 photos of 20 subjects, seen by the small model's image encoder: it calls 23 of 100 pairs "
    "of one subject close, and 4 of 100 pairs of two. It was trained on critters: do not trust it "
    "with photos",
    "bands that were set with another image encoder, on 103 photos of 20 subjects; they are rough",
)

SHOWN, PARTLY = 0.93, 0.8
"""An image shows the prompt, or part of it, if so many of the other texts fit it less well.
Rendered critters that show a one-attribute prompt reach 0.94 and more, others 0.56 to 0.91."""

_COPY, _CLOSE, _RELATED, _FAR = (
    *("almost a copy of the reference", "close to the reference"),
    *("related to the reference", "unlike the reference"),
)
_KEPT, _LOST, _OTHER = "the same critter", "another", "another critter"
_OTHER_TEXTS = tuple(
    f"{what} {where}"
    for what in ("a dog", "a portrait of a woman", "a red car", "a house", "flowers", "a city")
    for where in ("in the snow", "at the beach", "at night", "as an oil painting", "on a table")
)


@dataclass(frozen=True)
class Closeness:
    """What an encoder sees in a set.

    Args:
        reference: Each image's cosine to the nearest reference.
        prompt: Share of other texts that fit each image less well; None without a prompt, or
            without an encoder of text.
        alike: Mean cosine over all pairs; None for a single image.
        bands: Of the encoder.
        lost: For critters, what of the nearest reference's identity each image does not show.
        rests_on: What decides the words about the reference.
    """

    reference: tuple[float, ...]
    prompt: tuple[float, ...] | None
    alike: float | None
    bands: Bands
    lost: tuple[tuple[str, ...], ...] | None = None
    rests_on: str = _RESTS[0]

    @property
    def narrow(self) -> bool:
        """Whether the images are much alike."""
        return self.alike is not None and self.alike > self.bands.narrow

    def words(self, number: int) -> str:
        """Image `number`, as in `close to the reference; shows the prompt`."""
        said = self._kept(number)
        return said if self.prompt is None else f"{said}; {prompt_words(self.prompt[number])}"

    def summary(self) -> str:
        """All of them, in two or three sentences."""
        parts = [_counted([self._kept(number) for number in range(len(self.reference))])]
        if self.prompt is not None:
            parts.append(_counted([prompt_words(value) for value in self.prompt]))
        if self.alike is not None:
            parts.append(f"The images are {'much alike' if self.narrow else 'varied'}.")
        return " ".join(parts)

    def _kept(self, number: int) -> str:
        near = reference_words(self.reference[number], self.bands)
        if self.lost is None or (not self.lost[number] and near == _COPY):
            return near
        if len(self.lost[number]) > 2:
            return _OTHER
        lost = " and ".join(self.lost[number])
        return f"{_LOST} {lost}" if lost else _KEPT


def reference_words(value: float, bands: Bands) -> str:
    """A cosine to the reference, for people."""
    for least, words in ((bands.copy, _COPY), (bands.close, _CLOSE), (bands.related, _RELATED)):
        if value >= least:
            return words
    return _FAR


def prompt_words(share: float) -> str:
    """A share of other texts, for people."""
    if share >= SHOWN:
        return "shows the prompt"
    return "shows part of the prompt" if share >= PARTLY else "hardly shows the prompt"


def judged(
    attachment: Attachment,
    images: Sequence[Image.Image],
    references: Sequence[Image.Image],
    request: Request,
) -> Closeness | None:
    """Compare images, with the image encoder that the adapter reads.

    Returns:
        None where the adapter reads no images, or its encoder has no projection to compare by.
    """
    encoder = attachment.image_encoder
    if encoder is None or not hasattr(encoder, "visual_projection") or not references:
        return None
    sees = FeatureEncoder("base", encoder, attachment.image_processor)
    seen = sees.images(images)
    fits = seen @ sees.images(references).T
    embedded = request.base == CRITTERS
    pairs = (seen @ seen.T)[np.triu_indices(len(seen), 1)]
    lost = _lost(images, references, fits.argmax(1)) if embedded else None
    return Closeness(
        reference=tuple(map(float, fits.max(1))),
        prompt=_shares(attachment.pipe, seen, request.prompt[0], embedded),
        alike=float(pairs.mean()) if len(pairs) else None,
        bands=BANDS if lost is None else CRITTER_BANDS,
        lost=lost,
        rests_on=_RESTS[2 if not embedded else 1 if lost is None else 0],
    )


def _lost(
    images: Sequence[Image.Image], references: Sequence[Image.Image], nearest: np.ndarray
) -> tuple[tuple[str, ...], ...] | None:
    """Attributes of identity that differ; None where a reference is not a critter.

    Of 2,000 rendered held-out pairs that differ in one attribute, all are told apart and 1,998 are
    told exactly; of 400 of one critter, in one scene or two, 2 are told apart.
    """
    from ipdiverse.critters.oracle import read
    from ipdiverse.critters.scene import IDENTITY

    shown = read(_oracle(), np.stack([_small(one) for one in images]))
    given = read(_oracle(), np.stack([_small(one) for one in references]))
    if given.invalid is not None and given.invalid.any():
        return None
    count = len(IDENTITY)  # the first of the attributes
    differs = shown.attributes[:, :count] != given.attributes[nearest, :count]
    return tuple(tuple(np.array(IDENTITY)[row].tolist()) for row in differs)


def _small(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((64, 64)))


@lru_cache(1)
def _oracle() -> Any:
    from ipdiverse.critters.oracle import load_oracle

    return load_oracle(CRITTERS_ORACLE)


def _shares(pipe: Any, seen: np.ndarray, prompt: str, embedded: bool) -> tuple[float, ...] | None:
    if not prompt.strip():
        return None
    others = _captions() if embedded else _OTHER_TEXTS
    with torch.no_grad():
        read = joint_text(pipe, [prompt, *others], seen.shape[1])
    if read is None:
        return None
    texts = F.normalize(read, dim=1).cpu().numpy()
    fits = seen @ texts.T
    return tuple(map(float, (fits[:, 1:] < fits[:, :1]).mean(1)))


@lru_cache(1)
def _captions() -> tuple[str, ...]:
    """Captions of other pictures of the embedded world."""
    from ipdiverse.critters.make import example

    return tuple(example(index, 0, "train").text for index in range(96))


def _counted(words: Sequence[str]) -> str:
    """As `All 4 show the prompt.` or `3 are close to the reference, 1 is almost a copy of it.`."""
    found = Counter(words).most_common()
    if len(found) == 1:
        return f"{'It' if len(words) == 1 else f'All {len(words)}'} {_said(*found[0])}."
    return ", ".join(f"{count} {_said(text, count)}" for text, count in found) + "."


def _said(text: str, count: int) -> str:
    """With its verb, in singular or plural."""
    if text.startswith(_LOST) and text != _OTHER:
        return f"{'has' if count == 1 else 'have'} {text}"
    if "shows" in text:
        return text if count == 1 else text.replace("shows", "show")
    return f"{'is' if count == 1 else 'are'} {text}"


_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 340, 220, 58, 14, 44


def plot(closeness: Closeness) -> str:
    """An SVG: a numbered dot for each image, reference across and prompt upwards."""
    right, floor = _WIDTH - 12, _HEIGHT - _BOTTOM
    count = len(closeness.reference)
    words = "; ".join(f"image {one + 1} {closeness.words(one)}" for one in range(count))
    bands, lost = closeness.bands, closeness.lost or [()] * count
    edges = {"related": bands.related, "close": bands.close, "copy": bands.copy}
    drawn = ""
    for name in edges if closeness.lost is None else ("copy",):  # near may have lost an attribute
        x = _LEFT + (right - _LEFT) * edges[name]
        drawn += f'<line class="edge" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{floor}"/>'
        drawn += f'<text x="{x + 2:.1f}" y="{floor + 14}">{name}</text>'
    if closeness.prompt is not None:
        middle = -(floor + _TOP) / 2
        drawn += f'<text class="upwards" x="{middle:.0f}" y="16">shows the prompt →</text>'
    seen = zip(closeness.reference, closeness.prompt or [0.5] * count, lost, strict=True)
    for number, (near, share, gone) in enumerate(seen, 1):
        x = _LEFT + (right - _LEFT) * min(max(near, 0.0), 1.0)
        y, look = floor - (floor - _TOP - 8) * share, "lost" if gone else ""
        drawn += f'<circle class="{look}" cx="{x:.1f}" cy="{y:.1f}" r="9"/>'
        drawn += f'<text class="number" x="{x:.1f}" y="{y + 4:.1f}">{number}</text>'
    return (
        f'<svg class="closeness" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(words)}">'
        f'<path class="axis" d="M{_LEFT} {_TOP}V{floor}H{right}"/>{drawn}'
        f'<text class="across" x="{(_LEFT + right) / 2:.0f}" y="{_HEIGHT - 8}">'
        "like the reference →</text></svg>"
    )
