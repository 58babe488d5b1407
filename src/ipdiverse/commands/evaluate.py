"""`evaluate`, `calibrate` and `fit`: variety against fidelity, the dial's path, its scenes."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ipdiverse.base.bases import CRITTERS
from ipdiverse.commands.cluster import MERGES, Spread, in_parts
from ipdiverse.commands.console import (
    agree_to_encoders,
    agree_to_study,
    check_target,
    note,
    say,
    say_json,
    write_json,
)
from ipdiverse.config import problems, read_toml
from ipdiverse.errors import MAX_SENTENCE, ArgumentError, quoted
from ipdiverse.training.config import CacheConfig, FitOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ipdiverse.adapter.model import ImagePromptAdapter
    from ipdiverse.evaluation.study import Study
    from ipdiverse.parts import Part
    from ipdiverse.training.frozen import FrozenEncoders, Preprocessing

_OF_IMAGES = ("references", "prompts", "features")
MOVED = ("--publish", "--readings", "--partial")
"""Flags of version 0.1 that only the shipped study needs; `python -m workshop study` has them."""


@dataclass(frozen=True)
class Evaluate:
    """Measure variety against fidelity: a study of arms, or images that any tool made.

    Args:
        config: A study in TOML; an interrupted one resumes.
        quick: A coarse study of the shipped adapters on critters, in minutes.
        images: A folder of sets that any tool made, `STEM/*.png` for the reference STEM.
        references: Folder of references, for `images`.
        prompts: File with a prompt a line, for `images`.
        features: Encoders to compare `images` by: `dino` (the default), `clip`, `base`, a folder or
            a hub id.
        out: Folder for a study's images, results and report, or file for the JSON of `images`.
        spread: How the drawing of a study is spread over processes; `merge` then scores it.
        yes: Download what a study's preset needs without asking.
        json: Print the results as JSON.
    """

    config: str | None = None
    quick: bool = False
    images: str | None = None
    references: str | None = None
    prompts: str | None = None
    features: tuple[str, ...] = ()
    out: str | None = None
    spread: Spread = field(default_factory=Spread)
    yes: bool = False
    json: bool = False

    @property
    def home(self) -> Path:
        """The folder of a study."""
        return Path(self.out or "out/evaluation")

    def _read(self) -> Study:
        from ipdiverse.evaluation.study import quick_study, read_study

        study = read_study(Path(self.config)) if self.config else quick_study()
        agree_to_study(study, self.yes)
        return study

    def opened(self) -> Callable[[Part], Any]:
        """Open the base of a study, and draw any part of its images."""
        from ipdiverse.evaluation.running import Runner

        study = self._read()
        config = None if self.config is None else str(Path(self.config).absolute())
        about = {"kind": "evaluate", "config": config, "study": repr(study)}
        runner = Runner(study, self.home)
        return lambda part: runner.draw(part, about)

    def run(self) -> None:
        """Measure, write, say where."""
        if sum((bool(self.config), self.quick, bool(self.images))) != 1:
            raise ArgumentError(
                "needs one of them", where="evaluate", expected="--config, --quick or --images"
            )
        stray = [f"--{name}" for name in _OF_IMAGES if getattr(self, name)]
        if stray and not self.images:
            verb = "has" if len(stray) == 1 else "have"
            fix = "Set it in the study's file."
            raise ArgumentError(f"{verb} no effect with a study", where=", ".join(stray), fix=fix)
        if self.images:
            if self.spread != Spread():
                raise ArgumentError("have no effect with --images", where="--part, --to, --ray")
            self._made()
        else:
            in_parts(self.spread, self.home, self.opened, self._study)

    def _study(self) -> None:
        from ipdiverse.evaluation.report import write_report
        from ipdiverse.evaluation.running import Runner

        study = self._read()
        done = Runner(study, self.home).run()
        page = write_report(study, done, self.home)
        if self.json:
            rows = [one.row() for one in done.measured]
            say_json({"arms": rows, "hypervolumes": done.hypervolumes})
        else:
            say(f"open {page}")

    def _made(self) -> None:
        from ipdiverse.base.bases import load_base
        from ipdiverse.evaluation.bootstrap import interval
        from ipdiverse.evaluation.features import made_sets, open_encoder, score_made

        if not self.references:
            raise ArgumentError("is missing", where="references", fix="Give --references DIR.")
        check_target(self.out)
        prompts = Path(self.prompts) if self.prompts else None
        sets = made_sets(Path(self.images or ""), Path(self.references), prompts)
        features = self.features or ("dino",)
        pipe = load_base().pipe if "base" in features else None
        sums = score_made(sets, [open_encoder(name, pipe) for name in features])
        scores = {name: list(interval([found])) for name, found in sums.items()}
        report = {"sets": len(sets), "images": sum(len(one.files) for one in sets)}
        report |= {"features": list(features), "scores": scores}
        write_json(self.out, report)
        if self.json:
            say_json(report)
            return
        say(f"{report['sets']} sets, {report['images']} images")
        for name, (estimate, low, high) in scores.items():
            say(f"{name}: {estimate:.3f} ({low:.3f} to {high:.3f})")


@dataclass(frozen=True)
class Calibrate:
    """Find the dial's path for an adapter and write it into its file.

    Args:
        adapter: A name, file or hub id.
        base: The base model that it prompts.
        references: Folder of reference images; None takes critters that nothing was trained on.
        prompts: File with a prompt a line, for `references`.
        features: Encoders to compare images by, for `references`: the first measures variety and
            retention, the first that reads text measures the prompt.
        pairs: (prompt, reference) pairs.
        images: Of each pair.
        image_encoder: The encoder that the adapter reads references with, a folder or hub id; None
            takes the base's, or a preset adapter's own.
        steps: Denoising steps; None takes the base's own.
        levers: Those that the dial may move; by default all that the adapter has.
        base_weights: The adapter that this one was fine-tuned from, whose weights are stored with
            its own: the dial then leads from these to its own, and 0 is the former, to the bit.
        work: Folder for images; an interrupted calibration resumes.
        out: The file to write; None adds to the adapter's own, if `ipdiverse train` wrote it.
        yes: Download what a preset needs without asking.
        json: Print the path with what it achieved.
    """

    adapter: str
    base: str = CRITTERS
    references: str | None = None
    prompts: str | None = None
    features: tuple[str, ...] = ()
    pairs: int = 32
    images: int = 8
    image_encoder: str | None = None
    steps: int | None = None
    levers: tuple[str, ...] = ()
    base_weights: str | None = None
    work: str = "out/calibration"
    out: str | None = None
    yes: bool = False
    json: bool = False

    def run(self) -> None:
        """Climb, say every point, write."""
        from ipdiverse.base.adapters import adapter_file
        from ipdiverse.evaluation.calibrate import calibrate, calibration_study
        from ipdiverse.evaluation.study import Arm, Study

        # flags that are settings of the study, each under its own name
        names = Study.__dataclass_fields__.keys() & Calibrate.__dataclass_fields__.keys()
        numbers = {name: getattr(self, name) for name in names}
        study = calibration_study(self.adapter, **numbers)
        before = self.base_weights
        others = () if before is None else (Arm("base weights", "path", {"adapter": before}),)
        agree_to_study(replace(study, arms=study.arms + others), self.yes)
        source = adapter_file(self.base, self.adapter)
        target = Path(self.out) if self.out else _own(source)
        if target.suffix != ".safetensors":
            raise ArgumentError("must end in .safetensors", where="out", found=target)
        check_target(str(target))  # before hours of drawing
        tell = lambda line: print(quoted(line, MAX_SENTENCE), file=sys.stderr)  # noqa: E731, T201
        dial, path = calibrate(study, Path(self.work), self.levers, tell, target, before)
        say_json({"path": path, "dial": dial.as_spec()}) if self.json else say(f"wrote {target}")


def _own(source: Path) -> Path:
    """The adapter's file itself, if it is the user's to change."""
    from ipdiverse.adapter.files.checkpoint import read_spec
    from ipdiverse.base.adapters import CRITTERS_ADAPTERS

    shipped = source.resolve().parent == CRITTERS_ADAPTERS.resolve()
    # only adapters that ipdiverse trained hold a recipe
    if shipped or "recipe" not in read_spec(source):
        raise ArgumentError(
            "was published by others", where=source, fix="Name a new file: --out FILE.safetensors."
        )
    return source


_FEW = 300
"""Pairs below which a space keeps notably less of a subject; `docs/guides/adapters-you-have.md`."""


@dataclass(frozen=True)
class Fit:
    """Find what is the scene's in an adapter's image tokens, so that each image can have its own.

    Nothing is trained, and only the image encoder and the adapter's projection run. The file fits
    every adapter with the same projection. `--config FILE.toml` sets any option but the folder;
    flags override it.

    Args:
        folder: A folder that `prepare` wrote, with subjects of several pictures or with pairs.
        out: The file to write, `.safetensors`.
        adapter: Of a kind that reads no faces: a name, file or folder, or a hub id and its path.
        cache: The base, its image encoder, and how pictures were embedded if they are already.
        fit: How it is fitted.
        spread: How the embedding is spread over processes; `merge` then fits.
        local_files_only: Never connect.
        json: Print the report as JSON.
        yes: Download what a preset needs without asking.
    """

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    out: str
    adapter: str = ""
    cache: CacheConfig = field(default_factory=CacheConfig)
    fit: FitOptions = field(default_factory=FitOptions)
    spread: Spread = field(default_factory=Spread)
    local_files_only: bool = False
    json: bool = False
    yes: bool = False

    def opened(self) -> Callable[[Part], Any]:
        """Open encoders and adapter, and embed any part of the pictures."""
        from ipdiverse.training.fit import embed_part

        _, read = self._open()
        asked = asdict(replace(self, out=str(Path(self.out).absolute())))
        about = {"kind": "fit", "fit": {k: v for k, v in asked.items() if k != "spread"}}
        return lambda part: embed_part(Path(self.folder), *read, part, about)

    def run(self) -> None:
        """Fit, write and report."""
        in_parts(self.spread, Path(self.folder), self.opened, self.summed_up)

    def summed_up(self) -> None:
        """Fit what is embedded, and the rest too."""
        from ipdiverse.adapter.imagine import as_text, save_space
        from ipdiverse.training.fit import fit_space

        named, read = self._open()
        about = {"base": self.cache.base, "adapter": named}
        space = fit_space(Path(self.folder), *read, self.fit, about)
        save_space(space, Path(self.out))
        if self.json:
            say_json(space.spec | {"file": self.out})
            return
        say(f"{as_text(space.spec)}\nwrote {self.out}")
        if space.spec["pairs"] < _FEW:
            note(f"fitted on {space.spec['pairs']} pairs; from {_FEW} on more of a subject is kept")

    def _open(self) -> tuple[str, tuple[FrozenEncoders, ImagePromptAdapter, Preprocessing]]:
        """The adapter's name, the encoders, the adapter, and how pictures are shown to them."""
        from ipdiverse.adapter.files.checkpoint import load_adapter
        from ipdiverse.base.adapters import adapter_file, default_adapter
        from ipdiverse.data.manifest import read_manifest
        from ipdiverse.training.fit import check_kind
        from ipdiverse.training.frozen import Preprocessing, open_encoders

        check_target(self.out)
        read_manifest(Path(self.folder))
        base, encoder = self.cache.base, self.cache.image_encoder
        named = self.adapter or default_adapter(base)
        agree_to_encoders(base, encoder, self.yes, named, trains=False)
        file = adapter_file(base, named, local_files_only=self.local_files_only)
        adapter = load_adapter(file)
        check_kind(adapter)
        given: dict[str, Any] = {"local_files_only": self.local_files_only}
        encoders = open_encoders(base, encoder, **given, unet=False, trains=False)
        return named, (encoders, adapter, Preprocessing.of(self.cache, encoders.resolution))


def _merged(folder: Path, about: Mapping[str, Any]) -> str:
    """Join the parts of a cache, and fit what it holds."""
    line, asked = MERGES["embed"](folder, about), about["fit"]
    cache, fit = CacheConfig(**asked["cache"]), FitOptions(**asked["fit"])
    Fit(**{**asked, "folder": str(folder), "cache": cache, "fit": fit}).summed_up()
    return line


MERGES["fit"] = _merged


def read_fit(file: Path) -> dict[str, Any]:
    """The options of `fit` in a TOML file."""
    content = read_toml(file)
    own = Fit.__dataclass_fields__.keys() - {"folder", "cache", "fit", "spread"}
    parts = {kind: kind.__dataclass_fields__.keys() for kind in (CacheConfig, FitOptions)}
    found = [
        line
        for kind, names in {**parts, Fit: own}.items()
        for line in problems(kind, {k: v for k, v in content.items() if k in names})
    ]
    known = own.union(*parts.values())
    found += [f"unknown key {key!r}" for key in content if key not in known]
    if found:
        raise ArgumentError("; ".join(found), where=file)
    return content
