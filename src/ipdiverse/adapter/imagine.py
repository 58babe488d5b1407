"""Imagined references: a variation space, which tells a picture's subject from its scene.

Two pictures of one subject differ in the scene. Directions of image tokens in which such pictures
differ are the scene's; the rest are the subject's. So an image can be prompted with the subject of
its reference and the scene of another picture, and what an adapter copies is then what was asked
for. Nothing of the adapter or of the base is trained.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ipdiverse.adapter.files.containers import open_checkpoint
from ipdiverse.base.adapters import CRITTERS_SPACES
from ipdiverse.errors import CheckpointError, ModelError
from ipdiverse.provenance import derived_seed
from ipdiverse.writing import safetensors_bytes, tensors_hash, write_bytes_atomic

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ipdiverse.adapter.model import ImagePromptAdapter

_SPEC, _HASH = "ipdiverse.space", "ipdiverse.sha256"
_AS_NEAR = 0.8
"""Pictures fit a prompt from this part of the way on, from the mean similarity to the best."""
_FEWEST, _BEST = 8, 5
_MAX_CAPTIONS = 64 * 2**20
_LARGEST = 2**24  # of a stored shape; the real ones are a few thousand


@dataclass(frozen=True, eq=False)
class SceneBank:
    """Pictures whose scenes are drawn.

    Args:
        scenes: Their image tokens in the reduced space, (pictures, directions).
        keys: What a prompt is compared with, (pictures, key width), of length 1; (pictures, 0)
            where nothing is known, and any picture then fits any prompt.
        captions: What they show; "" where nobody said.
        near: Similarities of a held-out prompt to its nearest picture: one that is lower than all
            but a few, and the middle one. A prompt below the first is near to nothing here. None
            takes the nearest however far they are.
    """

    scenes: Tensor
    keys: Tensor
    captions: tuple[str, ...]
    near: tuple[float, float] | None = None

    def __len__(self) -> int:
        return len(self.scenes)

    def candidates(self, query: Tensor | None) -> tuple[Tensor, float]:
        """Numbers of the pictures that fit a prompt, and how much of their scene may be imposed.

        Args:
            query: The prompt as keys are, (key width,); None fits every picture.
        """
        if query is None or not self.keys.shape[1]:
            return torch.arange(len(self)), 1.0
        similar = self.keys @ query
        sorted_, found = similar.sort(descending=True, stable=True)
        # not a fixed number: hundreds of pictures show what a short prompt says, few a long one's
        mean, best = similar.mean(), sorted_[:_BEST].mean()
        count = int((sorted_ >= mean + _AS_NEAR * (best - mean)).sum())
        found = found[: max(min(_FEWEST, len(self)), min(count, len(self) // 10))]
        if self.near is None:
            return found, 1.0
        low, middle = self.near
        return found, min(1.0, max(0.0, 1 - (low - float(best)) / max(middle - low, 1e-6)))


@dataclass(frozen=True, eq=False)
class VariationSpace:
    """Directions of image tokens, and which of them are the scene's.

    With t a picture's image tokens as one vector: z = Wᵀ(t − μ)/s.

    Args:
        mean: μ, (tokens · width,).
        directions: W, the principal directions, (tokens · width, directions).
        deviations: s, the standard deviation along each.
        scene: Q, an orthonormal basis of the scene's part of z, (directions, scene directions).
        bank: Whence scenes are drawn.
        key_means: Means of the embeddings of prompts and of pictures, (2, embedding width), which
            are taken off before they are compared: they lie far apart in CLIP's space.
        key_directions: Principal directions of the embeddings, (embedding width, key width).
        spec: What it was fitted on, and what it kept of held-out pairs.
    """

    mean: Tensor
    directions: Tensor
    deviations: Tensor
    scene: Tensor
    bank: SceneBank
    key_means: Tensor
    key_directions: Tensor
    spec: dict[str, Any] = field(default_factory=dict)

    @property
    def reads(self) -> str:
        """What prompts are compared with: `image` embeddings, or `caption`s."""
        return str(self.spec.get("keys", "image"))

    @cached_property
    def sha256(self) -> str:
        """Hash of everything that decides images."""
        return tensors_hash(_tensors(self))

    def check(self, adapter: ImagePromptAdapter, where: object = "space") -> None:
        """Refuse an adapter with another projection than it was fitted on."""
        wanted, found = self.spec["projection"], projection_hash(adapter)
        own = (adapter.image_proj.num_tokens or 0) * adapter.token_width
        if not adapter.reads and own == len(self.mean):
            return  # of tokens that the prompt holds, nobody says which projection made them
        if wanted != found:
            raise ModelError(
                "was fitted on another adapter's projection",
                where=where,
                expected=f"projection {wanted[:12]}…, of {self.spec.get('adapter', 'unknown')}",
                found=f"projection {found[:12]}… in a {adapter.kind} adapter",
                fix="Fit one for this adapter: ipdiverse fit DATA --adapter … --out FILE.",
            )

    def reduce(self, tokens: Tensor) -> Tensor:
        """Image tokens (…, tokens, width) as z, (…, directions)."""
        flat = tokens.flatten(-2).to(self.mean)
        return (flat - self.mean) @ self.directions / self.deviations

    def expand(self, z: Tensor, tokens: Tensor) -> Tensor:
        """W (s z): what a change of z changes in tokens such as these."""
        return ((z * self.deviations) @ self.directions.T).view(tokens.shape).to(tokens)

    def recombined(self, tokens: Tensor, scenes: Tensor, strength: float = 1.0) -> Tensor:
        """The subject of some tokens in other scenes.

        z' = z − QQᵀz + QQᵀz_j, t' = t + strength · W(s(z' − z)): what lies outside W stays as it
        is, and so does everything at strength 0, to the bit.

        Args:
            tokens: (…, tokens, width).
            scenes: z_j, (…, directions).
            strength: 0..1.
        """
        if strength == 0:
            return tokens
        change = (scenes.to(self.mean) - self.reduce(tokens)) @ self.scene @ self.scene.T
        return tokens + self.expand(strength * change, tokens)

    def keys_of(self, embeds: Tensor, *, prompts: bool) -> Tensor:
        """Embeddings of prompts or of pictures as they are compared, (…, key width)."""
        centred = embeds.to(self.key_means) - self.key_means[0 if prompts else 1]
        return normalize(centred @ self.key_directions, dim=-1)

    def outside(self, embeds: Tensor) -> Tensor:
        """Share of pictures' embeddings that lies outside the directions of those it has seen."""
        centred = embeds.to(self.key_means) - self.key_means[1]
        inside = centred @ self.key_directions @ self.key_directions.T
        return (centred - inside).norm(dim=-1) / centred.norm(dim=-1)

    def drawn(self, query: Tensor | None, seed: int) -> tuple[Tensor, float]:
        """A scene for an image, by its own seed alone, and how much of it may be imposed."""
        found, share = self.bank.candidates(query)
        source = torch.Generator().manual_seed(derived_seed(seed, "scene"))
        chosen = int(torch.randint(len(found), (), generator=source))
        return self.bank.scenes[found[chosen]], share


def projection_hash(adapter: ImagePromptAdapter) -> str:
    """SHA-256 of an adapter's projection, the same whether it was stored in 16 or 32 bits."""
    state = adapter.image_proj.state_dict()
    return tensors_hash({name: tensor.half() for name, tensor in state.items()})


def space_at_hand(adapter: ImagePromptAdapter) -> VariationSpace | None:
    """The space in the package that was fitted on an adapter's projection, if there is one."""
    sizes = [adapter.image_proj.num_tokens, adapter.token_width]
    for file in sorted(CRITTERS_SPACES.glob("*.safetensors")):
        space = _opened(file, file.stat().st_mtime_ns)
        # their hash takes long for large projections, which are never of this kind
        if space.spec["tokens"] == sizes and space.spec["projection"] == projection_hash(adapter):
            return space
    return None


@lru_cache(maxsize=8)
def _opened(file: Path, _: int) -> VariationSpace:
    return load_space(file)


def as_text(spec: Mapping[str, Any]) -> str:
    """What a space is, in lines."""
    try:
        held_out, directions = spec["held_out"], spec["directions"]
        return (
            f"of {spec['adapter']} (base {spec['base']}), projection {spec['projection'][:12]}…\n"
            f"fitted on {spec['pictures']} pictures, {spec['subjects']} subjects with several, "
            f"{spec['pairs']} pairs\n"
            f"{directions['identity']} directions are the subject's and {directions['scene']} the "
            f"scene's; they explain {100 * spec['explained']:.1f} % of the image tokens\n"
            f"on held-out pairs, {100 * held_out['identity_kept']:.0f} % of what tells subjects "
            f"apart is kept, and {100 * held_out['scene_replaced']:.0f} % of what differs within "
            "one replaced\n"
            f"{spec['bank']} scenes, found by "
            + ("what they show" if spec["keys"] == "image" else "their captions")
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            "does not say how it was fitted", where="space", found=error
        ) from error


def save_space(space: VariationSpace, file: str | Path) -> None:
    """Write a space atomically (`*.safetensors`)."""
    tensors = _tensors(space)
    told = {_SPEC: json.dumps(space.spec, sort_keys=True), _HASH: tensors_hash(tensors)}
    write_bytes_atomic(Path(file), safetensors_bytes(tensors, {**told, "format": "pt"}))


def is_space(metadata: Mapping[str, str]) -> bool:
    """Whether a file with such metadata is a space."""
    return _SPEC in metadata


def load_space(file: str | Path) -> VariationSpace:
    """Open a space, in float32.

    Raises:
        CheckpointError: It is missing, broken, or something else.
    """
    file = Path(file)
    contents = open_checkpoint(file)
    if not is_space(contents.metadata):
        raise CheckpointError(
            "is not a variation space", where=file, fix="`ipdiverse fit` makes one."
        )
    if contents.metadata.get(_HASH) != tensors_hash(contents.tensors):
        raise CheckpointError(
            "is not as it was written", where=file, fix="It was damaged. Download or copy it again."
        )
    try:
        spec = json.loads(contents.metadata[_SPEC])
        return _checked(spec, contents.tensors)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, RecursionError) as error:
        raise CheckpointError("its parts do not fit together", where=file, found=error) from error


def _tensors(space: VariationSpace) -> dict[str, Tensor]:
    """As they are stored: eight bits, with a scale for each direction, where there are many."""
    bank = space.bank
    near = [] if bank.near is None else list(bank.near)
    packed = {
        "variation.directions": space.directions.T,
        "variation.scene": space.scene.T,
        "bank.scenes": bank.scenes.T,
        "bank.keys": bank.keys.T,
    }
    return {
        "variation.mean": space.mean.half().contiguous(),
        "variation.deviations": space.deviations.float().contiguous(),
        "keys.means": space.key_means.half().contiguous(),
        "keys.directions": space.key_directions.half().contiguous(),
        "bank.near": torch.tensor(near),
        "bank.captions": _text(bank.captions),
        **{n: t for name, rows in packed.items() for n, t in _eight_bits(name, rows).items()},
    }


def _checked(spec: dict[str, Any], tensors: dict[str, Tensor]) -> VariationSpace:
    """A space of a file's parts (ValueError where they do not fit)."""
    mean, deviations = (tensors[f"variation.{name}"].float() for name in ("mean", "deviations"))
    directions, scene, scenes, keys = (
        _from_eight_bits(name, tensors)
        for name in ("variation.directions", "variation.scene", "bank.scenes", "bank.keys")
    )
    near, captions = tensors["bank.near"].tolist(), _captions(tensors["bank.captions"])
    count, sizes = len(scenes), (len(mean), len(deviations))
    means, key_directions = tensors["keys.means"].float(), tensors["keys.directions"].float()
    shapes = [
        (mean.shape, sizes[:1]),
        (deviations.shape, sizes[1:]),
        (directions.shape, sizes),
        (scene.shape, (sizes[1], scene.shape[1])),
        (scenes.shape, (count, sizes[1])),
        (keys.shape, (count, keys.shape[1])),
        (means.shape, (2, means.shape[1])),
        (key_directions.shape, (means.shape[1], keys.shape[1])),
    ]
    if wrong := [f"{tuple(is_)}, not {should}" for is_, should in shapes if tuple(is_) != should]:
        raise ValueError(f"a shape is {wrong[0]}")
    if not count or len(captions) != count or len(near) not in (0, 2):
        raise ValueError(f"a bank of {count} pictures has {len(captions)} captions")
    if not isinstance(spec.get("projection"), str):
        raise ValueError("it does not say which projection it was fitted on")
    every = (mean, deviations, directions, scene, scenes, keys, means, key_directions)
    if not all(one.isfinite().all() for one in every):
        raise ValueError("a number is not finite")
    if not bool((deviations > 0).all()):
        raise ValueError("a deviation is not positive")
    bank = SceneBank(scenes, keys, captions, (near[0], near[1]) if near else None)
    return VariationSpace(mean, directions, deviations, scene, bank, means, key_directions, spec)


def _eight_bits(name: str, rows: Tensor) -> dict[str, Tensor]:
    """Whole numbers of −127 to 127, and what they are multiplied with, for each row."""
    scale = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127 if rows.numel() else rows[:, :1]
    whole = (rows / scale).round().to(torch.int8) if rows.numel() else rows.to(torch.int8)
    return {name: whole.contiguous(), f"{name}.scale": scale.flatten().float().contiguous()}


def _from_eight_bits(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    whole, scale = tensors[name], tensors[f"{name}.scale"]
    if whole.dtype != torch.int8 or whole.ndim != 2 or max(whole.shape) > _LARGEST:
        raise ValueError(f"{name} is {whole.dtype} {tuple(whole.shape)}")
    if not whole.numel():
        return whole.T.float()
    return (whole.float() * scale.float()[:, None]).T.contiguous()


def _text(lines: Sequence[str]) -> Tensor:
    packed = zlib.compress(json.dumps(list(lines)).encode(), 9)
    return torch.frombuffer(bytearray(packed), dtype=torch.uint8)


def _captions(packed: Tensor) -> tuple[str, ...]:
    """Captions of a file, which may claim to hold gigabytes."""
    opened = zlib.decompressobj()
    try:
        text = opened.decompress(packed.numpy().tobytes(), _MAX_CAPTIONS)
    except zlib.error as error:
        raise ValueError(f"captions cannot be unpacked: {error}") from error
    if not opened.eof:
        raise ValueError(f"captions are cut off, or longer than {_MAX_CAPTIONS} bytes")
    lines = json.loads(text)
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError("captions are not a list of text")
    return tuple(lines)
