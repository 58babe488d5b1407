"""The frozen encoders of a base, and how images are shown to them.

Training calls both at every step, or once for the cache. Everything random about an image is a
variant: number v of an image is always the same, so it can be stored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ipdiverse.adapter.attach.branches import text_mask
from ipdiverse.adapter.attach.encoding import ImageEncoding
from ipdiverse.base.bases import load_base, load_image_encoder
from ipdiverse.base.pipelines import check_trainable, load_unet, native_side
from ipdiverse.data.references import augment
from ipdiverse.errors import ModelError, check_range
from ipdiverse.provenance import derived_seed
from ipdiverse.training.config import CacheConfig


@dataclass(frozen=True)
class Preprocessing:
    """How images are shown to encoders: options of `CacheConfig`, checked."""

    resolution: int = 512
    variants: int = 1
    flip: bool = False
    changed: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        check_range("resolution", self.resolution, 16, 4096)
        check_range("variants", self.variants, 1, 64)
        check_range("changed", self.changed, 0, 64)
        check_range("resolution modulo 8", self.resolution % 8, 0, 0)

    @classmethod
    def of(cls, config: CacheConfig, resolution: int) -> Self:
        """The preprocessing of a cache, at the base's `resolution` unless it names another."""
        own = (config.variants, config.flip, config.changed, config.image_seed)
        return cls(config.resolution or resolution, *own)

    def target(self, image: Image.Image, sha256: str, variant: int) -> Tensor:
        """One variant of a target (0: the centre), float32 (3, resolution, resolution) in -1..1."""
        # as torchvision's Resize and RandomCrop of the original trainer, but seeded for each image
        scale = self.resolution / min(image.size)
        width, height = (max(self.resolution, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3)
        x, y, mirrored = (width - self.resolution) // 2, (height - self.resolution) // 2, False
        if variant:
            rng = np.random.default_rng(derived_seed(self.seed, sha256, "target", variant))
            x = int(rng.integers(width - self.resolution + 1))
            y = int(rng.integers(height - self.resolution + 1))
            mirrored = self.flip and bool(rng.random() < 0.5)
        image = image.crop((x, y, x + self.resolution, y + self.resolution))
        pixels = np.array(ImageOps.mirror(image) if mirrored else image)
        return torch.from_numpy(pixels).permute(2, 0, 1).float().div(127.5).sub(1)

    def reference(self, image: Image.Image, sha256: str, change: int) -> Image.Image:
        """One picture to prompt with: 0 is the image itself, the others are changed."""
        rng = np.random.default_rng(derived_seed(self.seed, sha256, "reference", change))
        return augment(image, rng) if change else image


class FrozenEncoders:
    """VAE, text encoders and image encoder of a stock pipeline."""

    def __init__(self, pipe: Any, image_encoder: Any = None, image_processor: Any = None) -> None:
        self.pipe = pipe
        self._fingerprint: str | None = None
        encoder = image_encoder or getattr(pipe, "image_encoder", None)
        processor = image_processor or getattr(pipe, "feature_extractor", None)
        if encoder is None or processor is None:
            fix = "Name one with --image-encoder."
            raise ModelError("has no image encoder", where="base", fix=fix)
        self.images = ImageEncoding(encoder, processor)
        texts = (getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2"))
        self.texts = [text for text in texts if text is not None]
        for module in self._modules():
            module.requires_grad_(False).eval()

    def to(self, device: torch.device) -> FrozenEncoders:
        """Move everything, the UNet too, to a device."""
        for module in (*self._modules(), self.pipe.unet):
            if module.device.type != "meta":  # without weights: not loaded yet, or freed for good
                module.to(device)
        return self

    def load_unet(self, device: torch.device) -> None:
        """Load the UNet, if it was left for later."""
        load_unet(self.pipe)
        self.pipe.unet.to(device).requires_grad_(False)

    def set_aside(self, for_good: bool) -> None:
        """Free the device of everything but the UNet, or `for_good` all memory, weights too."""
        for module in self._modules():
            module.to("meta" if for_good else "cpu")

    def _modules(self) -> tuple[Any, ...]:
        return (self.pipe.vae, self.images.encoder, *self.texts)

    @property
    def resolution(self) -> int:
        """Height and width in pixels that the base was made for."""
        return native_side(self.pipe)

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> dict[str, Tensor]:
        """Unscaled latents' `mean` and `std` (batch, channels, h, w) of pixels in -1..1."""
        vae = self.pipe.vae
        posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        return {"mean": posterior.mean, "std": posterior.std}

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """`states` (batch, tokens, width), `mask` (batch, tokens), and SDXL's `pooled`."""
        encoded = self.pipe.encode_prompt(
            prompt=list(captions),
            device=self.texts[0].device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        # Stable Diffusion returns two tensors; SDXL four, with pooled text as the third
        pooled = {} if len(encoded) < 4 else {"pooled": encoded[2]}
        mask = text_mask(self.pipe, {"prompt": list(captions)})
        # False at padding, which fusion must not read
        words = {} if mask is None else {"mask": mask.to(encoded[0].device)}
        return {"states": encoded[0], **words, **pooled}

    def image(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """`pooled` (batch, clip_dim) and `hidden` (batch, patches, clip_dim) of pictures."""
        return self.images.images(images)

    def no_image(self) -> dict[str, Tensor]:
        """What stands for "no image", as in the original: zeros, and a zero image's states."""
        hidden = self.images.zero_image()
        width = self.images.encoder.config.projection_dim
        return {"pooled": torch.zeros(1, width).to(hidden), "hidden": hidden}

    def fingerprint(self) -> str:
        """16 hexadecimal digits of every weight and of the preprocessing, computed once."""
        if self._fingerprint is None:
            digest = hashlib.sha256(str(self.images.processor).encode())
            for module in self._modules():
                for name, tensor in sorted(module.state_dict().items()):
                    digest.update(name.encode())
                    # as bytes, since numpy has no bfloat16
                    exact = tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8)
                    digest.update(exact.numpy().tobytes())
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint


def open_encoders(
    base: str,
    image_encoder: str | None = None,
    *,
    local_files_only: bool = False,
    unet: bool = True,
    trains: bool = True,
) -> FrozenEncoders:
    """The encoders of a base; without `unet`, its weights are left for `load_unet`.

    Not to train but to `fit`, any base will do: pictures and captions alone are read.
    """
    if trains:
        check_trainable(base, local_files_only=local_files_only)
    options: dict[str, Any] = {"local_files_only": local_files_only}
    own = None if image_encoder is None else ""  # a preset's encoder is not fetched in vain
    opened = load_base(base, safety_checker=False, encoder=own, unet=unet, **options)
    if image_encoder is None:
        return FrozenEncoders(opened.pipe)
    return FrozenEncoders(opened.pipe, *load_image_encoder(image_encoder, opened, **options))
