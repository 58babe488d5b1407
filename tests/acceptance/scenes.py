"""What a cell of the acceptance table runs: a stock pipeline, and how to call it for some items."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tests import joint_models, models

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL import Image

PROMPTS = ("a red critter", "a blue critter in a forest")


@dataclass
class Scene:
    """A pipeline and one task on it.

    Args:
        pipe: Stock.
        run: Outputs for some items, each with a prompt, a seed and pictures of its own.
        other: The same with another control picture; None where there is none.
    """

    pipe: Any
    run: Callable[[Sequence[int]], np.ndarray]
    other: Callable[[Sequence[int]], np.ndarray] | None = None


def runner(
    pipe: Any, pictures: Callable[[int], dict[str, Any]] | None = None, **settings: Any
) -> Callable[[Sequence[int]], np.ndarray]:
    """Calls a pipeline for some items.

    Args:
        pipe: The pipeline.
        pictures: Arguments of which each item has its own.
        settings: Arguments that all share.
    """
    shared: dict[str, Any] = {
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "output_type": "latent",
        **settings,
    }
    shared |= sizes(pipe)

    def run(items: Sequence[int]) -> np.ndarray:
        each = [pictures(item) if pictures else {} for item in items]
        images = pipe(
            prompt=[PROMPTS[item] for item in items],
            generator=[torch.Generator().manual_seed(item) for item in items],
            **{key: [one[key] for one in each] for key in each[0]},
            **shared,
        ).images
        return images.float().numpy() if isinstance(images, torch.Tensor) else images

    return run


def pipeline(name: str, task: str = "", *, fresh: bool = False, **others: Any) -> Any:
    """A pipeline of any architecture."""
    of = joint_models if name in joint_models.ARCHITECTURES else models
    return of.pipeline(name, task, fresh=fresh, **others)


def sizes(pipe: Any) -> dict[str, Any]:
    """What transformers' pipelines take for granted, in small."""
    if not hasattr(pipe, "transformer"):
        return {}
    return {"max_sequence_length": 12, "height": models.SIZE, "width": models.SIZE}


def text_to_image(name: str, *, fresh: bool = False, **settings: Any) -> Scene:
    pipe = pipeline(name, fresh=fresh)
    return Scene(pipe, runner(pipe, **settings))


def image_to_image(name: str) -> Scene:
    pipe = pipeline(name, "Img2Img")
    pictures = lambda item: {"image": models.picture(20 + item)}  # noqa: E731
    return Scene(pipe, runner(pipe, pictures, strength=0.5, num_inference_steps=4))


def inpainting(name: str, channels: int) -> Scene:
    """With a UNet made for it (9 channels: latents, mask, masked latents) or an ordinary one."""
    unet = {} if channels == 4 else {"unet": models.unet(name, in_channels=channels)}
    pipe = models.pipeline(name, "Inpaint", **unet)

    def pictures(item: int) -> dict[str, Any]:
        return {"image": models.picture(20 + item), "mask_image": half(item)}

    return Scene(pipe, runner(pipe, pictures, strength=0.99, num_inference_steps=3))


def controlnet(
    name: str, draw: Callable[[int], Image.Image], other: Callable[[int], Image.Image]
) -> Scene:
    """A random ControlNet; as one is made from a UNet it has no effect, so its exits are drawn."""
    from diffusers import ControlNetModel

    pipe = models.pipeline(name)
    torch.manual_seed(6)
    build: Any = ControlNetModel.from_unet
    control = build(pipe.unet, conditioning_embedding_out_channels=(8, 8, 16)).eval()
    exits = [*control.controlnet_down_blocks, control.controlnet_mid_block]
    for module in [*exits, control.controlnet_cond_embedding.conv_out]:
        torch.nn.init.normal_(module.weight, std=0.5)
    pipe = models.pipeline(name, "ControlNet", controlnet=control)
    return Scene(
        pipe,
        runner(pipe, lambda item: {"image": draw(item)}),
        runner(pipe, lambda item: {"image": other(item)}),
    )


def true_guidance() -> Scene:
    """Flux with a negative prompt: two calls of the transformer in each step."""
    pipe = pipeline("flux")
    negative = {"negative_prompt": "a grey critter"}
    return Scene(pipe, runner(pipe, lambda _: negative, true_cfg_scale=2.0))


def joint_inpainting(name: str) -> Scene:
    # SD 3's pipeline takes 16 channels for granted
    others = {"transformer": joint_models.sd3(in_channels=16, out_channels=16)}
    others["vae"] = joint_models.vae(latent_channels=16)
    pipe = pipeline(name, "Inpaint", **(others if name == "sd3" else {}))

    def pictures(item: int) -> dict[str, Any]:
        return {"image": models.picture(20 + item), "mask_image": half(item)}

    return Scene(pipe, runner(pipe, pictures, strength=0.99, num_inference_steps=3))


def flux_controlnet() -> Scene:
    """A random ControlNet whose exits are drawn, as they start at 0."""
    from diffusers import FluxControlNetModel

    build: Any = FluxControlNetModel.from_transformer
    with torch.random.fork_rng():
        torch.manual_seed(6)
        control = build(
            joint_models.flux(),
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=joint_models.HEAD_DIM,
            num_attention_heads=joint_models.HEADS,
        ).eval()
        exits = [*control.controlnet_blocks, *control.controlnet_single_blocks]
        for module in [*exits, control.controlnet_x_embedder]:
            torch.nn.init.normal_(module.weight, std=0.5)
    pipe = pipeline("flux", "ControlNet", controlnet=control)
    return Scene(
        pipe,
        runner(pipe, lambda item: {"control_image": pose(item)}),
        runner(pipe, lambda item: {"control_image": depth(item)}),
    )


def sd3_controlnet() -> Scene:
    """As for Flux; published ones have their own blocks too, and read the text."""
    from diffusers import SD3ControlNetModel

    build: Any = SD3ControlNetModel.from_transformer
    with torch.random.fork_rng():
        torch.manual_seed(6)
        control = build(joint_models.sd3(), num_layers=2, num_extra_conditioning_channels=0).eval()
        for module in [*control.controlnet_blocks, control.pos_embed_input.proj]:
            torch.nn.init.normal_(module.weight, std=0.5)
    pipe = pipeline("sd3", "ControlNet", controlnet=control, vae=_certain(joint_models.vae()))
    return Scene(
        pipe,
        runner(pipe, lambda item: {"control_image": pose(item)}),
        runner(pipe, lambda item: {"control_image": depth(item)}),
    )


def _certain(vae: Any) -> Any:
    """A VAE without noise: stock's ControlNet pipeline of SD 3 draws it without a generator."""
    encode = vae.encode

    def deterministic(*given: Any, **more: Any) -> Any:
        found = encode(*given, **more)
        found.latent_dist.std = torch.zeros_like(found.latent_dist.mean)
        return found

    vae.encode = deterministic
    return vae


def kontext() -> Scene:
    """Flux Kontext: the picture to edit stands behind the latents, as more tokens."""
    pipe = pipeline("flux", "Kontext")
    pictures = lambda item: {"image": models.picture(20 + item)}  # noqa: E731
    return Scene(pipe, runner(pipe, pictures, max_area=models.SIZE**2, _auto_resize=False))


def t2i_adapter(name: str) -> Scene:
    from diffusers import T2IAdapter

    torch.manual_seed(7)
    build: Any = T2IAdapter
    kind, factor = ("full_adapter_xl", 8) if name == "sdxl" else ("full_adapter", 4)
    control = build(
        channels=[16, 32, 32, 32],
        num_res_blocks=1,
        downscale_factor=factor,
        adapter_type=kind,
    ).eval()
    pipe = models.pipeline(name, "Adapter", adapter=control)
    return Scene(
        pipe,
        runner(pipe, lambda item: {"image": pose(item)}),
        runner(pipe, lambda item: {"image": pose(item + 5)}),
    )


def few_steps(name: str, scheduler: str, **settings: Any) -> Scene:
    import diffusers

    scene = text_to_image(name, num_inference_steps=3, **settings)
    build: Any = getattr(diffusers, scheduler)
    scene.pipe.scheduler = build.from_config(scene.pipe.scheduler.config)
    return scene


def latent_consistency() -> Scene:
    """LCM's own pipeline: guidance is an input of the UNet, and there is one branch."""
    unet = models.unet("sd1", time_cond_proj_dim=16)
    pipe = models.pipeline("sd1", "LatentConsistencyModel", unet=unet)
    pipe.scheduler = _lcm(pipe)
    return Scene(pipe, runner(pipe))


def _lcm(pipe: Any) -> Any:
    from diffusers import LCMScheduler

    return LCMScheduler.from_config(pipe.scheduler.config)


def pose(item: int) -> Image.Image:
    """A stick figure."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (models.SIZE, models.SIZE))
    draw, x = ImageDraw.Draw(image), 16 + 6 * item
    for line in ((x, 12, x, 40), (x - 12, 24, x + 12, 20), (x, 40, x - 8, 60), (x, 40, x + 8, 60)):
        draw.line(line, fill=(255, 80 + 20 * item, 0), width=3)
    return image


def depth(item: int) -> Image.Image:
    """A slope."""
    from PIL import Image

    ramp = np.linspace(20 * item, 255, models.SIZE, dtype=np.uint8)
    return Image.fromarray(np.tile(ramp, (models.SIZE, 1))).convert("RGB")


def half(item: int = 0) -> Image.Image:
    """A mask: one half white, left or right."""
    from PIL import Image

    mask = np.zeros((models.SIZE, models.SIZE), dtype=np.uint8)
    mask[:, : models.SIZE // 2] = 255
    return Image.fromarray(mask if item == 0 else 255 - mask)
