"""Publish an adapter or a variation space: the card, the dial's curve, and the upload.

The card (`card.md`, `space_card.md`) repeats what the file says of itself. Where the file says
nothing, the card says that.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipdiverse.adapter.files.structure import base_family, describe, stock_notes
from ipdiverse.base.adapters import PUBLISHED, PUBLISHED_SPACE
from ipdiverse.base.pipelines import HUB_ID
from ipdiverse.base.presets import PRESETS, encoder_of
from ipdiverse.contact_sheet import labelled_points
from ipdiverse.dial import dial_of
from ipdiverse.errors import ArgumentError, ModelError
from ipdiverse.writing import ensure_writable_folder, write_bytes_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ipdiverse.adapter.model import ImagePromptAdapter
    from ipdiverse.dial import Dial

CURVE = "dial.png"
"""The picture of the dial's curve, in the folder of the card."""
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_SHORT = {"SD 1.x": "sd15", "SDXL": "sdxl"}
_AUTHORS = "h94/IP-Adapter"
_PROVENANCE = ("command", "git_revision", "data", "versions", "converted_from", "reference")


@dataclass(frozen=True)
class Stated:
    """What only the publisher knows; an ArgumentError where it cannot be a name of the hub."""

    license: str | None = None  # short name; None states none
    base_model: str | None = None  # None takes what the adapter was trained on, if known

    def __post_init__(self) -> None:
        if self.license is not None and not _LICENSE.fullmatch(self.license):
            what, expected = "is not a license of the hub", "a short name such as apache-2.0"
            raise ArgumentError(what, where="license", expected=expected, found=self.license)
        if self.base_model is not None:
            _check_id("is not a model of the hub", "base_model", self.base_model)


def model_card(adapter: ImagePromptAdapter, repo_id: str, stated: Stated | None = None) -> str:
    """What a page about this adapter should say (`card.md`), with the hub's metadata."""
    stated = stated or Stated()
    base, own = stated.base_model or _known_base(adapter), _own_base(adapter)
    encoder = encoder_of(adapter.reads[-1], adapter.clip_dim or 0)
    theirs = encoder is not None and encoder.repository.id == _AUTHORS
    folder = encoder.weights[0].rpartition("/")[0] if encoder and theirs else ""
    dial, described = dial_of(adapter.spec, "adapter"), describe(adapter)
    family = own or described["family"]
    tokens = described["dims"]["num_tokens"] or "as many as the image encoder has states"
    facts = {
        "kind": adapter.kind,
        "prompts": family + (f", [{base}](https://huggingface.co/{base})" if base else ""),
        "image tokens": f"{tokens}, of width {adapter.token_width}",
        "layers with an image branch": len(adapter.widths()),
        "text-image fusion": "none" if adapter.fusion is None else adapter.fusion.kind,
        "base weights": "stored" if adapter.base_weights else "not stored",
        "license": stated.license or "not stated",
    }
    return _rendered(
        "card.md",
        metadata=_metadata(stated.license, base),
        family=family,
        facts=facts,
        repo_id=repo_id,
        weights=PUBLISHED,
        base=base,
        own_base=own,
        encoder=own is None and adapter.clip_dim is not None,
        encoder_address=f"{_AUTHORS}/{folder}" if folder else "ITS_IMAGE_ENCODER",
        encoder_source=f'"{_AUTHORS}", subfolder="{folder}"' if folder else '"ITS_IMAGE_ENCODER"',
        reads_faces="face" in adapter.reads,
        not_stock="; ".join(stock_notes(adapter)),
        has_fusion=adapter.fusion is not None,
        dial=None if dial is None else dial.source.replace("\n", " "),
        dial_rows=[] if dial is None else _dial_rows(dial),
        curve=CURVE,
        origin=_origin(adapter.spec),
    )


def _rendered(template: str, **values: Any) -> str:
    """A card; not escaped: it is Markdown, and what others wrote stands in a closed fence."""
    from jinja2 import StrictUndefined, Template

    return Template(
        Path(__file__).with_name(template).read_text("utf-8"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    ).render(**values)


def space_files(file: Path, repo_id: str, stated: Stated) -> dict[str, bytes | None]:
    """What a repository of a variation space holds, by name: the file as it is, and a card."""
    from ipdiverse.adapter.imagine import as_text, load_space

    spec = load_space(file).spec
    as_text(spec)  # refuses a file that does not say how it was fitted
    base = stated.base_model or (PRESETS[spec["base"]].base.id if spec["base"] in PRESETS else None)
    facts = {
        "fits": f"every adapter with the projection {spec['projection'][:12]}…",
        "subjects, pairs": f"{spec['subjects']}, {spec['pairs']}",
        "identity kept, held-out pairs": f"{100 * spec['held_out']['identity_kept']:.0f} %",
        "scene replaced, held-out pairs": f"{100 * spec['held_out']['scene_replaced']:.0f} %",
        "scenes": spec["bank"],
        "license": stated.license or "not stated",
    }
    named = {name: re.sub(r"[^\w./-]", "?", str(spec[name])) for name in ("base", "adapter")}
    card = _rendered(
        "space_card.md",
        metadata=_metadata(stated.license, base),
        spec=named,
        facts=facts,
        repo_id=repo_id,
        origin=_fenced(spec),
    )
    return {PUBLISHED_SPACE: file.read_bytes(), "README.md": card.encode("utf-8", "replace")}


def _metadata(licensed: str | None, base: str | None) -> str:
    """The YAML block that the hub reads."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=base,
        # without the relation the hub would list this as a fine-tuned copy of the base
        base_model_relation="adapter" if base else None,
        library_name="ipdiverse",
        license=licensed,
        pipeline_tag="text-to-image",
        tags=["ip-adapter", "image-prompt", "diffusers", "stable-diffusion"],
    )
    return data.to_yaml()


def _dial_rows(dial: Dial) -> list[list[str]]:
    """What the calibrated dial achieves at each of its points; empty if it was not measured."""
    rows: list[list[str]] = []
    for (setting, _), row in zip(dial.points, dial.achieved, strict=False):
        found = (row.variety, row.retention, row.accuracy, row.copies, row.invalid)
        numbers = ["-" if value is None else f"{value:.3f}" for value in found]
        rows.append([f"{setting:.2f}", *numbers])
    return rows


def _known_base(adapter: ImagePromptAdapter) -> str | None:
    """Hub id of what it was trained on, or else of what its widths say; None if unknown."""
    trained = _trained_on(adapter)
    if trained in PRESETS:
        return PRESETS[trained].base.id
    if HUB_ID.fullmatch(trained):
        return trained
    family = _SHORT.get(base_family(adapter))
    return PRESETS[family].base.id if family else None


def _trained_on(adapter: ImagePromptAdapter) -> str:
    recipe = adapter.spec.get("recipe")
    return str(recipe.get("base") or "") if isinstance(recipe, dict) else ""


def _own_base(adapter: ImagePromptAdapter) -> str | None:
    """The base that it was trained on, if that has a name of one word and its own encoder."""
    named = _trained_on(adapter)
    return named if named.isidentifier() and base_family(adapter) == "custom" else None


def _origin(spec: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Recipe and provenance, as the file's spec has them."""
    described = {"kind", "family", "fusion", "noise_conditioned", "dims", "shortcut", "dial"}
    told = {key: value for key, value in spec.items() if key not in described}
    recipe = told.pop("recipe", None)
    origin = {key: told.pop(key) for key in _PROVENANCE if key in told}
    named = {"Recipe": recipe, "Provenance": origin, "More": told}
    return [(title, _fenced(content)) for title, content in named.items() if content]


def _fenced(content: Any) -> str:
    """JSON in a fence that nothing in it can close."""
    text = json.dumps(content, indent=2, sort_keys=True)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}json\n{text}\n{fence}"


def curve_png(spec: Mapping[str, Any]) -> bytes | None:
    """What each of the dial's points keeps, over its variety; None where it was not measured."""
    dial = dial_of(spec, "adapter")
    if dial is None or not dial.achieved:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for name, label, colour in (
        ("retention", "subject kept", "#2962c9"),
        ("accuracy", "prompt obeyed", "#d35400"),
    ):
        found = [(row.variety, getattr(row, name)) for row in dial.achieved]
        points = [point for point in found if point[1] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, label=label)
    for index in labelled_points([row.variety for row in dial.achieved]):
        at = (dial.achieved[index].variety, dial.achieved[index].retention)
        words = f"{dial.points[index][0]:.2g}"
        axes.annotate(words, at, (3, 5), textcoords="offset points", fontsize=7, color="#2962c9")
    axes.set_xlabel("variety")
    axes.set_ylabel("kept")
    axes.set_title("the dial, from diversity 0 to 1", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def save_files(folder: Path, files: Mapping[str, bytes | None]) -> list[str]:
    """Write files into a folder, made if need be."""
    ensure_writable_folder(folder)
    for name, content in files.items():
        if content is None:  # a curve that was measured for other weights must not stay
            (folder / name).unlink(missing_ok=True)
        else:
            write_bytes_atomic(folder / name, content)
    return [name for name, content in files.items() if content is not None]


def push_files(
    repo_id: str,
    files: Callable[[], Mapping[str, bytes | None]],
    *,
    private: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload files to a repository of the hub, made if need be, in one commit."""
    import huggingface_hub

    check_repository(repo_id)
    if not (token or huggingface_hub.get_token()):
        raise ModelError(
            "there is no token to upload with",
            where=repo_id,
            fix="Run `hf auth login`, or set HF_TOKEN to a token that may write.",
        )
    # a folder, because the hub's library uploads what it finds there in one commit
    with tempfile.TemporaryDirectory() as folder:
        save_files(Path(folder), files())
        try:
            api = huggingface_hub.HfApi(token=token)
            address = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message or "Upload with ipdiverse",
                create_pr=create_pr,
            )
        except Exception as error:  # whatever the hub's library or the network raises
            raise _refused(repo_id, error) from error
    return str(address)


def check_repository(repo_id: str) -> None:
    """Refuse what cannot be a repository."""
    _check_id("is not a repository of the hub", "repo_id", repo_id)


def _check_id(what: str, where: str, given: str) -> None:
    if HUB_ID.fullmatch(given) is None:
        raise ArgumentError(what, where=where, expected="owner/name", found=given)


def _refused(repo_id: str, error: Exception) -> ModelError:
    """Why an upload failed, in one line."""
    import httpx  # what the hub's library connects with

    why = str(error).strip().partition("\n")[0][:200] or type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        what, fix = "may not be written to", "Check that the token may write there, and its owner."
    elif status is None and isinstance(error, OSError | httpx.TransportError):
        what, fix = "cannot be reached", "Check the network, and that HF_HUB_OFFLINE is not set."
    else:
        what, fix = "cannot be uploaded", "Check the name and your token."
    return ModelError(what, where=repo_id, found=why, fix=fix)
