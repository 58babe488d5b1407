"""`python -m workshop`: train the shipped models and measure them; run it in a checkout."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ipdiverse.commands.console import check_target, say, say_json, write_json
from ipdiverse.errors import IpdiverseError, check_range
from workshop.base.recipe import STAGES, BaseRecipe
from workshop.copier import CopierOptions


@dataclass(frozen=True)
class TrainBase(BaseRecipe):
    """Train the embedded base model from nothing; resumable.

    Args:
        folder: Working folder: renders, resume points, logs, finished stages.
        stages: Which stages, in order.
        start: `nothing`, or `shipped` to train the shipped UNet further in a new folder.
        ship: Write the finished weights into the package, once all stages are there.
    """

    folder: str = "runs/base"
    stages: tuple[Literal["vae", "text", "clip", "unet", "oracle"], ...] = STAGES
    start: Literal["nothing", "shipped"] = "nothing"
    ship: bool = True

    def run(self) -> None:
        """Train, and ship what is complete."""
        from workshop.base.shipping import ship_base, start_from_shipped
        from workshop.base.stages import train_stage

        folder = Path(self.folder)
        if self.start == "shipped":
            start_from_shipped(folder)
        for stage in self.stages:
            train_stage(stage, folder, self)
        missing = [stage for stage in STAGES if not (folder / stage / "model").exists()]
        if self.ship and not missing:
            say(f"wrote {ship_base(folder, self._command())}")
        elif self.ship:
            say(f"not shipped: {', '.join(missing)} still to train")

    def _command(self) -> str:
        """The flags that differ from the defaults, as typed."""
        words = ["python -m workshop train-base"]
        for option in fields(self):
            value = getattr(self, option.name)
            if value != option.default and option.name != "folder":  # a path says nothing elsewhere
                flag = option.name.replace("_", "-")
                if isinstance(value, bool):
                    words.append(f"--{flag}" if value else f"--no-{flag}")
                else:
                    words += [f"--{flag}", " ".join(value) if flag == "stages" else str(value)]
        return " ".join(words)


@dataclass(frozen=True)
class TrainAdapters:
    """Train adapters on critters, every reference with every fusion; resumable.

    Args:
        arms: By name, REFERENCE-FUSION; all by default. `self-none` is plain IP-Adapter. All but
            `plain` and `base-plain` go on from `plain`, which is trained first where it is missing.
        folder: Working folder: data, cache, runs.
        steps: Optimizer steps of 64 samples; None takes each arm's own.
        seeds: One run for each.
        images: Scenes to train on.
        ship: Write those that ship into the package, from the first seed.
    """

    arms: tuple[str, ...] = ()
    folder: str = "runs/adapters"
    steps: int | None = None
    seeds: tuple[int, ...] = (0,)
    images: int = 8000
    ship: bool = False

    def run(self) -> None:
        """Train one after another."""
        from workshop.arms import ARMS, arm_config, ship_arm, train_arm

        folder = Path(self.folder)
        wanted = [(arm, seed) for seed in self.seeds for arm in self.arms or tuple(ARMS)]
        for arm, seed in wanted:  # refuse all before hours are spent on the first
            arm_config(arm, folder, self.steps, seed)
        for number, (arm, seed) in enumerate(wanted, 1):
            file = train_arm(arm, folder, self.steps, seed, self.images)
            say(f"{number} of {len(wanted)}: wrote {file}")
            if self.ship and seed == self.seeds[0]:
                shipped = ship_arm(arm, folder, self.steps, seed)
                say(f"shipped {shipped}") if shipped else None


@dataclass(frozen=True)
class Check:
    """Measure the embedded base against its gates, on held-out scenes.

    Args:
        images: Images sampled for the text-to-image gates.
        guidance: The one fixed guidance; None takes the base's default.
        ship: Write the result into the package's provenance.
        json: Print everything as JSON.
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
        """Measure and print."""
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
    """Measure how an adapter copies: fidelity, variety and leak over its scale.

    Args:
        folder: Where images are kept: the same command goes on where it was interrupted.
        ship: Write the report into the package, for the demo's plot.
        json: Print everything as JSON.
        out: Also write the JSON to this file.
    """

    folder: str = "out/copier"
    ship: bool = False
    json: bool = False
    out: str | None = None

    def run(self) -> None:
        """Measure and print."""
        from ipdiverse.base.bases import copier_report
        from workshop.copier import copier_table, measure_copier

        check_target(self.out)
        report = measure_copier(self, Path(self.folder))
        say_json(report) if self.json else say(copier_table(report))
        write_json(self.out, report)
        if self.ship:
            write_json(str(copier_report(self.adapter)), report)


Command = (
    Annotated[TrainBase, tyro.conf.subcommand("train-base")]
    | Annotated[TrainAdapters, tyro.conf.subcommand("train-adapters")]
    | Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Copier, tyro.conf.subcommand("copier")]
)


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; 0 when it worked, 2 for bad input.

    Args:
        arguments: Without the program's name; None takes the process's own.
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
