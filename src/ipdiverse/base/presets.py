"""Presets: one word for a published base with its adapter and image encoder.

Revisions are commits, so that a preset means the same tomorrow. Files and rounded sizes are written
down because the hub's library cannot tell them offline. Sources: the repositories' model cards, and
the original authors' examples for steps, scale and scheduler (github.com/tencent-ailab/IP-Adapter).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
class Preset:
    """A base, an adapter for it, and good defaults.

    Args:
        name: The word.
        about: What it is for.
        base: A pipeline in diffusers' layout. Its weights are the published half-precision files,
            whatever precision computes.
        files: The pipeline's files, with sizes in bytes.
        checker: Its safety checker's files; none where the base was published without.
        adapter: Where the adapter is.
        weights: The adapter's file there, and its size.
        encoder: Where the image encoder is; None where the adapter reads faces alone.
        scheduler: Class in diffusers; it takes the base's own settings.
        resolution: Height and width in pixels that the base was made for.
        guidance_scale: Good default.
        scale: Good default of the image prompt's weight.
        steps: Good default.
        faces: The adapter reads face embeddings.
    """

    name: str
    about: str
    base: Repository
    files: tuple[tuple[str, int], ...]
    checker: tuple[tuple[str, int], ...]
    adapter: Repository
    weights: tuple[str, int]
    encoder: Repository | None
    scheduler: str
    resolution: int
    guidance_scale: float
    scale: float
    steps: int = 30
    faces: bool = False

    def base_files(self, revision: str = "", *, checker: bool = True) -> list[HubFile]:
        """The pipeline's files."""
        wanted = self.files + (self.checker if checker else ())
        return [HubFile(self.base, name, size, revision) for name, size in wanted]

    def adapter_files(self) -> list[HubFile]:
        """The adapter's one file."""
        return [HubFile(self.adapter, *self.weights)]

    def encoder_files(self) -> list[HubFile]:
        """The image encoder's; its preprocessing is CLIP's own and has no file."""
        if self.encoder is None:
            return []
        folder = "models/image_encoder"  # ViT-H/14, which all presets' adapters read
        weights = HubFile(self.encoder, f"{folder}/model.safetensors", 2528 * _MB)
        return [HubFile(self.encoder, f"{folder}/config.json"), weights]

    def all_files(self) -> list[HubFile]:
        """Everything."""
        return self.base_files() + self.adapter_files() + self.encoder_files()

    def repositories(self) -> list[Repository]:
        """Each one once."""
        return list(dict.fromkeys(file.repository for file in self.all_files()))


_IP_ADAPTER = Repository("h94/IP-Adapter", "018e402774aeeddd60609b4ecdb7e298259dc729", "apache-2.0")


def _model(folder: str, megabytes: int) -> tuple[tuple[str, int], ...]:
    name = "diffusion_pytorch_model" if folder in ("unet", "vae") else "model"
    weights = (f"{folder}/{name}.fp16.safetensors", megabytes * _MB)
    return ((f"{folder}/config.json", 0), weights)


def _pipeline(**megabytes: int) -> tuple[tuple[str, int], ...]:
    """A pipeline's files, from the size of each model's weights; a few kB count as nothing."""
    files = [("model_index.json", 0), ("scheduler/scheduler_config.json", 0)]
    for folder, size in megabytes.items():
        files += _model(folder, size)
        if folder.startswith("text_encoder"):
            home = folder.replace("text_encoder", "tokenizer")
            names = ("merges.txt", "special_tokens_map.json", "tokenizer_config.json")
            files += [*((f"{home}/{name}", 0) for name in names), (f"{home}/vocab.json", _MB)]
    return tuple(files)


_SD15 = Preset(
    name="sd15",
    about="Stable Diffusion 1.5, 4 image tokens: what the picture is about",
    base=Repository(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
        "creativeml-openrail-m",
    ),
    files=(
        *_pipeline(text_encoder=246, unet=1719, vae=167),
        ("feature_extractor/preprocessor_config.json", 0),
    ),
    checker=_model("safety_checker", 608),
    adapter=_IP_ADAPTER,
    weights=("models/ip-adapter_sd15.safetensors", 45 * _MB),
    encoder=_IP_ADAPTER,
    scheduler="DDIMScheduler",
    resolution=512,
    guidance_scale=7.5,
    scale=0.6,
)
_SDXL = Preset(
    name="sdxl",
    about="Stable Diffusion XL, 4 image tokens: what the picture is about",
    base=Repository(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "462165984030d82259a11f4367a4eed129e94a7b",
        "openrail++",
    ),
    files=_pipeline(text_encoder=246, text_encoder_2=1389, unet=5135, vae=167),
    checker=(),
    adapter=_IP_ADAPTER,
    # `vit-h`: the SDXL adapter without it reads another, larger encoder (OpenCLIP ViT-bigG/14)
    weights=("sdxl_models/ip-adapter_sdxl_vit-h.safetensors", 698 * _MB),
    encoder=_IP_ADAPTER,
    scheduler="EulerDiscreteScheduler",
    resolution=1024,
    guidance_scale=5.0,
    scale=0.6,
)
_ALL = (
    _SD15,
    replace(
        _SD15,
        name="sd15-plus",
        about="Stable Diffusion 1.5, 16 image tokens: closer to the picture",
        weights=("models/ip-adapter-plus_sd15.safetensors", 98 * _MB),
    ),
    replace(
        _SD15,
        name="sd15-plus-face",
        about="Stable Diffusion 1.5, 16 image tokens of a cropped face",
        weights=("models/ip-adapter-plus-face_sd15.safetensors", 98 * _MB),
        scale=0.7,
    ),
    replace(
        _SD15,
        name="sd15-faceid",
        about="Stable Diffusion 1.5, a face embedding: who it is, not the picture",
        adapter=Repository(
            "h94/IP-Adapter-FaceID",
            "43907e6f44d079bf1a9102d9a6e56aef7a219bae",
            "non-commercial research only",
        ),
        # published as a pickle alone; adapter.files reads it without running what is in it
        weights=("ip-adapter-faceid_sd15.bin", 97 * _MB),
        encoder=None,
        scale=1.0,
        faces=True,
    ),
    _SDXL,
    replace(
        _SDXL,
        name="sdxl-plus",
        about="Stable Diffusion XL, 16 image tokens: closer to the picture",
        weights=("sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors", 848 * _MB),
    ),
)
PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}
"""Every preset by its name."""


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
