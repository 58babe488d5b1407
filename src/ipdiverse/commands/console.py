"""What commands print and write, and the question before a large download."""

from __future__ import annotations

import json
import shlex
import sys
from importlib.metadata import distribution
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from ipdiverse.base.downloads import missing, not_cached, offline
from ipdiverse.base.pipelines import check_trainable
from ipdiverse.base.presets import PRESETS, as_size, preset_files, total
from ipdiverse.errors import MAX_SENTENCE, ArgumentError, quoted
from ipdiverse.writing import ensure_writable_folder, write_text_atomic

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ipdiverse.base.presets import HubFile
    from ipdiverse.evaluation.study import Study

_SMALL = 1_000_000


def say(text: str) -> None:
    """Print lines; names in them may come from anybody's file, so none can steer the terminal."""
    sys.stdout.write("".join(f"{quoted(line, None)}\n" for line in text.split("\n")))


def note(text: object) -> None:
    """Say what the user should know, on standard error."""
    sys.stderr.write(f"note: {quoted(text, MAX_SENTENCE)}\n")


def say_json(content: Any) -> None:
    """Print a value as JSON."""
    say(json.dumps(content, indent=2))


def check_target(out: str | None) -> None:
    """Refuse a file that cannot be written before hours are spent on its content."""
    if out is not None:
        ensure_writable_folder(Path(out).parent)


def write_json(out: str | None, content: Any) -> None:
    """Write a value as JSON, whole or not at all; to None, nowhere."""
    if out is not None:
        write_text_atomic(Path(out), json.dumps(content, indent=2) + "\n")


def check_installed(library: str, where: str) -> None:
    """Refuse what needs a library that is missing, before any work."""
    if find_spec(library) is None:
        extra = where.removeprefix("--")
        fix = f"Run `{how_to_add(extra)}`."
        raise ArgumentError(f"needs {library}, which is not installed", where=where, fix=fix)


def how_to_add(extra: str) -> str:
    """The command that adds an extra, by how this ipdiverse was installed (PEP 610)."""
    origin = json.loads(distribution("ipdiverse").read_text("direct_url.json") or "{}")
    where = unquote(urlsplit(origin.get("url", "")).path)
    if not where:  # of an index
        return f"pip install 'ipdiverse[{extra}]'"
    editable = origin.get("dir_info", {}).get("editable")
    return f"pip install {'-e ' if editable else ''}{shlex.quote(f'{where}[{extra}]')}"


def agree_to_encoders(
    name: str,
    image_encoder: str | None,
    yes: bool,
    init_from: str | None = None,
    *,
    trains: bool = True,
) -> None:
    """Ask as `agree` does, for the presets that training uses; it needs no safety checker.

    Args:
        name: The base; only a preset is asked for.
        init_from: The adapter to start from; only a preset's is asked for.
        trains: Whether an adapter is trained, which not every base allows.
    """
    if trains:
        check_trainable(name, local_files_only=True)  # before gigabytes are downloaded in vain
    encoder = "" if image_encoder else name
    files = preset_files(name, init_from or "", encoder, checker=False)
    named = [one for one in (name, init_from) if one in PRESETS]
    agree(", ".join(dict.fromkeys(named)), files, yes)


def agree_to_study(study: Study, yes: bool) -> None:
    """Ask as `agree` does, for the presets that a study uses; its own files are read first."""
    from ipdiverse.evaluation.pairs import pairs_of
    from ipdiverse.evaluation.running import needed_files

    if study.references is not None:  # a mistyped folder is named before anything is downloaded
        pairs_of(study)
    named = [name for name in (study.base, *study.sources) if name in PRESETS]
    agree(", ".join(dict.fromkeys(named)), needed_files(study), yes)


def agree(name: str, files: Sequence[HubFile], yes: bool) -> None:
    """Return when everything is in the local cache, or may be downloaded."""
    lacking = missing(files)
    if not lacking:
        return
    if offline():
        raise not_cached(lacking, name)
    size = as_size(total(lacking))
    # the question goes to stderr: stdout may be JSON that another program reads
    if not yes and not (sys.stdin.isatty() and sys.stderr.isatty()):
        repositories = ", ".join(dict.fromkeys(file.repository.id for file in lacking))
        raise ArgumentError(
            f"has to be downloaded first, about {size}",
            where=name,
            found=f"no terminal to ask on, for {repositories}",
            fix="Add --yes; `ipdiverse bases` lists sizes and licences.",
        )
    sys.stderr.write(f"{name} needs about {size} from the Hugging Face hub:\n{_listing(lacking)}")
    if yes:
        return
    sys.stderr.write("Download? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise ArgumentError("was not downloaded", where=name, found="no", fix="Answer y, or --yes.")


def _listing(files: Sequence[HubFile]) -> str:
    """Repositories with their licences, and their files; the small ones together."""
    lines = []
    ordered = sorted(files, key=lambda file: file.repository.id)
    for repository, group in groupby(ordered, key=lambda file: file.repository):
        wanted = list(group)
        lines.append(f"  {repository.link} (licence: {repository.license})")
        large = [file for file in wanted if file.size > _SMALL]
        lines += [f"    {as_size(file.size):>7}  {file.name}" for file in large]
        if small := len(wanted) - len(large):
            lines.append(f"{'':13}and {small} small file{'s' if small > 1 else ''}")
    return "".join(f"{line}\n" for line in lines)
