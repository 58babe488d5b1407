"""Presets: one word for a published base with its adapter and image encoder.

Revisions are commits, so that a preset means the same tomorrow. Files and rounded sizes are written
down because the hub's library cannot tell them offline. Sources: the repositories' model cards, and
the original authors' examples for steps, scale and scheduler (github.com/tencent-ailab/IP-Adapter).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

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
    """

    name: str
    repository: Repository
    weights: tuple[str, int]
    kind: str = "CLIPVisionModelWithProjection"
    text: tuple[HubFile, ...] = ()

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


_IP_ADAPTER = Repository("h94/IP-Adapter", "018e402774aeeddd60609b4ecdb7e298259dc729", "apache-2.0")
_FACE_ID = Repository(
    "h94/IP-Adapter-FaceID",
    "43907e6f44d079bf1a9102d9a6e56aef7a219bae",
    "non-commercial research only",
)
_SDXL_BASE = Repository(
    "stabilityai/stable-diffusion-xl-base-1.0",
    "462165984030d82259a11f4367a4eed129e94a7b",
    "openrail++",
)
_CLIP_L = Repository(
    "openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41", "mit"
)
_VOCABULARY = ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")


def _text_half(
    repository: Repository, model: str, megabytes: int, tokenizer: str = ""
) -> tuple[HubFile, ...]:
    """The text half of a CLIP: its weights first, then the rest of what opens it."""
    config = model.removesuffix(model.rpartition("/")[2]) + "config.json"
    names = (config, *(f"{tokenizer}{name}" for name in _VOCABULARY))
    weights = HubFile(repository, model, megabytes * _MB)
    return (weights, *(HubFile(repository, name) for name in names))


VIT_H = Encoder(
    "OpenCLIP ViT-H/14",
    _IP_ADAPTER,
    ("models/image_encoder/model.safetensors", 2528 * _MB),
    text=_text_half(
        Repository(
            "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
            "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
            "mit",
        ),
        "model.safetensors",
        3945,
    ),
)
BIG_G = Encoder(
    "OpenCLIP ViT-bigG/14",
    _IP_ADAPTER,
    ("sdxl_models/image_encoder/model.safetensors", 3690 * _MB),
    # SDXL's second text encoder is the other half of this model
    text=_text_half(
        _SDXL_BASE, "text_encoder_2/model.fp16.safetensors", 1389, tokenizer="tokenizer_2/"
    ),
)
CLIP_L = Encoder(
    "CLIP ViT-L/14",
    _CLIP_L,
    ("model.safetensors", 1711 * _MB),
    text=_text_half(_CLIP_L, "model.safetensors", 1711),
)
# main has pickles alone; this request of diffusers' authors, which their guide names, safetensors
_KOLORS_PLUS = Repository("Kwai-Kolors/Kolors-IP-Adapter-Plus", "refs/pr/4", "apache-2.0")
CLIP_L_336 = Encoder(
    "CLIP ViT-L/14 at 336 px", _KOLORS_PLUS, ("image_encoder/model.safetensors", 1711 * _MB)
)
SIGLIP = Encoder(
    "SigLIP so400m/14 at 384 px",
    Repository(
        "google/siglip-so400m-patch14-384", "9fdffc58afc957d1a03a25b10dba0329ab15c2a3", "apache-2.0"
    ),
    ("model.safetensors", 3512 * _MB),
    kind="SiglipVisionModel",
)


_TOKENIZERS = {
    "clip": _VOCABULARY,
    "t5": ("special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer_config.json"),
    "chatglm": ("tokenizer.model", "tokenizer_config.json"),
}


def _files(folders: str, variant: str = "") -> tuple[tuple[str, int], ...]:
    """A pipeline's files; a few kB count as nothing.

    Args:
        folders: Each with a colon and a key of `_TOKENIZERS`, or the megabytes of its weights; of
            several parts with a plus between.
        variant: Stands before the numbers in a part's name, and last in the index's.
    """
    files = [("model_index.json", 0), ("scheduler/scheduler_config.json", 0)]
    for folder, what in (one.split(":") for one in folders.split()):
        if what in _TOKENIZERS:
            files += [(f"{folder}/{name}", 0) for name in _TOKENIZERS[what]]
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


_WHOLE = "4 image tokens: what the picture is about"
_SD15 = Preset(
    name="sd15",
    about=f"Stable Diffusion 1.5, {_WHOLE}",
    base=Repository(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
        "creativeml-openrail-m",
    ),
    files=(
        *_files("text_encoder:246 tokenizer:clip unet:1719 vae:167", ".fp16"),
        ("feature_extractor/preprocessor_config.json", 0),
    ),
    checker=_files("safety_checker:608", ".fp16")[2:],
    adapter=_IP_ADAPTER,
    weights=("models/ip-adapter_sd15.safetensors", 45 * _MB),
    encoder=VIT_H,
    scheduler="DDIMScheduler",
    resolution=512,
    guidance_scale=7.5,
)
_SDXL = Preset(
    name="sdxl",
    about=f"Stable Diffusion XL, {_WHOLE}",
    base=_SDXL_BASE,
    files=_files(
        "text_encoder:246 tokenizer:clip text_encoder_2:1389 tokenizer_2:clip unet:5135 vae:167",
        ".fp16",
    ),
    adapter=_IP_ADAPTER,
    # `vit-h`: the SDXL adapter without it reads another, larger encoder (OpenCLIP ViT-bigG/14)
    weights=("sdxl_models/ip-adapter_sdxl_vit-h.safetensors", 698 * _MB),
    encoder=VIT_H,
    scheduler="EulerDiscreteScheduler",
    guidance_scale=5.0,
)
_FLUX_LICENCE = "FLUX.1 [dev] non-commercial"
_FLUX = Preset(
    name="flux-dev",
    about="Flux.1 dev, XLabs' adapter, 4 image tokens",
    base=Repository(
        "black-forest-labs/FLUX.1-dev",
        "3de623fc3c33e44ffbe2bad470d0f45bccf2eb21",
        f"{_FLUX_LICENCE}; gated",
    ),
    files=_files(
        "text_encoder:246 text_encoder_2:4995+4530 tokenizer:clip tokenizer_2:t5 "
        "transformer:9983+9949+3871 vae:168"
    ),
    adapter=Repository("XLabs-AI/flux-ip-adapter", "main", _FLUX_LICENCE),
    weights=("ip_adapter.safetensors", 982 * _MB),
    encoder=CLIP_L,
    guidance_scale=3.5,
    scale=1.0,
    steps=28,
    variant=None,
)
_SD35_TEXTS = (
    "text_encoder:247 text_encoder_2:1390 text_encoder_3:4995+4530 "
    "tokenizer:clip tokenizer_2:clip tokenizer_3:t5 vae:168 "
)
_SD35 = Preset(
    name="sd35-large",
    about="Stable Diffusion 3.5 large, InstantX' adapter, 64 image tokens",
    base=Repository(
        "stabilityai/stable-diffusion-3.5-large",
        "ceddf0a7fdf2064ea28e2213e3b84e4afa170a0f",
        "stabilityai-ai-community; gated",
    ),
    files=_files(f"{_SD35_TEXTS} transformer:9990+6306"),
    adapter=Repository(
        "InstantX/SD3.5-Large-IP-Adapter",
        "f1f54ca369ae759f9278ae9c87d46def9f133c78",
        "stabilityai-ai-community",
    ),
    weights=("ip-adapter.bin", 3360 * _MB),
    encoder=SIGLIP,
    guidance_scale=3.5,
    steps=28,
    variant=None,
)
_KOLORS = Preset(
    name="kolors",
    about="Kolors, 16 image tokens; reads Chinese and English",
    base=Repository(
        "Kwai-Kolors/Kolors-diffusers", "7e091c75199e910a26cd1b51ed52c28de5db3711", "apache-2.0"
    ),
    files=_files(
        "text_encoder:4920+4895+2671 tokenizer:chatglm unet:5159 vae:167", variant=".fp16"
    ),
    adapter=_KOLORS_PLUS,
    weights=("ip_adapter_plus_general.safetensors", 1013 * _MB),
    encoder=CLIP_L_336,
    scheduler="EulerDiscreteScheduler",
    guidance_scale=5.0,
)


def _of(base: Preset, name: str, about: str, file: str, megabytes: int, **changes: Any) -> Preset:
    """Another adapter on the same base; the name is what follows the base's."""
    about = f"{base.about.partition(',')[0]}, {about}"
    weights = (file, megabytes * _MB)
    return replace(base, name=base.name + name, about=about, weights=weights, **changes)


def _h94(base: Preset, name: str, about: str, end: str, megabytes: int, **changes: Any) -> Preset:
    """Of h94/IP-Adapter."""
    file = f"{base.weights[0].partition('/')[0]}/ip-adapter{end}.safetensors"
    return _of(base, name, about, file, megabytes, **changes)


def _face(base: Preset, name: str, about: str, file: str, megabytes: int, **more: Any) -> Preset:
    """An adapter that reads faces; published as a pickle alone, and read without running it."""
    changes = {"adapter": _FACE_ID, "encoder": None, "scale": 1.0, "faces": True, **more}
    return _of(base, name, about, f"ip-adapter-{file}.bin", megabytes, **changes)


_PLUS, _BIG = "16 image tokens: closer to the picture", "4 tokens of bigG"
_FACE_TOKENS = "16 image tokens of a cropped face"
_ALL_TOKENS = "257 image tokens of a cropped face"
_EMBEDDING = "a face embedding: who it is, not the picture"
_PLUS_V2 = "a face embedding and the face's picture"
_PORTRAIT = "embeddings of several pictures of a face"
_ALL = (
    _SD15,
    _h94(_SD15, "-light", "4 image tokens, milder", "_sd15_light", 45),
    _h94(_SD15, "-vit-g", _BIG, "_sd15_vit-G", 46, encoder=BIG_G),
    _h94(_SD15, "-plus", _PLUS, "-plus_sd15", 98),
    _h94(_SD15, "-plus-face", _FACE_TOKENS, "-plus-face_sd15", 98, scale=0.7),
    _h94(_SD15, "-full-face", _ALL_TOKENS, "-full-face_sd15", 44, scale=0.7),
    _face(_SD15, "-faceid", _EMBEDDING, "faceid_sd15", 97),
    _face(_SD15, "-faceid-plus", _PLUS_V2, "faceid-plus_sd15", 157, encoder=VIT_H),
    _face(_SD15, "-faceid-plusv2", _PLUS_V2, "faceid-plusv2_sd15", 157, encoder=VIT_H),
    _face(_SD15, "-faceid-portrait", _PORTRAIT, "faceid-portrait_sd15", 65),
    _SDXL,
    _h94(_SDXL, "-vit-g", _BIG, "_sdxl", 703, encoder=BIG_G),
    _h94(_SDXL, "-plus", _PLUS, "-plus_sdxl_vit-h", 848),
    _h94(_SDXL, "-plus-face", _FACE_TOKENS, "-plus-face_sdxl_vit-h", 848, scale=0.7),
    _face(_SDXL, "-faceid", _EMBEDDING, "faceid_sdxl", 1071),
    _face(_SDXL, "-faceid-plusv2", _PLUS_V2, "faceid-plusv2_sdxl", 1487, encoder=VIT_H),
    _face(_SDXL, "-faceid-portrait", _PORTRAIT, "faceid-portrait_sdxl", 749),
    _KOLORS,
    _FLUX,
    replace(
        _FLUX,
        name="flux-dev-v2",
        about="Flux.1 dev, XLabs' second adapter, 16 image tokens",
        adapter=Repository("XLabs-AI/flux-ip-adapter-v2", "main", _FLUX_LICENCE),
        weights=("ip_adapter.safetensors", 1057 * _MB),
    ),
    replace(
        _FLUX,
        name="flux-dev-instantx",
        about="Flux.1 dev, InstantX' adapter, 128 image tokens",
        adapter=Repository("InstantX/FLUX.1-dev-IP-Adapter", "main", _FLUX_LICENCE),
        weights=("ip-adapter.bin", 5290 * _MB),
        encoder=SIGLIP,
        scale=0.7,
    ),
    replace(
        _FLUX,
        name="flux-schnell",
        about="Flux.1 schnell in 4 steps, with the adapter of dev",
        base=Repository(
            "black-forest-labs/FLUX.1-schnell",
            "741f7c3ce8b383c54771c7003378a50191e9efe9",
            "apache-2.0; gated",
        ),
        guidance_scale=0.0,
        steps=4,
    ),
    _SD35,
    replace(
        _SD35,
        name="sd35-medium",
        about="Stable Diffusion 3.5 medium; nobody published an adapter for it",
        base=Repository(
            "stabilityai/stable-diffusion-3.5-medium",
            "b940f670f0eda2d07fbb75229e779da1ad11eb80",
            "stabilityai-ai-community; gated",
        ),
        files=_files(f"{_SD35_TEXTS} transformer:4940"),
        adapter=None,
        weights=("", 0),
        encoder=None,
        guidance_scale=4.5,
        steps=40,
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
