"""Every kind of adapter against stock diffusers, on SD 1.x, SD 2.x and SDXL in small, in fp32.

Stock is the reference where it is right: one item, the token counts it knows. Where it is wrong
(other token counts), the reference is the mathematics written out by hand; where it mixes the
references of a batch, it is each item alone (`tests/acceptance`).
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from ipdiverse.adapter.attach.attach import attach
from ipdiverse.adapter.model import ImagePromptAdapter, cross_attention_layers, layer_widths
from ipdiverse.adapter.projection import LinearProjection, ResamplerProjection
from ipdiverse.adapter.reference import Reference
from ipdiverse.loading import quiet
from tests import models

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TOLERANCE = 1e-5
SCALE = 0.7
IMAGES = [models.picture(10), models.picture(11)]
FACE = models.face(3)


def run(pipe: Any, guidance: float, **image: Any) -> np.ndarray:
    return pipe(
        prompt="a red critter in a forest",
        num_inference_steps=2,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
        **image,
    ).images.numpy()


def prompted(
    pipe: Any,
    adapter: ImagePromptAdapter,
    guidance: float,
    reference: Any,
    scale: Any = SCALE,
    negative: Any = None,
) -> np.ndarray:
    with attach(pipe, adapter) as attachment:
        attachment.set_scale(scale)
        attachment.set_reference(reference, negative=negative)
        return run(pipe, guidance)


def stock(
    name: str,
    adapter: ImagePromptAdapter,
    folder: Path,
    scale: Any = SCALE,
    task: str = "",
    **parts: Any,
) -> Any:
    """A stock pipeline that has loaded this adapter from a file."""
    file = folder / "adapter.safetensors"
    save_file(adapter.state_dict(), file)
    pipe = models.pipeline(name, task, fresh=True, **parts)
    with quiet():
        pipe.load_ip_adapter(str(folder), subfolder="", weight_name=file.name)
    pipe.set_ip_adapter_scale(scale)
    return pipe


def equal(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.isfinite(expected).all()
    assert np.abs(found - expected).max() <= TOLERANCE * max(1.0, np.abs(expected).max())


def guided(positive: torch.Tensor, negative: torch.Tensor, guidance: float) -> torch.Tensor:
    """Embeddings as stock takes them: with guidance the negative ones stand first."""
    return torch.cat([negative, positive]) if guidance > 1 else positive


@pytest.mark.parametrize("name", models.ARCHITECTURES)
@pytest.mark.parametrize("kind", ["base", "plus", "full-face"])
def test_images_equal_stock(name: str, kind: str, tmp_path: Path) -> None:
    pipe = models.pipeline(name)
    adapter = models.adapter(kind, pipe.unet)
    theirs = stock(name, adapter, tmp_path)
    for guidance in (1.0, 4.0):
        expected = run(theirs, guidance, ip_adapter_image=IMAGES[0])
        equal(prompted(pipe, adapter, guidance, IMAGES[0]), expected)


@pytest.mark.parametrize("name", models.ARCHITECTURES)
@pytest.mark.parametrize("rank", [0, 2], ids=["plain", "lora"])
def test_faceid_equals_stock(name: str, rank: int, tmp_path: Path) -> None:
    pipe = models.pipeline(name)
    adapter = models.adapter("faceid", pipe.unet, lora_rank=rank)
    theirs = stock(name, adapter, tmp_path)
    assert bool(getattr(theirs.unet, "peft_config", None)) == bool(rank)
    for guidance in (1.0, 4.0):
        embeds = guided(FACE[None], torch.zeros_like(FACE[None]), guidance)
        expected = run(theirs, guidance, ip_adapter_image_embeds=[embeds])
        equal(prompted(pipe, adapter, guidance, Reference(faces=FACE)), expected)


@pytest.mark.parametrize("name", models.ARCHITECTURES)
@pytest.mark.parametrize("kind", ["faceid-plus", "faceid-plus-v2"])
def test_faceid_plus_equals_stock(name: str, kind: str, tmp_path: Path) -> None:
    pipe = models.pipeline(name)
    adapter = models.adapter(kind, pipe.unet)
    theirs = stock(name, adapter, tmp_path)
    projection = theirs.unet.encoder_hid_proj.image_projection_layers[0]
    projection.shortcut = kind.endswith("v2")
    reference = Reference(IMAGES[:1], faces=FACE)
    for guidance in (1.0, 4.0):
        projection.clip_embeds = theirs.prepare_ip_adapter_image_embeds(
            [IMAGES[0]], None, torch.device("cpu"), 1, guidance > 1
        )[0]
        embeds = guided(FACE[None], torch.zeros_like(FACE[None]), guidance)
        expected = run(theirs, guidance, ip_adapter_image_embeds=[embeds])
        equal(prompted(pipe, adapter, guidance, reference), expected)


def test_several_images_of_one_item_equal_stock(tmp_path: Path) -> None:
    pipe = models.pipeline("sd1")
    adapter = models.adapter("plus", pipe.unet)
    theirs = stock("sd1", adapter, tmp_path)
    expected = run(theirs, 1.0, ip_adapter_image=[IMAGES])
    equal(prompted(pipe, adapter, 1.0, Reference(IMAGES)), expected)


def test_a_negative_image_equals_stock(tmp_path: Path) -> None:
    pipe = models.pipeline("sd1")
    adapter = models.adapter("base", pipe.unet)
    theirs = stock("sd1", adapter, tmp_path)
    positive, negative = (theirs.encode_image(i, "cpu", 1, False)[0][None] for i in IMAGES)
    expected = run(theirs, 4.0, ip_adapter_image_embeds=[guided(positive, negative, 4.0)])
    equal(prompted(pipe, adapter, 4.0, IMAGES[0], negative=IMAGES[1]), expected)


@pytest.mark.parametrize(
    ("preset", "theirs"),
    [
        ("style", {"up": {"block_0": [0.0, 1.0, 0.0]}}),
        ("layout", {"down": {"block_2": [0.0, 1.0]}}),
    ],
)
def test_instantstyle_on_sdxl_equals_stock(
    preset: str, theirs: dict[str, Any], tmp_path: Path
) -> None:
    pipe = models.pipeline("sdxl")
    adapter = models.adapter("base", pipe.unet)
    expected = run(stock("sdxl", adapter, tmp_path, theirs), 4.0, ip_adapter_image=IMAGES[0])
    equal(prompted(pipe, adapter, 4.0, IMAGES[0], scale=preset), expected)


def test_two_adapters_equal_stock(tmp_path: Path) -> None:
    pipe = models.pipeline("sd1")
    plus, base = models.adapter("plus", pipe.unet), models.adapter("base", pipe.unet, seed=6)
    for name, adapter in (("plus", plus), ("base", base)):
        save_file(adapter.state_dict(), tmp_path / f"{name}.safetensors")
    theirs = models.pipeline("sd1", fresh=True)
    with quiet():
        names = ["plus.safetensors", "base.safetensors"]
        theirs.load_ip_adapter(str(tmp_path), subfolder="", weight_name=names)
    theirs.set_ip_adapter_scale([0.7, 0.4])
    expected = run(theirs, 4.0, ip_adapter_image=IMAGES)
    with attach(pipe, plus, base) as attachment:
        for index, scale in enumerate((0.7, 0.4)):
            attachment.set_scale(scale, adapter=index)
            attachment.set_reference(IMAGES[index], adapter=index)
        equal(run(pipe, 4.0), expected)


def naive(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1) @ value


def by_hand(
    weights: dict[str, torch.Tensor], number: int, tokens: torch.Tensor
) -> Callable[..., Any]:
    """Decoupled cross-attention of one layer, arXiv:2308.06721, equation 5."""

    def processor(attn: Any, hidden_states: Any, encoder_hidden_states: Any, **_: Any) -> Any:
        split = lambda t: t.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # noqa: E731
        query = split(attn.to_q(hidden_states))
        text = naive(
            query, split(attn.to_k(encoder_hidden_states)), split(attn.to_v(encoder_hidden_states))
        )
        image_key = split(F.linear(tokens, weights[f"ip_adapter.{number}.to_k_ip.weight"]))
        image_value = split(F.linear(tokens, weights[f"ip_adapter.{number}.to_v_ip.weight"]))
        mixed = text + SCALE * naive(query, image_key, image_value)
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))

    return processor


@torch.no_grad()
@pytest.mark.parametrize("name", models.ARCHITECTURES)
def test_other_token_counts_equal_hand_written_mathematics(name: str) -> None:
    """Stock reads every `proj.weight` as 4 tokens; 7 are split wrongly or refused."""
    pipe = models.pipeline(name)
    widths = layer_widths(pipe.unet)
    width = next(iter(widths.values()))[0]
    torch.manual_seed(5)
    adapter = ImagePromptAdapter(LinearProjection(models.CLIP_DIM, width, num_tokens=7), widths)
    weights = adapter.state_dict()
    pixels = pipe.feature_extractor(IMAGES[0], return_tensors="pt").pixel_values
    embeds = pipe.image_encoder(pixels).image_embeds
    embeds = torch.cat([torch.zeros_like(embeds), embeds])
    projected = F.linear(embeds, weights["image_proj.proj.weight"], weights["image_proj.proj.bias"])
    tokens = F.layer_norm(
        projected.reshape(2, 7, width),
        (width,),
        weights["image_proj.norm.weight"],
        weights["image_proj.norm.bias"],
    )
    found = prompted(pipe, adapter, 4.0, IMAGES[0])

    theirs = models.pipeline(name, fresh=True)
    processors = dict(theirs.unet.attn_processors)
    for number, layer in cross_attention_layers(theirs.unet).items():
        processors[f"{layer}.processor"] = by_hand(weights, number, tokens)  # type: ignore[assignment]
    theirs.unet.set_attn_processor(processors)
    equal(found, run(theirs, 4.0))


def full_sd15() -> Any:
    """Stable Diffusion 1.5's UNet, VAE and text encoder at full size, with random weights."""
    import diffusers

    torch.manual_seed(0)
    unet: Any = diffusers.UNet2DConditionModel
    vae: Any = diffusers.AutoencoderKL
    words = len(models.pipeline("sd1").tokenizer)
    return models.pipeline(
        "sd1",
        unet=unet(
            sample_size=8,  # of 64 in the original: 64×64 pixels
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=768,
            attention_head_dim=8,
        ).eval(),
        vae=vae(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        ).eval(),
        text_encoder=models.text_encoder(768, words, layers=12, heads=12),
        image_encoder=None,  # embeddings are given
    )


@pytest.mark.parametrize("kind", ["base", "plus", "faceid"])
@pytest.mark.parametrize("count", [1, 2])
def test_embeddings_as_stock_stacks_them_equal_stock(kind: str, count: int, tmp_path: Path) -> None:
    pipe = models.pipeline("sd1")
    adapter = models.adapter(kind, pipe.unet)
    theirs = stock("sd1", adapter, tmp_path)
    if kind == "faceid":
        faces = torch.cat([models.face(seed) for seed in range(count)])[None]
        given = [torch.cat([torch.zeros_like(faces), faces])]
    else:
        images = IMAGES[:count]
        given = theirs.prepare_ip_adapter_image_embeds([images], None, "cpu", 1, True)
    expected = run(theirs, 4.0, ip_adapter_image_embeds=given)
    equal(prompted(pipe, adapter, 4.0, Reference(embeds=given)), expected)


@pytest.mark.parametrize("task", ["PAG", "InstructPix2Pix"])
def test_other_orders_of_rows_equal_stock(task: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"pag_scale": 3.0}
    parts: dict[str, Any] = {"pag_applied_layers": ["mid"]}
    if task == "InstructPix2Pix":
        options = {"image": IMAGES[1], "image_guidance_scale": 1.5}
        parts = {"unet": models.unet("sd1", in_channels=8)}
    pipe = models.pipeline("sd1", task, **parts)
    adapter = models.adapter("base", pipe.unet)
    theirs = stock("sd1", adapter, tmp_path, SCALE, task, **deepcopy(parts))
    expected = run(theirs, 4.0, ip_adapter_image=IMAGES[0], **options)
    with attach(pipe, adapter) as attachment:
        attachment.set_scale(SCALE)
        attachment.set_reference(IMAGES[0])
        equal(run(pipe, 4.0, **options), expected)


@pytest.mark.slow
def test_the_full_sd15_architecture_equals_stock(tmp_path: Path) -> None:
    pipe = full_sd15()
    widths = layer_widths(pipe.unet)
    assert list(widths) == list(range(1, 32, 2))
    embeds = torch.randn(1, 1024), torch.randn(1, 257, 1280)
    for projection, positive in (
        (LinearProjection(1024, 768), embeds[0]),
        (ResamplerProjection(1280, 768), embeds[1]),
    ):
        adapter = ImagePromptAdapter(projection, widths).eval()
        no_image = torch.zeros_like(positive)
        found = _with_embeds(pipe, adapter, positive, no_image)
        save_file(adapter.state_dict(), tmp_path / "full.safetensors")
        with quiet():
            pipe.load_ip_adapter(
                str(tmp_path),
                subfolder="",
                weight_name="full.safetensors",
                image_encoder_folder=None,  # embeddings are given
            )
        pipe.set_ip_adapter_scale(SCALE)
        given = [guided(positive[None], no_image[None], 4.0)]
        expected = run(pipe, 4.0, ip_adapter_image_embeds=given)
        equal(found, expected)
        pipe.unload_ip_adapter()


def _with_embeds(
    pipe: Any, adapter: ImagePromptAdapter, positive: torch.Tensor, negative: torch.Tensor
) -> np.ndarray:
    with attach(pipe, adapter) as attachment:
        attachment.set_scale(SCALE)
        attachment.set_reference(
            Reference(embeds=[positive]), negative=Reference(embeds=[negative])
        )
        return run(pipe, 4.0)
