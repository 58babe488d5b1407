"""Random models with the real architectures in small: SD 1.x, SD 2.x, SDXL and Kolors."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from ipdiverse.adapter.attach.branches import EncodedPrompt
from ipdiverse.adapter.model import ImagePromptAdapter, attention_layers, layer_widths
from workshop.base.tokenizer import build_tokenizer

if TYPE_CHECKING:
    from ipdiverse.adapter.model import LoraShapes, Projection

ARCHITECTURES = ("sd1", "sd2", "sdxl")
SIZE = 64
FACE_DIM = 32
CLIP_DIM = 48
CLIP_WIDTH = 32

_COMMON: dict[str, Any] = {"sample_size": 16, "norm_num_groups": 8, "layers_per_block": 2}
_FOUR_LEVELS: dict[str, Any] = {
    "block_out_channels": (16, 32, 32, 32),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
_UNETS: dict[str, dict[str, Any]] = {
    "sd1": {**_FOUR_LEVELS, "cross_attention_dim": 64, "attention_head_dim": 2},
    "sd2": {
        **_FOUR_LEVELS,
        "cross_attention_dim": 128,
        "attention_head_dim": (1, 2, 4, 4),
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 128,
        "attention_head_dim": (1, 2, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64 + 6 * 8,
    },
}


# SDXL's, with a layer that narrows the wider text of a language model
_UNETS["kolors"] = _UNETS["sdxl"] | {"encoder_hid_dim": 160, "encoder_hid_dim_type": "text_proj"}
_UNETS["kolors"]["projection_class_embeddings_input_dim"] = 160 + 6 * 8


def unet(name: str, **changes: Any) -> Any:
    """Block types, layers and their numbering are the original's; only widths are small."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1)
    build: Any = UNet2DConditionModel
    return build(**{**_COMMON, **_UNETS[name], **changes}).eval()


def two_levels() -> Any:
    """SD 1.x cut down to four cross-attention layers, for what takes long."""
    return unet(
        "sd1",
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def vae() -> Any:
    """Four times smaller latents, and the attention in the middle that the original has."""
    from diffusers import AutoencoderKL

    torch.manual_seed(2)
    build: Any = AutoencoderKL
    return build(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
    ).eval()


def text_encoder(
    width: int, vocabulary: int, *, projects: bool = False, layers: int = 2, heads: int = 2
) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(3)
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=40,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return (CLIPTextModelWithProjection if projects else CLIPTextModel)(config).eval()


class _Letters:
    """In place of sentencepiece, which is a package of its own: each letter is a token."""

    role_special_token_expression = ""

    def __init__(self, _: str) -> None:
        roles = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
        marks = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *roles)
        self.special_tokens = {mark: 128 + number for number, mark in enumerate(marks)}
        self.index_special_tokens = {number: mark for mark, number in self.special_tokens.items()}
        self.n_words, self.bos_id, self.eos_id, self.pad_id = 128 + len(marks), 1, 2, 0

    def tokenize(self, text: str, encode_special_tokens: bool = False) -> list[str]:
        return [] if encode_special_tokens else list(text)

    def convert_token_to_id(self, token: str) -> int:
        return self.special_tokens.get(token, ord(token[0]) % 128)

    def convert_id_to_token(self, number: int) -> str:
        return self.index_special_tokens.get(number) or chr(number)

    def decode_tokens(self, tokens: list[str]) -> str:
        return "".join(tokens)


def letters_for_sentencepiece() -> Any:
    """Lets ChatGLM's own tokenizer open without sentencepiece; a context manager."""
    return mock.patch("diffusers.pipelines.kolors.tokenizer.SPTokenizer", _Letters)


def language_model() -> tuple[Any, Any]:
    """ChatGLM and its tokenizer, which read Kolors' prompts."""
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
    from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer

    torch.manual_seed(3)
    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=160,
        hidden_size=160,
        ffn_hidden_size=64,
        kv_channels=40,
        num_attention_heads=4,
        seq_length=256,
        multi_query_attention=True,
        multi_query_group_num=2,
        original_rope=True,
        use_cache=False,
    )
    model = ChatGLMModel(config).eval()
    for name, parameter in model.named_parameters():  # diffusers leaves the memory as it finds it
        torch.nn.init.normal_(parameter, float("norm" in name), 0.1)
    with letters_for_sentencepiece():
        return model.requires_grad_(False), ChatGLMTokenizer(__file__)  # any file will do


def image_encoder() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(4)
    config = CLIPVisionConfig(
        hidden_size=CLIP_WIDTH,
        intermediate_size=64,
        projection_dim=CLIP_DIM,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    return CLIPVisionModelWithProjection(config).eval()


def image_processor() -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def scheduler(name: str) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction" if name == "sd2" else "epsilon",
    )


@functools.cache
def _components(name: str) -> dict[str, Any]:
    tokenizer = build_tokenizer()
    common = {
        "unet": unet(name),
        "vae": vae(),
        "scheduler": scheduler(name),
        "tokenizer": tokenizer,
        "feature_extractor": image_processor(),
        "image_encoder": image_encoder(),
    }
    words = len(tokenizer)
    if name == "sdxl":
        return common | {
            "text_encoder": text_encoder(64, words),
            "text_encoder_2": text_encoder(64, words, projects=True),
            "tokenizer_2": tokenizer,
        }
    if name == "kolors":
        language, common["tokenizer"] = language_model()
        return common | {"text_encoder": language}
    width = _UNETS[name]["cross_attention_dim"]
    return common | {"text_encoder": text_encoder(width, words), "safety_checker": None}


def pipeline(name: str, task: str = "", *, fresh: bool = False, **others: Any) -> Any:
    """A pipeline of one architecture. Pipelines share their models, as detaching leaves no trace.

    Args:
        name: One of `ARCHITECTURES`, or `kolors`.
        task: What stands before `Pipeline` in its class's name; empty is text-to-image.
        fresh: Copy the models, for a test that changes them.
        others: Components to replace or to add.
    """
    import diffusers
    from diffusers.pipelines import kolors

    # by its own module, as diffusers itself offers Kolors only where sentencepiece is installed
    library: Any = kolors if name == "kolors" else diffusers
    plain = "Kolors" if name == "kolors" else "StableDiffusion"
    prefix = "" if task.startswith("Latent") else plain
    kind = "XL" if name == "sdxl" else ""
    build: Any = getattr(library, f"{prefix}{kind}{task}Pipeline")
    takes = inspect.signature(build).parameters
    parts = {**_components(name), "add_watermarker": False, "requires_safety_checker": False}
    kept = {key: part for key, part in parts.items() if key in takes}
    kept["scheduler"] = copy.deepcopy(kept["scheduler"])
    pipe = build(**(copy.deepcopy(kept) if fresh else kept) | others)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def adapter(kind: str, unet: Any, *, lora_rank: int = 0, seed: int = 5) -> ImagePromptAdapter:
    """A random adapter for a UNet, as far from the text as a trained one is.

    Args:
        kind: `base`, `plus`, `full-face`, `faceid`, `faceid-plus` or `faceid-plus-v2`.
        unet: What it is for.
        lora_rank: Of low-rank changes of every attention layer; 0 has none.
        seed: Of its weights.
    """
    torch.manual_seed(seed)
    widths = layer_widths(unet)
    made = ImagePromptAdapter(
        _projection(kind, next(iter(widths.values()))[0]),
        widths,
        lora=_lora_shapes(unet, lora_rank) if lora_rank else None,
    )
    for name, parameter in made.ip_adapter.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1 if "lora" in name else 0.3)
    return made.eval()


def _projection(kind: str, token_width: int) -> Projection:
    from ipdiverse.adapter.projection import (
        FaceIDPlusProjection,
        FaceIDProjection,
        FullFaceProjection,
        LinearProjection,
        ResamplerProjection,
    )

    match kind:
        case "base":
            return LinearProjection(CLIP_DIM, token_width)
        case "plus":
            return ResamplerProjection(CLIP_WIDTH, token_width, num_tokens=8, width=64)
        case "full-face":
            return FullFaceProjection(CLIP_WIDTH, token_width)
        case "faceid":
            return FaceIDProjection(FACE_DIM, token_width)
        case _:
            return FaceIDPlusProjection(
                FACE_DIM, CLIP_WIDTH, token_width, shortcut=kind.endswith("v2")
            )


def _lora_shapes(unet: Any, rank: int) -> dict[int, LoraShapes]:
    shapes = {}
    for number, name in attention_layers(unet).items():
        layer = unet.get_submodule(name)
        parts = {"q": layer.to_q, "k": layer.to_k, "v": layer.to_v, "out": layer.to_out[0]}
        shapes[number] = {
            f"to_{key}_lora": (part.in_features, rank, part.out_features)
            for key, part in parts.items()
        }
    return shapes


def as_encoded(attachment: Any, positive: torch.Tensor, negative: Any = None) -> None:
    """Let text of a test's own pass for text that the pipeline encoded."""
    attachment.hook.encoded.append(EncodedPrompt(positive, negative))


def picture(seed: int, size: int = SIZE) -> Image.Image:
    """Noise, of low frequency so that encoders see something."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)


def face(seed: int) -> torch.Tensor:
    """A face embedding, (1, face_dim)."""
    return torch.randn(1, FACE_DIM, generator=torch.Generator().manual_seed(seed))
