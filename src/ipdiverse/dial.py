"""How strongly levers act, and the dial: `diversity` in 0..1, a path through them.

An adapter that was calibrated carries its own path in its file; any other takes `default_dial`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ipdiverse.errors import ArgumentError, CheckpointError, check_range
from ipdiverse.levers import LEVERS

if TYPE_CHECKING:
    from ipdiverse.levers import ActsOn, Lever, StepContext


class Levers(Mapping[str, Any]):
    """How strongly each lever acts: a mapping of those that are on; never changed in place.

    `levers.cads` is a lever's strength, on or off. `levers | {"cads": 0.3}` is a copy with another.

    Args:
        strengths: By name; a lever that is left out is off.

    Raises:
        ArgumentError: There is no such lever, or a strength is out of range.
    """

    __slots__ = ("_on",)
    _on: dict[str, Any]

    def __init__(self, **strengths: Any) -> None:
        if unknown := ", ".join(sorted(strengths.keys() - LEVERS.keys())):
            raise ArgumentError("unknown lever", expected=", ".join(LEVERS), found=unknown)
        for name, strength in strengths.items():
            LEVERS[name].check(strength)
        # JSON and TOML have lists for pairs
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in strengths.items()}
        # in the order of the registry, in which they act
        order = [name for name in LEVERS if name in given]
        self._on = {name: given[name] for name in order if given[name] != LEVERS[name].off}

    def __getattr__(self, name: str) -> Any:
        if name not in LEVERS:
            raise AttributeError(f"there is no lever {name!r}", name=name, obj=self)
        return self._on.get(name, LEVERS[name].off)

    def __getitem__(self, name: str) -> Any:
        return self._on[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._on)

    def __len__(self) -> int:
        return len(self._on)

    def __or__(self, other: Mapping[str, Any]) -> Levers:
        return Levers(**{**self._on, **other})

    def __hash__(self) -> int:  # calibration caches what levers achieve
        return hash(tuple(self._on.items()))

    def __repr__(self) -> str:
        return f"Levers({', '.join(f'{name}={value!r}' for name, value in self._on.items())})"

    def acting(self, acts_on: ActsOn) -> list[tuple[Lever, Any]]:
        """The levers that are on and act there, in order, with their strengths."""
        there = [(LEVERS[name], value) for name, value in self._on.items()]
        return [(lever, value) for lever, value in there if lever.acts_on == acts_on]

    def change(self, acts_on: ActsOn, subject: Any, context: StepContext) -> Any:
        """What the levers that act there make of a subject; itself where none is on."""
        for lever, strength in self.acting(acts_on):
            subject = lever.act(subject, strength, context)
        return subject


OFF = Levers()
"""What changes nothing."""

RENAMED_LEVERS = {"training": "interpolation"}
"""Levers of version 0.1 by their names of today."""
DROPPED_LEVERS = {
    **dict.fromkeys(("particle", "sparke", "repulsion", "shield"), 0),
    **dict.fromkeys(("drop", "late_layout", "remove_stated", "noise_level"), 0),
    "removal_rank": 4,
}
"""Levers of version 0.1 that are no longer there, and where each was off."""


def current_names(strengths: Mapping[str, Any], where: object = "levers") -> dict[str, Any]:
    """Strengths under today's names; a lever that is gone is left out, with a warning if on."""
    kept = {RENAMED_LEVERS.get(name, name): value for name, value in strengths.items()}
    gone = {name: kept.pop(name) for name in DROPPED_LEVERS if name in kept and name not in LEVERS}
    if on := [name for name, value in gone.items() if value != DROPPED_LEVERS[name]]:
        verb = "acts" if len(on) == 1 else "act"
        warnings.warn(f"{where}: {', '.join(on)} no longer {verb}", stacklevel=3)
    return kept


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
    """A path through the levers: points at rising settings from 0 to 1, interpolated between."""

    points: tuple[tuple[float, Levers], ...]
    source: str
    achieved: tuple[Achieved, ...] = ()

    def __post_init__(self) -> None:
        settings = [setting for setting, _ in self.points]
        if settings != sorted(set(settings)) or settings[0] != 0 or settings[-1] != 1:
            raise ArgumentError(
                "is not a path", where="dial", expected="settings from 0 up to 1", found=settings
            )
        if self.achieved and len(self.achieved) != len(self.points):
            raise ArgumentError("does not say what every point achieved", where="dial")

    def at(self, diversity: float) -> Levers:
        """Levers at a setting."""
        check_range("diversity", diversity, 0, 1)
        for (low, before), (high, after) in pairwise(self.points):
            if diversity <= high:
                return between(before, after, (diversity - low) / (high - low))
        raise AssertionError("a path ends at 1")

    def as_spec(self) -> dict[str, Any]:
        """For a checkpoint's spec; levers that are off are left out."""
        points = [[setting, dict(levers)] for setting, levers in self.points]
        achieved = [asdict(scores) for scores in self.achieved]
        return {"points": points, "source": self.source, "achieved": achieved}


def between(before: Levers, after: Levers, share: float) -> Levers:
    """Levers between two, strength by strength; at a share of 0 and 1 exactly these."""
    if share in (0, 1):
        return after if share else before
    return Levers(
        **{
            name: lever.between(getattr(before, name), getattr(after, name), share)
            for name, lever in LEVERS.items()
        }
    )


def dial_of(spec: Mapping[str, Any], where: object) -> Dial | None:
    """The dial in a checkpoint's spec, if it was calibrated."""
    found = spec.get("dial")
    if found is None:
        return None
    try:
        points = tuple(
            (float(setting), Levers(**current_names(levers, f"dial of {where}")))
            for setting, levers in found["points"]
        )
        achieved = tuple(Achieved(**scores) for scores in found.get("achieved", ()))
        return Dial(points, str(found["source"]), achieved)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArgumentError) as error:
        raise CheckpointError("its dial is broken", where=where, found=error) from error


_RECOMBINE = ((0.05, 0.2), (0.14, 0.3), (0.39, 0.4), (0.72, 0.5), (0.94, 0.6), (1.0, 1.0))
"""Settings of the dial, and strengths of `recombine`: between two scenes variety rises as a
sigmoid does, so settings are placed where it was measured to rise evenly on both plain adapters of
critters, alike (docs/study/imagined/results.json)."""


def default_dial(
    fused: bool, has_base_weights: bool = False, has_space: bool = False, draws: bool = False
) -> Dial:
    """A conservative path, for adapters that were not calibrated.

    An adapter that holds its base weights is led from these to its own. One with a variation space
    gives each image more and more of a scene of its own; so does one whose fusion draws. Others
    take levers that need no training: first guidance is left out at high noise, where it narrows
    most and serves least, then noise on image tokens grows.
    """
    if has_base_weights:
        path = ((0.0, Levers(interpolation=0.0)), (1.0, OFF))
        return Dial(path, "from the base weights to its own, not calibrated")
    if draws:
        return Dial(((0.0, Levers(fusion_strength=0.0)), (1.0, OFF)), "to drawn tokens")
    if has_space:
        rising = tuple((setting, Levers(recombine=strength)) for setting, strength in _RECOMBINE)
        start = ((0.0, Levers(fusion_strength=0.0)), (1e-6, OFF)) if fused else ((0.0, OFF),)
        return Dial((*start, *rising), "to scenes of other pictures, not calibrated")
    first = Levers(interval=(0.0, 4.0), cads=0.1)
    rising = ((0.2, first), (0.5, first | {"cads": 0.25}), (1.0, first | {"cads": 0.8}))
    if not fused:
        return Dial(((0.0, OFF), *rising), "default path, not calibrated")
    # the fusion is on as soon as the dial leaves 0: what it adds is not what the dial measures
    start = ((0.0, Levers(fusion_strength=0.0)), (1e-6, OFF))
    return Dial((*start, *rising), "default path, not calibrated")
