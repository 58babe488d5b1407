"""The nodes that prompt a model with images and turn the dial, in ComfyUI's node interface."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from .inputs import COMBINE, NO_IMAGE
from .loading import require_ipdiverse

PRESETS = (
    "linear",
    "ease in",
    "ease out",
    "ease in-out",
    "reverse in-out",
    "weak input",
    "weak middle",
    "weak output",
    "strong middle",
    "style transfer",
    "composition",
    "strong style transfer",
    "style and composition",
    "strong style and composition",
    "style transfer precise",
    "composition precise",
)
"""ipdiverse's presets, listed here so as not to import it at start."""
_SHARE = {"min": 0.0, "max": 1.0, "step": 0.001}
_HOW: dict[str, Any] = {
    "scale": (
        "FLOAT",
        {
            "default": 1.0,
            "min": -1.0,
            "max": 3.0,
            "step": 0.05,
            "tooltip": "How strongly the image acts; 0 is the model itself.",
        },
    ),
    "preset": (
        list(PRESETS),
        {"default": "linear", "tooltip": "Where it acts: which layers, and how strongly each."},
    ),
    "start_at": (
        "FLOAT",
        {
            "default": 0.0,
            **_SHARE,
            "tooltip": "From which share of the model's whole schedule on it acts.",
        },
    ),
    "end_at": (
        "FLOAT",
        {"default": 1.0, **_SHARE, "tooltip": "Up to which share of the whole schedule it acts."},
    ),
}
_COMBINE = (
    list(COMBINE),
    {
        "default": "concat",
        "tooltip": "Several images: side by side, or one mean, difference or sum of them.",
    },
)
_NEGATIVE = (
    "IMAGE",
    {"tooltip": "Guidance leads away from it; default: from no image."},
)
_NO_IMAGE = (
    list(NO_IMAGE),
    {
        "default": "zeros",
        "tooltip": "What plus adapters read for no image: zeros as in training, or a black picture "
        "as in ComfyUI_IPAdapter_plus. No effect on base adapters, or with a negative image.",
    },
)
_MORE: dict[str, Any] = {
    "diversity": (
        "IPDIVERSE_DIVERSITY",
        {"tooltip": "The dial. With nothing connected the adapter acts as it was trained."},
    ),
    "prompts": (
        "IPDIVERSE_PROMPTS",
        {
            "tooltip": "Of ipdiverse Encode prompts: a fusion then leaves padding out, and scenes "
            "fit the text."
        },
    ),
    "attn_mask": (
        "MASK",
        {"tooltip": "Where it acts: white does, black does not. One, or one for each image."},
    ),
}
_ADAPTER = ("IPDIVERSE_ADAPTER", {"tooltip": "Of ipdiverse Load adapter or Find models."})
_VISION = ("CLIP_VISION", {"tooltip": "The image encoder that the adapter was trained with."})
_MODEL = ("MODEL", {"tooltip": "Stable Diffusion 1.x, 2.x or XL."})
_IMAGE = ("IMAGE", {"tooltip": "The reference. Several in a batch are one reference together."})


class Diversity:
    """The dial: turns a setting into levers, by the adapter's own path if it was calibrated."""

    CATEGORY = "ipdiverse"
    DESCRIPTION = (
        "0 is stock IP-Adapter, 1 the most variety; connect it to Apply ipdiverse adapter."
    )
    RETURN_TYPES = ("IPDIVERSE_DIVERSITY",)
    RETURN_NAMES = ("diversity",)
    FUNCTION = "turn"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's interface
        """The setting, a seed for what is random, and perhaps a space."""
        return {
            "required": {
                "adapter": _ADAPTER,
                "diversity": (
                    "FLOAT",
                    {
                        "default": 0.5,
                        "min": 0.0,
                        "max": 1.0,
                        "step": 0.01,
                        "display": "slider",
                        "tooltip": "0 is stock IP-Adapter, 1 the most variety.",
                    },
                ),
                "seed": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 0xFFFFFFFFFFFFFFFF,
                        "tooltip": "Seed of the levers. Image i of a batch depends on it and on i.",
                    },
                ),
            },
            "optional": {
                "space": (
                    "IPDIVERSE_SPACE",
                    {"tooltip": "With it, each image gets a scene of its own, the subject kept."},
                )
            },
        }

    def turn(self, adapter: Any, diversity: float, seed: int, space: Any = None) -> tuple[Any]:
        """Read the dial.

        Raises:
            CheckpointError: The adapter's dial is broken.
            ModelError: The space was fitted on another adapter.
        """
        require_ipdiverse()
        from ipdiverse.levers import LEVERS
        from ipdiverse.sampling.sample import dial_for

        from .prompting import Setting

        if space is not None:
            space.check(adapter)
        levers = dial_for(adapter, space is not None).at(diversity)
        # ComfyUI guides with two branches, and its CLIP vision output is not changed
        elsewhere = {"embeddings"} if space is not None else {"embeddings", "projected"}
        left_out = [
            name for name in levers if name == "image_guidance" or LEVERS[name].acts_on in elsewhere
        ]
        if left_out:
            logging.warning("ipdiverse: left out of the dial's path: %s", ", ".join(left_out))
            levers |= {name: LEVERS[name].off for name in left_out}
        if space is not None and diversity and not levers.recombine:
            logging.warning("ipdiverse: this adapter's dial does not use a variation space")
        return (Setting(levers, seed, space),)


class EncodeImages:
    """Images as embeddings, which other nodes save, mix and load."""

    CATEGORY = "ipdiverse"
    DESCRIPTION = (
        "Embeddings of images as this adapter reads them, and of no image. The type is that of "
        "ComfyUI_IPAdapter_plus, whose nodes save, load and combine them."
    )
    RETURN_TYPES = ("EMBEDS", "EMBEDS")
    RETURN_NAMES = ("embeds", "negative_embeds")
    FUNCTION = "encode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's interface
        """Adapter, encoder and images."""
        return {
            "required": {"adapter": _ADAPTER, "clip_vision": _VISION, "image": _IMAGE},
            "optional": {
                "negative_image": _NEGATIVE,
                "no_image": _NO_IMAGE,
                "combine": _COMBINE,
            },
        }

    def encode(
        self,
        adapter: Any,
        clip_vision: Any,
        image: Any,
        negative_image: Any = None,
        no_image: str = "zeros",
        combine: str = "concat",
    ) -> tuple[Any, Any]:
        """Both embeddings.

        Raises:
            ModelError: Adapter and encoder do not fit.
        """
        require_ipdiverse()
        from . import inputs

        embeds = inputs.combined(inputs.encoded(adapter, clip_vision, image).embeds, combine)
        if negative_image is not None:
            return embeds, inputs.encoded(adapter, clip_vision, negative_image[:1]).embeds
        return embeds, inputs.no_image(adapter, clip_vision, no_image)


class EncodeFaces:
    """Faces as embeddings, for FaceID adapters."""

    CATEGORY = "ipdiverse"
    DESCRIPTION = (
        "Embeddings of the largest face of each image, by insightface, for FaceID adapters; "
        "connect both outputs to Apply ipdiverse embeddings."
    )
    RETURN_TYPES = ("EMBEDS", "EMBEDS")
    RETURN_NAMES = ("embeds", "negative_embeds")
    FUNCTION = "encode"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's interface
        """Adapter and photographs; the encoder for FaceID-Plus."""
        photos = {"tooltip": "Photographs of one person, each with the face in sight."}
        encoder = {"tooltip": "The image encoder, for FaceID-Plus alone."}
        return {
            "required": {"adapter": _ADAPTER, "image": ("IMAGE", photos)},
            "optional": {"clip_vision": ("CLIP_VISION", encoder)},
        }

    def encode(self, adapter: Any, image: Any, clip_vision: Any = None) -> tuple[Any, Any]:
        """Both embeddings.

        Raises:
            ModelError: insightface is not installed, or the adapter reads no faces.
            ArgumentError: An image shows no face.
        """
        require_ipdiverse()
        from .inputs import face_embeds
        from .loading import faces_of

        return face_embeds(adapter, faces_of(image), clip_vision, image)


class ApplyEmbeds:
    """Prompts a model with embeddings of images."""

    CATEGORY = "ipdiverse"
    DESCRIPTION = "Prompts a model with embeddings: of images or faces encoded, or loaded."
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's interface
        """Model, adapter and embeddings; strength, layers and steps."""
        given = {"tooltip": "Of the reference, as this adapter reads it."}
        none = {"tooltip": "Of the image that guidance leads away from, or of no image."}
        return {
            "required": {
                "model": _MODEL,
                "adapter": _ADAPTER,
                "embeds": ("EMBEDS", given),
                "negative_embeds": ("EMBEDS", none),
                **_HOW,
            },
            "optional": _MORE,
        }

    def apply(
        self,
        model: Any,
        adapter: Any,
        embeds: Any,
        negative_embeds: Any,
        scale: float,
        preset: str,
        start_at: float,
        end_at: float,
        diversity: Any = None,
        prompts: Any = None,
        attn_mask: Any = None,
    ) -> tuple[Any]:
        """A clone of the model with the prompt's patches; at scale 0, with none.

        Raises:
            ModelError: Adapter, model and embeddings do not fit.
            ArgumentError: A number is out of range.
        """
        require_ipdiverse()
        from ipdiverse.adapter.reference import RegionMask
        from ipdiverse.adapter.scale import resolve_scale
        from ipdiverse.levers import StepContext

        from .inputs import parts
        from .prompting import Given, ImagePrompt, Setting, prompted
        from .schedule import Schedule
        from .sites import sites_of

        setting = diversity or Setting()
        sites = sites_of(model)
        layers = [site.layer for site in sites]
        # its shares are checked here; when they are is told by ComfyUI's own schedule
        resolve_scale(preset, layers, weight=scale, start_at=start_at, end_at=end_at)
        strength = resolve_scale(preset, layers, weight=scale)
        if scale == 0:
            return (model.clone(),)
        strength = setting.levers.change("scale", strength, StepContext((), layers=layers))
        mask = None if attn_mask is None else RegionMask(_flat(attn_mask), mode="bilinear")
        schedule = Schedule(model.get_model_object("model_sampling"), start_at, end_at)
        positive, negative = (parts(adapter, one) for one in (embeds, negative_embeds))
        given = Given(positive, negative, strength, schedule, setting, prompts, mask)
        prompt = ImagePrompt(adapter, given)
        if prompt.scenes is not None and (share := prompt.scenes.share) < 1:
            logging.warning(
                "ipdiverse: no scene is near to the prompt: %d %% of one is imposed", 100 * share
            )
        return (prompted(model, sites, prompt),)


class ApplyAdapter:
    """Prompts a model with an image."""

    CATEGORY = "ipdiverse"
    DESCRIPTION = "Prompts a Stable Diffusion 1.x, 2.x or XL model with one image, or several."
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"

    _OPTIONAL: ClassVar[dict[str, Any]] = {
        **_MORE,
        "negative_image": _NEGATIVE,
        "no_image": _NO_IMAGE,
        "combine": _COMBINE,
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's interface
        """Model, adapter and image; strength, layers and steps."""
        return {
            "required": {
                "model": _MODEL,
                "adapter": _ADAPTER,
                "clip_vision": _VISION,
                "image": _IMAGE,
                **_HOW,
            },
            "optional": cls._OPTIONAL,
        }

    def apply(
        self,
        model: Any,
        adapter: Any,
        clip_vision: Any,
        image: Any,
        scale: float,
        preset: str,
        start_at: float,
        end_at: float,
        diversity: Any = None,
        prompts: Any = None,
        attn_mask: Any = None,
        negative_image: Any = None,
        no_image: str = "zeros",
        combine: str = "concat",
    ) -> tuple[Any]:
        """A clone of the model with the prompt's patches; at scale 0, with none.

        Raises:
            ModelError: Adapter, model and image encoder do not fit.
            ArgumentError: A number is out of range.
        """
        encode, how = EncodeImages().encode, (scale, preset, start_at, end_at)
        embeds = encode(adapter, clip_vision, image, negative_image, no_image, combine)
        return ApplyEmbeds().apply(model, adapter, *embeds, *how, diversity, prompts, attn_mask)


def _flat(mask: Any) -> Any:
    """A MASK as (masks, height, width): some nodes give one without the first axis."""
    return mask.reshape(-1, *mask.shape[-2:]).float().cpu()
