"""Presets: one word for a published base with its adapter and image encoder.

`presets.toml` lists them. Files and rounded sizes are written down because the hub's library cannot
tell them offline. Sources: the repositories' model cards, and the original authors' examples for
steps, scale and scheduler (github.com/tencent-ailab/IP-Adapter).
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ipdiverse.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SITE = "https://huggingface.co"
_MB = 1_000_000


@dataclass(frozen=True)
class Repository:
    """A repository of the Hugging Face hub."""

    id: str
    revision: str
    license: str

    @property
    def link(self) -> str:
        """Its page."""
        return f"{SITE}/{self.id}"


@dataclass(frozen=True)
class HubFile:
    """A file of a repository."""

    repository: Repository
    name: str
    size: int = 0
    revision: str = ""

    @property
    def at(self) -> str:
        """The revision to ask for."""
        return self.revision or self.repository.revision


@dataclass(frozen=True)
class Encoder:
    """An image encoder that adapters were trained with.

    Args:
        name: What its makers call it.
        repository: Where it is.
        weights: Its file and its size; `config.json` is beside it.
        kind: Class in transformers.
        text: Files of the text half of the same model, weights and config first; none where no
            safetensors of it are published.
        widths: Of what published adapters read of it: `pooled`, `hidden` or `last` states.
    """

    name: str
    repository: Repository
    weights: tuple[str, int]
    kind: str = "CLIPVisionModelWithProjection"
    text: tuple[HubFile, ...] = ()
    widths: Mapping[str, int] = field(default_factory=dict)

    def files(self) -> list[HubFile]:
        """Its configuration and its weights; CLIP's preprocessing is known and has no file."""
        name, size = self.weights
        config = name.removesuffix(name.rpartition("/")[2]) + "config.json"
        return [HubFile(self.repository, config), HubFile(self.repository, name, size)]


@dataclass(frozen=True)
class Preset:
    """A base, an adapter for it, and good defaults.

    Args:
        name: The word.
        about: What it is for.
        base: A pipeline in diffusers' layout. Its weights are the published half-precision files,
            whatever precision computes.
        files: The pipeline's files, with sizes in bytes.
        checker: Its safety checker's files; none where the base was published without.
        adapter: Where the adapter is; None where nobody published one.
        weights: The adapter's file there, and its size.
        encoder: What the adapter reads; None where that is faces alone.
        scheduler: Class in diffusers; it takes the base's own settings.
        resolution: Height and width in pixels that the base was made for.
        guidance_scale: Good default.
        scale: Good default of the image prompt's weight.
        steps: Good default.
        faces: The adapter reads face embeddings.
        variant: What stands in the names of the base's weights; None for those that were published
            in bfloat16 alone, which is what they compute in where the device can.
    """

    name: str
    about: str
    base: Repository
    files: tuple[tuple[str, int], ...]
    adapter: Repository | None
    weights: tuple[str, int]
    encoder: Encoder | None
    guidance_scale: float
    scheduler: str = "FlowMatchEulerDiscreteScheduler"
    resolution: int = 1024
    scale: float = 0.6
    checker: tuple[tuple[str, int], ...] = ()
    steps: int = 30
    faces: bool = False
    variant: str | None = "fp16"

    def base_files(self, revision: str = "", *, checker: bool = True) -> list[HubFile]:
        """The pipeline's files."""
        wanted = self.files + (self.checker if checker else ())
        return [HubFile(self.base, name, size, revision) for name, size in wanted]

    def adapter_files(self) -> list[HubFile]:
        """The adapter's one file, if there is one."""
        return [] if self.adapter is None else [HubFile(self.adapter, *self.weights)]

    def encoder_files(self) -> list[HubFile]:
        """The image encoder's."""
        return [] if self.encoder is None else self.encoder.files()

    def all_files(self) -> list[HubFile]:
        """Everything."""
        return self.base_files() + self.adapter_files() + self.encoder_files()

    def repositories(self) -> list[Repository]:
        """Each one once."""
        return list(dict.fromkeys(file.repository for file in self.all_files()))


_TABLES = tomllib.loads(Path(__file__).with_name("presets.toml").read_text("utf-8"))
_REPOSITORIES = {name: Repository(*told) for name, told in _TABLES["repositories"].items()}
_SMALL = {
    "clip": ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"),
    "t5": ("special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer_config.json"),
    "chatglm": ("tokenizer.model", "tokenizer_config.json"),
    "clip-images": ("preprocessor_config.json",),
}


def _files(folders: str, variant: str = "") -> tuple[tuple[str, int], ...]:
    """A pipeline's files; a few kB count as nothing.

    Args:
        folders: Each with a colon and a key of `_SMALL`, or the megabytes of its weights; of
            several parts with a plus between.
        variant: Stands before the numbers in a part's name, and last in the index's.
    """
    files = list[tuple[str, int]]()
    for folder, what in (one.split(":") for one in folders.split()):
        if what in _SMALL:
            files += [(f"{folder}/{name}", 0) for name in _SMALL[what]]
            continue
        other = folder.startswith(("text_encoder", "safety_checker"))
        stem = f"{folder}/model" if other else f"{folder}/diffusion_pytorch_model"
        sizes = [int(size) * _MB for size in what.split("+")]
        files.append((f"{folder}/config.json", 0))
        if len(sizes) == 1:
            files.append((f"{stem}{variant}.safetensors", sizes[0]))
            continue
        files.append((f"{stem}.safetensors.index{variant}.json", 0))
        for number, size in enumerate(sizes, 1):
            name = f"{stem}{variant}-{number:05}-of-{len(sizes):05}.safetensors"
            files.append((name, size))
    return tuple(files)


def _encoder(
    name: str, repository: str, weights: list[Any], text: Sequence[Any] = (), **more: Any
) -> Encoder:
    found = Encoder(name, _REPOSITORIES[repository], (weights[0], weights[1] * _MB), **more)
    if not text:
        return found
    home, model, size, tokenizer = text
    config = model.removesuffix(model.rpartition("/")[2]) + "config.json"
    names = (config, *(f"{tokenizer}{name}" for name in _SMALL["clip"]))
    rest = (HubFile(_REPOSITORIES[home], name) for name in names)
    return replace(found, text=(HubFile(_REPOSITORIES[home], model, size * _MB), *rest))


_ENCODERS = {name: _encoder(**told) for name, told in _TABLES["encoders"].items()}


def encoder_of(read: str, width: int) -> Encoder | None:
    """The published image encoder that adapters with such an input read, if one is known."""
    return next((one for one in _ENCODERS.values() if one.widths.get(read) == width), None)


def _preset(name: str, told: dict[str, Any]) -> Preset:
    """One of the file's, which says what differs from the one that it is `like`."""
    told = {"name": name, **_TABLES["presets"].get(told.get("like"), {}), **told}
    told.pop("like", None)
    variant = told.setdefault("variant", "fp16") or None
    end = f".{variant}" if variant else ""
    whole = (("model_index.json", 0), ("scheduler/scheduler_config.json", 0))
    file, size = told["weights"]
    parts = {
        "variant": variant,
        "base": _REPOSITORIES[told["base"]],
        "adapter": _REPOSITORIES[told["adapter"]] if told["adapter"] else None,
        "encoder": _ENCODERS[told["encoder"]] if told["encoder"] else None,
        "files": whole + _files(told["files"], end),
        "checker": _files(told.get("checker", ""), end),
        "weights": (file, size * _MB),
    }
    return Preset(**{**told, **parts})


PRESETS: dict[str, Preset] = {
    name: _preset(name, told) for name, told in _TABLES["presets"].items()
}
"""Every preset by its name."""


@dataclass(frozen=True)
class FewSteps:
    """A LoRA that was distilled to draw in few steps, and what has to be set with it.

    Args:
        lora: Its file.
        scheduler: Class in diffusers; it takes the base's own settings, and these.
        settings: Of the scheduler.
        steps: That it was made for.
        guidance_scale: The same; 1 is none, which its teacher's is distilled into.
        weight: Of the LoRA.
        call: What the pipeline is called with.
    """

    lora: HubFile
    scheduler: str
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int = 4
    guidance_scale: float = 1.0
    weight: float = 1.0
    call: dict[str, Any] = field(default_factory=dict)


def _few(lora: list[Any], **told: Any) -> FewSteps:
    repository, file, size = lora
    return FewSteps(HubFile(_REPOSITORIES[repository], file, size * _MB), **told)


FEW_STEPS: dict[str, dict[str, FewSteps]] = {
    name: {_REPOSITORIES[base].id: _few(**told) for base, told in loras.items()}
    for name, loras in _TABLES["few_steps"].items()
}
"""By name and by the base's repository."""


def few_steps_of(name: str, base: str) -> FewSteps | None:
    """What a name means on a preset; None without a name.

    Raises:
        ArgumentError: The name is unknown, or nobody published such a LoRA for this base.
    """
    if not name:
        return None
    if name not in FEW_STEPS:
        expected = " | ".join(FEW_STEPS)
        raise ArgumentError("is unknown", where="few_steps", expected=expected, found=name)
    found = FEW_STEPS[name].get(PRESETS[base].base.id) if base in PRESETS else None
    if found is None:
        raise ArgumentError(
            f"has no LoRA of {name}",
            where=f"base {base}",
            expected=", ".join(n for n, one in PRESETS.items() if one.base.id in FEW_STEPS[name]),
            fix="Take one of these, another of " + ", ".join(FEW_STEPS) + ", or --fast 1 to 3.",
        )
    return found


def preset_files(
    base: str, adapter: str = "", encoder: str = "", revision: str = "", *, checker: bool = True
) -> list[HubFile]:
    """Files of the hub that a base, an adapter and an image encoder take."""
    return [
        *(PRESETS[base].base_files(revision, checker=checker) if base in PRESETS else ()),
        *(PRESETS[adapter].adapter_files() if adapter in PRESETS else ()),
        *(PRESETS[encoder].encoder_files() if encoder in PRESETS else ()),
    ]


def total(files: list[HubFile]) -> int:
    """Bytes of all of them, about."""
    return sum(file.size for file in files)


def as_size(count: int) -> str:
    """Bytes for people: `98 MB`, `4.9 GB`."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(count / 1e6, 1):.0f} MB"
