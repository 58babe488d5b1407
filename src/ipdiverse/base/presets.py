"""Presets: one word for a published base with its adapter and image encoder.

Revisions are commits, so that a preset means the same tomorrow; to move one on is to change its
line here, or `--revision` for one run. Sizes are those of the published files, rounded: nothing
but the download itself knows them to the byte.

Sources: the model cards of the repositories, and the original authors' examples for steps, scale
and scheduler (github.com/tencent-ailab/IP-Adapter).
"""

from __future__ import annotations

from dataclasses import dataclass

SITE = "https://huggingface.co"
_MB = 1_000_000


@dataclass(frozen=True)
class Repository:
    """A repository of the Hugging Face hub.

    Args:
        id: `owner/name`.
        revision: Commit, tag or branch.
        license: As its model card states it.
    """

    id: str
    revision: str
    license: str

    @property
    def link(self) -> str:
        """Its page."""
        return f"{SITE}/{self.id}"


@dataclass(frozen=True)
class HubFile:
    """A file of a repository.

    Args:
        repository: Where it is.
        name: Its path there.
        size: In bytes, about; 0 is next to nothing.
        revision: In place of the repository's own.
    """

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
    """A base, what prompts it with images, and good defaults.

    Weights of the base are the published half-precision files, whatever precision computes.

    Args:
        name: The word.
        about: What it is for.
        base: A pipeline in diffusers' layout.
        files: The pipeline's files, with sizes in bytes.
        checker: Its safety checker's files; none where the base was published without.
        adapter: Where the adapter is.
        weights: The adapter's file there, and its size.
        encoder: Where the image encoder is; None where the adapter reads faces alone.
        encoder_folder: Its folder there.
        scheduler: Class in diffusers; it takes the base's own settings.
        resolution: Height and width in pixels that the base was made for.
        steps: Good default.
        guidance_scale: Good default.
        scale: Good default of the image prompt's weight.
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
    encoder_folder: str
    scheduler: str
    resolution: int
    steps: int
    guidance_scale: float
    scale: float
    faces: bool = False

    def base_files(self, revision: str = "", *, checker: bool = True) -> list[HubFile]:
        """What the pipeline is opened from.

        Args:
            revision: In place of the pinned one.
            checker: The safety checker too.
        """
        wanted = self.files + (self.checker if checker else ())
        return [HubFile(self.base, name, size, revision) for name, size in wanted]

    def adapter_files(self) -> list[HubFile]:
        """The adapter's one file."""
        return [HubFile(self.adapter, *self.weights)]

    def encoder_files(self) -> list[HubFile]:
        """The image encoder's; its preprocessing is CLIP's own and has no file."""
        if self.encoder is None:
            return []
        wanted = (("config.json", 0), ("model.safetensors", _ENCODER_SIZE))
        return [HubFile(self.encoder, f"{self.encoder_folder}/{n}", size) for n, size in wanted]

    def all_files(self) -> list[HubFile]:
        """Everything."""
        return self.base_files() + self.adapter_files() + self.encoder_files()

    def repositories(self) -> list[Repository]:
        """Each one once."""
        every = [self.base, self.adapter, *([self.encoder] if self.encoder else [])]
        return list(dict.fromkeys(every))


_SD15 = Repository(
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
    "creativeml-openrail-m",
)
_SDXL = Repository(
    "stabilityai/stable-diffusion-xl-base-1.0",
    "462165984030d82259a11f4367a4eed129e94a7b",
    "openrail++",
)
_IP_ADAPTER = Repository("h94/IP-Adapter", "018e402774aeeddd60609b4ecdb7e298259dc729", "apache-2.0")
_FACEID = Repository(
    "h94/IP-Adapter-FaceID",
    "43907e6f44d079bf1a9102d9a6e56aef7a219bae",
    "non-commercial research only",
)

_ENCODER_SIZE = 2528 * _MB
_VIT_H = "models/image_encoder"
"""OpenCLIP ViT-H/14, which every adapter here was trained with, `vit-h` of SDXL included."""


def _tokenizer(folder: str) -> tuple[tuple[str, int], ...]:
    names = ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")
    return tuple((f"{folder}/{name}", _MB if name == "vocab.json" else 0) for name in names)


_SD15_FILES = (
    ("model_index.json", 0),
    ("feature_extractor/preprocessor_config.json", 0),
    ("scheduler/scheduler_config.json", 0),
    ("text_encoder/config.json", 0),
    ("text_encoder/model.fp16.safetensors", 246 * _MB),
    *_tokenizer("tokenizer"),
    ("unet/config.json", 0),
    ("unet/diffusion_pytorch_model.fp16.safetensors", 1719 * _MB),
    ("vae/config.json", 0),
    ("vae/diffusion_pytorch_model.fp16.safetensors", 167 * _MB),
)
_SD15_CHECKER = (
    ("safety_checker/config.json", 0),
    ("safety_checker/model.fp16.safetensors", 608 * _MB),
)
_SDXL_FILES = (
    ("model_index.json", 0),
    ("scheduler/scheduler_config.json", 0),
    ("text_encoder/config.json", 0),
    ("text_encoder/model.fp16.safetensors", 246 * _MB),
    ("text_encoder_2/config.json", 0),
    ("text_encoder_2/model.fp16.safetensors", 1389 * _MB),
    *_tokenizer("tokenizer"),
    *_tokenizer("tokenizer_2"),
    ("unet/config.json", 0),
    ("unet/diffusion_pytorch_model.fp16.safetensors", 5135 * _MB),
    ("vae/config.json", 0),
    ("vae/diffusion_pytorch_model.fp16.safetensors", 167 * _MB),
)


def _sd15(
    name: str,
    about: str,
    weights: tuple[str, int],
    scale: float,
    adapter: Repository = _IP_ADAPTER,
    encoder: Repository | None = _IP_ADAPTER,
) -> Preset:
    return Preset(
        name=name,
        about=about,
        base=_SD15,
        files=_SD15_FILES,
        checker=_SD15_CHECKER,
        adapter=adapter,
        weights=weights,
        encoder=encoder,
        encoder_folder=_VIT_H if encoder else "",
        scheduler="DDIMScheduler",
        resolution=512,
        steps=30,
        guidance_scale=7.5,
        scale=scale,
        faces=encoder is None,
    )


def _sdxl(name: str, about: str, weights: tuple[str, int]) -> Preset:
    return Preset(
        name=name,
        about=about,
        base=_SDXL,
        files=_SDXL_FILES,
        checker=(),
        adapter=_IP_ADAPTER,
        weights=weights,
        encoder=_IP_ADAPTER,
        encoder_folder=_VIT_H,
        scheduler="EulerDiscreteScheduler",
        resolution=1024,
        steps=30,
        guidance_scale=5.0,
        scale=0.6,
    )


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        _sd15(
            "sd15",
            "Stable Diffusion 1.5, 4 image tokens: what the picture is about",
            ("models/ip-adapter_sd15.safetensors", 45 * _MB),
            0.6,
        ),
        _sd15(
            "sd15-plus",
            "Stable Diffusion 1.5, 16 image tokens: closer to the picture",
            ("models/ip-adapter-plus_sd15.safetensors", 98 * _MB),
            0.6,
        ),
        _sd15(
            "sd15-plus-face",
            "Stable Diffusion 1.5, 16 image tokens of a cropped face",
            ("models/ip-adapter-plus-face_sd15.safetensors", 98 * _MB),
            0.7,
        ),
        _sd15(
            "sd15-faceid",
            "Stable Diffusion 1.5, a face embedding: who it is, not the picture",
            ("ip-adapter-faceid_sd15.bin", 97 * _MB),
            1.0,
            adapter=_FACEID,
            encoder=None,
        ),
        _sdxl(
            "sdxl",
            "Stable Diffusion XL, 4 image tokens: what the picture is about",
            ("sdxl_models/ip-adapter_sdxl_vit-h.safetensors", 698 * _MB),
        ),
        _sdxl(
            "sdxl-plus",
            "Stable Diffusion XL, 16 image tokens: closer to the picture",
            ("sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors", 848 * _MB),
        ),
    )
}
"""Every preset by its name."""


def total(files: list[HubFile]) -> int:
    """Bytes of all of them, about."""
    return sum(file.size for file in files)


def as_size(count: int) -> str:
    """Bytes for people: `98 MB`, `4.9 GB`."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(count / 1e6, 1):.0f} MB"
