"""The model card of an adapter: what it is, how to use it here and in stock diffusers, its curve.

It repeats what the file says of itself. Where the file says nothing, the card says that.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

from ipdiverse.adapter.files.structure import base_family, describe, stock_notes
from ipdiverse.base.adapters import PUBLISHED
from ipdiverse.base.pipelines import HUB_ID
from ipdiverse.base.presets import PRESETS
from ipdiverse.contact_sheet import labelled_points
from ipdiverse.dial import dial_of
from ipdiverse.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ipdiverse.adapter.model import ImagePromptAdapter

CURVE = "dial.png"
"""The picture of the dial's curve, in the folder of the card."""
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_SHORT = {"SD 1.x": "sd15", "SDXL": "sdxl"}
_AUTHORS = "h94/IP-Adapter"
_ENCODERS = {
    ("pooled", 1024): "models/image_encoder",
    ("hidden", 1280): "models/image_encoder",
    ("pooled", 1280): "sdxl_models/image_encoder",
    ("hidden", 1664): "sdxl_models/image_encoder",
}
"""Folders of the original authors' repository, by what an adapter reads and how wide that is."""
_PROVENANCE = ("command", "git_revision", "data", "versions", "converted_from", "reference")


@dataclass(frozen=True)
class Stated:
    """What only the publisher knows.

    Args:
        license: Its short name on the hub; None states none.
        base_model: Hub id of what it prompts; None takes what it was trained on, if known.

    Raises:
        ArgumentError: One of them is not such a name.
    """

    license: str | None = None
    base_model: str | None = None

    def __post_init__(self) -> None:
        if self.license is not None and not _LICENSE.fullmatch(self.license):
            raise ArgumentError(
                "is not a license of the hub",
                where="license",
                expected="a short name such as apache-2.0",
                found=self.license,
            )
        if self.base_model is not None and not HUB_ID.fullmatch(self.base_model):
            raise ArgumentError(
                "is not a model of the hub",
                where="base_model",
                expected="owner/name",
                found=self.base_model,
            )


def card_files(
    adapter: ImagePromptAdapter, repo_id: str, stated: Stated
) -> dict[str, bytes | None]:
    """The card, and the dial's curve, None where it was not measured, by their files' names."""
    card = model_card(adapter, repo_id, stated)
    return {CURVE: curve_png(adapter.spec), "README.md": card.encode("utf-8", "replace")}


def model_card(adapter: ImagePromptAdapter, repo_id: str, stated: Stated | None = None) -> str:
    """What a page about this adapter should say, as Markdown with the hub's metadata."""
    stated = stated or Stated()
    base = stated.base_model or _known_base(adapter)
    parts = (
        _metadata(stated.license, base),
        _facts(adapter, base, stated.license),
        _use(adapter, repo_id, base),
        _use_stock(adapter, repo_id, base),
        _dial(adapter.spec),
        _training(adapter.spec),
    )
    return "\n\n".join(parts) + "\n"


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
    """The base that it was trained on, where `load_base` knows that by a name of one word.

    Such a base brings its own image encoder; None for bases of the hub and for folders.
    """
    named = _trained_on(adapter)
    return named if named.isidentifier() and base_family(adapter) == "custom" else None


def _metadata(licensed: str | None, base: str | None) -> str:
    """The YAML block that the hub reads."""
    from huggingface_hub import ModelCardData

    # without the relation the hub would list this as a fine-tuned copy of the base
    data = ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base else None,
        library_name="ipdiverse",
        license=licensed,
        pipeline_tag="text-to-image",
        tags=["ip-adapter", "image-prompt", "diffusers", "stable-diffusion"],
    )
    return f"---\n{data.to_yaml()}\n---"


def _facts(adapter: ImagePromptAdapter, base: str | None, licensed: str | None) -> str:
    facts = describe(adapter)
    family = _own_base(adapter) or facts["family"]
    tokens = facts["dims"]["num_tokens"] or "as many as the image encoder has states"
    rows = {
        "kind": adapter.kind,
        "prompts": family + (f", [{base}](https://huggingface.co/{base})" if base else ""),
        "image tokens": f"{tokens}, of width {adapter.token_width}",
        "layers with an image branch": len(adapter.widths()),
        "text-image fusion": "none" if adapter.fusion is None else adapter.fusion.kind,
        "base weights": "stored" if adapter.base_weights else "not stored",
        "license": licensed or "not stated",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"# An image prompt for {family}\n\n| | |\n|---|---|\n{table}"


def _use(adapter: ImagePromptAdapter, repo_id: str, base: str | None) -> str:
    own = _own_base(adapter)
    name = own or base or "YOUR_BASE"
    own_encoder = own is not None or adapter.clip_dim is None
    encoder = "" if own_encoder else f"\n{_encoder_lines(adapter)}"
    given = "" if own_encoder else ", image_encoder=encoder, image_processor=processor"
    folder = _encoder_folder(adapter)
    flag = "" if own_encoder else f" --image-encoder {folder or 'ITS_IMAGE_ENCODER'}"
    face = "face" in adapter.reads
    reference = 'Reference([image], faces=load_face_embeddings("face.npy"))' if face else "image"
    imports = (
        "from ipdiverse import ImagePromptAdapter, Reference, attach, load_base\n"
        "from ipdiverse.adapter.attach.face_embeddings import load_face_embeddings"
        if face
        else "from ipdiverse import ImagePromptAdapter, attach, load_base"
    )
    return f"""## Use with ipdiverse

```python
{imports}
{encoder}
base = load_base("{name}")
adapter = ImagePromptAdapter.from_pretrained("{repo_id}")
with attach(base.pipe, adapter{given}) as prompt:
    prompt.set_reference({reference})
    images = base.pipe("your prompt").images
```

```
ipdiverse generate --base {name} --adapter {repo_id}/{PUBLISHED}{flag} \\
    --image FILE{" --faces FACE" if face else ""} --prompt TEXT --diversity 0.5
```"""


def _encoder_folder(adapter: ImagePromptAdapter) -> str | None:
    """Where the image encoder of an adapter of these widths is published; None if unknown."""
    folder = _ENCODERS.get((adapter.reads[-1], adapter.clip_dim or 0))
    return f"{_AUTHORS}/{folder}" if folder else None


def _encoder_lines(adapter: ImagePromptAdapter) -> str:
    folder = (_encoder_folder(adapter) or "").removeprefix(f"{_AUTHORS}/")
    source = f'"{_AUTHORS}", subfolder="{folder}"' if folder else '"ITS_IMAGE_ENCODER"'
    return (
        "from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection\n\n"
        f"encoder = CLIPVisionModelWithProjection.from_pretrained({source})\n"
        "processor = CLIPImageProcessor()"
    )


def _use_stock(adapter: ImagePromptAdapter, repo_id: str, base: str | None) -> str:
    title = "## Use with stock diffusers"
    if "face" in adapter.reads:
        return f"{title}\n\nIt takes face embeddings, as `ip_adapter_image_embeds`."
    if notes := stock_notes(adapter):
        return f"{title}\n\nIt cannot be used there: {'; '.join(notes)}."
    if own := _own_base(adapter):
        opened = f'from ipdiverse import load_base\n\npipe = load_base("{own}").pipe  # stock'
    else:
        opened = (
            f"from diffusers import DiffusionPipeline\n{_encoder_lines(adapter)}\n"
            f'pipe = DiffusionPipeline.from_pretrained(\n    "{base or "YOUR_BASE"}", '
            "image_encoder=encoder, feature_extractor=processor\n)"
        )
    return f"""{title}

```python
{opened}
pipe.load_ip_adapter(
    "{repo_id}", subfolder="", weight_name="{PUBLISHED}", image_encoder_folder=None
)
pipe.set_ip_adapter_scale(1.0)
images = pipe("your prompt", ip_adapter_image=image).images
```

{_stock_difference(adapter)}"""


def _stock_difference(adapter: ImagePromptAdapter) -> str:
    """What stock diffusers does not read of the file."""
    said = []
    if adapter.fusion is not None:
        said.append(
            "Stock diffusers leaves out the text-image fusion: it draws what ipdiverse draws at "
            "`fusion_strength` 0."
        )
    return " ".join(said) or "From one reference it draws the same there."


def _dial(spec: Mapping[str, Any]) -> str:
    """What the calibrated dial achieves at each of its points, or that it was not measured."""
    dial = dial_of(spec, "adapter")
    if dial is None:
        return (
            "## Dial\n\nThis adapter was not calibrated. Its `diversity` takes a conservative path "
            "that is the same for every adapter, and what that achieves here was not measured: "
            "`ipdiverse calibrate` finds a path and measures it."
        )
    source = dial.source.replace("\n", " ")
    if not dial.achieved:
        return f"## Dial\n\nIts path: {source}. What it achieves was not measured."
    head = (
        "| `diversity` | variety | subject kept | prompt obeyed | copies | broken images |\n"
        "|---|---|---|---|---|---|"
    )
    lines = [
        f"| {setting:.2f} | {row.variety:.3f} | {row.retention:.3f} | {_number(row.accuracy)} | "
        f"{_number(row.copies)} | {row.invalid:.3f} |"
        for (setting, _), row in zip(dial.points, dial.achieved, strict=True)
    ]
    table = "\n".join([head, *lines])
    return (
        f"## Dial\n\nIts path was {source}. On other bases, prompts and references the numbers "
        f"will differ.\n\n![variety against what is kept]({CURVE})\n\n{table}\n\nCopies are "
        "images that repeat the reference's whole scene, beyond chance."
    )


def curve_png(spec: Mapping[str, Any]) -> bytes | None:
    """The dial's curve: what each of its points keeps, over the variety that it gives."""
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


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _training(spec: Mapping[str, Any]) -> str:
    """Recipe and provenance, as the file's spec has them."""
    origin = {name: spec[name] for name in _PROVENANCE if name in spec}
    described = {"kind", "family", "fusion", "noise_conditioned", "dims", "shortcut", "dial"}
    recipe = spec.get("recipe")
    rest = {
        key: value
        for key, value in spec.items()
        if key not in described and key not in _PROVENANCE and key != "recipe"
    }
    parts = [
        f"### {title}\n\n{_fenced(content)}"
        for title, content in (("Recipe", recipe), ("Provenance", origin), ("More", rest))
        if content
    ]
    if not parts:
        return "## Training\n\nThe file does not say how it was made."
    return "\n\n".join(["## Training", *parts])


def _fenced(content: Any) -> str:
    """JSON in a fence that nothing in it can close."""
    text = json.dumps(content, indent=2, sort_keys=True)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}json\n{text}\n{fence}"
