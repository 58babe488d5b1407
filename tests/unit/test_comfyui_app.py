"""The nodes in ComfyUI itself: stock, ours, and ComfyUI_IPAdapter_plus on the same random models.

`IPDIVERSE_COMFYUI` names ComfyUI's sources (0.3.64 was used), `IPDIVERSE_COMFYUI_PYTHON` a Python
that can run them, this one if it is not set, and `IPDIVERSE_COMFYUI_IPADAPTER_PLUS` the sources of
that pack. Without the first all are skipped, without the last those that need that pack.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import comfyui

COMFYUI = os.environ.get("IPDIVERSE_COMFYUI", "")
OTHER = os.environ.get("IPDIVERSE_COMFYUI_IPADAPTER_PLUS", "")
PYTHON = os.environ.get("IPDIVERSE_COMFYUI_PYTHON", sys.executable)
EXAMPLES = sorted((comfyui.FOLDER / "examples").glob("*_api.json"))
Workflow = dict[str, Any]

pytestmark = pytest.mark.skipif(not COMFYUI, reason="IPDIVERSE_COMFYUI names no sources")
beside = pytest.mark.skipif(not OTHER, reason="IPDIVERSE_COMFYUI_IPADAPTER_PLUS names no sources")


def node(kind: str, /, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def stock(kind: str = "sd1", images: int = 1) -> Workflow:
    sampling = {"sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    return {
        "base": node("TinyCheckpoint", kind=kind),
        "positive": node("CLIPTextEncode", clip=["base", 1], text="a red dog in the snow"),
        "negative": node("CLIPTextEncode", clip=["base", 1], text="blurry"),
        "empty": node("EmptyLatentImage", width=64, height=64, batch_size=images),
        "image": node("EmptyImage", width=64, height=64, batch_size=1, color=0x80A0F0),
        "vision": node("TinyClipVision"),
        "sampler": node(
            "KSampler",
            model=["base", 0],
            seed=1,
            steps=2,
            cfg=4.0,
            **sampling,
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["empty", 0],
        ),
        "save": node("SaveTensor", samples=["sampler", 0], name=""),
    }


def ours(workflow: Workflow, adapter: str = "base", name: str = "ours", **inputs: Any) -> Workflow:
    """The workflow with our node before the sampler."""
    made, model = copy.deepcopy(workflow), workflow["sampler"]["inputs"]["model"]
    file = f"{made['base']['inputs']['kind']}_{adapter}.safetensors"
    made[f"{name}_file"] = node("IpdiverseLoadAdapter", adapter_name=file)
    how = {"scale": 0.8, "preset": "linear", "start_at": 0.0, "end_at": 1.0, **inputs}
    files = {"adapter": [f"{name}_file", 0], "clip_vision": ["vision", 0], "image": ["image", 0]}
    made[name] = node("IpdiverseApplyAdapter", model=model, **files | how)
    made["sampler"]["inputs"]["model"] = [name, 0]
    return made


def theirs(
    workflow: Workflow, adapter: str = "base", name: str = "theirs", **inputs: Any
) -> Workflow:
    """The same with that pack's node."""
    made, model = copy.deepcopy(workflow), workflow["sampler"]["inputs"]["model"]
    file = f"{made['base']['inputs']['kind']}_{adapter}.safetensors"
    made[f"{name}_file"] = node("IPAdapterModelLoader", ipadapter_file=file)
    how = {"weight": 0.8, "weight_type": "linear", "combine_embeds": "concat"}
    how |= {"embeds_scaling": "V only", "start_at": 0.0, "end_at": 1.0, **inputs}
    files = {"ipadapter": [f"{name}_file", 0], "clip_vision": ["vision", 0], "image": ["image", 0]}
    made[name] = node("IPAdapterAdvanced", model=model, **files | how)
    made["sampler"]["inputs"]["model"] = [name, 0]
    return made


def from_image(workflow: Workflow) -> Workflow:
    made = copy.deepcopy(workflow)
    made["picture"] = node("EmptyImage", width=64, height=64, batch_size=1, color=0x30F010)
    made["empty"] = node("VAEEncode", pixels=["picture", 0], vae=["base", 2])
    made["sampler"]["inputs"] |= {"denoise": 0.6, "steps": 3}
    return made


def advanced(workflow: Workflow, *ends: int) -> Workflow:
    """With one advanced sampler for each part of the steps."""
    made, before, latents = copy.deepcopy(workflow), 0, ["empty", 0]
    given = made["sampler"]["inputs"]
    same = {name: given[name] for name in ("model", "cfg", "positive", "negative")}
    same |= {"noise_seed": 1, "steps": ends[-1], "sampler_name": "euler", "scheduler": "normal"}
    for end in ends:
        made["sampler" if end == ends[-1] else f"until {end}"] = node(
            "KSamplerAdvanced",
            **same,
            latent_image=latents,
            start_at_step=before,
            end_at_step=end,
            add_noise="disable" if before else "enable",
            return_with_leftover_noise="disable" if end == ends[-1] else "enable",
        )
        before, latents = end, [f"until {end}", 0]
    return made


def dialled(workflow: Workflow, **inputs: Any) -> Workflow:
    """Our node with the dial at 1."""
    made = copy.deepcopy(workflow)
    dial = {"adapter": ["ours_file", 0], "diversity": 1.0, "seed": 3, **inputs}
    made["dial"] = node("IpdiverseDiversity", **dial)
    made["ours"]["inputs"]["diversity"] = ["dial", 0]
    return made


def once(workflow: Workflow) -> Workflow:
    """With both texts given once."""
    made = copy.deepcopy(workflow)
    texts = {"text": "a red dog in the snow", "negative_text": "blurry"}
    made["texts"] = node("IpdiverseEncodePrompts", clip=["base", 1], **texts)
    made["sampler"]["inputs"] |= {"positive": ["texts", 0], "negative": ["texts", 1]}
    made["ours"]["inputs"]["prompts"] = ["texts", 2]
    return made


def in_scenes(workflow: Workflow) -> Workflow:
    made = dialled(once(workflow), space=["space", 0])
    file = {"adapter": ["ours_file", 0], "space_name": "tiny.safetensors"}
    made["space"] = node("IpdiverseLoadSpace", **file)
    return made


def lora(workflow: Workflow) -> Workflow:
    made = copy.deepcopy(workflow)
    made["lora"] = node("TinyLora", model=workflow["sampler"]["inputs"]["model"])
    made["sampler"]["inputs"]["model"] = ["lora", 0]
    return made


def face(workflow: Workflow) -> Workflow:
    """A FaceID adapter whose tokens do nothing, and whose LoRA is that of `lora`."""
    made, model = copy.deepcopy(workflow), workflow["sampler"]["inputs"]["model"]
    made["face_file"] = node("IpdiverseLoadAdapter", adapter_name="sd1_face.safetensors")
    made["faces"] = node("TinyFaces")
    embeds = {"embeds": ["faces", 0], "negative_embeds": ["faces", 1]}
    how = {"scale": 1.0, "preset": "linear", "start_at": 0.0, "end_at": 1.0}
    given = {"model": model, "adapter": ["face_file", 0]}
    made["face"] = node("IpdiverseApplyEmbeds", **given, **embeds, **how)
    made["sampler"]["inputs"]["model"] = ["face", 0]
    return made


def three_branches(workflow: Workflow) -> Workflow:
    made = copy.deepcopy(workflow)
    model = made["sampler"]["inputs"]["model"]
    conds = {"cond1": ["positive", 0], "cond2": ["negative", 0], "negative": ["negative", 0]}
    weights = {"cfg_conds": 4.0, "cfg_cond2_negative": 3.0, "style": "regular"}
    made["guider"] = node("DualCFGGuider", model=model, **conds, **weights)
    made["noise"] = node("RandomNoise", noise_seed=1)
    made["method"] = node("KSamplerSelect", sampler_name="euler")
    made["sigmas"] = node("BasicScheduler", model=model, scheduler="normal", steps=2, denoise=1.0)
    made["sampler"] = node(
        "SamplerCustomAdvanced",
        noise=["noise", 0],
        guider=["guider", 0],
        sampler=["method", 0],
        sigmas=["sigmas", 0],
        latent_image=["empty", 0],
    )
    return made


def example(file: Path) -> Workflow:
    """An example with random models in place of files."""
    tiny = {
        "CheckpointLoaderSimple": node("TinyCheckpoint", kind="sd1"),
        "CLIPVisionLoader": node("TinyClipVision"),
        "LoadImage": node("EmptyImage", width=64, height=64, batch_size=1, color=0x80A0F0),
    }
    smaller: dict[str, dict[str, Any]] = {
        "IpdiverseLoadAdapter": {"adapter_name": "sd1_base.safetensors"},
        "IpdiverseLoadSpace": {"space_name": "tiny.safetensors"},
        "EmptyLatentImage": {"width": 64, "height": 64, "batch_size": 1},
        "KSampler": {"steps": 1},
    }
    made = {name: tiny.get(o["class_type"], o) for name, o in json.loads(file.read_text()).items()}
    for one in made.values():
        one["inputs"] |= smaller.get(one["class_type"], {})
    return made


def patched(kind: str, /, **inputs: Any) -> Callable[[Workflow], Workflow]:
    """A node that changes the MODEL, put last before the sampler."""

    def put(workflow: Workflow) -> Workflow:
        made = copy.deepcopy(workflow)
        made[kind] = node(kind, model=workflow["sampler"]["inputs"]["model"], **inputs)
        made["sampler"]["inputs"]["model"] = [kind, 0]
        return made

    return put


def controlled(workflow: Workflow) -> Workflow:
    made = copy.deepcopy(workflow)
    texts = {"positive": ["positive", 0], "negative": ["negative", 0]}
    how = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    files = {"control_net": ["network", 0], "image": ["image", 0]}
    made["network"] = node("TinyControlNet", kind="sd1")
    made["control"] = node("ControlNetApplyAdvanced", **texts, **files, **how)
    made["sampler"]["inputs"] |= {"positive": ["control", 0], "negative": ["control", 1]}
    return made


def large(workflow: Workflow) -> Workflow:
    """Of 128 pixels: areas have 64 at least, and FreeU divides by 0 where a layer has one."""
    made = copy.deepcopy(workflow)
    made["empty"]["inputs"] |= {"width": 128, "height": 128}
    return made


def in_an_area(workflow: Workflow) -> Workflow:
    made = large(workflow)
    area = {"width": 64, "height": 64, "x": 0, "y": 0, "strength": 1.0}
    made["area"] = node("ConditioningSetArea", conditioning=["negative", 0], **area)
    both = {"conditioning_1": ["positive", 0], "conditioning_2": ["area", 0]}
    made["areas"] = node("ConditioningCombine", **both)
    made["sampler"]["inputs"]["positive"] = ["areas", 0]
    return made


def few_steps(workflow: Workflow) -> Workflow:
    made = patched("ModelSamplingDiscrete", sampling="lcm", zsnr=False)(workflow)
    made["sampler"]["inputs"] |= {"sampler_name": "lcm", "cfg": 1.0}
    return made


def of_three(workflow: Workflow) -> Workflow:
    made = copy.deepcopy(workflow)
    made["empty"]["inputs"]["batch_size"] = 3
    return made


TOOLS: dict[str, Callable[[Workflow], Workflow]] = {
    "LoRA": lora,
    "ControlNet": controlled,
    "area conditioning": in_an_area,
    "Perturbed-Attention Guidance": patched("PerturbedAttentionGuidance", scale=3.0),
    # swaps of one size are not random
    "HyperTile": patched("HyperTile", tile_size=1, swap_size=1, max_depth=0, scale_depth=False),
    "FreeU V2": lambda one: patched("FreeU_V2", b1=1.3, b2=1.4, s1=0.9, s2=0.2)(large(one)),
    "LCM": few_steps,
    "Perp-Neg": patched("PerpNeg", empty_conditioning=["negative", 0], neg_scale=1.0),
    "batch of 3": of_three,
}
"""As the table of docs/comfyui.md names them."""
LARGE = ("area conditioning", "FreeU V2")
AFTER = ("Perturbed-Attention Guidance", "HyperTile", "FreeU V2")
_IMAGES = {"image": ["two", 0]}
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "attn_mask": ({"attn_mask": ["mask", 0]}, {"attn_mask": ["mask", 0]}),
    **{
        name: ({"preset": name}, {"weight_type": name})
        for name in ("style transfer precise", "composition precise")
    },
    **{
        f"{way} of images": (_IMAGES | {"combine": way}, _IMAGES | {"combine_embeds": way})
        for way in ("concat", "average", "subtract", "add", "norm average")
    },
}
"""Inputs of our node and of that pack's that mean the same."""
PACKS = (("ours", "theirs"), ("theirs", "ours"))


def with_inputs(workflow: Workflow) -> Workflow:
    """With a mask of the left half, and two images."""
    made = copy.deepcopy(workflow)
    made["black"] = node("SolidMask", value=0.0, width=64, height=64)
    made["left"] = node("SolidMask", value=1.0, width=32, height=64)
    place = {"destination": ["black", 0], "source": ["left", 0], "x": 0, "y": 0}
    made["mask"] = node("MaskComposite", **place, operation="add")
    made["other"] = node("EmptyImage", width=64, height=64, batch_size=1, color=0xF01020)
    made["two"] = node("ImageBatch", image1=["image", 0], image2=["other", 0])
    return made


def by_embeds(encodes: str, applies: str) -> Workflow:
    """One pack's embeddings in one pack's node."""
    made = ours(theirs(stock()))
    images = {"image": ["image", 0], "clip_vision": ["vision", 0]}
    how = {"model": ["base", 0], "start_at": 0.0, "end_at": 1.0}
    own, other = {"adapter": ["ours_file", 0]}, {"ipadapter": ["theirs_file", 0]}
    if encodes == "ours":
        made["embeds"] = node("IpdiverseEncodeImages", **images, **own)
    else:
        made["embeds"] = node("IPAdapterEncoder", **images, **other, weight=1.0)
    if applies == "ours":
        given = {"embeds": ["embeds", 0], "negative_embeds": ["embeds", 1]}
        how |= {"scale": 0.8, "preset": "linear", **own, **given}
        made["ours"] = node("IpdiverseApplyEmbeds", **how)
    else:
        given = {"pos_embed": ["embeds", 0], "neg_embed": ["embeds", 1]}
        how |= {"weight": 0.8, "weight_type": "linear", "embeds_scaling": "V only"}
        made["ours"] = node("IPAdapterEmbeds", **how, **other, **given)
    return made


def tried() -> dict[str, Workflow]:
    """Of the table: each tool alone, beside our node, and beside that pack's in its place."""
    made = {"large stock": large(stock()), "large ours": large(ours(stock()))}
    for name, tool in TOOLS.items():
        made[f"{name}, alone"] = tool(stock())
        made[f"{name}, at 0"] = ours(tool(stock()), scale=0.0)
        made[f"{name}, ours"] = ours(tool(stock()))
        made[f"{name}, theirs"] = theirs(tool(stock()))
    for name in AFTER:
        made[f"{name} after ours"] = TOOLS[name](ours(stock()))
        made[f"{name} after theirs"] = TOOLS[name](theirs(stock()))
    for name, (own, other) in WAYS.items():
        made[f"{name}, ours"] = ours(with_inputs(stock()), **own)
        made[f"{name}, theirs"] = theirs(with_inputs(stock()), **other)
    precise = "style transfer precise"
    made["sdxl precise, ours"] = ours(stock("sdxl"), preset=precise)
    made["sdxl precise, theirs"] = theirs(stock("sdxl"), weight_type=precise)
    for encodes, applies in PACKS:
        made[f"embeds of {encodes} in {applies}"] = by_embeds(encodes, applies)
    return made


def workflows() -> dict[str, Workflow]:
    made = tried() if OTHER else {}
    for kind in ("sd1", "sdxl"):
        made[f"{kind} stock"] = stock(kind)
        made[f"{kind} at 0"] = ours(stock(kind), scale=0.0)
        made[f"{kind} ours"] = ours(stock(kind))
        made[f"{kind} plus, ours"] = ours(stock(kind), "plus", no_image="black")
        if OTHER:
            made[f"{kind} theirs"] = theirs(stock(kind))
            made[f"{kind} plus, theirs"] = theirs(stock(kind), "plus")
            both = theirs(theirs(stock(kind)), "plus", name="second")
            made[f"{kind} both theirs"] = both
            made[f"{kind} theirs after ours"] = theirs(ours(stock(kind)), "plus")
            made[f"{kind} ours after theirs"] = ours(theirs(stock(kind), "plus"))
    window = {"start_at": 0.5, "end_at": 0.8}
    made["image to image, ours"] = from_image(ours(stock(), **window))
    if OTHER:
        made["image to image, theirs"] = from_image(theirs(stock(), **window))
    cads = dialled(ours(stock(), start_at=0.2, end_at=0.6))
    made["4 steps"], made["2 and 2 steps"] = advanced(cads, 4), advanced(cads, 2, 4)
    made["fused"], made["fused, once"] = ours(stock(), "fused"), once(ours(stock(), "fused"))
    made["plain"], made["in scenes"] = ours(stock(images=2)), in_scenes(ours(stock(images=2)))
    made["first in a scene"] = in_scenes(ours(stock()))
    made["three branches"] = three_branches(ours(stock()))
    made["both ours"] = ours(ours(stock()), "plus", name="second", no_image="black")
    made["lora"], made["face"] = lora(stock()), face(stock())
    for name, workflow in made.items():
        workflow["save"]["inputs"]["name"] = name
    return made | {f"example {file.stem}": example(file) for file in EXAMPLES}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Latents, or an error, of every workflow: one start of ComfyUI for all."""
    folder = tmp_path_factory.mktemp("comfyui")
    (folder / "workflows.json").write_text(json.dumps(workflows()))
    script = Path(__file__).parents[1] / "comfyui_app.py"
    packs = [OTHER] if OTHER else []
    command = [PYTHON, str(script), COMFYUI, str(folder), *packs]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((folder / "results.json").read_text())
    found: dict[str, Any] = {
        f"told {file.stem}": json.loads((folder / file.name).read_text()) for file in EXAMPLES
    }
    for name, result in results.items():
        found[name] = result["error"]
        if not result["error"]:
            file = folder / "output" / result["files"][0].lstrip("/")
            tensors = file.suffix == ".safetensors"
            found[name] = load_file(file)["samples"] if tensors else file.read_bytes()
    return found


def assert_close(one: Any, other: Any) -> None:
    """Closer than one step of 8 bits by far: 1/255 is .004 of the range."""
    assert not isinstance(one, str), one
    assert not isinstance(other, str), other
    assert (one - other).abs().max() < 1e-4 * other.abs().max()


def assert_differ(one: Any, other: Any) -> None:
    assert (one - other).abs().max() > 1e-2 * other.abs().max()


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_scale_0_is_stock_to_the_bit(drawn: dict[str, Any], kind: str) -> None:
    assert drawn[f"{kind} at 0"].equal(drawn[f"{kind} stock"])
    assert_differ(drawn[f"{kind} ours"], drawn[f"{kind} stock"])


@beside
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("adapter", ["", " plus,"])
def test_both_packs_draw_the_same(drawn: dict[str, Any], kind: str, adapter: str) -> None:
    assert_close(drawn[f"{kind}{adapter} ours"], drawn[f"{kind}{adapter} theirs"])


@beside
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("order", ["theirs after ours", "ours after theirs"])
def test_both_packs_add_up_in_either_order(drawn: dict[str, Any], kind: str, order: str) -> None:
    assert_close(drawn[f"{kind} {order}"], drawn[f"{kind} both theirs"])


@beside
@pytest.mark.parametrize("tool", TOOLS)
def test_beside_a_tool_it_acts_as_that_pack(drawn: dict[str, Any], tool: str) -> None:
    alone = drawn[f"{tool}, alone"]
    without = drawn["large stock" if tool in LARGE else "sd1 stock"]
    assert tool == "batch of 3" or not torch.allclose(alone, without), "the tool acts"
    assert drawn[f"{tool}, at 0"].equal(alone)
    assert_differ(drawn[f"{tool}, ours"], alone)
    assert_close(drawn[f"{tool}, ours"], drawn[f"{tool}, theirs"])


@beside
@pytest.mark.parametrize("tool", AFTER)
def test_tools_may_come_after_it(drawn: dict[str, Any], tool: str) -> None:
    without = drawn["large ours" if tool in LARGE else "sd1 ours"]
    assert not torch.allclose(drawn[f"{tool} after ours"], without), "the tool acts"
    assert_close(drawn[f"{tool} after ours"], drawn[f"{tool} after theirs"])


@beside
@pytest.mark.parametrize("way", WAYS)
def test_inputs_mean_what_those_of_that_pack_mean(drawn: dict[str, Any], way: str) -> None:
    assert_differ(drawn[f"{way}, ours"], drawn["sd1 ours"])
    assert_close(drawn[f"{way}, ours"], drawn[f"{way}, theirs"])


@beside
def test_precise_types_of_sdxl_are_those_of_that_pack(drawn: dict[str, Any]) -> None:
    assert_differ(drawn["sdxl precise, ours"], drawn["sdxl ours"])
    assert_close(drawn["sdxl precise, ours"], drawn["sdxl precise, theirs"])


@beside
@pytest.mark.parametrize(("encodes", "applies"), PACKS)
def test_embeddings_go_from_pack_to_pack(drawn: dict[str, Any], encodes: str, applies: str) -> None:
    assert_close(drawn[f"embeds of {encodes} in {applies}"], drawn["sd1 ours"])


def test_the_table_of_the_docs_names_what_is_tried() -> None:
    text = (Path(__file__).parents[2] / "docs" / "comfyui.md").read_text("utf-8")
    assert [tool for tool in TOOLS if f"| {tool}" not in text] == []


@beside
def test_two_of_ours_add_up_as_two_of_that_pack(drawn: dict[str, Any]) -> None:
    assert_close(drawn["both ours"], drawn["sd1 both theirs"])


def test_the_lora_in_a_face_adapters_file_acts_as_comfyuis(drawn: dict[str, Any]) -> None:
    assert_close(drawn["face"], drawn["lora"])
    assert_differ(drawn["face"], drawn["sd1 stock"])


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_the_page_reads_an_example_as_the_api_does(drawn: dict[str, Any], file: Path) -> None:
    page, api = drawn[f"told {file.stem}"].values()
    assert page == {name: {**one, "left": []} for name, one in api.items()}


def test_two_samplers_are_one(drawn: dict[str, Any]) -> None:
    assert_close(drawn["2 and 2 steps"], drawn["4 steps"])


@beside
def test_a_window_is_one_of_the_whole_schedule(drawn: dict[str, Any]) -> None:
    assert_close(drawn["image to image, ours"], drawn["image to image, theirs"])


def test_texts_given_once_take_the_padding_from_a_fusion(drawn: dict[str, Any]) -> None:
    assert_differ(drawn["fused, once"], drawn["fused"])


def test_each_image_has_a_scene_of_its_own(drawn: dict[str, Any]) -> None:
    for image in range(2):
        assert_differ(drawn["in scenes"][image], drawn["plain"][image])
    assert_close(drawn["first in a scene"][0], drawn["in scenes"][0])


def test_three_branches_are_refused_in_one_line(drawn: dict[str, Any]) -> None:
    expected = "guidance: has more than two branches; expected cond and uncond"
    assert drawn["three branches"].startswith(expected)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_examples_draw(drawn: dict[str, Any], file: Path) -> None:
    found = drawn[f"example {file.stem}"]
    assert isinstance(found, bytes), found
    assert found.startswith(b"\x89PNG")
