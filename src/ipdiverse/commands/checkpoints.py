"""`inspect`, `convert`, `push` and `bases`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ipdiverse.base.downloads import missing
from ipdiverse.base.presets import PRESETS, Preset, as_size, total
from ipdiverse.commands.console import note, say, say_json
from ipdiverse.errors import CheckpointError


@dataclass(frozen=True)
class Source:
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
        """The local file, which may be an adapter."""
        from ipdiverse.adapter.files.containers import check_is_adapter
        from ipdiverse.base.adapters import find_checkpoint

        options = {one.name: getattr(self, one.name) for one in fields(Source)}
        found = find_checkpoint(**options)
        check_is_adapter(found)  # before torch is imported, which takes seconds
        return found


@dataclass(frozen=True)
class Inspect(Source):
    """Say what a checkpoint is: kind, base family, tokens, widths, fusion, what does not fit.

    Of a PNG that ipdiverse wrote, say how it was made: prompt, command, seed and the rest.

    Args:
        json: Print everything as JSON.
    """

    json: bool = False

    def run(self) -> None:
        """Read names and shapes, or a picture's record, and print."""
        from ipdiverse.image_io.files import SUFFIXES

        if Path(self.source).suffix.lower() in SUFFIXES:
            from ipdiverse import provenance

            record = provenance.read_provenance(self.source)
            say_json(record) if self.json else say(f"{self.source}\n{provenance.as_text(record)}")
            return
        file = self.find()
        from ipdiverse.adapter.files.containers import open_checkpoint
        from ipdiverse.adapter.imagine import as_text as as_lines
        from ipdiverse.adapter.imagine import is_space, load_space

        if is_space(open_checkpoint(file).metadata):
            spec = load_space(file).spec
            say_json({**spec, "file": str(file), "kind": "variation space"}) if self.json else say(
                f"{file.name}\n  a variation space\n  " + as_lines(spec).replace("\n", "\n  ")
            )
            return
        from ipdiverse.adapter.files.inspection import as_text, inspect_checkpoint

        report = inspect_checkpoint(file)
        say_json(report) if self.json else say(as_text(report))
        if not report["loads"]:
            raise CheckpointError("does not load", where=report["file"], fix="See above.")


@dataclass(frozen=True)
class Convert(Source):
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
        file = self.find()
        from ipdiverse.adapter.files.conversion import convert

        notes = convert(
            file, self.out, self.to, force=self.force, face_id_plus_v2=self.face_id_plus_v2
        )
        for one in notes:
            note(one)
        say(f"wrote {self.out}")


@dataclass(frozen=True)
class Push(Source):
    """Publish an adapter or a variation space on the hub, with a card of what it is and its use.

    Args:
        repo_id: The repository, `owner/name`; made if need be.
        license: Its short name on the hub, for example `apache-2.0`.
        base_model: Hub id of what it prompts; None takes what it was trained on, if known.
        private: Of a repository that is made.
        dry_run: Write the folder that would be uploaded, and upload nothing.
        out: The folder of a dry run.
        face_id_plus_v2: Version 2 (True) or 1 (False) of FaceID-Plus, whose files do not say.
    """

    repo_id: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="REPO")] = field(
        kw_only=True
    )
    license: str | None = None
    base_model: str | None = None
    private: bool = False
    dry_run: bool = False
    out: str = "out/hub"
    face_id_plus_v2: bool | None = None

    def run(self) -> None:
        """Upload, or write what would be."""
        from ipdiverse.adapter.files import publishing
        from ipdiverse.adapter.files.checkpoint import load_adapter, stored_dtype
        from ipdiverse.adapter.files.containers import open_checkpoint
        from ipdiverse.adapter.imagine import is_space

        repo, private = self.repo_id, self.private
        publishing.check_repository(repo)
        # refused before a large file is opened
        told = publishing.Stated(self.license, self.base_model)
        file = self.find()
        if is_space(open_checkpoint(file).metadata):
            files = publishing.space_files(file, repo, told)
            save = lambda: publishing.save_files(Path(self.out), files)  # noqa: E731
            push = lambda: publishing.push_files(repo, lambda: files, private=private)  # noqa: E731
        else:
            adapter = load_adapter(file, face_id_plus_v2=self.face_id_plus_v2)
            dtype = stored_dtype(file)  # what is published is as exact as the file, and no larger
            stated: dict[str, Any] = {"license": self.license, "base_model": self.base_model}
            save = lambda: adapter.save_pretrained(self.out, dtype, repo_id=repo, **stated)  # noqa: E731
            push = lambda: adapter.push_to_hub(repo, private=private, dtype=dtype, **stated)  # noqa: E731
        if self.dry_run:
            say(f"wrote {', '.join(save())} into {self.out}; nothing was uploaded")
        else:
            say(f"published {push()}")


@dataclass(frozen=True)
class Bases:
    """List the bases that have a short name: size, whether they are downloaded, licence, link.

    Args:
        json: Print everything as JSON.
    """

    json: bool = False

    def run(self) -> None:
        """Look into the local cache and print; connects to nothing."""
        presets = [_described(preset) for preset in PRESETS.values()]
        if self.json:
            say_json({"embedded": ["critters"], "presets": presets})
            return
        say("critters: in the package, nothing to download")
        for preset in presets:
            say("\n" + _listed(preset))
        say("\nSizes are approximate. Presets share files, which are downloaded once.")


def _described(preset: Preset) -> dict[str, Any]:
    files = preset.all_files()
    lacking = missing(files)
    encoder = preset.encoder_files()
    parts = {
        "base": preset.base,
        "adapter": preset.adapter,
        "image_encoder": preset.encoder and preset.encoder.repository,
    }
    shown = ("name", "about", "scheduler", "resolution", "steps", "guidance_scale", "scale")
    return {name: getattr(preset, name) for name in shown} | {
        "bytes": total(files),
        "bytes_missing": total(lacking),
        "cached": not lacking,
        "files_missing": [f"{file.repository.id}/{file.name}" for file in lacking],
        "repositories": {
            part: {n: getattr(repository, n) for n in ("id", "revision", "license", "link")}
            for part, repository in parts.items()
            if repository is not None
        },
        "adapter": preset.weights[0],
        "image_encoder": encoder[0].name.rpartition("/")[0] if encoder else None,
        "reads": reads(preset),
        "reads_faces": preset.faces,
    }


def reads(preset: Preset) -> str:
    """What an adapter is shown the picture by."""
    faces = ["face embeddings of insightface"] if preset.faces else []
    return " and ".join([*faces, *([preset.encoder.name] if preset.encoder else [])])


def _listed(preset: dict[str, Any]) -> str:
    left = as_size(preset["bytes_missing"])
    state = "in the local cache" if preset["cached"] else f"{left} to download"
    repositories = {r["id"]: r for r in preset["repositories"].values()}.values()
    return "\n".join(
        [
            f"{preset['name']}: {preset['about']}",
            f"  {as_size(preset['bytes'])}, {state}; {preset['resolution']} px, "
            f"{preset['steps']} steps, guidance {preset['guidance_scale']:g}, "
            f"scale {preset['scale']:g}",
            f"  reads {preset['reads']}" if preset["reads"] else "  has no adapter of its own",
            *(f"  {r['link']} ({r['license']})" for r in repositories),
        ]
    )
