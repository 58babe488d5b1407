"""`python -m workshop`, in a checkout: train the shipped models and measure them."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ipdiverse.commands.console import agree_to_study, check_target, say, say_json, write_json
from ipdiverse.errors import IpdiverseError, check_range
from workshop.base.stages import STAGES, BaseRecipe
from workshop.copier import CopierOptions


@dataclass(frozen=True)
class TrainBase(BaseRecipe):
    """Train the embedded base model; run it again to resume.

    Args:
        folder: Working folder for renders, resume points, logs and finished stages.
        stages: Stages to train, in order.
        start: `nothing` for random weights; `shipped` to train the shipped UNet further, in a new
            folder.
        ship: Write the weights into the package once all stages are finished.
    """

    folder: str = "runs/base"
    stages: tuple[Literal["vae", "text", "clip", "unet", "oracle", "inspector"], ...] = STAGES
    start: Literal["nothing", "shipped"] = "nothing"
    ship: bool = True

    def run(self) -> None:
        """Train the stages, and ship them if all are finished."""
        from workshop.base.shipping import ship_base, ship_readers, start_from_shipped
        from workshop.base.stages import train_stage

        folder = Path(self.folder)
        if self.start == "shipped":
            start_from_shipped(folder, self.stages)
        for stage in self.stages:
            train_stage(stage, folder, self)
        readers = {"oracle", "inspector"}
        if self.ship and readers >= set(self.stages):
            say(f"wrote {ship_readers(folder, self._command())}")
            return
        missing = [stage for stage in STAGES if not (folder / stage / "model").exists()]
        if self.ship and not missing:
            say(f"wrote {ship_base(folder, self._command())}")
        elif self.ship:
            say(f"not shipped: train {', '.join(missing)} first")

    def _command(self) -> str:
        """The command with every flag that differs from its default, for the provenance."""
        words = ["python -m workshop train-base"]
        for option in fields(self):
            value = getattr(self, option.name)
            # a path of this machine would mean nothing on another
            if value != option.default and option.name != "folder":
                flag = option.name.replace("_", "-")
                if isinstance(value, bool):
                    words.append(f"--{flag}" if value else f"--no-{flag}")
                else:
                    words += [f"--{flag}", " ".join(value) if flag == "stages" else str(value)]
        return " ".join(words)


@dataclass(frozen=True)
class TrainAdapters:
    """Train adapters on critters, every reference with every fusion; run it again to resume.

    Args:
        arms: Names, as REFERENCE-FUSION; all by default. `self-none` is plain IP-Adapter. All but
            `plain` and `base-plain` start from `plain`, which is trained first if it is missing.
        folder: Working folder for data, cache and runs.
        steps: Optimizer steps of 64 samples; None takes each arm's own number.
        seeds: Train each arm once with each of these seeds.
        images: Scenes to train on.
        ship: Write the arms that ship into the package, from the first seed.
    """

    arms: tuple[str, ...] = ()
    folder: str = "runs/adapters"
    steps: int | None = None
    seeds: tuple[int, ...] = (0,)
    images: int = 8000
    ship: bool = False

    def run(self) -> None:
        """Train the arms one after another."""
        from workshop.arms import ARMS, arm_config, ship_arm, train_arm

        folder = Path(self.folder)
        wanted = [(arm, seed) for seed in self.seeds for arm in self.arms or tuple(ARMS)]
        for arm, seed in wanted:  # refuse a wrong name before hours are spent on the first
            arm_config(arm, folder, self.steps, seed)
        for number, (arm, seed) in enumerate(wanted, 1):
            file = train_arm(arm, folder, self.steps, seed, self.images)
            say(f"{number} of {len(wanted)}: wrote {file}")
            if self.ship and seed == self.seeds[0]:
                shipped = ship_arm(arm, folder, self.steps, seed)
                say(f"shipped {shipped}") if shipped else None


@dataclass(frozen=True)
class Gates:
    """Measure the embedded base on held-out scenes, and compare with its gates.

    Args:
        images: Number of images drawn for the text-to-image gates.
        guidance: Classifier-free guidance; None takes the base's default.
        ship: Write the result into the package's provenance.
        json: Print the report as JSON.
        out: Also write the JSON to this file.
    """

    images: int = 2000
    guidance: float | None = None
    ship: bool = False
    json: bool = False
    out: str | None = None

    def __post_init__(self) -> None:
        check_range("images", self.images, 64, 1_000_000)
        if self.guidance is not None:
            check_range("guidance", self.guidance, 0, 100)

    def run(self) -> None:
        """Measure and print the report."""
        from workshop.gates import check_base, gate_table

        check_target(self.out)
        report = check_base(self.images, self.guidance)
        say_json(report) if self.json else say(gate_table(report))
        write_json(self.out, report)
        if self.ship:
            from workshop.base.shipping import record_gates

            record_gates(report)


@dataclass(frozen=True)
class Copier(CopierOptions):
    """Measure fidelity, variety and leak of an adapter over its scale.

    Args:
        folder: Folder that keeps the images; run the same command again to resume.
        ship: Write the report into the package, where the demo's plot reads it.
        json: Print the report as JSON.
        out: Also write the JSON to this file.
    """

    folder: str = "out/copier"
    ship: bool = False
    json: bool = False
    out: str | None = None

    def run(self) -> None:
        """Measure and print the report."""
        from ipdiverse.base.adapters import copier_report
        from workshop.copier import copier_table, measure_copier

        check_target(self.out)
        report = measure_copier(self, Path(self.folder))
        say_json(report) if self.json else say(copier_table(report))
        write_json(self.out, report)
        if self.ship:
            write_json(str(copier_report(self.adapter)), report)


@dataclass(frozen=True)
class Study:
    """Run a study as `ipdiverse evaluate` does, from readings too, with rival levers in its arms.

    Args:
        config: The study in TOML; an interrupted one resumes.
        out: Folder for images, results and report.
        publish: Copy the study's numbers, pictures and readings (what the oracle read in every
            image) to this folder.
        readings: A folder of readings that `--publish` wrote: arms in it are not drawn again.
        partial: Draw nothing: report on the part of the study that was drawn or read so far.
    """

    config: tyro.conf.Positional[str]
    out: str = "out/study"
    publish: str | None = None
    readings: str | None = None
    partial: bool = False

    def run(self) -> None:
        """Measure and report."""
        import workshop.rivals  # noqa: F401 - importing registers the levers
        from ipdiverse.evaluation.report import write_report
        from ipdiverse.evaluation.study import read_study
        from workshop.recorded import RecordedRunner, publish

        study, out = read_study(Path(self.config)), Path(self.out)
        agree_to_study(study, yes=False)
        known = Path(self.readings) if self.readings else None
        runner = RecordedRunner(study, out, known, partial=self.partial)
        left_out = runner.leave_out_undrawn() if self.partial else []
        page = write_report(study, runner.run(left_out), out)
        if self.publish:
            publish(out, Path(self.publish))
        say(f"open {page}")


@dataclass(frozen=True)
class Dose:
    """Fit variation spaces on pairs that share scenes, and predict what leaks through them.

    Args:
        folder: Working folder for pairs and spaces, which `studies/dose.toml` draws with.
        images: Pairs to fit each on.
        out: Also write the predictions to this file.
    """

    folder: str = "runs/dose"
    images: int = 2000
    out: str | None = None

    def run(self) -> None:
        """Fit, predict and print."""
        from workshop.dose import dose_response

        check_target(self.out)
        report = dose_response(Path(self.folder), self.images)
        say_json(report)
        write_json(self.out, report)


Command = (
    Annotated[TrainBase, tyro.conf.subcommand("train-base")]
    | Annotated[TrainAdapters, tyro.conf.subcommand("train-adapters")]
    | Annotated[Dose, tyro.conf.subcommand("dose")]
    | Annotated[Gates, tyro.conf.subcommand("gates")]
    | Annotated[Copier, tyro.conf.subcommand("copier")]
    | Annotated[Study, tyro.conf.subcommand("study")]
)


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; returns 0, or 2 for bad input.

    Args:
        arguments: The command line without the program's name; None takes that of the process.
    """
    try:
        command = tyro.cli(
            Command,  # type: ignore[arg-type]
            prog="python -m workshop",
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        )
        command.run()
    except IpdiverseError as error:
        sys.stderr.write(f"workshop: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
