"""`evaluate` and `calibrate`: variety against fidelity, and the dial's path through it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from ipdiverse.base.bases import CRITTERS
from ipdiverse.commands.console import agree_to_study, check_target, say, say_json, write_json
from ipdiverse.errors import MAX_SENTENCE, ArgumentError, quoted

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
    yes: bool = False
    json: bool = False

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
        self._made() if self.images else self._study()

    def _study(self) -> None:
        from ipdiverse.evaluation.report import write_report
        from ipdiverse.evaluation.running import Runner
        from ipdiverse.evaluation.study import quick_study, read_study

        study = read_study(Path(self.config)) if self.config else quick_study()
        agree_to_study(study, self.yes)
        out = Path(self.out or "out/evaluation")
        done = Runner(study, out).run()
        page = write_report(study, done, out)
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
        from ipdiverse.adapter.files.conversion import store_base_weights
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
        if before is not None:
            store_base_weights(source, adapter_file(self.base, before), target)
            study = calibration_study(str(target), **numbers)
        dial, path = calibrate(study, Path(self.work), self.levers, _tell, target)
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


def _tell(line: str) -> None:
    sys.stderr.write(quoted(line, MAX_SENTENCE) + "\n")
