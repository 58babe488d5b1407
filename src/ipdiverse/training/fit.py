"""Fit a variation space in closed form: which directions of image tokens are the scene's.

Only embeddings of images are read, of a folder that `prepare` wrote, and each is projected twice:
for the mean and the principal directions, then for the scatter within subjects. Nothing but sums
and the bank is kept, so memory does not grow with the number of pictures.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ipdiverse.adapter.attach.encoding import text_embeds, text_tower
from ipdiverse.adapter.imagine import SceneBank, VariationSpace, projection_hash
from ipdiverse.adapter.model import check_encoder
from ipdiverse.errors import DataError, ModelError
from ipdiverse.provenance import derived_seed
from ipdiverse.training.config import FitOptions
from ipdiverse.training.embed import EmbeddedPictures, Stored, embed

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from ipdiverse.adapter.model import ImagePromptAdapter
    from ipdiverse.data.manifest import Record
    from ipdiverse.parts import Part
    from ipdiverse.training.embed import TrainingData
    from ipdiverse.training.frozen import FrozenEncoders, Preprocessing

FEWEST_SUBJECTS = 20
EXPLAINED, MOST_DIRECTIONS = 0.985, 256
"""Share of the tokens' variance that principal directions explain, and how many at most."""
IS_SCENE = 0.7
"""A direction is the scene's from this share of its variance within subjects on, if held out."""
_FOLDS = 5
_SAMPLE, _EXACT, _TOGETHER = 4096, 4096, 256
"""Directions are found in a sample where tokens are wider than the second number."""
_HELD = 2**29
"""Numbers that are held at once, 2 GB: a picture of Flux Redux is three million."""
_KEY_WIDTH = 48
_PROMPTS = 250
_FOUND = 0.75
"""A caption's own picture must be nearer than this share of the others for a shared space."""


def fit_space(
    folder: Path,
    encoders: FrozenEncoders,
    adapter: ImagePromptAdapter,
    preprocessing: Preprocessing,
    options: FitOptions | None = None,
    about: Mapping[str, Any] = MappingProxyType({}),
) -> VariationSpace:
    """Fit the space of an adapter's projection.

    Args:
        folder: As `prepare` wrote it, with subjects of several pictures or with pairs.
        encoders: Of a base that the adapter fits.
        adapter: Of any kind that reads no faces.
        preprocessing: As the cache of `embed` was made with; one that is not there is made.
        options: How; None takes the defaults.
        about: What else its file should say.

    Raises:
        DataError: There are too few subjects with several pictures.
        ModelError: The adapter is of another kind, or does not fit the image encoder.
    """
    tower, stored = _reads(encoders, adapter)
    pictures = EmbeddedPictures(folder, encoders, preprocessing, stored)
    groups = _subjects(pictures.records, folder)
    tokens = _Tokens(pictures, adapter, groups)
    options = options or FitOptions()
    names, kept = _banked(pictures, options), dict[str, Tensor]()
    fitted = _fitted(tokens, options, set(names), kept)
    mean, directions, deviations, scene, explained, held_out = fitted
    pairs = tokens.pairs
    scenes = torch.stack([kept[name] for name in names])
    bank, keys = _bank(scenes, names, pictures, encoders, tower)
    spec = {
        "projection": projection_hash(adapter),
        "kind": adapter.kind,
        "tokens": [adapter.image_proj.num_tokens, adapter.token_width],
        "pictures": tokens.count,
        "subjects": sum(len(group) > 1 for group in groups.values()),
        "pairs": pairs,
        "explained": round(explained, 4),
        "directions": {"identity": len(scene) - scene.shape[1], "scene": scene.shape[1]},
        "held_out": held_out,
        "bank": len(bank),
        "keys": keys[0],
        **about,
    }
    return VariationSpace(mean, directions, deviations, scene, bank, keys[1], keys[2], spec)


def embed_part(
    folder: Path,
    encoders: FrozenEncoders,
    adapter: ImagePromptAdapter,
    preprocessing: Preprocessing,
    part: Part,
    about: Mapping[str, Any],
) -> None:
    """Embed a part of the pictures that `fit_space` reads; takes and raises what that does.

    The sums are not split: those of another order differ in their last digits. They cost little,
    as of each picture only the projection of its embeddings is computed for them.

    Args:
        about: What `merge` needs to know of the fit.
    """
    stored = replace(_reads(encoders, adapter)[1], rows=("pictures",))
    embed(folder, encoders, preprocessing, stored, part, about)


def _reads(
    encoders: FrozenEncoders, adapter: ImagePromptAdapter
) -> tuple[tuple[Any, Any] | None, Stored]:
    """The text tower that goes with the image encoder, and which embeddings are needed."""
    check_kind(adapter)
    check_encoder(adapter, encoders.images.encoder)
    # SigLIP has no projection, and no base its text encoder
    width = getattr(encoders.images.encoder.config, "projection_dim", 0)
    tower = text_tower(encoders.pipe, width)
    both = tower and adapter.reads == ("hidden",)
    return tower, Stored("both" if both else adapter.reads[0])  # type: ignore[arg-type]


def fit_directions(
    data: TrainingData, records: Sequence[Record], adapter: ImagePromptAdapter, folder: Path
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, directions, deviations and the scene's directions of a training run's pictures."""
    check_kind(adapter)
    tokens = _Tokens(data, adapter, _subjects(records, folder))
    mean, directions, deviations, scene, _, _ = _fitted(tokens, FitOptions(), (), {})
    return mean, directions, deviations, scene


def _fitted(
    tokens: _Tokens, options: FitOptions, names: Collection[str], kept: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor, float, dict[str, float]]:
    """What a space is but for its bank; `kept` gets the coordinates of the pictures of `names`."""
    mean, directions, deviations, explained = _principal(tokens, options, tokens.pairs)
    scatter = _Scatter(deviations)
    for subject, files, rows in chain.from_iterable(tokens.subjects()):
        z = (rows - mean) @ directions / deviations
        scatter.add(z, derived_seed(subject) % _FOLDS)
        kept |= {name: one for name, one in zip(files, z, strict=True) if name in names}
    scene, held_out = _scene_directions(scatter, options.shrink)
    return mean, directions, deviations, scene, explained, held_out


def check_kind(adapter: ImagePromptAdapter) -> None:
    """Refuse adapters whose tokens are not a picture's alone."""
    if adapter.kind not in ("base", "plus", "pooled", "redux", "time-resampler"):
        raise ModelError(
            "has no variation space",
            where=f"a {adapter.kind} adapter",
            expected="a base or plus adapter",
            fix="A face's embedding holds no scene; its adapter copies none either."
            if adapter.kind.startswith("faceid")
            else None,
        )


def _subjects(records: Sequence[Record], folder: Path) -> dict[str, list[str]]:
    """Pictures by subject; one without a subject is its own, with its reference if it has one."""
    groups: dict[str, dict[str, None]] = defaultdict(dict)
    for record in records:
        # a reference shows what its record shows, whatever that is called
        name = record.file_name if record.subject is None else f"subject {record.subject}"
        groups[name] |= dict.fromkeys(filter(None, (record.file_name, record.reference)))
    several = sum(len(group) > 1 for group in groups.values())
    if several < FEWEST_SUBJECTS:
        raise DataError(
            "has too few subjects with several pictures",
            where=folder,
            expected=f"{FEWEST_SUBJECTS} at least, and better 300",
            found=several,
            fix="Prepare a folder with one folder of pictures for each subject, or a list with "
            "references.",
        )
    return {name: list(group) for name, group in sorted(groups.items())}


class _Tokens:
    """Image tokens of every picture, subject by subject, projected anew at each pass."""

    def __init__(
        self,
        pictures: EmbeddedPictures | TrainingData,
        adapter: ImagePromptAdapter,
        groups: dict[str, list[str]],
    ) -> None:
        self.pictures, self.adapter, self.groups = pictures, adapter, groups
        self.pairs = sum(len(group) - 1 for group in groups.values())
        self.count = len({name for files in groups.values() for name in files})
        # an encoder says how many tokens Redux has, and the kept states of SD 3.5's adapter
        self.width = self.of([next(iter(groups.values()))[0]]).shape[1]

    def subjects(self) -> Iterator[list[tuple[str, list[str], Tensor]]]:
        """Some at a time: subject, its files, and their tokens, (files, tokens · width)."""
        from tqdm import tqdm

        files, some = sum(map(len, self.groups.values())), list[tuple[str, list[str]]]()
        with tqdm(total=files, unit="picture", disable=None) as progress:
            for subject in (*self.groups.items(), None):
                names = [name for _, group in some for name in group]
                full = len(names) >= min(_TOGETHER, _HELD // self.width)
                if names and (subject is None or full):
                    parts = self.of(names).split([len(group) for _, group in some])
                    yield [(*one, part) for one, part in zip(some, parts, strict=True)]
                    progress.update(len(names))
                    some = []
                some += [] if subject is None else [subject]

    @torch.no_grad()
    def of(self, files: Sequence[str]) -> Tensor:
        """Tokens of some pictures, as one vector each."""
        read, parameter = self.adapter.reads[0], next(self.adapter.parameters())
        rows = torch.stack([self.pictures[name][read] for name in files]).to(parameter)
        parts = [self.adapter.tokens(part) for part in rows.split(64)]
        return torch.cat(parts).flatten(1).float().cpu()


def _principal(
    tokens: _Tokens, options: FitOptions, pairs: int
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Mean, principal directions, the deviation along each, and the share that they explain."""
    if tokens.width <= _EXACT:
        mean, variances, vectors, whole = _exact(tokens)
    else:
        mean, variances, vectors, whole = _sampled(tokens)
    shares = variances.cumsum(0) / whole
    # few pairs tell little about many directions
    most = min(MOST_DIRECTIONS, pairs, int((variances > 1e-9 * variances[0]).sum()))
    enough = int((shares < EXPLAINED).sum()) + 1
    count = min(options.directions or enough, most)
    parts = (mean, vectors[:, :count], variances[:count].sqrt())
    return (*(part.float().contiguous() for part in parts), float(shares[count - 1]))  # type: ignore[return-value]


def _exact(tokens: _Tokens) -> tuple[Tensor, Tensor, Tensor, float]:
    width = tokens.width
    total, squares = torch.zeros(width).double(), torch.zeros(width, width).double()
    origin, count = None, 0
    for some in tokens.subjects():
        rows = torch.cat([part for _, _, part in some]).double()
        # near the mean, so that sums of squares stay exact
        origin = rows.mean(0) if origin is None else origin
        rows -= origin
        total += rows.sum(0)
        squares.addmm_(rows.T, rows)
        count += len(rows)
    mean = total / count
    variances, vectors = torch.linalg.eigh(squares / count - mean.outer(mean))
    variances = variances.flip(0).clamp_min(0)
    mean += 0 if origin is None else origin
    return mean, variances, vectors.flip(1), float(variances.sum())


def _sampled(tokens: _Tokens) -> tuple[Tensor, Tensor, Tensor, float]:
    """From a bounded sample, as a covariance of SDXL's 32,768 numbers would take 8 GB."""
    every = [name for files in tokens.groups.values() for name in files]
    most = min(_SAMPLE, _HELD // tokens.width)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[:most]
    rows = torch.cat([tokens.of([every[i] for i in part.tolist()]) for part in order.split(64)])
    mean = rows.mean(0)
    rows -= mean
    count = min(MOST_DIRECTIONS + 32, *rows.shape)
    torch.manual_seed(0)  # the method draws random directions (arXiv:0909.4061)
    _, found, vectors = torch.svd_lowrank(rows, q=count, niter=4)
    whole = float(rows.pow(2).sum()) / len(rows)
    return mean, found.pow(2) / len(rows), vectors, whole


class _Scatter:
    """Sums of squares of z within subjects, by fold, and what shrinkage needs besides."""

    def __init__(self, deviations: Tensor) -> None:
        self.deviations = deviations.double()
        zeros = torch.zeros(_FOLDS, len(deviations), len(deviations), dtype=torch.float64)
        self.squares, self.fourth = zeros, torch.zeros(_FOLDS, dtype=torch.float64)
        self.count = torch.zeros(_FOLDS, dtype=torch.float64)

    def add(self, z: Tensor, fold: int) -> None:
        """All pictures of a subject: m of them are m − 1 independent differences.

        Each is a picture less the mean of those before it, scaled to the variance of one picture:
        (z_a − z_b)/√2 for a pair.
        """
        if len(z) < 2:
            return
        before = torch.arange(1, len(z), dtype=torch.float64)[:, None]
        means = z.double().cumsum(0)[:-1] / before
        apart = (z.double()[1:] - means) * (before / (before + 1)).sqrt()
        self.squares[fold] += apart.T @ apart
        self.fourth[fold] += (apart * self.deviations).pow(2).sum(1).pow(2).sum()
        self.count[fold] += len(apart)

    def within(self, folds: Sequence[int], shrink: bool) -> Tensor:
        """S_w of some folds.

        Shrunk as Ledoit and Wolf (2004, Journal of Multivariate Analysis 88, lemma 3.1) towards a
        multiple of the identity *before whitening*. In z, that would leave every direction as it
        is. Before, it says that directions in which tokens hardly vary are the scene's until pairs
        say otherwise, and there are where few pairs mislead.
        """
        chosen, s = list(folds), self.deviations
        count = self.count[chosen].sum()
        found = self.squares[chosen].sum(0) / count
        if not shrink:
            return found
        raw, width = found * s.outer(s), len(s)
        level = raw.trace() / width
        apart = (raw - level * torch.eye(width, dtype=raw.dtype)).pow(2).sum()
        noise = (self.fourth[chosen].sum() / count - raw.pow(2).sum()) / count
        share = (noise / apart).clamp(0, 1)
        shrunk = (1 - share) * raw + share * level * torch.eye(width, dtype=raw.dtype)
        return shrunk / s.outer(s)


def _scene_directions(scatter: _Scatter, shrink: bool) -> tuple[Tensor, dict[str, float]]:
    """Q, and what it keeps of the subject and replaces of the scene, on held-out pairs.

    Each fold of subjects in turn is held out: directions come from the others, in the order of
    their variance within subjects, and the fold's own pairs say what that is in truth. From the
    first direction on where it is `IS_SCENE`, in the median of three, all are the scene's.
    """
    filled = [fold for fold in range(_FOLDS) if scatter.count[fold]]
    within = torch.zeros(len(scatter.deviations), dtype=torch.float64)
    for fold in filled:
        others = [other for other in filled if other != fold]
        _, vectors = torch.linalg.eigh(scatter.within(others, shrink))
        within += ((scatter.squares[fold] @ vectors) * vectors).sum(0)
    within /= scatter.count.sum()
    smooth = torch.cat([within[:1], within, within[-1:]]).unfold(0, 3, 1).median(1).values
    identity = int((smooth < IS_SCENE).long().cumprod(0).sum())
    _, vectors = torch.linalg.eigh(scatter.within(filled, shrink))
    # what a direction tells of the subject, in nats: total variance 1, `within` of it noise
    told = -within.clamp(1e-6, 1).log() / 2
    held_out = {
        "identity_kept": float(told[:identity].sum() / told.sum().clamp_min(1e-9)),
        "scene_replaced": float(within[identity:].sum() / within.sum().clamp_min(1e-9)),
    }
    rounded = {name: round(share, 4) for name, share in held_out.items()}
    return vectors[:, identity:].float().contiguous(), rounded


def _banked(pictures: EmbeddedPictures, options: FitOptions) -> list[str]:
    """Files of the bank: a random part of the records, as these have captions."""
    source = torch.Generator().manual_seed(options.seed)
    every = list(dict.fromkeys(record.file_name for record in pictures.records))
    order = torch.randperm(len(every), generator=source)[: options.bank]
    return [every[i] for i in sorted(order.tolist())]


def _bank(
    scenes: Tensor,
    names: Sequence[str],
    pictures: EmbeddedPictures,
    encoders: FrozenEncoders,
    tower: tuple[Any, Any] | None,
) -> tuple[SceneBank, tuple[str, Tensor, Tensor]]:
    """The bank; what its keys are, their means and their directions."""
    texts = {record.file_name: record.text for record in pictures.records}
    captions = tuple(texts[name] for name in names)
    told = [i for i, caption in enumerate(captions) if caption]
    some = told[:: max(1, len(told) // _PROMPTS)]

    def found_by(keys: Tensor, means: Tensor, directions: Tensor, tower: Any) -> SceneBank:
        """The bank, with the similarities of halves of captions, as users write less."""
        short = [half for i in some for half in _halves(captions[i])]
        asked = text_embeds(encoders.pipe, tower, short)
        similar = normalize((asked - means[0]) @ directions, dim=-1) @ keys.T
        return SceneBank(scenes, keys, captions, _near(similar, some))

    if tower is not None and some:
        images = torch.stack([pictures[name]["pooled"] for name in names])
        prompts = text_embeds(encoders.pipe, tower, [captions[i] for i in some])
        keys, means, directions = _keys(images, prompts)
        similar = normalize((prompts - means[0]) @ directions, dim=-1) @ keys.T
        own = similar[range(len(some)), some]
        if float((similar < own[:, None]).float().mean()) > _FOUND:
            return found_by(keys, means, directions, tower), ("image", means, directions)
    if len(told) < len(captions):  # a key for a part of them would leave the others out for good
        width = encoders.pipe.text_encoder.config.hidden_size
        none = torch.zeros(2, width), torch.zeros(width, 0)
        return SceneBank(scenes, torch.zeros(len(names), 0), captions), ("caption", *none)
    embeds = text_embeds(encoders.pipe, None, captions)
    keys, means, directions = _keys(embeds, embeds)
    return found_by(keys, means, directions, None), ("caption", means, directions)


def _keys(pictures: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys of pictures, and the means and directions that make them."""
    means = torch.stack([prompts.mean(0), pictures.mean(0)])
    centred = pictures - means[1]
    _, vectors = torch.linalg.eigh((centred.T @ centred).double())
    directions = vectors.flip(1)[:, :_KEY_WIDTH].float().contiguous()
    return normalize(centred @ directions, dim=-1), means, directions


def _halves(caption: str) -> list[str]:
    """Held-out prompts."""
    words = caption.split()
    return [" ".join(words[: len(words) // 2 or 1]), " ".join(words[len(words) // 2 :])]


def _near(similar: Tensor, own: Sequence[int]) -> tuple[float, float]:
    """Similarities of held-out prompts to the nearest other pictures: a low one and the middle."""
    others = similar.unflatten(0, (len(own), -1)).clone()
    others[range(len(own)), :, list(own)] = -1
    best = others.topk(min(5, others.shape[-1] - 1)).values.mean(-1).flatten()
    low, middle = best.quantile(torch.tensor([0.02, 0.5])).tolist()
    return low, middle
