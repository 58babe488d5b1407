"""The dial: `diversity` in 0..1, a path through the levers. Light: nothing heavy is imported here.

An adapter that was calibrated carries its own path in its file; any other takes `default_dial`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from ipdiverse.errors import ArgumentError, CheckpointError, check_range, check_whole

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ipdiverse.adapter.model import ImagePromptAdapter


@dataclass(frozen=True)
class Levers:
    """How strongly each lever acts; the defaults change nothing, bit for bit.

    Args:
        training: Mix of the plain weights (0) and the trained ones (1); only for adapters that hold
            both.
        fusion_strength: Weight of what text-image fusion adds; 1 as trained, 0 plain IP-Adapter.
        image_guidance: w_I of factorised guidance: weight of what the image adds to the text; the
            guidance scale is w_T. None guides text and image together.
        interval: Guide only while the noise level σ is in this range (arXiv:2404.07724); None is
            always.
        late_layout: Share of the steps for which the layers that carry the layout wait.
        noise_level: τ of noise-conditioned adapters, 0..999: noise on each item's embedding, held
            over its steps.
        remove_stated: Strength of taking out of the embedding what the prompt states.
        removal_rank: Directions it may take out.
        drop: Share of image tokens dropped.
        cads: Noise on image tokens, annealed.
        repulsion: Repulsion of image tokens inside a set.
        shield: Distance kept from the reference's own latents.
        particle: Particle guidance inside a set.
        sparke: SPARKE inside a set.
    """

    training: float = 1.0
    fusion_strength: float = 1.0
    image_guidance: float | None = None
    interval: tuple[float, float] | None = None
    late_layout: float = 0.0
    noise_level: int = 0
    remove_stated: float = 0.0
    removal_rank: int = 4
    drop: float = 0.0
    cads: float = 0.0
    repulsion: float = 0.0
    shield: float = 0.0
    particle: float = 0.0
    sparke: float = 0.0

    @property
    def on_a_set(self) -> bool:
        """Whether an image depends on the others of its set."""
        return bool(self.repulsion or self.particle or self.sparke)

    def __post_init__(self) -> None:
        check_range("fusion_strength", self.fusion_strength, 0, 10)
        if self.image_guidance is not None:
            check_range("image_guidance", self.image_guidance, 0, 100)
        for name in ("noise_level", "removal_rank"):
            check_whole(name, getattr(self, name))
        check_range("noise_level", self.noise_level, 0, 999)
        check_range("removal_rank", self.removal_rank, 1, 1000)
        for name in ("training", "late_layout", "drop", "remove_stated"):
            check_range(name, getattr(self, name), 0, 1)
        for name in ("cads", "repulsion", "shield", "particle", "sparke"):
            check_range(name, getattr(self, name), 0, 100)
        if self.interval is not None and not _is_range(self.interval):
            raise ArgumentError(
                "is no range of noise levels",
                where="interval",
                expected="0 ≤ low < high",
                found=self.interval,
            )


def _is_range(interval: object) -> bool:
    if not isinstance(interval, (tuple, list)) or len(interval) != 2:
        return False
    numbers = all(isinstance(value, (int, float)) for value in interval)
    return numbers and 0 <= interval[0] < interval[1]


OFF = Levers()
"""What changes nothing."""


@dataclass(frozen=True)
class Achieved:
    """What levers achieved on a calibration's pairs.

    Args:
        variety: Normalised entropy, or an encoder's Vendi score over the number of images.
        retention: Identity kept, or an encoder's similarity to the reference.
        accuracy: Prompt obeyed, or an encoder's similarity to the prompt; None where none reads.
        invalid: Share of broken images; 0 where that is not known.
        copies: Share of images that repeat the reference's whole scene, beyond chance, or that an
            encoder takes for it; None where that is not known.
    """

    variety: float
    retention: float
    accuracy: float | None = None
    invalid: float = 0.0
    copies: float | None = None


@dataclass(frozen=True)
class Dial:
    """A path through the levers.

    Args:
        points: Levers at rising settings, the first at 0 and the last at 1. Between two of them
            every number is interpolated.
        source: Where it comes from, for people.
        achieved: Of each point; empty where nothing was measured.
    """

    points: tuple[tuple[float, Levers], ...]
    source: str
    achieved: tuple[Achieved, ...] = ()

    def __post_init__(self) -> None:
        settings = [setting for setting, _ in self.points]
        if settings != sorted(set(settings)) or settings[0] != 0 or settings[-1] != 1:
            raise ArgumentError(
                "is no path", where="dial", expected="settings from 0 up to 1", found=settings
            )
        if self.achieved and len(self.achieved) != len(self.points):
            raise ArgumentError("does not say what every point achieved", where="dial")

    def at(self, diversity: float) -> Levers:
        """Levers at a setting.

        Args:
            diversity: 0..1.

        Raises:
            ArgumentError: It is out of range.
        """
        check_range("diversity", diversity, 0, 1)
        for (low, before), (high, after) in zip(self.points, self.points[1:], strict=False):
            if diversity <= high:
                return between(before, after, (diversity - low) / (high - low))
        raise AssertionError("a path ends at 1")

    def as_spec(self) -> dict[str, Any]:
        """For a checkpoint's spec; what is off is left out."""
        points = [[setting, changed(levers)] for setting, levers in self.points]
        achieved = [asdict(scores) for scores in self.achieved]
        return {"points": points, "source": self.source, "achieved": achieved}


def between(before: Levers, after: Levers, share: float) -> Levers:
    """Levers between two, number by number; at a share of 0 and 1 exactly these."""
    if share in (0, 1):
        return after if share else before
    mixed: dict[str, Any] = {}
    for field in fields(Levers):
        one, other = getattr(before, field.name), getattr(after, field.name)
        mix = _mixed_interval if field.name == "interval" else _mixed
        mixed[field.name] = mix(one, other, share)
    mixed["noise_level"] = round(mixed["noise_level"])
    mixed["removal_rank"] = round(mixed["removal_rank"])
    return Levers(**mixed)


def _mixed(one: Any, other: Any, share: float) -> Any:
    if one == other or one is None or other is None:
        return other  # there is no number between "off" and a number: the lever comes on at once
    return one + (other - one) * share


_LOUDEST = 1e3
"""A noise level above which hardly a step lies: there an interval of "always" begins to close."""


def _mixed_interval(one: Any, other: Any, share: float) -> Any:
    """Lower ends linearly, upper ends by their logarithms, as noise levels are spread."""
    if one == other:
        return one
    (low, high), (next_low, next_high) = (ends or (0.0, _LOUDEST) for ends in (one, other))
    return (low + (next_low - low) * share, high * (next_high / high) ** share)


def changed(levers: Levers) -> dict[str, Any]:
    """The levers that are on, by name."""
    return {name: value for name, value in asdict(levers).items() if value != getattr(OFF, name)}


def dial_of(spec: Mapping[str, Any], where: object) -> Dial | None:
    """The dial in a checkpoint's spec, if it was calibrated.

    Raises:
        CheckpointError: What is there is no dial.
    """
    found = spec.get("dial")
    if found is None:
        return None
    try:
        points = tuple(
            (float(setting), replace(OFF, **_tuples(levers))) for setting, levers in found["points"]
        )
        achieved = tuple(Achieved(**scores) for scores in found.get("achieved", ()))
        return Dial(points, str(found["source"]), achieved)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArgumentError) as error:
        raise CheckpointError("its dial is broken", where=where, found=error) from error


def dial_for(adapter: ImagePromptAdapter) -> Dial:
    """An adapter's own dial, or the default one if it was not calibrated.

    Raises:
        CheckpointError: Its own is broken.
    """
    calibrated = dial_of(adapter.spec, "adapter")
    return calibrated or default_dial(adapter.fusion is not None, bool(adapter.base_weights))


def default_dial(fused: bool, has_base_weights: bool = False) -> Dial:
    """A conservative path, for adapters that were not calibrated.

    One that holds the weights it went on from is led from these to its own. Others take levers that
    need no training: first guidance is left out where it narrows most and serves least (high
    noise), then token noise is annealed and the layout waits, last some tokens are left out.

    Args:
        fused: The adapter has a text-image fusion: 0 leaves it out, as stock IP-Adapter does.
        has_base_weights: It holds the weights that it was fine-tuned from.
    """
    if has_base_weights:
        path = ((0.0, replace(OFF, training=0.0)), (1.0, OFF))
        return Dial(path, "from the weights it went on from to its own, not calibrated")
    start = replace(OFF, fusion_strength=0.0) if fused else OFF
    first = replace(OFF, interval=(0.0, 4.0), cads=0.1, late_layout=0.1)
    middle = replace(first, cads=0.25, late_layout=0.2, drop=0.1)
    last = replace(first, cads=0.6, late_layout=0.4, drop=0.25)
    path = ((0.0, start), (1e-6, OFF), (0.2, first), (0.5, middle), (1.0, last))
    return Dial(path if fused else (path[0], *path[2:]), "default path, not calibrated")


def _tuples(levers: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has lists for tuples."""
    values = dict(levers)
    if values.get("interval") is not None:
        low, high = values["interval"]
        values["interval"] = (float(low), float(high))
    return values
