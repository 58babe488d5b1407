"""ComfyUI nodes of ipdiverse: prompt a model with images, with a dial for variety.

Copy this folder into ComfyUI's `custom_nodes`. At import only ComfyUI's own packages are needed;
ipdiverse is imported when a node runs.
"""

from .loading import EncodePrompts, FindModels, LoadAdapter, LoadSpace, Scenes
from .nodes import ApplyAdapter, ApplyEmbeds, Diversity, EncodeFaces, EncodeImages

NODE_CLASS_MAPPINGS = {
    "IpdiverseLoadAdapter": LoadAdapter,
    "IpdiverseFindModels": FindModels,
    "IpdiverseApplyAdapter": ApplyAdapter,
    "IpdiverseDiversity": Diversity,
    "IpdiverseEncodePrompts": EncodePrompts,
    "IpdiverseEncodeImages": EncodeImages,
    "IpdiverseEncodeFaces": EncodeFaces,
    "IpdiverseApplyEmbeds": ApplyEmbeds,
    "IpdiverseLoadSpace": LoadSpace,
    "IpdiverseScenes": Scenes,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "IpdiverseLoadAdapter": "Load ipdiverse adapter",
    "IpdiverseFindModels": "ipdiverse Find models",
    "IpdiverseApplyAdapter": "Apply ipdiverse adapter",
    "IpdiverseDiversity": "ipdiverse Diversity",
    "IpdiverseEncodePrompts": "ipdiverse Encode prompts",
    "IpdiverseEncodeImages": "ipdiverse Encode images",
    "IpdiverseEncodeFaces": "ipdiverse Encode faces",
    "IpdiverseApplyEmbeds": "Apply ipdiverse embeddings",
    "IpdiverseLoadSpace": "Load ipdiverse variation space",
    "IpdiverseScenes": "ipdiverse Scenes",
}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
