"""Cells that show something of their own, beside or in place of the five."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ipdiverse.adapter.attach.attach import attach, detach
from ipdiverse.adapter.fusion import GatedFusion
from ipdiverse.adapter.model import attention_layers
from ipdiverse.adapter.reference import Reference
from ipdiverse.dial import Levers
from ipdiverse.loading import quiet
from ipdiverse.sampling.denoiser import steer
from tests import joint_models, models
from tests.acceptance.checks import REFERENCES, adapter_of, differ, equal, put_on, the_five
from tests.acceptance.scenes import (
    PROMPTS,
    Scene,
    half,
    image_to_image,
    pipeline,
    runner,
    sizes,
    text_to_image,
)
from tests.acceptance.single_file import write_single_file

if TYPE_CHECKING:
    from collections.abc import Callable


def precision(name: str, dtype: torch.dtype) -> None:
    scene = text_to_image(name, fresh=True)
    scene.pipe.to(dtype)
    the_five(scene, rounding=40 * torch.finfo(dtype).eps)


def fused(name: str) -> None:
    """An adapter with text-image fusion whose gates are open."""
    scene = text_to_image(name)
    adapter = models.adapter("plus", scene.pipe.unet)
    torch.manual_seed(8)
    adapter.fusion = GatedFusion(adapter.token_width, adapter.image_proj.num_tokens or 0, heads=2)
    torch.nn.init.constant_(adapter.fusion.gate, 1.0)
    the_five(scene, adapter)
    assert "encode_prompt" not in vars(scene.pipe)
    with put_on(scene.pipe, adapter) as attachment:
        attachment.set_reference(REFERENCES[0])
        with_text = scene.run([0])
        attachment.set_fusion_strength(0.0)
        differ(scene.run([0]), with_text)


def model_offload() -> None:
    """The execution device is the CPU here; hooks and their order are those of an accelerator."""
    scene = text_to_image("sd1", fresh=True)
    expected = _prompted(text_to_image("sd1"))
    scene.pipe.enable_model_cpu_offload(device="cpu")
    the_five(scene)
    np.testing.assert_array_equal(_prompted(scene), expected)


def model_offload_after_attaching() -> None:
    scene = text_to_image("sd1", fresh=True)
    plain = scene.run([0])
    with put_on(scene.pipe, models.adapter("plus", scene.pipe.unet)) as attachment:
        scene.pipe.enable_model_cpu_offload(device="cpu")
        attachment.set_reference(REFERENCES[0])
        first = scene.run([0])
        attachment.set_reference(REFERENCES[1])
        differ(scene.run([0]), first)
    for _ in range(2):
        np.testing.assert_array_equal(scene.run([0]), plain)
    assert hasattr(scene.pipe.unet, "_hf_hook")


def vae_tiling() -> None:
    scene = text_to_image("sd1", fresh=True, output_type="np")
    vae = scene.pipe.vae
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = 32, 8
    tiles = []
    vae.decoder.register_forward_hook(lambda *_: tiles.append(1))
    the_five(scene)
    runs = len(tiles)
    scene.run([0])
    assert len(tiles) - runs > 1


def compiled(*, first: bool) -> None:
    """`torch.compile` before or after attaching; what it compiles is counted."""
    pipe = models.pipeline("sd1", unet=models.two_levels())
    scene = Scene(pipe, runner(pipe))
    adapter = models.adapter("base", pipe.unet)
    scales = (0.8, 0.0, 1.7)
    expected = _at_scales(scene, adapter, scales)
    compilations = []

    def backend(graph: Any, _: Any) -> Callable[..., Any]:
        compilations.append(graph)
        return graph.forward

    torch.compiler.reset()
    if first:
        pipe.unet = torch.compile(pipe.unet, backend=backend)
    with put_on(pipe, adapter) as attachment:
        if not first:
            pipe.unet.compile(backend=backend)
        attachment.set_reference(REFERENCES[0])
        for scale in (1.0, 0.5, 0.0):  # 0 skips the branch: a version of its own
            attachment.set_scale(scale)
            scene.run([0])
        warm = len(compilations)
        for scale, result in zip(scales, expected, strict=True):
            attachment.set_scale(scale)
            equal(scene.run([0]), result)
        attachment.set_scale(lambda _, progress: 1 - progress)
        attachment.set_reference(REFERENCES[1])
        scene.run([0])
    assert 0 < warm == len(compilations)


def _at_scales(scene: Scene, adapter: Any, scales: tuple[float, ...]) -> list[np.ndarray]:
    results = []
    with put_on(scene.pipe, adapter) as attachment:
        attachment.set_reference(REFERENCES[0])
        for scale in scales:
            attachment.set_scale(scale)
            results.append(scene.run([0]))
    return results


def several_outputs(name: str) -> None:
    """Two prompts with two images each; a reference for each prompt, then one for each output."""
    pipe = pipeline(name)
    pictures = [*REFERENCES, models.picture(12), models.picture(13)]

    def run(prompts: tuple[str, ...], seeds: list[int]) -> np.ndarray:
        return pipe(
            prompt=list(prompts),
            num_images_per_prompt=len(seeds) // len(prompts),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=2,
            guidance_scale=3.0,
            output_type="latent",
            **sizes(pipe),
        ).images.numpy()

    with put_on(pipe, adapter_of(pipe)) as attachment:
        for references, of_output in ((pictures[:2], [0, 0, 1, 1]), (pictures, [0, 1, 2, 3])):
            attachment.set_reference(references)
            together = run(PROMPTS, [0, 1, 2, 3])
            for output, reference in enumerate(of_output):
                attachment.set_reference(references[reference])
                alone = run((PROMPTS[output // 2],), [output])
                equal(together[output], alone[0])


def instantx() -> None:
    """InstantX' adapter, which acts in single blocks too; beside XLabs' at scale 0 it is alone."""
    scene = text_to_image("flux")
    adapter = joint_models.adapter(joint_models.instantx_tensors())
    the_five(scene, adapter)
    alone = _prompted(scene, adapter)
    with put_on(scene.pipe, adapter, adapter_of(scene.pipe)) as attachment:
        for index in (0, 1):
            attachment.set_reference(REFERENCES[index], adapter=index)
        differ(scene.run([0]), alone)
        attachment.set_scale(0.0, adapter=1)
        np.testing.assert_array_equal(scene.run([0]), alone)


def redux() -> None:
    """Redux is more text: no layer of its own, and a strength; beside XLabs at 0 it is absent."""
    scene = text_to_image("flux")
    scene.pipe.register_modules(image_encoder=joint_models.siglip())
    try:
        adapter = joint_models.adapter(joint_models.redux_tensors())
        the_five(scene, adapter)
        with put_on(scene.pipe, adapter) as attachment:
            attachment.set_reference(REFERENCES)
            attachment.set_scale(torch.tensor([0.2, 2.0]))
            together = scene.run([0, 1])
            for item, scale in enumerate((0.2, 2.0)):
                attachment.set_reference(REFERENCES[item])
                attachment.set_scale(scale)
                equal(together[item], scene.run([item])[0])
    finally:
        scene.pipe.register_modules(image_encoder=models.image_encoder())


_KINDS: dict[str, tuple[str, Callable[[], dict[str, torch.Tensor]]]] = {
    "flux": ("flux", joint_models.xlabs_tensors),
    "flux-instantx": ("flux", joint_models.instantx_tensors),
    "flux-redux": ("flux", joint_models.redux_tensors),
    "sd3": ("sd3", joint_models.sd3_tensors),
}


def _on(kind: str) -> tuple[Scene, Any, Any]:
    """Text-to-image of a transformer, an adapter of a kind, and the image encoder it reads."""
    name, tensors = _KINDS[kind]
    scene = text_to_image(name)
    encoder = joint_models.siglip() if kind in {"flux-redux", "sd3"} else scene.pipe.image_encoder
    return scene, joint_models.adapter(tensors()), encoder


def imagined(kind: str) -> None:
    """Each item in a scene of its own, of a space that was fitted on random embeddings."""
    scene, adapter, encoder = _on(kind)
    seeds, space = (3, 4), joint_models.space(adapter)
    assert 0 < space.scene.shape[1] <= len(space.deviations)
    plain = scene.run([0, 1])
    with attach(scene.pipe, adapter, image_encoder=encoder) as attachment:
        attachment.set_space(space)
        attachment.set_reference(REFERENCES)
        before = scene.run([0, 1])
        steer(attachment, Levers(recombine=0.0), seeds, PROMPTS)
        np.testing.assert_array_equal(scene.run([0, 1]), before)
        steer(attachment, Levers(recombine=1.0), seeds, PROMPTS)
        together = scene.run([0, 1])
        differ(together, before)
        attachment.set_reference(REFERENCES[1])
        steer(attachment, Levers(recombine=1.0), seeds[1:], PROMPTS[1:])
        equal(scene.run([1])[0], together[1])
    np.testing.assert_array_equal(scene.run([0, 1]), plain)


def drawn_tokens(kind: str) -> None:
    """A generative fusion: each item's tokens by its own seed; at strength 0 it is absent."""
    scene, adapter, encoder = _on(kind)
    with attach(scene.pipe, adapter, image_encoder=encoder) as attachment:
        attachment.set_reference(REFERENCES)
        before = scene.run([0, 1])
    adapter.fusion = joint_models.flow(adapter)
    with attach(scene.pipe, adapter, image_encoder=encoder) as attachment:
        attachment.set_reference(REFERENCES)
        attachment.set_seeds((3, 4))
        together = scene.run([0, 1])
        differ(together, before)
        attachment.set_fusion_strength(0.0)
        np.testing.assert_array_equal(scene.run([0, 1]), before)
        attachment.set_fusion_strength(1.0)
        attachment.set_reference(REFERENCES[1])
        attachment.set_seeds((4,))
        equal(scene.run([1])[0], together[1])


def call_with_image(name: str) -> None:
    """An image of the call itself, as stock's scripts give it: that of `set_reference`."""
    from ipdiverse.sampling.diversify import attach as attach_public

    scene, adapter, encoder = _on(name)
    negative: dict[str, Any] = {"negative_prompt": ["a stone"], "true_cfg_scale": 2.0}
    given: dict[str, Any] = (
        negative | {"negative_ip_adapter_image": REFERENCES[1]} if name == "flux" else {}
    )
    with attach(scene.pipe, adapter, image_encoder=encoder) as attachment:
        against = REFERENCES[1] if name == "flux" else None
        attachment.set_reference(REFERENCES[0], negative=against)
        expected = runner(scene.pipe, **(negative if given else {}))([0])
    kind = type(scene.pipe)
    with attach_public(scene.pipe, adapter, image_encoder=encoder):
        found = runner(scene.pipe, ip_adapter_image=REFERENCES[0], **given)([0])
    np.testing.assert_array_equal(found, expected)
    assert type(scene.pipe) is kind


def redux_of_stock() -> None:
    """Image tokens that a prompt holds: at 0 the text alone, at 1 stock, both exactly."""
    scene, adapter, encoder = _on("flux-redux")
    pixels = models.image_processor()(REFERENCES, return_tensors="pt").pixel_values
    with torch.no_grad():
        text, pooled, _ = scene.pipe.encode_prompt(list(PROMPTS), None, max_sequence_length=12)
        tokens = adapter.tokens(encoder(pixels).last_hidden_state)

    def run(embeds: torch.Tensor, *items: int) -> np.ndarray:
        rows = list(items)
        own = {"prompt_embeds": embeds[rows], "pooled_prompt_embeds": pooled[rows]}
        own["generator"] = [torch.Generator().manual_seed(item) for item in items]
        fixed = {"num_inference_steps": 2, "output_type": "latent"}
        return scene.pipe(**own, **fixed, **sizes(scene.pipe)).images.numpy()

    both = torch.cat([text, tokens], dim=1)
    stock, told = run(both, 0, 1), {"image_tokens": tokens.shape[1]}
    for strength, expected in ((0.0, run(text, 0, 1)), (1.0, stock)):
        steer(scene.pipe, Levers(), (3, 4), strength=strength, **told)
        np.testing.assert_array_equal(run(both, 0, 1), expected)
    steer(scene.pipe, Levers(cads=1.0), (3, 4), strength=0.5, **told)
    together = run(both, 0, 1)
    differ(together, stock)
    steer(scene.pipe, Levers(cads=1.0), (4,), strength=0.5, **told)
    equal(run(both, 1)[0], together[1])
    detach(scene.pipe)
    np.testing.assert_array_equal(run(both, 0, 1), stock)


def second_attention() -> None:
    """Stable Diffusion 3.5 medium's blocks have two attentions, and adapters count both."""
    model = joint_models.sd3(dual_attention_layers=(1,))
    pipe = pipeline("sd3", transformer=model)
    tensors = joint_models.sd3_tensors(layers=joint_models.SD3_BLOCKS + 1)
    the_five(Scene(pipe, runner(pipe)), joint_models.adapter(tensors))


def more_tokens() -> None:
    """XLabs' second adapter has 16 tokens."""
    adapter = joint_models.adapter(joint_models.xlabs_tensors(num_tokens=16))
    assert adapter.image_proj.num_tokens == 16
    the_five(text_to_image("flux"), adapter)


def several_adapters(name: str) -> None:
    """Two adapters: one at scale 0 is absent, exactly; two halves are a whole."""
    scene = text_to_image(name)

    def made(second: bool) -> Any:
        if name in joint_models.ARCHITECTURES:
            return joint_models.adapter(_KINDS[name][1](**({"seed": 11} if second else {})))
        return models.adapter("base" if second else "plus", scene.pipe.unet, seed=5 + second)

    plus, base = made(False), made(True)
    alone = _prompted(scene, plus)
    with put_on(scene.pipe, plus, base) as attachment:
        attachment.set_reference(REFERENCES[0], adapter=0)
        attachment.set_reference(REFERENCES[1], adapter=1)
        both = scene.run([0])
        attachment.set_scale(0.0, adapter=1)
        np.testing.assert_array_equal(scene.run([0]), alone)
        differ(both, alone)
    with put_on(scene.pipe, plus, made(False)) as attachment:
        for index in (0, 1):
            attachment.set_reference(REFERENCES[0], adapter=index)
        attachment.set_scale(0.5)
        equal(scene.run([0]), alone)


def masked_references(name: str) -> None:
    """Two references, each in its half; a white mask is none, a black one leaves the other."""
    scene = text_to_image(name)
    alone = _prompted(scene)
    white, black = (Image.new("L", (models.SIZE, models.SIZE), v) for v in (255, 0))

    def masked(*masks: Image.Image, swapped: bool = False) -> np.ndarray:
        images = REFERENCES[::-1] if swapped else REFERENCES
        with put_on(scene.pipe, adapter_of(scene.pipe)) as attachment:
            attachment.set_reference(Reference(images, masks=masks))
            return scene.run([0])

    equal(masked(white, black), alone)
    halves = masked(half(0), half(1))
    differ(halves, alone)
    differ(masked(half(0), half(1), swapped=True), halves)
    equal(masked(half(1), half(0), swapped=True), halves)


def negative_reference(name: str) -> None:
    """It acts through guidance, and only there."""
    results = {}
    for guidance in (1.0, 3.0):
        scene = text_to_image(name, guidance_scale=guidance)
        with put_on(scene.pipe, models.adapter("plus", scene.pipe.unet)) as attachment:
            for key, negative in (("none", None), ("some", REFERENCES[1])):
                attachment.set_reference(REFERENCES[0], negative=negative)
                results[guidance, key] = scene.run([0])
    np.testing.assert_array_equal(results[1.0, "some"], results[1.0, "none"])
    differ(results[3.0, "some"], results[3.0, "none"])


def scale_window(name: str) -> None:
    """The steps that image-to-image takes count from 0 to 1, not those that it skips."""
    scene = image_to_image(name)
    plain = scene.run([0])
    with put_on(scene.pipe, adapter_of(scene.pipe)) as attachment:
        attachment.set_reference(REFERENCES[0])
        whole = scene.run([0])
        attachment.set_scale(1.0, end_at=0.5)
        first = scene.run([0])
        attachment.set_scale(1.0, start_at=0.5)
        second = scene.run([0])
    for found in (first, second):
        differ(found, plain)
        differ(found, whole)
    differ(first, second)


def lora_beside(name: str) -> None:
    """A LoRA of someone else's, loaded before and after attaching, and taken off while attached."""
    scene = text_to_image(name, fresh=True)
    plain = scene.run([0])
    prompted = _prompted(scene)
    scene.pipe.load_lora_weights(_lora(scene.pipe.unet), adapter_name="theirs")
    differ(scene.run([0]), plain)
    the_five(scene)
    before = _prompted(scene)
    differ(before, prompted)
    scene.pipe.unload_lora_weights()

    with put_on(scene.pipe, models.adapter("plus", scene.pipe.unet)) as attachment:
        attachment.set_reference(REFERENCES[0])
        scene.pipe.load_lora_weights(_lora(scene.pipe.unet), adapter_name="theirs")
        np.testing.assert_array_equal(scene.run([0]), before)
        scene.pipe.unload_lora_weights()
        np.testing.assert_array_equal(scene.run([0]), prompted)
    np.testing.assert_array_equal(scene.run([0]), plain)


def _lora(unet: Any, rank: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(9)
    state = {}
    for name in attention_layers(unet).values():
        layer = unet.get_submodule(name)
        for part, linear in (("to_q", layer.to_q), ("to_v", layer.to_v)):
            key = f"unet.{name}.{part}"
            state[f"{key}.lora_A.weight"] = 0.3 * torch.randn(rank, linear.in_features)
            state[f"{key}.lora_B.weight"] = 0.3 * torch.randn(linear.out_features, rank)
    return state


def single_file() -> None:
    """A checkpoint in the layout of the original Stable Diffusion repository."""
    from diffusers import StableDiffusionPipeline

    original = text_to_image("sd1")
    with tempfile.TemporaryDirectory() as folder:
        config, file = Path(folder, "config"), Path(folder, "model.safetensors")
        with quiet():
            original.pipe.save_pretrained(config)
        write_single_file(original.pipe, file)
        for weights in config.rglob("*.safetensors"):
            weights.unlink()  # what is loaded comes from the one file
        pipe = StableDiffusionPipeline.from_single_file(
            str(file),
            config=str(config),
            local_files_only=True,
            image_encoder=original.pipe.image_encoder,
            safety_checker=None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    scene = Scene(pipe, runner(pipe))
    np.testing.assert_array_equal(scene.run([0]), original.run([0]))
    the_five(scene)


def faces(kind: str) -> None:
    """A face of its own for each item."""
    scene = text_to_image("sd1")
    given = [
        Reference([image] if "plus" in kind else (), faces=models.face(i))
        for i, image in enumerate(REFERENCES)
    ]
    the_five(scene, models.adapter(kind, scene.pipe.unet), references=given)


def _prompted(scene: Scene, adapter: Any = None) -> np.ndarray:
    """Item 0 with the first reference."""
    put_on(scene.pipe, adapter or adapter_of(scene.pipe)).set_reference(REFERENCES[0])
    try:
        return scene.run([0])
    finally:
        detach(scene.pipe)
