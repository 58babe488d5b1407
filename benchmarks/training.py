"""A training step by ipdiverse against what the original trainer does at each step, one process.

    python benchmarks/training.py [--rounds 15] [--out FILE.json] [--full]

The original (`tutorial_train.py` of IP-Adapter) opens its images at every step, runs VAE, image
encoder and text encoder on them, computes in fp32 and saves the whole state: frozen UNet, adapter
and optimizer. Here that is restated with our adapter, so that only this differs.

Times are taken on Stable Diffusion 1.5's architecture in miniature, with every part's share of the
operations as in the full one at 512 pixels. What leaving the frozen parts out can give is bounded
by the ratio of operations, and, as an operation of a convolution costs less time than one of an
attention, more tightly by a third run: the original's step with all that is frozen computed
before, in fp32, and nothing else to do. A row beside it compares a generative fusion, which learns
of embeddings, with an adapter that learns through the UNet. `--full` takes peak memory and
checkpoint sizes at full size, 512 pixels, in a process for each arm.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from timing import alternating, flops, machine, ratio_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ipdiverse.adapter.attach.attach import attach
from ipdiverse.adapter.model import new_adapter
from ipdiverse.base.bases import load_base
from ipdiverse.critters.make import make_dataset
from ipdiverse.data.manifest import read_manifest
from ipdiverse.data.prepare import PrepareOptions, prepare
from ipdiverse.training.config import TrainConfig
from ipdiverse.training.frozen import FrozenEncoders
from ipdiverse.training.loss import hold_less
from ipdiverse.training.trainer import Trainer
from workshop.base.tokenizer import build_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

DROP = 0.05
"""Share without image, without text, without both, as in the original."""

SIZES: dict[str, dict[str, Any]] = {
    "full": {
        "unet": (320, 640, 1280, 1280),
        "cross": 768,
        "heads": 8,
        "vae": (128, 256, 512, 512),
        "text": (768, 12, 12),
        "vision": (1280, 32, 16, 224, 14, 1024),
        "pixels": 512,
        "batch": 1,
    },
    "miniature": {
        "unet": (64, 128, 256, 256),
        "cross": 128,
        "heads": 8,
        "vae": (32, 64, 64, 64),
        "text": (128, 2, 2),
        "vision": (320, 11, 4, 112, 14, 256),
        "pixels": 192,
        "batch": 4,
    },
}


def pipeline(name: str) -> Any:
    """Stable Diffusion 1.5's architecture, full or in miniature, with random weights."""
    size = SIZES[name]
    torch.manual_seed(0)
    build_vae: Any = AutoencoderKL
    width, layers, heads = size["text"]
    vision_width, vision_layers, vision_heads, vision_pixels, patch, projection = size["vision"]
    return StableDiffusionPipeline(
        vae=build_vae(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=size["vae"],
            layers_per_block=2,
            scaling_factor=0.18215,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                max_position_embeddings=77,
            )
        ),
        tokenizer=build_tokenizer(),
        unet=UNet2DConditionModel(
            sample_size=size["pixels"] // 8,
            cross_attention_dim=size["cross"],
            attention_head_dim=size["heads"],
            block_out_channels=size["unet"],
        ),
        scheduler=DDPMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            steps_offset=1,
            clip_sample=False,
        ),
        safety_checker=None,
        feature_extractor=CLIPImageProcessorPil(
            size={"shortest_edge": vision_pixels},
            crop_size={"height": vision_pixels, "width": vision_pixels},
        ),
        image_encoder=CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=vision_width,
                intermediate_size=4 * vision_width,
                num_hidden_layers=vision_layers,
                num_attention_heads=vision_heads,
                image_size=vision_pixels,
                patch_size=patch,
                projection_dim=projection,
            )
        ),
        requires_safety_checker=False,
    )


class Original:
    """What the original trainer does at each step.

    Args:
        pipe: The base.
        data: A prepared folder.
        size: Of `SIZES`.
    """

    def __init__(self, pipe: Any, data: Path, size: dict[str, Any]) -> None:
        self.pipe, self.data, self.size = pipe, data, size
        for part in (pipe.vae, pipe.text_encoder, pipe.image_encoder, pipe.unet):
            part.requires_grad_(False)
        self.adapter = new_adapter("base", pipe.unet, pipe.image_encoder, None, num_tokens=4)
        attach(pipe, self.adapter)
        self.adapter.requires_grad_(True).train()
        self.optimizer = torch.optim.AdamW(self.adapter.parameters(), 1e-4, weight_decay=0.01)
        self.records = read_manifest(data)
        self.rng = np.random.default_rng(0)

    def step(self) -> None:
        """One optimizer step on images drawn at random."""
        self.learn(*self.encoded())

    def encoded(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latents, image embeddings and text states of images drawn at random."""
        chosen = self.rng.integers(len(self.records), size=self.size["batch"])
        images = [self._image(self.records[index].file_name) for index in chosen]
        return self._encode(images, [self.records[index].text for index in chosen])

    def learn(self, latents: torch.Tensor, embeds: torch.Tensor, text: torch.Tensor) -> None:
        """The part of a step that learns."""
        self._loss(latents, embeds, text).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _image(self, name: str) -> Image.Image:
        side = self.size["pixels"]
        return Image.open(self.data / name).convert("RGB").resize((side, side))

    def _encode(
        self, images: list[Image.Image], captions: list[str]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pipe, drop = self.pipe, self.rng.random(len(images))
        pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images])
        with torch.no_grad():
            scaled = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
            latents = pipe.vae.encode(scaled).latent_dist.sample() * 0.18215
            seen = pipe.feature_extractor(images, return_tensors="pt").pixel_values
            embeds = pipe.image_encoder(seen).image_embeds
            no_image = torch.from_numpy((drop < DROP) | ((drop >= 2 * DROP) & (drop < 3 * DROP)))
            embeds = embeds * ~no_image[:, None]
            kept = ["" if DROP <= u < 3 * DROP else c for u, c in zip(drop, captions, strict=True)]
            tokens = pipe.tokenizer(
                kept, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
            )
            text = pipe.text_encoder(tokens.input_ids)[0]
        return latents, embeds, text

    def _loss(
        self, latents: torch.Tensor, embeds: torch.Tensor, text: torch.Tensor
    ) -> torch.Tensor:
        noise, steps = torch.randn_like(latents), torch.randint(1000, (len(latents),))
        noisy = self.pipe.scheduler.add_noise(latents, noise, steps)
        predicted = self.pipe.unet(noisy, steps, (text, [self.adapter.tokens(embeds)])).sample
        return torch.nn.functional.mse_loss(predicted.float(), noise.float())

    def save(self, folder: Path) -> None:
        """The whole state, as accelerate saves it: the module holds the UNet."""
        torch.save(
            {**self.pipe.unet.state_dict(), **self.adapter.state_dict()},
            folder / "pytorch_model.bin",
        )
        torch.save(self.optimizer.state_dict(), folder / "optimizer.bin")


class Ours:
    """`ipdiverse train` on the same data, embedded before.

    Args:
        base: A pipeline, or the folder of one.
        data: A prepared folder.
        size: Of `SIZES`.
        precision: `fp32` or `bf16`.
    """

    def __init__(self, base: Any, data: Path, size: dict[str, Any], precision: str) -> None:
        config = TrainConfig(
            data=str(data),
            out=str(data / f"run-{precision}"),
            adapter="base",
            fusion="none",
            reference="self",
            resolution=size["pixels"],
            changed=0,
            batch=size["batch"],
            steps=1_000_000,
            mixed_precision="no" if precision == "fp32" else precision,  # type: ignore[arg-type]
        )
        opened = isinstance(base, str)
        config = replace(config, base=base) if opened else config
        self.trainer = Trainer(config, None if opened else FrozenEncoders(base))
        self._batches: Iterator[Any] = self.trainer.batches()

    def step(self) -> None:
        """One optimizer step."""
        self.trainer.one_step(next(self._batches))


def of_tokens(folder: Path, rounds: int) -> dict[str, float]:
    """A step of a generative fusion, which has no UNet, against one of the same adapter with it.

    On critters, with the shipped plain adapter and the same batch.
    """
    prepare("critters", folder / "critters", PrepareOptions(n=64))
    steps: dict[str, Any] = {}
    for fusion in ("none", "generative"):
        config = TrainConfig(
            data=str(folder / "critters"),
            out=str(folder / f"run-{fusion}"),
            init_from="plus",
            fusion=fusion,  # type: ignore[arg-type]
            changed=0,
            batch=32,
            steps=1_000_000,
        )
        trainer = Trainer(config)
        batches = trainer.batches()
        steps[fusion] = lambda t=trainer, b=batches: t.one_step(next(b))
    times = alternating(steps, rounds)
    return ratio_of(times["none"], times["generative"])


def dataset(folder: Path, pixels: int, count: int = 16) -> Path:
    """A prepared folder of scenes."""
    make_dataset(folder / "made", count, size=pixels)
    prepare(str(folder / "made"), folder / "data", PrepareOptions())
    return folder / "data"


def shares(name: str) -> dict[str, float]:
    """Operations of each frozen part on one image, as shares of a step without them."""
    with torch.device("meta"):
        pipe, size = pipeline(name), SIZES[name]
        side, cross = size["pixels"], size["cross"]
        _, _, _, seen, _, _ = size["vision"]
        pipe.unet.requires_grad_(False)
        latents = torch.empty(1, 4, side // 8, side // 8)
        # gradients run to every cross-attention's context, as they do to an adapter's layers
        context = torch.empty(1, 77 + 4, cross, requires_grad=True)

        def train() -> None:
            pipe.unet(latents, torch.zeros(1), context).sample.sum().backward()

        with torch.no_grad():
            frozen = {
                "vae": flops(lambda: pipe.vae.encode(torch.empty(1, 3, side, side))),
                "vision": flops(lambda: pipe.image_encoder(torch.empty(1, 3, seen, seen))),
                "text": flops(
                    lambda: (
                        pipe.text_encoder(torch.zeros(1, 77, dtype=torch.long)).last_hidden_state
                    )
                ),
            }
        with sdpa_kernel(SDPBackend.MATH):  # whose operations are counted
            step = flops(train)
    return {part: count / step for part, count in frozen.items()} | {"step_gflop": step / 1e9}


def held(name: str) -> dict[str, float]:
    """Bytes that the UNet's forward pass of one image leaves to the backward pass.

    Returns:
        As autograd does it, as `hold_less` does, and what that costs, in operations over those of
        a step without.
    """
    size = SIZES[name]
    side, width = size["pixels"] // 8, size["cross"]

    def predicted(unet: Any) -> torch.Tensor:
        context = torch.empty(1, 77 + 4, width, requires_grad=True)
        return unet(torch.empty(1, 4, side, side), torch.zeros(1), context).sample

    def left(unet: Any) -> float:
        known = {p.untyped_storage()._cdata for p in unet.parameters()}
        kept: dict[int, Any] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                kept[storage._cdata] = storage  # alive, so that no other gets its address
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = predicted(unet)
        held = sum(storage.nbytes() for storage in kept.values())
        del out  # until here it kept all of them
        return float(held)

    def operations(unet: Any) -> int:
        with sdpa_kernel(SDPBackend.MATH):  # whose operations are counted
            return flops(lambda: predicted(unet).sum().backward())

    with FakeTensorMode(allow_non_fake_inputs=True):
        unet = pipeline(name).unet.requires_grad_(False)
        before, step = left(unet), operations(unet)
        hold_less(unet)
        return {"before": before, "after": left(unet), "operations": operations(unet) / step}


def bound(parts: dict[str, float]) -> float:
    """Operations with the frozen parts over operations without."""
    return 1 + sum(parts[part] for part in ("vae", "vision", "text"))


def measure_full(arm: str, base: Path) -> None:
    """One step and one checkpoint of a base in a folder; prints peak memory and bytes."""
    size = SIZES["full"]
    with tempfile.TemporaryDirectory() as temporary:
        data = dataset(Path(temporary), size["pixels"], 2)
        saved = Path(temporary) / "saved"
        saved.mkdir()
        if arm == "original":
            original = Original(load_base(str(base)).pipe, data, size)
            original.step()
            peak = _peak()
            original.save(saved)
        else:
            ours = Ours(str(base), data, size, arm)
            ours.step()
            peak = _peak()
            ours.trainer.save()
            saved = Path(ours.trainer.config.out)
        written = sum(file.stat().st_size for file in saved.rglob("*") if file.is_file())
    print(json.dumps({"peak_bytes": peak, "checkpoint_bytes": written}))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def full() -> dict[str, Any]:
    """Peak memory and checkpoint of each arm, each in a process of its own, from files."""
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        for arm in ("written", "original", "fp32", "bf16"):
            command = [sys.executable, __file__, "--arm", arm, "--base", temporary]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            if arm != "written":
                found[arm] = json.loads(done.stdout.splitlines()[-1])
                print(arm, found[arm], flush=True)
    return found


def main() -> None:
    """Measure and print a table; write JSON where asked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--arm", choices=("written", "original", "fp32", "bf16"))
    parser.add_argument("--base", type=Path)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    if chosen.arm == "written":
        pipeline("full").save_pretrained(chosen.base)
        return
    if chosen.arm:
        measure_full(chosen.arm, chosen.base)
        return
    parts = {name: shares(name) for name in SIZES}
    report: dict[str, Any] = {"parts": parts, **machine(), "rounds": chosen.rounds}
    report["held"] = {name: held(name) for name in SIZES}
    report["bounds"] = {name: bound(shared) for name, shared in parts.items()}
    size = SIZES["miniature"]
    report["cells"] = {}
    with tempfile.TemporaryDirectory() as temporary:
        data = dataset(Path(temporary), size["pixels"])
        original = Original(pipeline("miniature"), data, size)
        ready = original.encoded()
        runs = {"original": original.step, "bound": lambda: original.learn(*ready)}
        for precision in ("fp32", "bf16"):
            runs[precision] = Ours(pipeline("miniature"), data, size, precision).step
        times = alternating(runs, chosen.rounds)
        report["of_tokens"] = of_tokens(Path(temporary), chosen.rounds)
    for name in ("bound", "fp32", "bf16"):
        report["cells"][name] = ratio_of(times["original"], times[name])
        report["cells"][name]["of_bound"] = ratio_of(times["bound"], times[name])
    if chosen.full:
        report["full"] = full()
    if chosen.out:
        chosen.out.write_text(json.dumps(report, indent=2) + "\n")
    print(table(report))


def table(report: dict[str, Any]) -> str:
    """Markdown."""
    rows = [
        f"| samples a second, {name} | {cell['ratio']:.2f} "
        f"| {cell['low']:.2f} to {cell['high']:.2f} | {cell['of_bound']['ratio']:.0%} |"
        for name, cell in report["cells"].items()
    ]
    rows.append(
        f"| bound by operations | {report['bounds']['miniature']:.2f} "
        f"| full size {report['bounds']['full']:.2f} | |"
    )
    flow = report["of_tokens"]
    rows.append(
        f"| samples a second, generative fusion over one through the UNet | {flow['ratio']:.2f} "
        f"| {flow['low']:.2f} to {flow['high']:.2f} | |"
    )
    less = report["held"]["full"]
    rows.append(
        f"| held of an image's forward pass, full size | {less['before'] / 1e9:.2f} GB, "
        f"{less['after'] / 1e9:.2f} GB | | {less['operations'] - 1:+.1%} operations |"
    )
    if "full" in report:
        original = report["full"]["original"]
        for name in ("fp32", "bf16"):
            cell = report["full"][name]
            less = 1 - cell["peak_bytes"] / original["peak_bytes"]
            smaller = original["checkpoint_bytes"] / cell["checkpoint_bytes"]
            rows.append(f"| peak memory, {name} | {less:.0%} less | | |")
            rows.append(f"| checkpoint, {name} | {smaller:.1f} times smaller | | |")
    return "\n".join(
        ["| original / ours | ratio | 95 % | of the bound |", "|---|---|---|---|", *rows]
    )


if __name__ == "__main__":
    main()
