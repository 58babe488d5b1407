"""What a study measures: arms, each one way of sampling, read from a TOML file.

pairs = 200                     # (prompt, reference) pairs
images = 16                     # of each
steps = 25                      # else the base's own, as scale and guidance_scale

[[arm]]
name = "plain"                  # as the report calls it
family = "λ sweep"              # arms of a family are joined by a line
adapter = "plus"                # and of what `ipdiverse generate` takes: scale, preset, start_at,
scale = 1.0                     # end_at, guidance_scale, diversity, every lever

[[sweep]]                       # an arm for every combination
family = "λ × guidance"
scale = [0.0, 0.25, 0.5, 0.75, 1.0]
guidance_scale = [1.0, 3.0, 7.5]
"""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from ipdiverse.base.bases import CRITTERS, DEFAULT_ADAPTER, default_adapter, defaults_of
from ipdiverse.errors import ArgumentError, IpdiverseError, check_range
from ipdiverse.levers import LEVERS
from ipdiverse.sampling.request import MAX_IMAGES, MAX_STEPS, Request, current

if TYPE_CHECKING:
    from pathlib import Path

SETTINGS = ("adapter", "scale", "preset", "start_at", "end_at", "guidance_scale", "diversity")
"""What an arm may set besides levers: fields of `Request`."""


@dataclass(frozen=True)
class Arm:
    """One way of sampling.

    Args:
        name: Unlike any other's.
        family: Arms that belong together.
        settings: Levers, and fields of `Request` that are in `SETTINGS`.
        adapters: Files of the same training with other seeds; empty takes `settings`' adapter.
        at: Where the arm stands in its family; None is in the order of the file.
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
        """As a request, without images and prompts.

        Args:
            steps: Denoising steps.
            guidance_scale: What holds where the arm states none.
            scale: The same, of the image prompt's weight.

        Raises:
            ArgumentError: A setting is out of range.
        """
        wanted = {name: value for name, value in self.settings.items() if name != "adapter"}
        usual = {"n": 1, "steps": steps, "scale": scale, "guidance_scale": guidance_scale}
        return Request.of(usual | wanted, self.name)


@dataclass(frozen=True)
class Study:
    """Arms, measured on the same pairs with the same seeds.

    Args:
        arms: What is compared; of another base than critters, those without an adapter take its
            own.
        base: Whose images.
        pairs: (prompt, reference) pairs.
        images: Of each pair.
        steps: Denoising steps; None takes the base's own.
        seed: Of pairs and noise.
        split: Identities of critters to draw: `test` to report, `validation` to calibrate.
        edits: Prompts on critters state one attribute of identity too, not as the reference has it.
        references: Folder of reference images; None draws held-out critters.
        prompts: File with a prompt a line, for `references`.
        features: Encoders to compare images by: of `features.ENCODERS`, folders, hub ids.
        image_encoder: What adapters read references with, a folder or hub id; None takes the
            base's, or that of a preset whose adapter is among the arms'.
        baseline: Name of the arm that differences are taken from; None is the first.
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
            raise ArgumentError(
                "is no split", where="split", expected="test or validation", found=self.split
            )
        if self.prompts is not None and self.references is None:
            raise ArgumentError(
                "go with references alone",
                where="prompts",
                found="none",
                fix="Give references too; critters have prompts of their own.",
            )
        object.__setattr__(self, "arms", tuple(_prompted(arm, self.base) for arm in self.arms))
        names = [arm.name for arm in self.arms]
        if not names or len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ArgumentError(
                "must each have a name of their own" if names else "are missing",
                where="arms",
                found=", ".join(twice) or None,
            )
        if self.baseline is not None and self.baseline not in names:
            raise ArgumentError("names no arm", where="baseline", found=self.baseline)

    @property
    def baseline_arm(self) -> Arm:
        """What differences are taken from."""
        return next((arm for arm in self.arms if arm.name == self.baseline), self.arms[0])

    def settings(self) -> dict[str, Any]:
        """For reports: everything but the arms."""
        return {name: value for name, value in asdict(self).items() if name != "arms"}


def read_study(file: Path) -> Study:
    """Read a study.

    Raises:
        ArgumentError: The file cannot be read, or says what no study has.
    """
    try:
        content = tomllib.loads(file.read_text("utf-8"))
    except (OSError, UnicodeError, tomllib.TOMLDecodeError) as error:
        raise ArgumentError("cannot be read", where=file, expected="TOML", found=error) from error
    arms = [_arm(entry, file) for entry in _entries(content, "arm", file)]
    for entry in _entries(content, "sweep", file):
        arms += _swept(entry, file)
    known = {f.name for f in fields(Study)} - {"arms"}
    if unknown := sorted(content.keys() - known):
        raise ArgumentError("unknown key", where=file, found=", ".join(unknown))
    for name, kind in _KINDS.items():
        if name in content and (
            not isinstance(content[name], kind) or isinstance(content[name], bool) != (kind is bool)
        ):
            raise ArgumentError(
                "is of another type", where=f"{file}: {name}", found=repr(content[name])
            )
    if "features" in content:
        content["features"] = _words(content["features"], f"{file}: features")
    try:
        study = Study(arms=tuple(arms), **content)
        for arm in study.arms:
            arm.request(study.steps, 1.0)
    except (IpdiverseError, TypeError) as error:
        raise ArgumentError(str(error), where=file) from error
    return study


def _prompted(arm: Arm, base: str) -> Arm:
    """The arm with its adapter; what critters take stands in `Arm.sources`."""
    if base == CRITTERS or arm.adapters or "adapter" in arm.settings:
        return arm
    return replace(arm, adapters=(default_adapter(base),))


def quick_study() -> Study:
    """A coarse study of the shipped adapters: few pairs, the plain one's λ sweep, the dial."""
    sweep = [
        Arm(f"λ {scale:g}", "plain, λ sweep", {"adapter": "plus", "scale": scale}, at=scale)
        for scale in (1.0, 0.75, 0.5, 0.25, 0.0)
    ]
    dial = [
        Arm(f"diversity {setting:g}", "dial", {"diversity": setting}, at=setting)
        for setting in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    return Study(arms=(*sweep, *dial), pairs=24, images=8, steps=15)


_TEXTS = ("base", "references", "prompts", "image_encoder", "baseline", "split")
_KINDS: dict[str, type] = {
    **dict.fromkeys(("pairs", "images", "steps", "seed"), int),
    **dict.fromkeys(_TEXTS, str),
    "features": list,
    "edits": bool,
}


def _words(found: Any, where: str) -> tuple[str, ...]:
    if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
        raise ArgumentError("is no list of texts", where=where, found=repr(found))
    return tuple(found)


def _entries(content: dict[str, Any], name: str, file: Path) -> list[dict[str, Any]]:
    found = content.pop(name, [])
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ArgumentError("is no table", where=f"{file}: {name}", expected=f"[[{name}]]")
    return found


def _arm(entry: dict[str, Any], file: Path) -> Arm:
    settings = dict(entry)
    name, family = settings.pop("name", None), settings.pop("family", None)
    at, adapters = settings.pop("at", None), settings.pop("adapters", [])
    if not isinstance(name, str):
        raise ArgumentError("has no name", where=f"{file}: arm", found=entry)
    where = f"{file}: arm {name!r}"
    settings = current(settings, where)
    if unknown := sorted(settings.keys() - {*SETTINGS, *LEVERS}):
        raise ArgumentError("unknown key", where=where, found=", ".join(unknown))
    if not isinstance(at, (int, float, type(None))):
        raise ArgumentError("is no number", where=f"{where}, at", found=repr(at))
    if isinstance(settings.get("interval"), list):
        settings["interval"] = tuple(settings["interval"])
    return Arm(name, family or name, settings, _words(adapters, f"{where}, adapters"), at)


def _swept(entry: dict[str, Any], file: Path) -> list[Arm]:
    """An arm for every combination of the keys that hold lists."""
    entry = dict(entry)
    family = entry.pop("family", None)
    if not isinstance(family, str):
        raise ArgumentError("has no family", where=f"{file}: sweep", found=entry)
    varied = {
        key: values
        for key, values in entry.items()
        if isinstance(values, list) and key != "adapters" and (key != "interval" or _nested(values))
    }
    if empty := sorted(key for key, values in varied.items() if not values):
        raise ArgumentError("is empty", where=f"{file}: sweep {family!r}", found=", ".join(empty))
    fixed = {key: value for key, value in entry.items() if key not in varied}
    arms = []
    for values in product(*varied.values()):
        chosen = dict(zip(varied, values, strict=True))
        words = ", ".join(f"{key} {_said(value)}" for key, value in chosen.items())
        at = values[0] if len(varied) == 1 and isinstance(values[0], (int, float)) else None
        named = {"name": f"{family}: {words}", "family": family, "at": at}
        arms.append(
            _arm({k: v for k, v in (fixed | chosen | named).items() if v is not None}, file)
        )
    return arms


def _nested(values: list[Any]) -> bool:
    return bool(values) and isinstance(values[0], list)


def _said(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)
