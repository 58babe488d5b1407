"""ComfyUI nodes of ipdiverse: load an adapter, apply it to a model, set its diversity dial.

Copy this folder into ComfyUI's `custom_nodes`. At import only ComfyUI's own packages are needed;
ipdiverse is imported when a node runs.
"""

from .nodes import ApplyAdapter, Diversity, LoadAdapter

NODE_CLASS_MAPPINGS = {
    "IpdiverseLoadAdapter": LoadAdapter,
    "IpdiverseApplyAdapter": ApplyAdapter,
    "IpdiverseDiversity": Diversity,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "IpdiverseLoadAdapter": "Load ipdiverse adapter",
    "IpdiverseApplyAdapter": "Apply ipdiverse adapter",
    "IpdiverseDiversity": "ipdiverse Diversity",
}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
