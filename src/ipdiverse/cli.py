"""The command line. Each command is a typed config with `run`; heavy imports happen in there."""

from __future__ import annotations

import json as json_module
import sys
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ipdiverse.critters.recipe import STAGES, BaseRecipe
from ipdiverse.data.options import PrepareOptions
from ipdiverse.errors import Interrupted, IpdiverseError, check_range
from ipdiverse.sampling.request import MAX_IMAGES, MAX_STEPS, Request
from ipdiverse.training.config import TrainConfig, as_flags

_Count = Annotated[int, tyro.conf.arg(aliases=["-n"])]
_Texts = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
_Numbers = Annotated[tuple[float, ...], tyro.conf.UseAppendAction]


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def _say_json(content: Any) -> None:
    _say(json_module.dumps(content, indent=2))


@dataclass(frozen=True)
class Generate(Request):
    """Make images from a reference and a prompt.

    Args:
        out: Folder for images, contact sheet and generation.json.
        json: Print the record, from which the exact command can be repeated, as JSON.
    """

    image: _Texts = ()
    prompt: _Texts = ()
    mask: _Texts = ()
    weights: _Numbers = ()
    n: _Count = 4
    out: str = "out"
    json: bool = False

    def run(self) -> None:
        """Generate and write."""
        from ipdiverse.provenance import ensure_writable_folder
        from ipdiverse.sampling.generate import generate

        ensure_writable_folder(Path(self.out))
        wanted = {f.name: getattr(self, f.name) for f in fields(Request)}
        record = generate(**wanted).save(self.out)
        for note in record["notes"]:
            sys.stderr.write(f"note: {note}\n")
        if self.json:
            _say_json(record)
        else:
            written = len(record["image_sha256"])
            _say(f"wrote {written} images and {Path(self.out) / 'contact_sheet.png'}")


@dataclass(frozen=True)
class Demo:
    """Show at a glance what a plain image prompt does: three scales, and its numbers.

    Args:
        out: Folder for the page.
    """

    out: str = "out/demo"

    def run(self) -> None:
        """Make the page and say which file to open."""
        from ipdiverse.evaluation.demo import make_demo

        _say(f"open {make_demo(Path(self.out))}")


@dataclass(frozen=True)
class Prepare(PrepareOptions):
    """Check a source of images and captions, and write what is good as one data set to train on.

    Args:
        source: A folder, a list (.jsonl, .csv, .json), a .tar, a hub id, or `critters`.
        out: Target folder, new or of an interrupted run.
        json: Print the doctor's report as JSON.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")] = field(
        kw_only=True
    )
    out: str = field(kw_only=True)
    json: bool = False

    def run(self) -> None:
        """Prepare and report."""
        from ipdiverse.data.doctor import as_text
        from ipdiverse.data.prepare import prepare

        options = PrepareOptions(**{f.name: getattr(self, f.name) for f in fields(PrepareOptions)})
        report = prepare(self.source, Path(self.out), options)
        _say_json(report) if self.json else _say(as_text(report))


@dataclass(frozen=True)
class Embed:
    """Compute everything frozen of a prepared data set once, so that training need not.

    Args:
        folder: A folder that `prepare` wrote.
        base: Whose encoders: `critters`, `sd15`, `sdxl`, a hub id, a folder or a file.
        image_encoder: A CLIP vision model, folder or hub id; None takes the base's.
        resolution: Height and width of targets in pixels; None takes the base's own.
        variants: Random crops of each target; 1 is the centre crop alone.
        flip: Mirror some of the variants.
        changed: Changed references of each image, for `augmented`.
        seed: Of crops, flips and changes.
        images: `pooled` embeddings serve base adapters, `hidden` states plus adapters.
        dtype: float16 halves the disk.
        local_files_only: Never connect.
        json: Print the report as JSON.
    """

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    base: str = "critters"
    image_encoder: str | None = None
    resolution: int | None = None
    variants: int = 1
    flip: bool = False
    changed: int = 0
    seed: int = 0
    images: Literal["pooled", "hidden", "both"] = "both"
    dtype: Literal["float32", "float16"] = "float32"
    local_files_only: bool = False
    json: bool = False

    def run(self) -> None:
        """Embed and report."""
        from ipdiverse.training.embed import Stored, embed
        from ipdiverse.training.frozen import open_encoders
        from ipdiverse.training.preprocessing import Preprocessing

        encoders = open_encoders(
            self.base, self.image_encoder, local_files_only=self.local_files_only
        )
        shown = Preprocessing(
            self.resolution or encoders.resolution,
            self.variants,
            self.flip,
            self.changed,
            self.seed,
        )
        report = embed(Path(self.folder), encoders, shown, Stored(self.images, self.dtype))
        if self.json:
            _say_json(report)
            return
        _say(
            f"{report['images']} images and {report['pictures']} pictures in {report['shards']} "
            f"shards, {report['computed']} of them computed now, {report['bytes'] / 1e6:.1f} MB"
        )
        if self.variants > 1 or self.changed:
            _say(
                f"{self.variants} variants of each target are stored; training draws among these "
                f"alone, and among {self.changed} changed references of each image"
            )


@dataclass(frozen=True)
class Train(TrainConfig):
    """Train an adapter on a prepared data set; stop it at any time, and the same command goes on.

    `--config FILE.toml` gives any of these fields; flags hold over it. The original trainer's flags
    are understood too.

    Args:
        root: The folder that image names in `data` are relative to, when that is a list of images
            rather than a prepared folder.
    """

    root: str | None = None

    def run(self) -> None:
        """Prepare what is not prepared, train, and say where the adapter is."""
        from ipdiverse.data.prepare import prepare
        from ipdiverse.training.trainer import train

        given = {f.name: getattr(self, f.name) for f in fields(TrainConfig)}
        if Path(self.data).is_file():
            prepared = Path(self.out) / "data"
            prepare(self.data, prepared, PrepareOptions(root=self.root))
            given["data"] = str(prepared)
        _say(f"wrote {train(TrainConfig(**given))}")


@dataclass(frozen=True)
class Make:
    """Write critters images and a manifest, in the format that users' own data sets have.

    Args:
        out: Folder for images and metadata.jsonl.
        n: How many scenes.
        pairs: Give each scene a second image of the same creature as its reference.
        size: Height and width in pixels.
        seed: Of scenes, renders and captions.
        split: Identities of `train`, `validation` or `test`.
    """

    out: str
    n: _Count = 1000
    pairs: bool = False
    size: int = 64
    seed: int = 0
    split: Literal["train", "validation", "test"] = "train"

    def run(self) -> None:
        """Write them."""
        from ipdiverse.critters.make import make_dataset

        written = make_dataset(Path(self.out), self.n, self.pairs, self.size, self.seed, self.split)
        _say(f"wrote {written} images and {Path(self.out) / 'metadata.jsonl'}")


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
        from ipdiverse.critters.shipping import ship_base, start_from_shipped
        from ipdiverse.critters.training.stages import train_stage

        folder = Path(self.folder)
        if self.start == "shipped":
            start_from_shipped(folder)
        for stage in self.stages:
            train_stage(stage, folder, self)
        missing = [stage for stage in STAGES if not (folder / stage / "model").exists()]
        if self.ship and not missing:
            _say(f"wrote {ship_base(folder, self._command())}")
        elif self.ship:
            _say(f"not shipped: {', '.join(missing)} still to train")

    def _command(self) -> str:
        """The flags that differ from the defaults, as typed."""
        words = ["ipdiverse critters train-base"]
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
class TrainPlain:
    """Train plain IP-Adapter on critters as its authors do (reference = target); resumable.

    Args:
        kind: `base` (pooled, 4 tokens) or `plus` (resampler, 16 tokens).
        folder: Working folder of `train-base`, with its corpus and latents.
        steps: Optimizer steps, batch 64.
        seed: Of data, initial weights and noise.
    """

    kind: Literal["base", "plus"] = "plus"
    folder: str = "runs/base"
    steps: int = 3000
    seed: int = 0

    def run(self) -> None:
        """Train and ship."""
        from ipdiverse.training.run import train_plain

        _say(f"wrote {train_plain(self.kind, Path(self.folder), self.steps, self.seed)}")


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
        from ipdiverse.evaluation.gates import check_base, gate_table

        _check_target(self.out)
        report = check_base(self.images, self.guidance)
        _say_json(report) if self.json else _say(gate_table(report))
        _write_json(self.out, report)
        if self.ship:
            from ipdiverse.critters.shipping import record_gates

            record_gates(report)


@dataclass(frozen=True)
class Copier:
    """Measure how plain IP-Adapter copies: fidelity, variety and leak over its scale.

    Args:
        adapter: `base` or `plus`.
        scales: Weights of the image prompt.
        pairs: (prompt, reference) pairs, on held-out identities.
        images: Images a pair.
        steps: Denoising steps.
        guidance: Classifier-free guidance; None takes the base's default.
        ship: Write the report into the package, for the demo's plot.
        json: Print everything as JSON.
        out: Also write the JSON to this file.
    """

    adapter: str = "plus"
    scales: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    pairs: int = 200
    images: int = 8
    steps: int = 25
    guidance: float | None = None
    ship: bool = False
    json: bool = False
    out: str | None = None

    def __post_init__(self) -> None:
        check_range("pairs", self.pairs, 2, 100_000)
        check_range("images", self.images, 2, MAX_IMAGES)
        check_range("steps", self.steps, 1, MAX_STEPS)
        for scale in self.scales:
            check_range("scales", scale, 0, 10)
        if self.guidance is not None:
            check_range("guidance", self.guidance, 0, 100)

    def run(self) -> None:
        """Measure and print."""
        from ipdiverse.bases import copier_report
        from ipdiverse.evaluation.copier import copier_table, measure_copier

        _check_target(self.out)
        report = measure_copier(
            self.adapter, self.scales, self.pairs, self.images, self.steps, self.guidance
        )
        _say_json(report) if self.json else _say(copier_table(report))
        _write_json(self.out, report)
        if self.ship:
            _write_json(str(copier_report(self.adapter)), report)


def _check_target(out: str | None) -> None:
    """Refuse a file that cannot be written before hours are spent on its content."""
    if out is not None:
        from ipdiverse.provenance import ensure_writable_folder

        ensure_writable_folder(Path(out).parent)


def _write_json(out: str | None, content: Any) -> None:
    if out is not None:
        from ipdiverse.provenance import write_text_atomic

        write_text_atomic(Path(out), json_module.dumps(content, indent=2) + "\n")


@dataclass(frozen=True)
class _Source:
    """A checkpoint: a file, a folder, or a hub id `owner/repository`.

    Args:
        source: The file, folder or hub id.
        weight_name: The file in a folder or repository.
        subfolder: Where in the folder or repository.
        revision: Branch, tag or commit of a repository.
        local_files_only: Never connect.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    weight_name: str | None = None
    subfolder: str = ""
    revision: str | None = None
    local_files_only: bool = False

    def find(self) -> Path:
        """The local file."""
        from ipdiverse.adapter.sources import find_checkpoint

        return find_checkpoint(
            self.source,
            weight_name=self.weight_name,
            subfolder=self.subfolder,
            revision=self.revision,
            local_files_only=self.local_files_only,
        )


@dataclass(frozen=True)
class Inspect(_Source):
    """Say what a checkpoint is: kind, base family, tokens, widths, fusion, what does not fit.

    Args:
        json: Print everything as JSON.
    """

    json: bool = False

    def run(self) -> None:
        """Read names and shapes, and print."""
        from ipdiverse.adapter.inspection import as_text, inspect_checkpoint

        report = inspect_checkpoint(self.find())
        _say_json(report) if self.json else _say(as_text(report))


@dataclass(frozen=True)
class Convert(_Source):
    """Write a checkpoint of any layout in another, and verify it by loading.

    Args:
        out: The file to write: .safetensors, with `tencent` .bin too.
        to: `ipdiverse` (with a spec), `diffusers` (no fusion) or `tencent` (the original code's).
        force: Replace a file that is there.
        face_id_plus_v2: Version 2 (True) or 1 (False) of FaceID-Plus, whose files do not say.
    """

    out: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = field(kw_only=True)
    to: Literal["ipdiverse", "diffusers", "tencent"] = field(kw_only=True)
    force: bool = False
    face_id_plus_v2: bool | None = None

    def run(self) -> None:
        """Convert and say what was assumed or left out."""
        from ipdiverse.adapter.conversion import convert

        notes = convert(
            self.find(),
            self.out,
            self.to,
            force=self.force,
            face_id_plus_v2=self.face_id_plus_v2,
        )
        for note in notes:
            sys.stderr.write(f"note: {note}\n")
        _say(f"wrote {self.out}")


@dataclass(frozen=True)
class Critters:
    """The embedded world: make data, train its models, check them."""

    command: (
        Annotated[Make, tyro.conf.subcommand("make")]
        | Annotated[TrainBase, tyro.conf.subcommand("train-base")]
        | Annotated[TrainPlain, tyro.conf.subcommand("train-plain")]
        | Annotated[Check, tyro.conf.subcommand("check")]
        | Annotated[Copier, tyro.conf.subcommand("copier")]
    ) = field()

    def run(self) -> None:
        """Run the chosen command."""
        self.command.run()


Command = (
    Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Prepare, tyro.conf.subcommand("prepare")]
    | Annotated[Embed, tyro.conf.subcommand("embed")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Critters, tyro.conf.subcommand("critters")]
)


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; 0 when it worked, 2 for bad input, 128 + its number when a signal stopped it.

    Args:
        arguments: Without the program's name; None takes the process's own.
    """
    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        if arguments[:1] == ["train"]:
            arguments = ["train", *as_flags(arguments[1:])]
        command = tyro.cli(
            Command,  # type: ignore[arg-type]
            prog="ipdiverse",
            args=arguments,
            description="Image prompts with variety, without losing what you asked for.",
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        )
        command.run()
    except IpdiverseError as error:
        sys.stderr.write(f"ipdiverse: {error}\n")
        return 2
    except Interrupted as stop:
        sys.stderr.write(f"ipdiverse: {stop}; the same command goes on from there\n")
        return 128 + stop.number
    except KeyboardInterrupt:
        sys.stderr.write("ipdiverse: interrupted\n")
        return 130
    return 0
