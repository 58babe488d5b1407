"""Presets: one word for a published base with its adapter and image encoder.

Revisions are commits, so that a preset means the same tomorrow. Files and rounded sizes are written
down because the hub's library cannot tell them offline. Sources: the repositories' model cards, and
the original authors' examples for steps, scale and scheduler (github.com/tencent-ailab/IP-Adapter).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ipdiverse.errors import ArgumentError

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
    checker: tuple[tuple[str, int], ...]
    adapter: Repository | None
    weights: tuple[str, int]
    encoder: Encoder | None
    scheduler: str
    resolution: int
    guidance_scale: float
    scale: float
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


def _model(folder: str, megabytes: int) -> tuple[tuple[str, int], ...]:
    name = "diffusion_pytorch_model" if folder in ("unet", "vae") else "model"
    weights = (f"{folder}/{name}.fp16.safetensors", megabytes * _MB)
    return ((f"{folder}/config.json", 0), weights)


def _shards(folder: str, *megabytes: int, variant: str = "") -> tuple[tuple[str, int], ...]:
    """A model's files in bfloat16, or in several parts with their index."""
    name = "model" if folder.startswith("text") else "diffusion_pytorch_model"
    config, count = (f"{folder}/config.json", 0), len(megabytes)
    if count == 1:
        return (config, (f"{folder}/{name}.safetensors", megabytes[0] * _MB))
    # transformers puts the variant before the numbers in a part's name, and last in the index's
    index = f"{folder}/{name}.safetensors.index{variant}.json"
    parts = [
        (f"{folder}/{name}{variant}-{number:05}-of-{count:05}.safetensors", size * _MB)
        for number, size in enumerate(megabytes, 1)
    ]
    return (config, (index, 0), *parts)


_INDEX = (("model_index.json", 0), ("scheduler/scheduler_config.json", 0))
_T5_VOCABULARY = ("special_tokens_map.json", "spiece.model", "tokenizer.json")


def _tokenizer(home: str, *names: str) -> tuple[tuple[str, int], ...]:
    return tuple((f"{home}/{name}", 0) for name in (*names, "tokenizer_config.json"))


def _pipeline(**megabytes: int) -> tuple[tuple[str, int], ...]:
    """A pipeline's files, from the size of each model's weights; a few kB count as nothing."""
    files = [*_INDEX]
    for folder, size in megabytes.items():
        files += _model(folder, size)
        if folder.startswith("text_encoder"):
            home = folder.replace("text_encoder", "tokenizer")
            files += [(f"{home}/{name}", _MB * (name == "vocab.json")) for name in _VOCABULARY]
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
    encoder=VIT_H,
    scheduler="DDIMScheduler",
    resolution=512,
    guidance_scale=7.5,
    scale=0.6,
)
_SDXL = Preset(
    name="sdxl",
    about="Stable Diffusion XL, 4 image tokens: what the picture is about",
    base=_SDXL_BASE,
    files=_pipeline(text_encoder=246, text_encoder_2=1389, unet=5135, vae=167),
    checker=(),
    adapter=_IP_ADAPTER,
    # `vit-h`: the SDXL adapter without it reads another, larger encoder (OpenCLIP ViT-bigG/14)
    weights=("sdxl_models/ip-adapter_sdxl_vit-h.safetensors", 698 * _MB),
    encoder=VIT_H,
    scheduler="EulerDiscreteScheduler",
    resolution=1024,
    guidance_scale=5.0,
    scale=0.6,
)
_FLUX = Preset(
    name="flux-dev",
    about="Flux.1 dev, XLabs' adapter, 4 image tokens",
    base=Repository(
        "black-forest-labs/FLUX.1-dev",
        "3de623fc3c33e44ffbe2bad470d0f45bccf2eb21",
        "FLUX.1 [dev] non-commercial; gated",
    ),
    files=(
        *_INDEX,
        *_shards("text_encoder", 246),
        *_shards("text_encoder_2", 4995, 4530),
        *_tokenizer("tokenizer", *_VOCABULARY[:2], "vocab.json"),
        *_tokenizer("tokenizer_2", *_T5_VOCABULARY),
        *_shards("transformer", 9983, 9949, 3871),
        *_shards("vae", 168),
    ),
    checker=(),
    adapter=Repository("XLabs-AI/flux-ip-adapter", "main", "FLUX.1 [dev] non-commercial"),
    weights=("ip_adapter.safetensors", 982 * _MB),
    encoder=CLIP_L,
    scheduler="FlowMatchEulerDiscreteScheduler",
    resolution=1024,
    guidance_scale=3.5,
    scale=1.0,
    steps=28,
    variant=None,
)
_SD35 = Preset(
    name="sd35-large",
    about="Stable Diffusion 3.5 large, InstantX' adapter, 64 image tokens",
    base=Repository(
        "stabilityai/stable-diffusion-3.5-large",
        "ceddf0a7fdf2064ea28e2213e3b84e4afa170a0f",
        "stabilityai-ai-community; gated",
    ),
    files=(
        *_INDEX,
        *_shards("text_encoder", 247),
        *_shards("text_encoder_2", 1390),
        *_shards("text_encoder_3", 4995, 4530),
        *_tokenizer("tokenizer", *_VOCABULARY[:2], "vocab.json"),
        *_tokenizer("tokenizer_2", *_VOCABULARY[:2], "vocab.json"),
        *_tokenizer("tokenizer_3", *_T5_VOCABULARY),
        *_shards("transformer", 9990, 6306),
        *_shards("vae", 168),
    ),
    checker=(),
    adapter=Repository(
        "InstantX/SD3.5-Large-IP-Adapter",
        "f1f54ca369ae759f9278ae9c87d46def9f133c78",
        "stabilityai-ai-community",
    ),
    weights=("ip-adapter.bin", 3360 * _MB),
    encoder=SIGLIP,
    scheduler="FlowMatchEulerDiscreteScheduler",
    resolution=1024,
    guidance_scale=3.5,
    scale=0.6,
    steps=28,
    variant=None,
)
_KOLORS = Preset(
    name="kolors",
    about="Kolors, 16 image tokens; reads Chinese and English",
    base=Repository(
        "Kwai-Kolors/Kolors-diffusers", "7e091c75199e910a26cd1b51ed52c28de5db3711", "apache-2.0"
    ),
    files=(
        *_INDEX,
        *_shards("text_encoder", 4920, 4895, 2671, variant=".fp16"),
        *_tokenizer("tokenizer", "tokenizer.model"),
        *_model("unet", 5159),
        *_model("vae", 167),
    ),
    checker=(),
    adapter=_KOLORS_PLUS,
    weights=("ip_adapter_plus_general.safetensors", 1013 * _MB),
    encoder=CLIP_L_336,
    scheduler="EulerDiscreteScheduler",
    resolution=1024,
    guidance_scale=5.0,
    scale=0.6,
)


def _of(base: Preset, name: str, about: str, file: str, megabytes: int, **changes: Any) -> Preset:
    """Another adapter on the same base."""
    about = f"{base.about.partition(',')[0]}, {about}"
    return replace(base, name=name, about=about, weights=(file, megabytes * _MB), **changes)


def _face(base: Preset, name: str, about: str, file: str, megabytes: int, **more: Any) -> Preset:
    """An adapter that reads faces; published as a pickle alone, and read without running it."""
    changes = {"adapter": _FACE_ID, "encoder": None, "scale": 1.0, "faces": True, **more}
    return _of(base, name, about, f"ip-adapter-{file}.bin", megabytes, **changes)


_PLUS, _V1, _XL = "16 image tokens: closer to the picture", "models/ip-adapter", "sdxl_models/"
_FACE_TOKENS = "16 image tokens of a cropped face"
_EMBEDDING = "a face embedding: who it is, not the picture"
_PLUS_V2 = "a face embedding and the face's picture"
_PORTRAIT = "embeddings of several pictures of a face"
_ALL = (
    _SD15,
    _of(_SD15, "sd15-light", "4 image tokens, milder", f"{_V1}_sd15_light.safetensors", 45),
    _of(
        _SD15, "sd15-vit-g", "4 tokens of bigG", f"{_V1}_sd15_vit-G.safetensors", 46, encoder=BIG_G
    ),
    _of(_SD15, "sd15-plus", _PLUS, f"{_V1}-plus_sd15.safetensors", 98),
    _of(_SD15, "sd15-plus-face", _FACE_TOKENS, f"{_V1}-plus-face_sd15.safetensors", 98, scale=0.7),
    _of(
        _SD15,
        "sd15-full-face",
        "257 image tokens of a cropped face",
        f"{_V1}-full-face_sd15.safetensors",
        44,
        scale=0.7,
    ),
    _face(_SD15, "sd15-faceid", _EMBEDDING, "faceid_sd15", 97),
    _face(_SD15, "sd15-faceid-plus", _PLUS_V2, "faceid-plus_sd15", 157, encoder=VIT_H),
    _face(_SD15, "sd15-faceid-plusv2", _PLUS_V2, "faceid-plusv2_sd15", 157, encoder=VIT_H),
    _face(_SD15, "sd15-faceid-portrait", _PORTRAIT, "faceid-portrait_sd15", 65),
    _SDXL,
    _of(
        _SDXL,
        "sdxl-vit-g",
        "4 tokens of bigG",
        f"{_XL}ip-adapter_sdxl.safetensors",
        703,
        encoder=BIG_G,
    ),
    _of(_SDXL, "sdxl-plus", _PLUS, f"{_XL}ip-adapter-plus_sdxl_vit-h.safetensors", 848),
    _of(
        _SDXL,
        "sdxl-plus-face",
        _FACE_TOKENS,
        f"{_XL}ip-adapter-plus-face_sdxl_vit-h.safetensors",
        848,
        scale=0.7,
    ),
    _face(_SDXL, "sdxl-faceid", _EMBEDDING, "faceid_sdxl", 1071),
    _face(_SDXL, "sdxl-faceid-plusv2", _PLUS_V2, "faceid-plusv2_sdxl", 1487, encoder=VIT_H),
    _face(_SDXL, "sdxl-faceid-portrait", _PORTRAIT, "faceid-portrait_sdxl", 749),
    _KOLORS,
    _FLUX,
    _of(
        _FLUX,
        "flux-dev-v2",
        "XLabs' second adapter, 16 image tokens",
        "ip_adapter.safetensors",
        1057,
        adapter=Repository("XLabs-AI/flux-ip-adapter-v2", "main", "FLUX.1 [dev] non-commercial"),
    ),
    _of(
        _FLUX,
        "flux-dev-instantx",
        "InstantX' adapter, 128 image tokens",
        "ip-adapter.bin",
        5290,
        adapter=Repository("InstantX/FLUX.1-dev-IP-Adapter", "main", "FLUX.1 [dev] non-commercial"),
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
        files=tuple(f for f in _SD35.files if not f[0].startswith("transformer/"))
        + _shards("transformer", 4940),
        adapter=None,
        weights=("", 0),
        encoder=None,
        guidance_scale=4.5,
        steps=40,
    ),
)
PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}
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


_LORA, _RAIL = "pytorch_lora_weights.safetensors", "openrail++"
_HYPER = Repository("ByteDance/Hyper-SD", "a08b9c3da8dc3be0a6e79b04721bf237241403f9", _RAIL)
_LIGHTNING = "sdxl_lightning_4step_lora.safetensors"
_LAST = {"timestep_spacing": "trailing"}  # they begin at the very last timestep
_ETA = {"eta": 0.3}  # the paper's gamma: the noise that a step adds again
_ON_SD15, _ON_SDXL = _SD15.base.id, _SDXL.base.id


def _few(
    home: Repository | str, file: str, size: int, kind: str, rail: str = _RAIL, **more: Any
) -> FewSteps:
    home = Repository(home, "main", rail) if isinstance(home, str) else home
    return FewSteps(HubFile(home, file, size * _MB), f"{kind}Scheduler", **more)


FEW_STEPS: dict[str, dict[str, FewSteps]] = {
    "lcm": {
        _ON_SD15: _few("latent-consistency/lcm-lora-sdv1-5", _LORA, 135, "LCM"),
        _ON_SDXL: _few("latent-consistency/lcm-lora-sdxl", _LORA, 394, "LCM"),
    },
    "lightning": {
        _ON_SDXL: _few("ByteDance/SDXL-Lightning", _LIGHTNING, 394, "EulerDiscrete", settings=_LAST)
    },
    "hyper": {
        _ON_SD15: _few(_HYPER, "Hyper-SD15-4steps-lora.safetensors", 269, "DDIM", settings=_LAST),
        _ON_SDXL: _few(_HYPER, "Hyper-SDXL-4steps-lora.safetensors", 787, "DDIM", settings=_LAST),
    },
    "tcd": {
        _ON_SD15: _few("h1t/TCD-SD15-LoRA", _LORA, 135, "TCD", "mit", call=_ETA),
        _ON_SDXL: _few("h1t/TCD-SDXL-LoRA", _LORA, 394, "TCD", "mit", call=_ETA),
    },
}
"""By name and by the base's repository. Sources: their model cards."""
_FLUX_FEW = _few(_HYPER, "Hyper-FLUX.1-dev-8steps-lora.safetensors", 1388, "FlowMatchEulerDiscrete")
# Flux is told its guidance, at no cost
FEW_STEPS["hyper"][_FLUX.base.id] = replace(_FLUX_FEW, steps=8, guidance_scale=3.5, weight=0.125)


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
