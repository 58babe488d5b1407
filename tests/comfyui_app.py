"""Runs API workflows in ComfyUI itself, on a CPU, with random models that have its real layouts.

    PYTHON tests/comfyui_app.py COMFYUI FOLDER [OTHER_PACK …]

`FOLDER/workflows.json` names workflows; `FOLDER/results.json` gets, for each, the images that it
saved, or the exception of the node that failed. Nodes of this file stand in for files of gigabytes:
`TinyCheckpoint` (for `CheckpointLoaderSimple`), `TinyClipVision`, `TinyControlNet`, `TinyLora`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACK = ROOT / "integrations/comfyui"
CLIP_WIDTH, CLIP_DIM, FACE_WIDTH = 32, 48, 24


def main(comfyui: Path, folder: Path, others: list[Path]) -> None:
    """Run every workflow of the folder."""
    sys.path[:0] = [str(comfyui), str(ROOT / "src"), str(ROOT)]
    sys.argv = ["main.py", "--cpu", "--base-directory", str(folder), "--disable-metadata"]
    for name in (
        "models/ipadapter",
        "models/clip_vision",
        "custom_nodes",
        "input",
        "output",
        "temp",
        "user",
    ):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for pack in (PACK, *others):
        link = folder / "custom_nodes" / (pack.name if pack != PACK else "ipdiverse")
        if not link.exists():
            link.symlink_to(pack)
    import comfy.options

    comfy.options.enable_args_parsing()
    import nodes

    logging.getLogger().setLevel(logging.WARNING)
    asyncio.run(nodes.init_extra_nodes(init_api_nodes=False))
    nodes.NODE_CLASS_MAPPINGS.update(TINY)
    make_adapters(folder / "models/ipadapter")
    workflows = json.loads((folder / "workflows.json").read_text())
    for file in sorted((PACK / "examples").glob("*_api.json")):
        page = json.loads(file.with_name(file.name.replace("_api", "")).read_text())
        told = {"page": as_api(page), "api": json.loads(file.read_text())}
        (folder / file.name).write_text(json.dumps(told))
    results = {name: run(workflow) for name, workflow in workflows.items()}
    (folder / "results.json").write_text(json.dumps(results))


def as_api(page: dict[str, Any]) -> dict[str, Any]:
    """A workflow of the page as the page itself sends it, by what ComfyUI's nodes say they take."""
    import nodes

    links = {link[0]: [str(link[1]), link[2]] for link in page["links"]}
    made = {}
    for one in page["nodes"]:
        kind = nodes.NODE_CLASS_MAPPINGS[one["type"]]
        wires = {part["name"]: part for part in one["inputs"]}
        values, inputs = list(one["widgets_values"]), dict[str, Any]()
        for name, (type_, *more) in [
            entry for part in ("required", "optional") for entry in _entries(kind, part)
        ]:
            box = isinstance(type_, (list, tuple)) or type_ in {"INT", "FLOAT", "STRING", "COMBO"}
            if box:
                inputs[name] = values.pop(0)
                if name in ("seed", "noise_seed") and kind.__module__ == "nodes":
                    values.pop(0)  # what becomes of it after a run
                elif values[:1] == ["fixed"]:
                    values.pop(0)
                if more and more[0].get("image_upload"):
                    values.pop(0)  # the button
            elif wires[name]["type"] != type_:
                inputs[name] = f"a wire of {wires[name]['type']}, not of {type_}"
            elif wires[name]["link"] is not None:
                inputs[name] = links[wires[name]["link"]]
        made[str(one["id"])] = {"class_type": one["type"], "inputs": inputs, "left": values}
    return made


def _entries(kind: Any, part: str) -> Any:
    return kind.INPUT_TYPES().get(part, {}).items()


class Server:
    """What the executor tells of its work: to nobody."""

    client_id = last_node_id = None
    last_prompt_id = None

    def send_sync(self, *_: Any) -> None:
        """Nothing."""


def run(workflow: dict[str, Any]) -> dict[str, Any]:
    """What a workflow saved, as files, and its error in one line."""
    import execution

    valid, error, outputs, wrong = asyncio.run(execution.validate_prompt("one", workflow, None))
    if not valid:
        return {"error": f"{error['message']}: {json.dumps(wrong)}", "files": []}
    executor = execution.PromptExecutor(Server())
    executor.execute(workflow, "one", {}, outputs)
    failed = [told for event, told in executor.status_messages if event == "execution_error"]
    saved = executor.history_result["outputs"].values() if not failed else ()
    files = [one for output in saved for kind in output.values() for one in kind]
    return {
        "error": failed[0]["exception_message"].strip() if failed else None,
        "traceback": failed[0]["traceback"][-3:] if failed else None,
        "files": [f"{one['subfolder']}/{one['filename']}" for one in files if "filename" in one],
    }


# --- random models ---------------------------------------------------------------------------

_COMMON: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
    "dtype": None,
}
_SD1: dict[str, Any] = {
    **_COMMON,
    "num_res_blocks": [2] * 4,
    "transformer_depth": [1] * 6 + [0, 0],
    "transformer_depth_output": [1] * 9 + [0] * 3,
    "transformer_depth_middle": 1,
    "channel_mult": [1, 2, 4, 4],
    "use_linear_in_transformer": False,
    "context_dim": 768,
    "adm_in_channels": None,
    "num_heads": 8,
}
_SDXL: dict[str, Any] = {
    **_COMMON,
    "num_res_blocks": [2] * 3,
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "channel_mult": [1, 2, 4],
    "use_linear_in_transformer": True,
    "context_dim": 2048,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "num_head_channels": 32,
}
_known: dict[str, Any] = {}


def random_weights(module: Any, seed: int) -> Any:
    """ComfyUI's layers start with memory as it was."""
    import torch

    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, one in module.named_parameters():
            if one.ndim > 1:
                width = one[0].numel() if "embedding" not in name else 400
                one.copy_(torch.randn(one.shape, generator=source) / width**0.5)
            elif name.endswith(("weight", "scale")):
                one.fill_(1.0)
            else:
                one.zero_()
    return module.float().eval()


def tiny_model(kind: str) -> Any:
    """MODEL with SD 1.x's or SDXL's blocks and text width, a tenth as wide inside."""
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    sizes, base = {"sd1": (_SD1, "SD15"), "sdxl": (_SDXL, "SDXL")}[kind]
    supported = getattr(comfy.supported_models, base)
    config = type(base, (supported,), {"unet_extra_config": {}})(sizes)
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, device="cpu")
    random_weights(model.diffusion_model, 1)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def tiny_clip(kind: str) -> Any:
    """CLIP with three layers: SDXL reads the last but one."""
    import comfy.sd
    import comfy.supported_models

    base = {"sd1": comfy.supported_models.SD15, "sdxl": comfy.supported_models.SDXL}[kind]
    options = {f"clip_{name}_model_config": {"num_hidden_layers": 3} for name in "lg"}
    clip = comfy.sd.CLIP(base.clip_target(base({})), model_options=options)
    random_weights(clip.cond_stage_model, 2)
    return clip


def tiny_vae() -> Any:
    """VAE: the tiny autoencoder, which ComfyUI knows by its names."""
    import comfy.sd
    import comfy.taesd.taesd

    model = random_weights(comfy.taesd.taesd.TAESD(latent_channels=4), 3)
    return comfy.sd.VAE(sd=model.state_dict())


class TinyCheckpoint:
    """Stands in for CheckpointLoaderSimple."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "CLIP", "VAE"), "load", "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Which architecture."""
        return {"required": {"kind": (["sd1", "sdxl"],)}}

    def load(self, kind: str) -> tuple[Any, Any, Any]:
        """The same models every time."""
        if kind not in _known:
            _known[kind] = (tiny_model(kind), tiny_clip(kind), tiny_vae())
        return _known[kind]


class TinyClipVision:
    """Stands in for CLIPVisionLoader."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CLIP_VISION",), "load", "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Nothing."""
        return {"required": {}}

    def load(self) -> tuple[Any]:
        """An encoder with three layers."""
        if "vision" not in _known:
            import tempfile

            import comfy.clip_vision

            sizes = {
                "hidden_size": CLIP_WIDTH,
                "intermediate_size": 64,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "image_size": 224,
                "patch_size": 56,
                "projection_dim": CLIP_DIM,
                "hidden_act": "gelu",
                "layer_norm_eps": 1e-5,
                "num_channels": 3,
                "model_type": "clip_vision_model",
            }
            with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
                file.write(json.dumps(sizes))
                file.flush()
                _known["vision"] = comfy.clip_vision.ClipVisionModel(file.name)
            random_weights(_known["vision"].model, 4)
        return (_known["vision"],)


class TinyControlNet:
    """Stands in for ControlNetLoader."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONTROL_NET",), "load", "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Which architecture."""
        return {"required": {"kind": (["sd1", "sdxl"],)}}

    def load(self, kind: str) -> tuple[Any]:
        """A random one."""
        import comfy.cldm.cldm
        import comfy.controlnet
        import comfy.ops

        sizes = {**({"sd1": _SD1, "sdxl": _SDXL}[kind]), "hint_channels": 3}
        for name in ("out_channels", "transformer_depth_output"):
            sizes.pop(name)
        network = comfy.cldm.cldm.ControlNet(**sizes, operations=comfy.ops.disable_weight_init)
        return (comfy.controlnet.ControlNet(random_weights(network, 5)),)


class TinyLora:
    """Stands in for LoraLoaderModelOnly."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "load", "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The model."""
        return {"required": {"model": ("MODEL",)}}

    def load(self, model: Any) -> tuple[Any]:
        """Changes of rank 2 of every layer of cross-attention."""
        import comfy.sd
        import torch

        source, lora = torch.Generator().manual_seed(6), {}
        for name, weight in model.model.diffusion_model.named_parameters():
            if "attn2" in name and name.endswith("weight"):
                key = "lora_unet_" + _diffusers_names(model)[name].replace(".", "_")
                rows, columns = weight.shape
                lora[f"{key}.lora_up.weight"] = torch.randn(rows, 2, generator=source) * 0.05
                lora[f"{key}.lora_down.weight"] = torch.randn(2, columns, generator=source) * 0.05
        return (comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0],)


def _diffusers_names(model: Any) -> dict[str, str]:
    """ComfyUI's name of a weight to diffusers', which LoRA files have."""
    import comfy.utils

    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    return {theirs: name.removesuffix(".weight") for name, theirs in names.items()}


class TinyFaces:
    """Stands in for ipdiverse Encode faces, which asks for insightface and its models."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("EMBEDS", "EMBEDS"), "encode", "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Nothing."""
        return {"required": {}}

    def encode(self) -> tuple[Any, Any]:
        """A face, and none."""
        import torch

        return torch.ones(1, FACE_WIDTH), torch.zeros(1, FACE_WIDTH)


class SaveTensor:
    """Saves a LATENT as it is, which an image of 8 bits would not tell."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "save", "test", True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The latents, and the file's name."""
        return {"required": {"samples": ("LATENT",), "name": ("STRING", {"default": "one"})}}

    def save(self, samples: dict[str, Any], name: str) -> dict[str, Any]:
        """A file of one tensor."""
        import folder_paths
        from safetensors.torch import save_file

        file = Path(folder_paths.get_output_directory()) / f"{name}.safetensors"
        save_file({"samples": samples["samples"].contiguous()}, file)
        return {"ui": {"saved": [{"filename": file.name, "subfolder": ""}]}}


TINY = {
    one.__name__: one
    for one in (TinyCheckpoint, TinyClipVision, TinyControlNet, TinyLora, TinyFaces, SaveTensor)
}


def make_adapters(folder: Path) -> None:
    """Adapters for the random models, as files: `sd1_base`, `sd1_plus` and so on."""
    import importlib

    import nodes
    import torch

    from ipdiverse.adapter.files.checkpoint import save_adapter
    from ipdiverse.adapter.fusion import GatedFusion
    from ipdiverse.adapter.model import ImagePromptAdapter
    from ipdiverse.adapter.projection import LinearProjection, ResamplerProjection

    pack = nodes.NODE_CLASS_MAPPINGS["IpdiverseApplyAdapter"].__module__.rpartition(".")[0]
    sites_of = importlib.import_module(f"{pack}.sites").sites_of
    for kind, text, inside in (("sd1", 768, 768), ("sdxl", 2048, 1280)):
        sites = sites_of(TinyCheckpoint().load(kind)[0])
        widths = {site.layer.number: site.widths for site in sites}
        middle = [site.layer.number for site in sites if site.layer.part == "mid"]
        for name in ("base", "plus", "fused"):
            torch.manual_seed(7)
            plus = ResamplerProjection(CLIP_WIDTH, text, width=inside)
            projection = plus if name == "plus" else LinearProjection(CLIP_DIM, text)
            adapter = ImagePromptAdapter(projection, widths)
            if name != "fused":
                # ComfyUI_IPAdapter_plus names the middle ("middle", 1), which ComfyUI does not
                # have: without an image there, both packs should draw the same
                for number in middle:
                    torch.nn.init.zeros_(adapter.layers()[number].to_v_ip.weight)
            if name == "fused":
                adapter.fusion = GatedFusion(text, 4, heads=2)
                torch.nn.init.ones_(adapter.fusion.gate)
            save_adapter(adapter, folder / f"{kind}_{name}.safetensors", {}, torch.float32)
            if (kind, name) == ("sd1", "base"):
                make_space(adapter, folder.parent / "ipdiverse_spaces")
        if kind == "sd1":
            make_face_adapter(sites, folder)


def make_face_adapter(sites: list[Any], folder: Path) -> None:
    """A FaceID adapter whose tokens do nothing, with the changes that `TinyLora` makes."""
    import torch

    from ipdiverse.adapter.files.checkpoint import save_adapter
    from ipdiverse.adapter.model import ImagePromptAdapter
    from ipdiverse.adapter.projection import FaceIDProjection

    places = {
        f"{site.path}.attn2.{part}{'.0' if part == 'to_out' else ''}.weight": (site, part)
        for site in sites
        for part in ("to_q", "to_k", "to_v", "to_out")
    }
    unet = TinyCheckpoint().load("sd1")[0].model.diffusion_model
    weights = {name: one for name, one in unet.named_parameters() if "attn2" in name}
    shapes: dict[int, dict[str, tuple[int, int, int]]] = {}
    for name, (site, part) in places.items():
        rows, columns = weights[name].shape
        shapes.setdefault(site.layer.number, {})[f"{part}_lora"] = (columns, 2, rows)
    widths = {site.layer.number: site.widths for site in sites}
    adapter = ImagePromptAdapter(FaceIDProjection(FACE_WIDTH, 768), widths, lora=shapes)
    source = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for layer in adapter.layers().values():
            torch.nn.init.zeros_(layer.to_v_ip.weight)
        for name, weight in weights.items():
            if not name.endswith("weight"):
                continue
            site, part = places[name]
            change = getattr(adapter.layers()[site.layer.number], f"{part}_lora")
            rows, columns = weight.shape
            change.up.weight.copy_(torch.randn(rows, 2, generator=source) * 0.05)
            change.down.weight.copy_(torch.randn(2, columns, generator=source) * 0.05)
    save_adapter(adapter, folder / "sd1_face.safetensors", {}, torch.float32)


def make_space(adapter: Any, folder: Path) -> None:
    """A random variation space of an adapter, whose scenes are found by CLIP-L's embeddings."""
    import torch
    from torch.nn.functional import normalize

    from ipdiverse.adapter.imagine import SceneBank, VariationSpace, projection_hash, save_space

    source = torch.Generator().manual_seed(8)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=source)

    size, text = adapter.image_proj.num_tokens * adapter.token_width, 768
    directions = torch.linalg.qr(drawn(size, 8)).Q
    scene = torch.linalg.qr(drawn(8, 4)).Q
    bank = SceneBank(drawn(32, 8), normalize(drawn(32, 6), dim=-1), ("",) * 32)
    spec = {"projection": projection_hash(adapter), "keys": "image", "adapter": "tiny"}
    keys = (drawn(2, text), drawn(text, 6))
    space = VariationSpace(torch.zeros(size), directions, torch.ones(8), scene, bank, *keys, spec)
    folder.mkdir(exist_ok=True)
    save_space(space, folder / "tiny.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), [*map(Path, sys.argv[3:])])
