"""What a study measures: arms, each one way of sampling, read from a TOML file.

pairs = 200                     # (prompt, reference) pairs
images = 16                     # of each
steps = 25                      # default: the base's own, as for scale and guidance_scale

[[arm]]
name = "plain"                  # its name in the report
family = "λ sweep"              # arms of a family are joined by a line
adapter = "plus"                # and options of `ipdiverse generate`: scale, preset, start_at,
scale = 1.0                     # end_at, guidance_scale, diversity, space, candidates, every lever

[[sweep]]                       # an arm for every combination
family = "λ × guidance"
scale = [0.0, 0.25, 0.5, 0.75, 1.0]
guidance_scale = [1.0, 3.0, 7.5]
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from ipdiverse.base.adapters import DEFAULT_ADAPTER, default_adapter
from ipdiverse.base.bases import CRITTERS, defaults_of
from ipdiverse.config import read, read_toml, renamed
from ipdiverse.dial import DROPPED_LEVERS
from ipdiverse.errors import ArgumentError, IpdiverseError, check_range
from ipdiverse.levers import LEVERS
from ipdiverse.sampling.request import MAX_IMAGES, MAX_STEPS, RENAMED, Request

SETTINGS = (
    *("adapter", "scale", "preset", "start_at", "end_at", "guidance_scale", "diversity"),
    *("candidates", "space", "fast"),
)
"""What an arm may set besides levers: fields of `Request`."""


@dataclass(frozen=True)
class Arm:
    """One way of sampling.

    Args:
        name: Different for every arm.
        family: Arms that belong together.
        settings: Levers, and fields of `Request` that are in `SETTINGS`.
        adapters: Files of the same training with different seeds; empty takes the adapter in
            `settings`.
        at: Position in the family; None keeps the order of the file.
    """

    name: str
    family: str
    settings: dict[str, Any] = field(default_factory=dict)
    adapters: tuple[str, ...] = ()
    at: float | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """The adapters, one for each training seed."""
        return self.adapters or (str(self.settings.get("adapter", DEFAULT_ADAPTER)),)

    def request(
        self, steps: int | None, guidance_scale: float | None, scale: float | None = 1.0
    ) -> Request:
        """The arm as a request without images and prompts; what it sets itself comes first."""
        own = {name: value for name, value in self.settings.items() if name != "adapter"}
        usual = {"n": 1, "steps": steps, "scale": scale, "guidance_scale": guidance_scale}
        return Request.of(usual | own, self.name)


@dataclass(frozen=True)
class Study:
    """Arms, measured on the same pairs with the same seeds.

    Args:
        arms: What is compared. Arms that name no adapter take the base's own.
        base: The base model.
        pairs: (prompt, reference) pairs.
        images: Of each pair.
        steps: Denoising steps; None takes the base's own.
        seed: Of pairs and noise.
        split: Identities of critters to draw: `test` to report, `validation` to calibrate.
        edits: Prompts on critters also contradict one attribute of the reference's identity.
        references: Folder of reference images; None draws held-out critters.
        prompts: File with a prompt a line, for `references`.
        features: Encoders to compare images by: names in `features.ENCODERS`, folders, hub ids.
        image_encoder: The encoder that adapters read references with, a folder or hub id; None
            takes the base's, or that of a preset whose adapter an arm names.
        baseline: Name of the arm that others are compared with; None is the first.
    """

    arms: tuple[Arm, ...]
    base: str = CRITTERS
    pairs: int = 200
    images: int = 16
    steps: int | None = None
    seed: int = 3
    split: Literal["test", "validation"] = "test"
    edits: bool = False
    references: str | None = None
    prompts: str | None = None
    features: tuple[str, ...] = ()
    image_encoder: str | None = None
    baseline: str | None = None

    def __post_init__(self) -> None:
        if self.steps is None:
            object.__setattr__(self, "steps", defaults_of(self.base).steps)
        check_range("pairs", self.pairs, 2, 100_000)
        check_range("images", self.images, 2, MAX_IMAGES)
        check_range("steps", self.steps or 0, 1, MAX_STEPS)
        if self.split not in ("test", "validation"):
            expected = "test or validation"
            raise ArgumentError("is unknown", where="split", expected=expected, found=self.split)
        if self.prompts is not None and self.references is None:
            raise ArgumentError(
                "needs references",
                where="prompts",
                fix="Set references too; critters have their own prompts.",
            )
        object.__setattr__(self, "arms", tuple(_prompted(arm, self.base) for arm in self.arms))
        names = [arm.name for arm in self.arms]
        if not names:
            raise ArgumentError("are missing", where="arms")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ArgumentError("need different names", where="arms", found=", ".join(twice))
        for arm in self.arms:
            drawn = arm.settings.get("candidates", self.images)
            check_range(f"{arm.name}: candidates", drawn, self.images, MAX_IMAGES)
        if self.baseline is not None and self.baseline not in names:
            raise ArgumentError("is not the name of an arm", where="baseline", found=self.baseline)

    @property
    def baseline_arm(self) -> Arm:
        """The arm that others are compared with."""
        return next((arm for arm in self.arms if arm.name == self.baseline), self.arms[0])

    @property
    def sources(self) -> list[str]:
        """Every adapter that an arm names, once."""
        return list(dict.fromkeys(source for arm in self.arms for source in arm.sources))


def read_study(file: Path) -> Study:
    """Read a study.

    Settings of version 0.1 that were renamed are read under their names of today. Arms that set
    a lever of version 0.1 that is gone are left out. A warning says both.
    """
    content = read_toml(file)
    entries = [renamed(entry, RENAMED, file) for entry in _tables(content, "arm", file)]
    for entry in _tables(content, "sweep", file):
        entries += _swept(renamed(entry, RENAMED, file), file)
    arms = tuple(_arm(entry, file) for entry in _without_dropped(entries, file))
    study = read(Study, content | {"arms": arms}, file)
    try:
        for arm in study.arms:
            arm.request(study.steps, 1.0)
    except IpdiverseError as error:
        raise ArgumentError(str(error), where=file) from error
    return study


def quick_study() -> Study:
    """A coarse study of the shipped adapters: few pairs, the λ sweep of the plain one, the dial."""
    sweep = [
        Arm(f"λ {scale:g}", "plain, λ sweep", {"adapter": "plus", "scale": scale}, at=scale)
        for scale in (1.0, 0.75, 0.5, 0.25, 0.0)
    ]
    dial = [
        Arm(f"diversity {setting:g}", "dial", {"diversity": setting}, at=setting)
        for setting in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    return Study(arms=(*sweep, *dial), pairs=24, images=8, steps=15)


def _prompted(arm: Arm, base: str) -> Arm:
    """The arm with the base's own adapter if it names none; `Arm.sources` has that of critters."""
    if base == CRITTERS or arm.adapters or "adapter" in arm.settings:
        return arm
    return replace(arm, adapters=(default_adapter(base),))


def _tables(content: dict[str, Any], name: str, file: Path) -> list[dict[str, Any]]:
    found = content.pop(name, [])
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ArgumentError("is not a table", where=f"{file}: {name}", expected=f"[[{name}]]")
    return found


def _without_dropped(entries: list[dict[str, Any]], file: Path) -> list[dict[str, Any]]:
    """Entries that set none of the levers that are gone: without them they would be other arms."""
    gone = DROPPED_LEVERS.keys() - LEVERS.keys()
    kept = [entry for entry in entries if not gone & entry.keys()]
    if less := len(entries) - len(kept):
        named = ", ".join(sorted(gone & {key for entry in entries for key in entry}))
        warnings.warn(
            f"{file}: left out {less} arms, as these levers no longer exist: {named}", stacklevel=3
        )
    return kept


def _arm(entry: dict[str, Any], file: Path) -> Arm:
    own = {key: entry[key] for key in ("name", "family", "at", "adapters") if key in entry}
    settings = {key: value for key, value in entry.items() if key not in own}
    where = f"{file}: arm {entry.get('name', '')!r}"
    if unknown := sorted(settings.keys() - {*SETTINGS, *LEVERS}):
        raise ArgumentError("unknown key", where=where, found=", ".join(unknown))
    if isinstance(settings.get("interval"), list):
        settings["interval"] = tuple(settings["interval"])
    family = own.get("name", "")  # an arm without a family is one by itself
    return read(Arm, {"family": family, "settings": settings} | own, where)


def _swept(entry: dict[str, Any], file: Path) -> list[dict[str, Any]]:
    """An arm's entry for every combination of the keys that hold lists."""
    family = entry.get("family")
    if not isinstance(family, str):
        raise ArgumentError("has no family", where=f"{file}: sweep", found=entry)
    varied = {key: values for key, values in entry.items() if _varies(key, values)}
    if empty := sorted(key for key, values in varied.items() if not values):
        raise ArgumentError("is empty", where=f"{file}: sweep {family!r}", found=", ".join(empty))
    found = []
    for values in product(*varied.values()):
        chosen = dict(zip(varied, values, strict=True))
        words = ", ".join(
            f"{key} {value:g}" if isinstance(value, (int, float)) else f"{key} {value}"
            for key, value in chosen.items()
        )
        one = entry | chosen | {"name": f"{family}: {words}"}
        # arms that differ in one number lie on a line, and the report joins them
        if len(varied) == 1 and isinstance(values[0], (int, float)):
            one["at"] = values[0]
        found.append(one)
    return found


def _varies(key: str, value: Any) -> bool:
    """Whether a key of a sweep holds values to try; one interval or all adapters are not."""
    if not isinstance(value, list) or key == "adapters":
        return False
    return key != "interval" or bool(value and isinstance(value[0], list))
