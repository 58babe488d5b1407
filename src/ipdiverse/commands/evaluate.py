"""`evaluate` and `calibrate`: variety against fidelity, and the dial's path through it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from ipdiverse.commands.console import agree_to_study, check_target, say, say_json, write_json
from ipdiverse.errors import ArgumentError
from ipdiverse.evaluation.options import CalibrateOptions


@dataclass(frozen=True)
class Evaluate:
    """Measure variety against fidelity: a study of arms, or images that any tool made.

    Args:
        config: A study in TOML; an interrupted one goes on.
        quick: A coarse study of the shipped adapters on critters, in minutes.
        images: A folder of sets that any tool made, `STEM/*.png` for the reference STEM.
        references: Folder of references, for `images`.
        prompts: File with a prompt a line, for `images`.
        features: Encoders to compare `images` by: `dino`, which is the default, `clip`, `base`, a
            folder or a hub id.
        out: Folder for the study's images, results and report; file for `images`' JSON.
        publish: Copy the study's numbers and pictures, and what was read in its images, to this
            folder.
        readings: A folder `publish` wrote readings to: arms that are there are not drawn again.
        partial: Draw nothing: report on what of the study was drawn or read so far.
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
    publish: str | None = None
    readings: str | None = None
    partial: bool = False
    yes: bool = False
    json: bool = False

    def run(self) -> None:
        """Measure, write, say where."""
        given = [bool(self.config), self.quick, bool(self.images)]
        if sum(given) != 1:
            raise ArgumentError(
                "needs one of them", where="evaluate", expected="--config, --quick or --images"
            )
        self._check_heard()
        self._made() if self.images else self._study()

    def _check_heard(self) -> None:
        """Refuse what only the other way of measuring would heed."""
        way, others = ("--images", _OF_STUDIES) if self.images else ("a study", _OF_IMAGES)
        if stray := [f"--{name}" for name in others if getattr(self, name)]:
            own = "Leave out what is for studies." if self.images else "Its file says so itself."
            raise ArgumentError(
                "would not be heeded", where=", ".join(stray), found=f"with {way}", fix=own
            )

    def _study(self) -> None:
        from ipdiverse.evaluation.report import publish, write_report
        from ipdiverse.evaluation.running import run_study
        from ipdiverse.evaluation.study import quick_study, read_study

        study = read_study(Path(self.config)) if self.config else quick_study()
        agree_to_study(study, self.yes)
        out = Path(self.out or "out/evaluation")
        known = Path(self.readings) if self.readings else None
        done = run_study(study, out, known=known, partial=self.partial)
        page = write_report(study, done, out)
        if self.publish:
            publish(out, Path(self.publish))
        if self.json:
            rows = [one.row() for one in done.measured]
            say_json({"arms": rows, "hypervolumes": done.hypervolumes})
        else:
            say(f"open {page}")

    def _made(self) -> None:
        from ipdiverse.base.bases import load_base
        from ipdiverse.evaluation.bootstrap import interval
        from ipdiverse.evaluation.features import open_encoder
        from ipdiverse.evaluation.folders import made_sets, score_made

        if not self.references:
            raise ArgumentError("is missing", where="references", fix="Give --references DIR.")
        check_target(self.out)
        prompts = Path(self.prompts) if self.prompts else None
        sets = made_sets(Path(self.images or ""), Path(self.references), prompts)
        features = self.features or ("dino",)
        pipe = load_base().pipe if "base" in features else None
        encoders = [open_encoder(name, pipe) for name in features]
        parts = score_made(sets, encoders)
        scores = {name: list(interval([part])) for name, part in parts.items()}
        report = {"sets": len(sets), "images": sum(len(one.files) for one in sets)}
        report |= {"features": list(features), "scores": scores}
        write_json(self.out, report)
        if self.json:
            say_json(report)
            return
        say(f"{report['sets']} sets, {report['images']} images")
        for name, (estimate, low, high) in scores.items():
            say(f"{name}: {estimate:.3f} ({low:.3f} to {high:.3f})")


_OF_IMAGES = ("references", "prompts", "features")
_OF_STUDIES = ("publish", "readings", "partial")


@dataclass(frozen=True)
class Calibrate(CalibrateOptions):
    """Find the dial's path for an adapter and write it into its file.

    Args:
        plain: The plain adapter that it went on from, to be stored beside its own weights: the dial
            then leads from one to the other, and 0 is the plain one, to the bit.
        work: Folder for images; an interrupted calibration in it goes on.
        out: The file to write; None adds to the adapter's own, if `ipdiverse train` wrote it.
        yes: Download what a preset needs without asking.
        json: Print the path with what it achieved.
    """

    plain: str | None = None
    work: str = "out/calibration"
    out: str | None = None
    yes: bool = False
    json: bool = False

    def run(self) -> None:
        """Climb, say every point, write."""
        from ipdiverse.adapter.files.checkpoint import copy_with_spec, remember_in_file
        from ipdiverse.adapter.files.sources import local_file
        from ipdiverse.base.bases import adapter_source
        from ipdiverse.evaluation.calibrate import calibrate, study_of
        from ipdiverse.evaluation.study import Arm

        study = study_of(self)
        plain = () if self.plain is None else (Arm("plain", "path", {"adapter": self.plain}),)
        agree_to_study(replace(study, arms=study.arms + plain), self.yes)
        source = local_file(adapter_source(self.base, self.adapter))
        target = Path(self.out) if self.out else _own(source)
        if target.suffix != ".safetensors":
            raise ArgumentError("must end in .safetensors", where="out", found=target)
        check_target(str(target))
        adapter = self.adapter
        if self.plain is not None:
            remember_in_file(source, local_file(adapter_source(self.base, self.plain)), target)
            source, adapter = target, str(target)
        dial, path = calibrate(replace(self, adapter=adapter), Path(self.work), _tell)
        copy_with_spec(source, target, {"dial": dial.as_spec()})
        say_json({"path": path, "dial": dial.as_spec()}) if self.json else say(f"wrote {target}")


def _own(source: Path) -> Path:
    """The adapter's file itself, if it is the user's to change."""
    from ipdiverse.adapter.files.checkpoint import read_spec
    from ipdiverse.base.bases import CRITTERS_ADAPTERS

    shipped = source.resolve().parent == CRITTERS_ADAPTERS.resolve()
    if shipped or "recipe" not in read_spec(source):
        raise ArgumentError(
            "was published by others", where=source, fix="Name a new file: --out FILE.safetensors."
        )
    return source


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")
