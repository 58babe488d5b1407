"""The three nodes, in ComfyUI's node interface."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

_FOLDER = "ipadapter"
"""ComfyUI's name for the folder of IP-Adapters, `models/ipadapter`."""

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
)
"""ipdiverse's presets without the precise ones, listed here so as not to import it at start."""


class LoadAdapter:
    """Opens an adapter in any published layout, from `models/ipadapter`."""

    CATEGORY = "ipdiverse"
    DESCRIPTION = "Opens an IP-Adapter of any published layout, with ipdiverse's fusion and dial."
    RETURN_TYPES = ("IPDIVERSE_ADAPTER",)
    RETURN_NAMES = ("adapter",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's interface
        """A file of `models/ipadapter`."""
        return {"required": {"adapter_name": (_folder_paths().get_filename_list(_FOLDER),)}}

    @classmethod
    def IS_CHANGED(cls, adapter_name: str) -> float:  # noqa: N802 - ComfyUI's interface
        """When the file was written: a new one under the same name is loaded again."""
        return Path(_folder_paths().get_full_path_or_raise(_FOLDER, adapter_name)).stat().st_mtime

    def load(self, adapter_name: str) -> tuple[Any]:
        """Open it.

        Raises:
            CheckpointError: The file is broken, or not an adapter.
        """
        _require_ipdiverse()
        from ipdiverse.adapter.files.checkpoint import load_adapter

        file = Path(_folder_paths().get_full_path_or_raise(_FOLDER, adapter_name))
        version = "plusv2" in file.name if "faceid-plus" in file.name else None
        return (load_adapter(file, face_id_plus_v2=version),)


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
        """The setting, and a seed for what is random."""
        return {
            "required": {
                "adapter": ("IPDIVERSE_ADAPTER",),
                "diversity": (
                    "FLOAT",
                    {"default": 0.5, "min": 0.0, "max": 1.0, "step": 0.01, "display": "slider"},
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
        }

    def turn(self, adapter: Any, diversity: float, seed: int) -> tuple[Any]:
        """Read the dial.

        Raises:
            CheckpointError: The adapter's dial is broken.
        """
        _require_ipdiverse()
        from ipdiverse.levers import LEVERS
        from ipdiverse.sampling.sample import dial_for

        from .prompting import Setting

        levers = dial_for(adapter).at(diversity)
        # ComfyUI guides with two branches, its CLIP vision output is not changed, and a variation
        # space would have to read the prompt
        elsewhere = ("embeddings", "projected")
        left_out = [
            name for name in levers if name == "image_guidance" or LEVERS[name].acts_on in elsewhere
        ]
        if left_out:
            logging.warning("ipdiverse: left out of the dial's path: %s", ", ".join(left_out))
            levers |= {name: LEVERS[name].off for name in left_out}
        return (Setting(levers, seed),)


class ApplyAdapter:
    """Prompts a model with an image."""

    CATEGORY = "ipdiverse"
    DESCRIPTION = "Prompts a Stable Diffusion 1.x, 2.x or XL model with one image, or several."
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply"

    _OPTIONAL: ClassVar[dict[str, Any]] = {
        "diversity": ("IPDIVERSE_DIVERSITY",),
        "negative_image": (
            "IMAGE",
            {"tooltip": "Guidance leads away from it; default: from no image."},
        ),
        "clip": (
            "CLIP",
            {"tooltip": "With the texts below, a fusion leaves their padding out, as in training."},
        ),
        "text": ("STRING", {"default": "", "multiline": True}),
        "negative_text": ("STRING", {"default": "", "multiline": True}),
    }

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's interface
        """Model, adapter and image; strength, layers and steps."""
        share = {"min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "model": ("MODEL",),
                "adapter": ("IPDIVERSE_ADAPTER",),
                "clip_vision": ("CLIP_VISION",),
                "image": ("IMAGE", {"tooltip": "Several are one reference together."}),
                "scale": ("FLOAT", {"default": 1.0, "min": -1.0, "max": 3.0, "step": 0.05}),
                "preset": (list(PRESETS), {"default": "linear"}),
                "start_at": ("FLOAT", {"default": 0.0, **share, "tooltip": "Share of the steps."}),
                "end_at": ("FLOAT", {"default": 1.0, **share, "tooltip": "Share of the steps."}),
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
        negative_image: Any = None,
        clip: Any = None,
        text: str = "",
        negative_text: str = "",
    ) -> tuple[Any]:
        """A clone of the model with the prompt's patches; at scale 0, with none.

        Raises:
            ModelError: Adapter, model and image encoder do not fit.
            ArgumentError: A number is out of range.
        """
        _require_ipdiverse()
        from ipdiverse.adapter.scale import resolve_scale
        from ipdiverse.levers import StepContext

        from .inputs import encode, word_mask
        from .prompting import ImagePrompt, Setting, prompted
        from .sites import sites_of

        setting = diversity or Setting()
        sites = sites_of(model)
        layers = [site.layer for site in sites]
        strength = resolve_scale(preset, layers, weight=scale, start_at=start_at, end_at=end_at)
        if scale == 0:
            return (model.clone(),)
        strength = setting.levers.change("scale", strength, StepContext((), layers=layers))
        embeds = encode(adapter, clip_vision, image, negative_image)
        words = None
        if clip is not None and adapter.fusion is not None:
            words = (word_mask(clip, text), word_mask(clip, negative_text))
        prompt = ImagePrompt(adapter, *embeds, strength, setting, words)
        return (prompted(model, sites, prompt),)


def _folder_paths() -> Any:
    """ComfyUI's table of folders, with the adapters' folder in it."""
    import folder_paths  # pyright: ignore[reportMissingImports] - ComfyUI's

    if _FOLDER not in folder_paths.folder_names_and_paths:
        folder_paths.add_model_folder_path(_FOLDER, str(Path(folder_paths.models_dir) / _FOLDER))
    return folder_paths


def _require_ipdiverse() -> None:
    """Say in one line what to do if ipdiverse is not installed.

    Raises:
        RuntimeError: It is not installed.
    """
    try:
        import ipdiverse  # noqa: F401 - only whether it can be imported
    except ImportError as error:
        raise RuntimeError(
            "ipdiverse is not installed in ComfyUI's Python: install it there with pip."
        ) from error
