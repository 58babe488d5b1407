"""Nodes that bring files: adapters, the image encoder that fits, variation spaces, prompts."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

_ADAPTERS, _SPACES, _ENCODERS = "ipadapter", "ipdiverse_spaces", "clip_vision"
"""ComfyUI's names of folders; `models/ipadapter` is that of other packs too."""
_OWN_SPACE = "the adapter's own"
_HIDDEN = (
    "vision_model.embeddings.class_embedding",
    "visual.class_embedding",
    "class_embedding",
)
"""Tensors of an image encoder's file whose width is that of its hidden states, by layout."""


def folder_paths() -> Any:
    """ComfyUI's table of folders, with those of adapters and spaces in it."""
    import folder_paths as known  # pyright: ignore[reportMissingImports] - ComfyUI's

    for name in (_ADAPTERS, _SPACES):
        if name not in known.folder_names_and_paths:
            known.add_model_folder_path(name, str(Path(known.models_dir) / name))
    return known


def require_ipdiverse() -> None:
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
        files = folder_paths().get_filename_list(_ADAPTERS)
        tooltip = "A file of models/ipadapter. Use ipdiverse Find models to look for one that fits."
        return {"required": {"adapter_name": (files, {"tooltip": tooltip})}}

    @classmethod
    def IS_CHANGED(cls, adapter_name: str) -> float:  # noqa: N802 - ComfyUI's interface
        """When the file was written: a new one under the same name is loaded again."""
        return Path(folder_paths().get_full_path_or_raise(_ADAPTERS, adapter_name)).stat().st_mtime

    def load(self, adapter_name: str) -> tuple[Any]:
        """Open it.

        Raises:
            CheckpointError: The file is broken, or not an adapter.
        """
        require_ipdiverse()
        return (_opened(Path(folder_paths().get_full_path_or_raise(_ADAPTERS, adapter_name))),)


class FindModels:
    """Looks for an adapter that fits a MODEL, and for the image encoder that fits the adapter."""

    CATEGORY = "ipdiverse"
    DESCRIPTION = (
        "Finds the first adapter of a kind in models/ipadapter that fits this model, and an image "
        "encoder in models/clip_vision that fits the adapter. Sizes decide, not names."
    )
    RETURN_TYPES = ("IPDIVERSE_ADAPTER", "CLIP_VISION")
    RETURN_NAMES = ("adapter", "clip_vision")
    FUNCTION = "find"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's interface
        """The model, and which kind of adapter."""
        kinds = ["plus", "base", "full-face"]
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "What the adapter must have been trained for."}),
                "kind": (
                    kinds,
                    {"tooltip": "plus copies more of the image than base; full-face reads faces."},
                ),
            }
        }

    def find(self, model: Any, kind: str) -> tuple[Any, Any]:
        """Look through both folders, in the order of names.

        Raises:
            ModelError: There is no adapter that fits, or no encoder.
        """
        require_ipdiverse()
        from ipdiverse.errors import ModelError

        from .sites import sites_of

        sites = sites_of(model)
        adapter = _first_adapter({site.layer.number: site.widths for site in sites}, kind)
        pooled = adapter.reads == ("pooled",)
        file = _first_encoder(adapter.clip_dim, pooled)
        if file is None:
            raise ModelError(
                "holds no image encoder for this adapter",
                where="models/clip_vision",
                expected=f"{'embeddings' if pooled else 'hidden states'} of width "
                f"{adapter.clip_dim}",
                fix="Put CLIP ViT-H (SD 1.x, and most of SDXL) or ViT-bigG (the others) there.",
            )
        import comfy.clip_vision  # pyright: ignore[reportMissingImports] - ComfyUI's

        return adapter, comfy.clip_vision.load(str(file))


class LoadSpace:
    """Opens a variation space: what tells a picture's subject from its scene."""

    CATEGORY = "ipdiverse"
    DESCRIPTION = "Opens a variation space that `ipdiverse fit` made for this adapter."
    RETURN_TYPES = ("IPDIVERSE_SPACE",)
    RETURN_NAMES = ("space",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's interface
        """The adapter, and a file of `models/ipdiverse_spaces`."""
        files = [_OWN_SPACE, *folder_paths().get_filename_list(_SPACES)]
        tooltip = "A file of models/ipdiverse_spaces, or the one that came with ipdiverse."
        return {
            "required": {
                "adapter": ("IPDIVERSE_ADAPTER", {"tooltip": "What the space was fitted on."}),
                "space_name": (files, {"tooltip": tooltip}),
            }
        }

    def load(self, adapter: Any, space_name: str) -> tuple[Any]:
        """Open it.

        Raises:
            CheckpointError: The file is broken, or not a space.
            ModelError: It was fitted on another adapter, or there is none.
        """
        require_ipdiverse()
        from ipdiverse.adapter.imagine import load_space, space_at_hand
        from ipdiverse.errors import ModelError

        if space_name != _OWN_SPACE:
            space = load_space(folder_paths().get_full_path_or_raise(_SPACES, space_name))
            space.check(adapter, space_name)
            return (space,)
        found = space_at_hand(adapter)
        if found is None:
            raise ModelError(
                "comes without a variation space",
                where=f"a {adapter.kind} adapter",
                fix="Fit one, `ipdiverse fit DATA --adapter … --out FILE`, and put the file into "
                "models/ipdiverse_spaces.",
            )
        return (found,)


class Scenes:
    """Draws scenes from pictures of one's own."""

    CATEGORY = "ipdiverse"
    DESCRIPTION = "Puts pictures of your own in place of a variation space's scenes."
    RETURN_TYPES = ("IPDIVERSE_SPACE",)
    RETURN_NAMES = ("space",)
    FUNCTION = "read"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's interface
        """The space, what reads the pictures, and the pictures."""
        return {
            "required": {
                "space": ("IPDIVERSE_SPACE", {"tooltip": "Which part of a picture is its scene."}),
                "adapter": ("IPDIVERSE_ADAPTER", {"tooltip": "What the space was fitted on."}),
                "clip_vision": ("CLIP_VISION", {"tooltip": "Encoder of the adapter's images."}),
                "images": (
                    "IMAGE",
                    {"tooltip": "A batch of two or more; their subjects do not matter."},
                ),
            }
        }

    def read(self, space: Any, adapter: Any, clip_vision: Any, images: Any) -> tuple[Any]:
        """The space with these scenes."""
        require_ipdiverse()
        from .scenes import with_scenes

        return (with_scenes(space, adapter, clip_vision, images),)


class EncodePrompts:
    """Both texts, given once: for the sampler, for a fusion, and for scenes that fit."""

    CATEGORY = "ipdiverse"
    DESCRIPTION = "Encodes both texts as CLIP Text Encode does, and tells them to the adapter too."
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING", "IPDIVERSE_PROMPTS")
    RETURN_NAMES = ("positive", "negative", "prompts")
    FUNCTION = "encode"

    _TEXT: ClassVar[dict[str, Any]] = {"multiline": True, "dynamicPrompts": True, "default": ""}

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's interface
        """The text encoder and both texts."""
        return {
            "required": {
                "clip": ("CLIP", {"tooltip": "The model's text encoder."}),
                "text": ("STRING", {**cls._TEXT, "tooltip": "What the images should show."}),
                "negative_text": ("STRING", {**cls._TEXT, "tooltip": "What they should not."}),
            }
        }

    def encode(self, clip: Any, text: str, negative_text: str) -> tuple[Any, Any, Any]:
        """Conditioning for the sampler, and what the adapter is to know of the texts."""
        require_ipdiverse()
        from .inputs import word_mask
        from .scenes import Prompts

        encoded = [
            clip.encode_from_tokens_scheduled(clip.tokenize(one)) for one in (text, negative_text)
        ]
        pooled = encoded[0][0][1].get("pooled_output")
        words = (word_mask(clip, text), word_mask(clip, negative_text))
        known = None if pooled is None else pooled[0].detach().float().cpu()
        return (*encoded, Prompts(words, known, text))


def faces_of(images: Any) -> Any:
    """Embeddings of the largest face of each image, (images, width).

    Models are looked for where other packs keep them, in `models/insightface`.

    Raises:
        ModelError: insightface is not installed, or has no models.
        ArgumentError: An image shows no face.
    """
    import torch
    from PIL import Image

    from ipdiverse.adapter.attach.face_embeddings import detect_face
    from ipdiverse.errors import ModelError

    try:
        import insightface.app  # noqa: F401 # pyright: ignore[reportMissingImports] - optional
    except ImportError as error:
        raise ModelError(
            "is not installed in ComfyUI's Python",
            where="insightface",
            fix="Run python -m pip install insightface onnxruntime there; the base and plus "
            "adapters need none of it.",
        ) from error
    root = Path(folder_paths().models_dir) / "insightface"
    pixels = (images.detach().cpu() * 255).round().clamp(0, 255).to(torch.uint8).numpy()
    return torch.cat([detect_face(Image.fromarray(one), root) for one in pixels])


def _opened(file: Path) -> Any:
    from ipdiverse.adapter.files.checkpoint import load_adapter

    version = "plusv2" in file.name if "faceid-plus" in file.name else None
    return load_adapter(file, face_id_plus_v2=version)


def _first_adapter(widths: dict[int, tuple[int, int]], kind: str) -> Any:
    """The first file of the folder with an adapter of a kind whose layers are so wide."""
    from ipdiverse.adapter.files.inspection import inspect_checkpoint
    from ipdiverse.errors import CheckpointError, ModelError

    paths, seen, text = folder_paths(), [], next(iter(widths.values()))[0]
    for name in paths.get_filename_list(_ADAPTERS):
        file = Path(paths.get_full_path_or_raise(_ADAPTERS, name))
        try:  # names and shapes alone: weights are not read
            found = inspect_checkpoint(file)
        except CheckpointError:
            continue  # the folder may hold other files
        seen.append(f"{name} ({found['kind']}, {found['family']})")
        if (found["kind"], found["layers"]) != (kind, len(widths)) or not found["loads"]:
            continue
        adapter = _opened(file)
        if adapter.widths() == widths:
            logging.info("ipdiverse: %s fits this model", name)
            return adapter
    raise ModelError(
        "holds no such adapter for this model",
        where="models/ipadapter",
        expected=f"kind {kind}, {len(widths)} layers of text width {text}",
        found=", ".join(seen) or "none",
        fix="Download one, for example of h94/IP-Adapter, and refresh the page.",
    )


def _first_encoder(width: int | None, pooled: bool) -> Path | None:
    """The first image encoder of the folder whose output has a width, by its file's header."""
    from safetensors import SafetensorError, safe_open

    paths = folder_paths()
    for name in paths.get_filename_list(_ENCODERS):
        file = Path(paths.get_full_path_or_raise(_ENCODERS, name))
        try:
            with safe_open(file, "pt") as opened:
                shapes = {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError):
            continue  # other formats: their shapes cannot be read without their weights
        if _width_of(shapes, pooled) == width:
            logging.info("ipdiverse: %s fits this adapter", name)
            return file
    return None


def _width_of(shapes: dict[str, list[int]], pooled: bool) -> int | None:
    """Width of an image encoder's embeddings, or of its hidden states."""
    if pooled:
        if "visual_projection.weight" in shapes:
            return shapes["visual_projection.weight"][0]
        # OpenCLIP's layout has the projection the other way round
        found = shapes.get("visual.proj") or shapes.get("proj")
        return found[1] if found else None
    return next((shapes[name][0] for name in _HIDDEN if name in shapes), None)
