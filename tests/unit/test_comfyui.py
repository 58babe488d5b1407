"""The ComfyUI nodes, against its interface in small: what diffusers' pipeline draws, they draw."""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import inspect
import json
import logging
import subprocess
import sys
import tomllib
import types
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import normalize

from ipdiverse.adapter.attach.attach import attach
from ipdiverse.adapter.attention import ImageBranch, decoupled_cross_attention
from ipdiverse.adapter.files.checkpoint import save_adapter
from ipdiverse.adapter.fusion import GatedFusion
from ipdiverse.adapter.imagine import (
    SceneBank,
    VariationSpace,
    projection_hash,
    save_space,
)
from ipdiverse.adapter.model import ImagePromptAdapter, attention_layers, remember_base_weights
from ipdiverse.adapter.reference import Reference
from ipdiverse.adapter.scale import PRESETS, unet_layers
from ipdiverse.dial import OFF, Dial, Levers, default_dial
from ipdiverse.errors import IpdiverseError, ModelError
from ipdiverse.levers import LEVERS
from ipdiverse.provenance import derived_seed
from ipdiverse.sampling.denoiser import steer
from tests import comfyui, models
from tests.comfyui import COND, UNCOND

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

PACK = comfyui.load_pack()
NODES = PACK.NODE_CLASS_MAPPINGS
INPUTS, PROMPTING, SCENES, SCHEDULE, SITES = (
    importlib.import_module(f"{PACK.__name__}.{name}")
    for name in ("inputs", "prompting", "scenes", "schedule", "sites")
)
PROMPT, NEGATIVE = "a red critter in the snow", "two blue critters"
GUIDANCE = 4.0
DEFAULTS: dict[str, Any] = {"scale": 0.8, "preset": "linear", "start_at": 0.0, "end_at": 1.0}
TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def comfy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    comfyui.install(monkeypatch, tmp_path / "models")


@functools.cache
def pipeline(architecture: str) -> Any:
    pipe = models.pipeline(architecture)
    whole = {"timestep_spacing": "trailing"}  # ComfyUI knows no timesteps between the trained ones
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, **whole)
    return pipe


def model_of(architecture: str) -> comfyui.ModelPatcher:
    pipe = pipeline(architecture)
    return comfyui.ModelPatcher(comfyui.BaseModel(pipe.unet, pipe.scheduler))


def adapter_of(architecture: str, kind: str = "base", fused: bool = False) -> ImagePromptAdapter:
    made = models.adapter(kind, pipeline(architecture).unet)
    if fused:
        tokens = made.image_proj.num_tokens
        assert tokens is not None
        torch.manual_seed(8)
        made.fusion = GatedFusion(made.token_width, tokens, heads=2)
        torch.nn.init.ones_(made.fusion.gate)
    return made


def clip_vision() -> comfyui.ClipVision:
    return comfyui.ClipVision(pipeline("sd1").image_encoder)


def image(seed: int = 1, count: int = 1) -> Tensor:
    drawn = torch.rand(count, 4, 4, 3, generator=torch.Generator().manual_seed(seed))
    return drawn.repeat_interleave(16, 1).repeat_interleave(16, 2)


def applied(model: Any, adapter: ImagePromptAdapter, **changes: Any) -> Any:
    """Through the node, as ComfyUI runs it."""
    given = {"clip_vision": clip_vision(), "image": image(), **DEFAULTS, **changes}
    with torch.inference_mode():
        (patched,) = NODES["IpdiverseApplyAdapter"]().apply(model, adapter, **given)
    return patched


def turned(adapter: ImagePromptAdapter, diversity: float, **more: Any) -> Any:
    return NODES["IpdiverseDiversity"]().turn(adapter, diversity, **{"seed": 5, **more})[0]


def prompts(architecture: str = "sd1", text: str = PROMPT, width: int = 8) -> Any:
    """As the node gives them to the adapter."""
    clip = comfyui.Clip(pipeline(architecture).tokenizer, width=width)
    return NODES["IpdiverseEncodePrompts"]().encode(clip, text, NEGATIVE)[2]


@functools.cache
def conds(architecture: str) -> tuple[comfyui.Cond, comfyui.Cond]:
    pipe = pipeline(architecture)
    with torch.no_grad():
        if architecture != "sdxl":
            text, negative = pipe.encode_prompt(PROMPT, "cpu", 1, True, NEGATIVE)
            return (text, None), (negative, None)
        text, negative, pooled, no_pooled = pipe.encode_prompt(
            PROMPT, None, "cpu", 1, True, NEGATIVE
        )
    ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]])
    return (
        (text, {"text_embeds": pooled, "time_ids": ids}),
        (negative, {"text_embeds": no_pooled, "time_ids": ids}),
    )


def noise(items: int = 2) -> Tensor:
    return torch.randn(items, 4, 16, 16, generator=torch.Generator().manual_seed(3))


def sampled(patcher: Any, architecture: str = "sd1", steps: int = 3, **options: Any) -> Tensor:
    scheduler = copy.deepcopy(pipeline(architecture).scheduler)
    scheduler.set_timesteps(steps)
    start = noise() * scheduler.init_noise_sigma
    with torch.inference_mode():
        return comfyui.sample(
            patcher, *conds(architecture), GUIDANCE, start, scheduler.sigmas, **options
        )


def in_diffusers(
    adapter: ImagePromptAdapter,
    architecture: str = "sd1",
    steps: int = 3,
    levers: Levers = OFF,
    scale: Any = 0.8,
    given: Tensor | None = None,
    space: VariationSpace | None = None,
    **setting: Any,
) -> Tensor:
    """The same with ipdiverse on a stock pipeline; images are given as what CLIP vision reads."""
    pipe = pipeline(architecture)
    name = "image_embeds" if adapter.reads == ("pooled",) else "penultimate_hidden_states"
    with torch.no_grad():
        embeds = clip_vision().encode_image(image() if given is None else given)[name]
    with attach(pipe, copy.deepcopy(adapter)) as prompt:
        prompt.set_reference(Reference(embeds=[embeds]))
        prompt.set_scale(scale, **setting)
        prompt.set_space(space)
        steer(prompt, levers, [derived_seed(5, i, "levers") for i in range(2)])
        sizes = {"height": 64, "width": 64} if architecture == "sdxl" else {}
        return pipe(
            PROMPT,
            negative_prompt=NEGATIVE,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            num_images_per_prompt=2,
            latents=noise(),
            output_type="latent",
            **sizes,
        ).images


def assert_close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert (found - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))


def assert_differ(one: Tensor, other: Tensor) -> None:
    assert (one - other).abs().max() > 1e-2


# --- ComfyUI's node interface ----------------------------------------------------------------


def test_the_pack_offers_what_comfyui_looks_for() -> None:
    assert NODES.keys() == PACK.NODE_DISPLAY_NAME_MAPPINGS.keys()
    readme = (comfyui.FOLDER / "README.md").read_text()
    assert not [name for name in PACK.NODE_DISPLAY_NAME_MAPPINGS.values() if name not in readme]


def folders(tmp_path: Path) -> Path:
    for name in ("ipadapter", "ipdiverse_spaces", "clip_vision"):
        (tmp_path / "models" / name).mkdir(parents=True)
    return tmp_path / "models"


@pytest.mark.parametrize("name", NODES)
def test_a_node_is_one(name: str, tmp_path: Path) -> None:
    folders(tmp_path)
    node = NODES[name]
    inputs = node.INPUT_TYPES()
    assert "required" in inputs
    assert inputs.keys() <= {"required", "optional", "hidden"}
    named = {key: entry for part in inputs.values() for key, entry in part.items()}
    for entry in named.values():
        assert isinstance(entry, tuple)
        assert isinstance(entry[0], (str, list)), "a type, or the choices"
        assert entry[1]["tooltip"], "every input says what it is"
    assert isinstance(node.CATEGORY, str)
    assert all(isinstance(kind, str) for kind in node.RETURN_TYPES)
    assert len(getattr(node, "RETURN_NAMES", node.RETURN_TYPES)) == len(node.RETURN_TYPES)
    takes = inspect.signature(getattr(node, node.FUNCTION)).parameters
    assert list(takes)[1:] == list(named), "ComfyUI calls with these names"
    defaults = {key for key, one in takes.items() if one.default is not inspect.Parameter.empty}
    assert defaults == set(inputs.get("optional", {})), "only optional inputs may be absent"


def test_what_one_node_gives_the_next_takes(tmp_path: Path) -> None:
    folders(tmp_path)
    load, apply, turn = (
        NODES[f"Ipdiverse{name}"] for name in ("LoadAdapter", "ApplyAdapter", "Diversity")
    )
    adapter, diversity = load.RETURN_TYPES[0], turn.RETURN_TYPES[0]
    assert apply.INPUT_TYPES()["required"]["adapter"][0] == adapter
    assert turn.INPUT_TYPES()["required"]["adapter"][0] == adapter
    assert apply.INPUT_TYPES()["optional"]["diversity"][0] == diversity
    presets = apply.INPUT_TYPES()["required"]["preset"][0]
    assert presets == [one for one in PRESETS if one not in ("style", "layout", "instantstyle")]


def test_modules_import_only_what_comfyui_has() -> None:
    allowed = {*sys.stdlib_module_names, "torch", "numpy"}
    files = sorted(comfyui.FOLDER.glob("*.py"))
    assert len(files) >= 4
    for file in files:
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Import):
                assert {name.name.partition(".")[0] for name in node.names} <= allowed, file
            elif isinstance(node, ast.ImportFrom):
                assert node.level or (node.module or "").partition(".")[0] in allowed, file


def test_it_imports_where_nothing_else_is_installed_and_says_what_is_missing() -> None:
    code = f"""
import importlib.util, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in ("ipdiverse", "diffusers", "transformers", "safetensors", "jaxtyping", "PIL"):
            raise ModuleNotFoundError(f"No module named {{top!r}}", name=top)
sys.meta_path.insert(0, Blocked())
spec = importlib.util.spec_from_file_location("pack", {str(comfyui.FOLDER / "__init__.py")!r})
pack = importlib.util.module_from_spec(spec)
sys.modules["pack"] = pack
spec.loader.exec_module(pack)
import pack.inputs, pack.nodes, pack.prompting, pack.scenes, pack.schedule, pack.sites
for name in ("ApplyAdapter", "ApplyEmbeds", "Diversity", "EncodeImages", "EncodePrompts"):
    pack.NODE_CLASS_MAPPINGS["Ipdiverse" + name].INPUT_TYPES()
pack.NODE_CLASS_MAPPINGS["IpdiverseEncodeFaces"].INPUT_TYPES()
try:
    pack.NODE_CLASS_MAPPINGS["IpdiverseDiversity"]().turn(None, 0.5, 0)
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout == (
        "ipdiverse is not installed in ComfyUI's Python: install it there with pip.\n"
    )


def test_running_needs_what_the_packs_metadata_names() -> None:
    code = """
import sys
import numpy, PIL, safetensors.torch, torch  # ComfyUI's own
before = set(sys.modules)
import ipdiverse.adapter.attention, ipdiverse.adapter.files.checkpoint, ipdiverse.adapter.scale
import ipdiverse.adapter.attach.face_embeddings
import ipdiverse.adapter.files.inspection, ipdiverse.adapter.imagine, ipdiverse.adapter.reference
import ipdiverse.dial, ipdiverse.levers, ipdiverse.sampling.sample
files = {n: getattr(m, "__file__", "") or "" for n, m in sys.modules.items() if n not in before}
print(sorted({n.partition(".")[0] for n, file in files.items() if "site-packages" in file}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = set(ast.literal_eval(done.stdout)) - {"numpy", "PIL", "safetensors", "torch"}
    project = tomllib.loads((comfyui.FOLDER / "pyproject.toml").read_text())["project"]
    assert found == {one.partition(">")[0] for one in project["dependencies"]}


def test_load_opens_a_file_of_the_folder_and_sees_when_it_changes(tmp_path: Path) -> None:
    import os

    folder = tmp_path / "models/ipadapter"
    folder.mkdir(parents=True)
    made = adapter_of("sd1", fused=True)
    save_adapter(made, folder / "mine.safetensors", {"steps": 3}, torch.float32)
    node = NODES["IpdiverseLoadAdapter"]
    assert node.INPUT_TYPES()["required"]["adapter_name"][0] == ["mine.safetensors"]
    with torch.inference_mode():
        (opened,) = node().load("mine.safetensors")
    assert opened.spec["steps"] == 3
    assert torch.equal(
        sampled(applied(model_of("sd1"), opened)), sampled(applied(model_of("sd1"), made))
    )
    before = node.IS_CHANGED("mine.safetensors")
    os.utime(folder / "mine.safetensors", (1, 1))
    assert node.IS_CHANGED("mine.safetensors") == 1 != before


# --- layers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_layers_are_those_of_diffusers_in_its_order(architecture: str) -> None:
    """Where each stands, and whose weights it has: names of blocks are told by ComfyUI's UNet."""
    unet = pipeline(architecture).unet
    model = model_of(architecture)
    sites = SITES.sites_of(model)
    assert [site.layer for site in sites] == unet_layers(unet)
    names = attention_layers(unet)
    parts = model.model.diffusion_model
    for site in sites:
        name, number = site.block
        block = parts.middle_block if name == "middle" else getattr(parts, f"{name}_blocks")[number]
        (transformer,) = [m for m in block if hasattr(m, "transformer_blocks")]
        mine = transformer.transformer_blocks[site.index].attn2
        theirs = unet.get_submodule(names[site.layer.number])
        assert mine.to_k is theirs.to_k
        assert site.widths == (theirs.to_k.in_features, theirs.to_q.out_features)


def test_a_model_without_a_unet_is_told_where_it_can_be_drawn() -> None:
    flux = type("Flux", (), {})()
    model: Any = types.SimpleNamespace(model=types.SimpleNamespace(diffusion_model=flux))
    with pytest.raises(ModelError) as error:
        SITES.sites_of(model)
    assert str(error.value) == (
        "model: has no UNet with cross-attention; expected Stable Diffusion 1.x, 2.x or XL; found "
        "Flux. These nodes are for models with a UNet; Flux.1 and SD 3.5 are drawn by "
        "`ipdiverse generate --base flux-dev` or sd35-large."
    )


def test_blocks_have_comfyuis_well_known_names() -> None:
    """The tables that every ComfyUI user of SD 1.x and SDXL knows."""
    sd1 = [site.block for site in SITES.sites_of(model_of("sd1"))]
    assert sd1 == [
        *(("input", number) for number in (1, 2, 4, 5, 7, 8)),
        ("middle", 0),
        *(("output", number) for number in range(3, 12)),
    ]
    sdxl = [(site.block, site.index) for site in SITES.sites_of(model_of("sdxl"))]
    assert sdxl == [
        *((("input", number), i) for number in (4, 5) for i in range(2)),
        *((("input", number), i) for number in (7, 8) for i in range(10)),
        *((("middle", 0), i) for i in range(10)),
        *((("output", number), i) for number in (0, 1, 2) for i in range(10)),
        *((("output", number), i) for number in (3, 4, 5) for i in range(2)),
    ]
    assert len(sdxl) == 70


def key_of(site: Any) -> tuple[Any, ...]:
    """ComfyUI's: with the place in the block only where there are several."""
    return site.block if site.alone else (*site.block, site.index)


@pytest.mark.parametrize("architecture", ["sd1", "sdxl"])
def test_every_layer_computes_our_decoupled_attention(architecture: str) -> None:
    """Each patch alone, on query, key and value of its layer, against the pure function."""
    adapter = adapter_of(architecture)
    patched = applied(model_of(architecture), adapter, scale=0.7)
    sites = SITES.sites_of(patched)
    replaced = patched.model_options["transformer_options"]["patches_replace"]["attn2"]
    assert set(replaced) == {key_of(site) for site in sites}
    with torch.no_grad():
        positive = adapter.tokens(clip_vision().encode_image(image()).image_embeds)
        negative = adapter.tokens(torch.zeros(1, models.CLIP_DIM))
    tokens = torch.cat([negative, negative, positive, positive])
    generator = torch.Generator().manual_seed(0)
    for site in sites:
        width, heads = site.widths[1], 2
        query, key, value = (
            torch.randn(4, count, width, generator=generator) for count in (9, 5, 5)
        )
        options = {
            "cond_or_uncond": [UNCOND, COND],
            "n_heads": heads,
            "dim_head": width // heads,
            "ipdiverse_text": torch.zeros(4, 5, site.widths[0]),
            "sigmas": torch.ones(1),
        }
        weights = adapter.layers()[site.layer.number]
        with torch.no_grad():
            found = replaced[key_of(site)](query, key, value, options)
            *text, image_key, image_value = (
                states.unflatten(-1, (heads, -1)).transpose(1, 2)
                for states in (query, key, value, weights.to_k_ip(tokens), weights.to_v_ip(tokens))
            )
            branch = ImageBranch(image_key, image_value, 0.7)
            expected = decoupled_cross_attention(*text, [branch]).transpose(1, 2).flatten(2)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


# --- whole images ----------------------------------------------------------------------------


def test_the_fake_is_diffusers_unet_in_another_order() -> None:
    """Without a prompt both sample the same: what follows compares prompts alone."""
    for architecture in models.ARCHITECTURES:
        adapter = adapter_of(architecture)
        expected = in_diffusers(adapter, architecture, scale=0.0)
        assert_close(sampled(model_of(architecture), architecture), expected, 1e-5)


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
@pytest.mark.parametrize("kind", ["base", "plus", "full-face"])
def test_images_are_those_of_the_pipeline(architecture: str, kind: str) -> None:
    adapter = adapter_of(architecture, kind)
    found = sampled(applied(model_of(architecture), adapter), architecture)
    assert_close(found, in_diffusers(adapter, architecture))
    assert_differ(found, sampled(model_of(architecture), architecture))


@pytest.mark.parametrize("architecture", ["sd1", "sdxl"])
def test_a_fusion_reads_each_rows_own_text_without_padding(architecture: str) -> None:
    adapter = adapter_of(architecture, "plus", fused=True)
    words = {"prompts": prompts(architecture)}
    found = sampled(applied(model_of(architecture), adapter, **words), architecture)
    assert_close(found, in_diffusers(adapter, architecture))
    without = sampled(applied(model_of(architecture), adapter), architecture)
    assert (found - without).abs().max() > 1e-3, "padding matters"


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_ours(preset: str) -> None:
    adapter = adapter_of("sd1")
    found = sampled(applied(model_of("sd1"), adapter, preset=preset), steps=2)
    assert_close(found, in_diffusers(adapter, steps=2, scale=preset, weight=0.8))


def test_it_acts_in_its_share_of_the_steps() -> None:
    adapter = adapter_of("sd1")
    found = sampled(applied(model_of("sd1"), adapter, start_at=0.2, end_at=0.7), steps=4)
    assert_close(found, in_diffusers(adapter, steps=4, start_at=0.2, end_at=0.7))
    assert_differ(found, sampled(applied(model_of("sd1"), adapter), steps=4))


def test_several_images_are_one_reference_together() -> None:
    adapter, both = adapter_of("sd1", "plus", fused=True), image(2, count=2)
    found = sampled(applied(model_of("sd1"), adapter, image=both, prompts=prompts()))
    assert_close(found, in_diffusers(adapter, given=both))


def test_a_negative_image_is_what_the_unconditional_rows_get() -> None:
    adapter = adapter_of("sd1", "plus")
    plain = sampled(applied(model_of("sd1"), adapter))
    same = sampled(applied(model_of("sd1"), adapter, negative_image=image()))
    other = sampled(applied(model_of("sd1"), adapter, negative_image=image(7)))
    assert_differ(plain, other)
    assert_differ(same, other)


# --- rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_rows_get_their_own_tokens_however_they_are_batched(fused: bool) -> None:
    """In one call, unconditional first, or one by one where memory is short."""
    patched = applied(model_of("sd1"), adapter_of("sd1", fused=fused))
    assert_close(sampled(patched, together=False), sampled(patched, together=True), 1e-5)


def test_conditional_and_unconditional_rows_differ_in_tokens() -> None:
    patched = applied(model_of("sd1"), adapter_of("sd1"))
    positive, _ = conds("sd1")
    sigma, sigmas = torch.ones(1), torch.tensor([1.0, 0.0])
    with torch.inference_mode():
        cond, uncond = comfyui.predict(patched, [positive, positive], noise(), sigma, sigmas)
        free, _ = comfyui.predict(model_of("sd1"), [positive, positive], noise(), sigma, sigmas)
    assert_differ(cond, uncond)
    assert_differ(cond, free)


def test_guidance_with_more_branches_is_refused() -> None:
    patched = applied(model_of("sd1"), adapter_of("sd1"))
    positive, negative = conds("sd1")
    with pytest.raises(IpdiverseError, match="guidance: has more than two branches"):
        comfyui.predict(
            patched, [positive, negative, negative], noise(), torch.ones(1), torch.ones(2)
        )


# --- scale 0, other patches ------------------------------------------------------------------


def test_scale_0_is_the_model_itself() -> None:
    patched = applied(model_of("sd1"), adapter_of("sd1"), scale=0.0)
    assert patched.model_options == {"transformer_options": {}}
    assert torch.equal(sampled(patched), sampled(model_of("sd1")))


def test_layers_whose_scale_is_0_are_left_alone() -> None:
    patched = applied(model_of("sdxl"), adapter_of("sdxl"), preset="style transfer")
    replaced = patched.model_options["transformer_options"]["patches_replace"]["attn2"]
    assert {key[:2] for key in replaced} == {("output", 1)}, "InstantStyle's block"


def test_outside_its_steps_it_changes_nothing_to_the_bit() -> None:
    patched = applied(model_of("sd1"), adapter_of("sd1"), start_at=1.0)
    assert torch.equal(sampled(patched), sampled(model_of("sd1")))


def test_the_model_that_came_in_is_not_changed() -> None:
    model = model_of("sd1")
    before = sampled(model)
    applied(model, adapter_of("sd1"))
    assert model.model_options == {"transformer_options": {}}
    assert torch.equal(sampled(model), before)


def test_the_adapter_that_came_in_is_not_changed() -> None:
    adapter = adapter_of("sd1", fused=True)
    before = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    patched = applied(model_of("sd1"), adapter)
    layer = SITES.sites_of(patched)[0]
    patch = patched.model_options["transformer_options"]["patches_replace"]["attn2"]
    rows = torch.zeros(2, 3, layer.widths[1], dtype=torch.bfloat16)
    options = {
        "cond_or_uncond": [UNCOND, COND],
        "n_heads": 2,
        "ipdiverse_text": torch.zeros(2, 5, layer.widths[0], dtype=torch.bfloat16),
        "sigmas": torch.ones(1),
    }
    with torch.no_grad():
        found = patch[key_of(layer)](rows, rows, rows, options)
    assert found.dtype == torch.bfloat16, "it computes as the model does"
    after = adapter.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def stock_latents(pipe: Any, **sizes: int) -> torch.Tensor:
    """What a pipeline of diffusers draws of the nodes' prompts and noise."""
    return pipe(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=3,
        guidance_scale=GUIDANCE,
        num_images_per_prompt=2,
        latents=noise(),
        output_type="latent",
        **sizes,
    ).images


def test_two_adapters_add_up() -> None:
    one, two = adapter_of("sd1"), models.adapter("plus", pipeline("sd1").unet, seed=11)
    both = sampled(applied(applied(model_of("sd1"), one), two, image=image(4)))
    pipe = pipeline("sd1")
    with torch.no_grad():
        pooled = clip_vision().encode_image(image()).image_embeds
        states = clip_vision().encode_image(image(4)).penultimate_hidden_states
    with attach(pipe, one, two) as prompt:
        prompt.set_reference(Reference(embeds=[pooled]), adapter=0)
        prompt.set_reference(Reference(embeds=[states]), adapter=1)
        prompt.set_scale(0.8)
        expected = stock_latents(pipe)
    assert_close(both, expected)


def test_a_patch_of_others_is_called_inside() -> None:
    model = model_of("sd1")
    called = []

    def theirs(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        called.append(options["block"])
        return comfyui.optimized_attention(q, k, v, options["n_heads"])

    model.set_model_attn2_replace(theirs, "middle", 0)
    found = sampled(applied(model, adapter_of("sd1")), steps=1)
    assert called == [("middle", 0)]
    assert torch.equal(found, sampled(applied(model_of("sd1"), adapter_of("sd1")), steps=1))


def test_an_attention_that_was_chosen_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def attention(*args: Any, **options: Any) -> Tensor:
        given.append(options)
        return comfyui.optimized_attention(*args)

    monkeypatch.setattr(
        sys.modules["comfy.ldm.modules.attention"], "optimized_attention", attention
    )
    patched = applied(model_of("sd1"), adapter_of("sd1"))
    sampled(patched, steps=1)
    assert given
    assert not any("transformer_options" in options for options in given)
    patched.model_options["transformer_options"]["optimized_attention_override"] = print
    sampled(patched, steps=1)
    assert given[-1]["transformer_options"]["optimized_attention_override"] is print


# --- the dial --------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_diversity_0_is_stock_ip_adapter(fused: bool) -> None:
    adapter = adapter_of("sd1", fused=fused)
    found = sampled(applied(model_of("sd1"), adapter, diversity=turned(adapter, 0.0)))
    adapter.fusion = None
    assert torch.equal(found, sampled(applied(model_of("sd1"), adapter)))


@pytest.mark.parametrize(
    "on",
    [
        {"interpolation": 0.5},
        {"cads": 0.4},
        {"drop": 0.5},
        {"late_layout": 0.5},
        {"fusion_strength": 0.5},
        {"interval": (0.0, 4.0)},
        {"interval": (0.2, 6.0), "cads": 0.3, "drop": 0.25, "fusion_strength": 1.5},
    ],
    ids=", ".join,
)
def test_levers_do_what_they_do_in_a_pipeline(on: dict[str, Any], rivals: None) -> None:
    """The same seeds, so the same images, lever by lever."""
    levers = Levers(**on)
    adapter = adapter_of("sd1", "plus", fused=True)
    torch.manual_seed(9)
    remember_base_weights(adapter, models.adapter("plus", pipeline("sd1").unet, seed=8))
    setting, words = PROMPTING.Setting(levers, 5), {"prompts": prompts()}
    found = sampled(applied(model_of("sd1"), adapter, diversity=setting, **words), steps=4)
    assert_close(found, in_diffusers(adapter, steps=4, levers=levers), 3e-4)
    without = sampled(applied(model_of("sd1"), adapter, **words), steps=4)
    assert (found - without).abs().max() > 1e-3, "it acts"


def test_diversity_0_is_the_adapter_it_went_on_from() -> None:
    adapter = adapter_of("sd1", fused=True)
    plain = models.adapter("base", pipeline("sd1").unet, seed=8)
    remember_base_weights(adapter, plain)
    found = sampled(applied(model_of("sd1"), adapter, diversity=turned(adapter, 0.0)))
    assert torch.equal(found, sampled(applied(model_of("sd1"), plain)))


def test_the_default_path_acts_and_repeats() -> None:
    adapter = adapter_of("sd1")
    drawn = [
        sampled(applied(model_of("sd1"), adapter, diversity=turned(adapter, setting, seed=seed)))
        for setting, seed in ((0.5, 1), (0.5, 1), (0.5, 2), (1.0, 1))
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert (drawn[0] - drawn[2]).abs().max() > 1e-3
    assert (drawn[0] - drawn[3]).abs().max() > 1e-3


def test_an_adapters_own_path_is_taken(caplog: pytest.LogCaptureFixture, rivals: None) -> None:
    adapter = adapter_of("sd1")
    last = Levers(cads=0.8, remove_stated=1.0, image_guidance=2.0)
    adapter.spec["dial"] = Dial(((0.0, OFF), (1.0, last)), "by hand").as_spec()
    with caplog.at_level(logging.WARNING):
        setting = turned(adapter, 1.0)
    assert setting.levers == Levers(cads=0.8)
    for name in ("remove_stated", "image_guidance"):
        assert name in caplog.text, "what is left out is said"


# --- faces -----------------------------------------------------------------------------------


def found_faces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """insightface with its models: the upper left pixel tells whose face it is."""

    class FaceAnalysis:
        def __init__(self, name: str, root: str) -> None:
            assert (name, root) == ("buffalo_l", str(tmp_path / "models" / "insightface"))

        def prepare(self, **_: Any) -> None:
            pass

        def get(self, pixels: Any) -> list[Any]:
            embedding = models.face(int(pixels[0, 0, 0]))[0].numpy()
            return [types.SimpleNamespace(bbox=[0, 0, 9, 9], normed_embedding=embedding)]

    app: Any = types.ModuleType("insightface.app")
    app.FaceAnalysis = FaceAnalysis
    monkeypatch.setitem(sys.modules, "insightface", types.ModuleType("insightface"))
    monkeypatch.setitem(sys.modules, "insightface.app", app)


@pytest.mark.parametrize("kind", ["faceid", "faceid-plus", "faceid-plus-v2"])
@pytest.mark.parametrize("architecture", ["sd1", "sdxl"])
def test_faces_and_the_lora_in_their_file_act_as_in_a_pipeline(
    architecture: str, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found_faces(monkeypatch, tmp_path)
    folders(tmp_path)
    pipe, photos = pipeline(architecture), image(2, count=2)
    adapter, vision = models.adapter(kind, pipe.unet, lora_rank=2), clip_vision()
    encoder = None if kind == "faceid" else vision
    with torch.inference_mode():
        embeds = NODES["IpdiverseEncodeFaces"]().encode(adapter, photos, encoder)
        (patched,) = NODES["IpdiverseApplyEmbeds"]().apply(
            model_of(architecture), adapter, *embeds, **DEFAULTS
        )
        states = vision.encode_image(photos)["penultimate_hidden_states"]
    faces = torch.cat([models.face(round(float(one[0, 0, 2]) * 255)) for one in photos])
    given = [faces] if kind == "faceid" else [faces, states.clone()]
    found = sampled(patched, architecture)
    with attach(pipe, copy.deepcopy(adapter)) as prompt:
        prompt.set_reference(Reference(embeds=given))
        prompt.set_scale(0.8)
        sizes = {"height": 64, "width": 64} if architecture == "sdxl" else {}
        expected = stock_latents(pipe, **sizes)
    assert_close(found, expected)
    without = patched.clone()
    without.patches = {}
    assert_differ(found, sampled(without, architecture))


def test_faces_that_cannot_be_read_are_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    encode, unet = NODES["IpdiverseEncodeFaces"]().encode, pipeline("sd1").unet
    alone, both = models.adapter("faceid", unet), models.adapter("faceid-plus", unet)
    monkeypatch.setitem(sys.modules, "insightface", None)
    with pytest.raises(ModelError, match=r"insightface: is not installed in Comfy.*pip install"):
        encode(alone, image())
    found_faces(monkeypatch, tmp_path)
    folders(tmp_path)
    with pytest.raises(ModelError, match=r"a base adapter: reads images, not faces.*Encode images"):
        encode(adapter_of("sd1"), image())
    with pytest.raises(ModelError, match="a faceid-plus adapter: reads images too"):
        encode(both, image())
    apply, embeds = NODES["IpdiverseApplyEmbeds"]().apply, encode(alone, image())
    with pytest.raises(ModelError, match=r"a faceid-plus.* cannot read them.*face of width 32 and"):
        apply(model_of("sd1"), both, *embeds, **DEFAULTS)
    with pytest.raises(ModelError, match="a plus adapter cannot read them"):
        apply(model_of("sd1"), adapter_of("sd1", "plus"), *embeds, **DEFAULTS)
    embeds = encode(both, image(), clip_vision())
    with pytest.raises(ModelError, match=r"a plus adapter cannot.*found embeddings of FaceID-Plus"):
        apply(model_of("sd1"), adapter_of("sd1", "plus"), *embeds, **DEFAULTS)


# --- what cannot be --------------------------------------------------------------------------


def test_what_does_not_fit_is_one_line() -> None:
    sd1, faces = adapter_of("sd1"), models.adapter("faceid", pipeline("sd1").unet)
    cases: list[tuple[Any, ImagePromptAdapter, dict[str, Any], str]] = [
        (
            model_of("sdxl"),
            sd1,
            {},
            r"layer 1 does not fit this model; expected \(tokens, hidden\)",
        ),
        (model_of("sd1"), faces, {}, "a faceid adapter: reads faces, which these nodes do not"),
        (model_of("sd1"), sd1, {"start_at": 2.0}, "start_at: is out of range"),
        (type("Flux", (), {"model": object()})(), sd1, {}, "model: has no UNet"),
    ]
    for model, adapter, changes, message in cases:
        with pytest.raises(IpdiverseError, match=message) as said:
            applied(model, adapter, **changes)
        assert "\n" not in str(said.value)
    wide = comfyui.ClipVision(pipeline("sd1").image_encoder)
    wide.encode_image = lambda _: {"image_embeds": torch.zeros(1, 7)}  # type: ignore[assignment]
    with pytest.raises(ModelError, match=r"does not fit this CLIP vision model; .* width 7"):
        applied(model_of("sd1"), sd1, clip_vision=wide)


# --- progress: by the noise level, over the whole schedule -----------------------------------


def in_parts(patcher: Any, steps: int, at: int) -> Tensor:
    """As two advanced samplers draw, each with its part of the steps."""
    scheduler = copy.deepcopy(pipeline("sd1").scheduler)
    scheduler.set_timesteps(steps)
    latents = noise() * scheduler.init_noise_sigma
    with torch.inference_mode():
        for part in (scheduler.sigmas[: at + 1], scheduler.sigmas[at:]):
            latents = comfyui.sample(patcher, *conds("sd1"), GUIDANCE, latents, part)
    return latents


@pytest.mark.parametrize("changes", [{"start_at": 0.3, "end_at": 0.6}, {"cads": 0.5}, {}])
def test_two_samplers_of_two_steps_are_one_of_four(changes: dict[str, Any]) -> None:
    if levers := {name: changes.pop(name) for name in ("cads",) if name in changes}:
        changes["diversity"] = PROMPTING.Setting(Levers(**levers), 5)
    patched = applied(model_of("sd1"), adapter_of("sd1"), **changes)
    assert_close(in_parts(patched, 4, 2), sampled(patched, steps=4), 1e-5)


def test_progress_is_told_by_the_noise_level() -> None:
    sampling = comfyui.BaseModel(pipeline("sd1").unet, pipeline("sd1").scheduler).model_sampling
    schedule = SCHEDULE.Schedule(sampling, 0.25, 0.5)
    found = []
    for share in (0.25, 0.5, 0.75):
        options = {"sigmas": torch.tensor([sampling.percent_to_sigma(share)])}
        assert schedule.progress(options) == pytest.approx(share, abs=1e-4)
        found.append(schedule.acts({"sigmas": options["sigmas"].double()}))
    assert found == [True, True, False], "both ends included, as in ComfyUI's own nodes"
    assert schedule.progress({"sigmas": sampling.sigma_max[None]}) == 0
    assert schedule.progress({"sigmas": torch.tensor([0.0])}) == 1


# --- inputs ----------------------------------------------------------------------------------


def test_no_image_is_zeros_or_a_black_picture() -> None:
    base, plus = adapter_of("sd1"), adapter_of("sd1", "plus")
    drawn = {
        (name, no): sampled(applied(model_of("sd1"), adapter, no_image=no), steps=1)
        for name, adapter in (("base", base), ("plus", plus))
        for no in INPUTS.NO_IMAGE
    }
    assert torch.equal(drawn["base", "zeros"], drawn["base", "black"])
    assert_differ(drawn["plus", "zeros"], drawn["plus", "black"])
    black = torch.zeros(1, 40, 40, 3)
    same = sampled(applied(model_of("sd1"), plus, negative_image=black), steps=1)
    assert_close(drawn["plus", "black"], same, 1e-6)


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_embeddings_are_what_images_become(kind: str) -> None:
    adapter = adapter_of("sd1", kind)
    encode, apply = NODES["IpdiverseEncodeImages"](), NODES["IpdiverseApplyEmbeds"]()
    embeds = encode.encode(adapter, clip_vision(), image())
    (patched,) = apply.apply(model_of("sd1"), adapter, *embeds, *DEFAULTS.values())
    assert torch.equal(sampled(patched), sampled(applied(model_of("sd1"), adapter)))
    other = adapter_of("sd1", "plus" if kind == "base" else "base")
    with pytest.raises(ModelError, match=f"embeddings: a {other.kind} adapter cannot read them"):
        apply.apply(model_of("sd1"), other, *embeds, *DEFAULTS.values())


def test_several_images_become_one_reference() -> None:
    one, other = torch.rand(2, 1, 6, generator=torch.Generator().manual_seed(1))
    both = torch.cat([one, other])
    expected = {
        "concat": both,
        "average": (one + other) / 2,
        "subtract": one - other,
        "add": one + other,
        "norm average": (one + other) / 2 / both.norm(dim=0),
    }
    assert expected.keys() == set(INPUTS.COMBINE)
    for how, wanted in expected.items():
        torch.testing.assert_close(INPUTS.combined(both, how), wanted)
        assert torch.equal(INPUTS.combined(one, how), one), "one image is one reference"


def test_a_mask_says_where_the_image_acts() -> None:
    adapter, model = adapter_of("sd1"), model_of("sd1")
    everywhere = applied(model, adapter, attn_mask=torch.ones(1, 16, 16))
    nowhere = applied(model, adapter, attn_mask=torch.zeros(16, 16))
    assert_close(sampled(everywhere), sampled(applied(model, adapter)), 1e-6)
    assert torch.equal(sampled(nowhere), sampled(model))
    # a mask for each image of the batch
    each = torch.stack([torch.ones(16, 16), torch.zeros(16, 16)])
    found = sampled(applied(model, adapter, attn_mask=each))
    assert_close(found[0], sampled(applied(model, adapter))[0], 1e-6)
    assert torch.equal(found[1], sampled(model)[1])


def test_half_a_mask_acts_in_half_of_a_layers_pixels() -> None:
    mask = torch.zeros(1, 16, 16)
    mask[:, :, :8] = 1
    adapter = adapter_of("sd1")
    patched = applied(model_of("sd1"), adapter, attn_mask=mask)
    site = SITES.sites_of(patched)[0]
    patch = patched.model_options["transformer_options"]["patches_replace"]["attn2"][key_of(site)]
    rows = torch.randn(2, 256, site.widths[1], generator=torch.Generator().manual_seed(0))
    options = {
        "cond_or_uncond": [UNCOND, COND],
        "n_heads": 2,
        "ipdiverse_text": torch.zeros(2, 5, site.widths[0]),
        "sigmas": torch.ones(1),
        "original_shape": [2, 4, 16, 16],
    }
    with torch.no_grad():
        changed = (patch(rows, rows, rows, options) - patch.attend(rows, rows, rows, options)) != 0
    acts = changed.any(-1).unflatten(1, (16, 16)).all(1)
    assert acts.tolist() == [[True] * 8 + [False] * 8] * 2


@pytest.mark.parametrize("preset", ["style transfer precise", "composition precise"])
def test_layers_that_lead_away_do_so_however_rows_are_batched(preset: str) -> None:
    patched = applied(model_of("sd1"), adapter_of("sd1"), preset=preset)
    assert_close(sampled(patched, together=False), sampled(patched, together=True), 1e-5)


# --- beside ComfyUI_IPAdapter_plus ------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["sd1", "sdxl"])
def test_that_packs_node_adds_to_ours_and_leaves_our_model_alone(architecture: str) -> None:
    """It adds to a patch that it finds under its key, if that has the method `add`."""
    mine = applied(model_of(architecture), adapter_of(architecture))
    alone = sampled(mine, architecture)
    later, called = mine.clone(), []
    theirs = {"sdxl": ("output", 3, 1), "sd1": ("output", 4)}[architecture]
    patch = later.model_options["transformer_options"]["patches_replace"]["attn2"][theirs]

    def callback(
        out: Tensor, q: Tensor, k: Tensor, v: Tensor, options: Any, **given: Any
    ) -> Tensor:
        called.append(given["weight"])
        return out

    patch.add(callback, weight=0.5, sigma_start=1.5, sigma_end=0.0)
    assert not torch.equal(sampled(later, architecture), alone)
    assert called
    assert len(called) < 3 * 2, "only in its range of noise levels"
    assert torch.equal(sampled(mine, architecture), alone), "the model before it is as it was"


# --- scenes ----------------------------------------------------------------------------------


def space_of(adapter: ImagePromptAdapter, width: int = 8, keys: str = "image") -> VariationSpace:
    """A random one, whose scenes are found by embeddings of a width."""
    source = torch.Generator().manual_seed(8)
    tokens = adapter.image_proj.num_tokens
    assert tokens is not None
    size = tokens * adapter.token_width

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source)

    directions, scene = torch.linalg.qr(drawn(size, 6)).Q, torch.linalg.qr(drawn(6, 3)).Q
    bank = SceneBank(3 * drawn(100, 6), normalize(drawn(100, 4), dim=-1), ("",) * 100)
    spec = {"projection": projection_hash(adapter), "keys": keys, "adapter": "tiny"}
    parts = (torch.zeros(size), directions, torch.ones(6), scene, bank, drawn(2, width))
    return VariationSpace(*parts, drawn(width, 4), spec)


def test_every_image_has_a_scene_of_its_own_as_in_a_pipeline() -> None:
    adapter = adapter_of("sd1")
    space, levers = space_of(adapter), Levers(recombine=0.7)
    setting = PROMPTING.Setting(levers, 5, space)
    found = sampled(applied(model_of("sd1"), adapter, diversity=setting))
    # any scene fits, as there is no prompt: this base has no text encoder in CLIP's image space
    keyless = replace(space, bank=replace(space.bank, keys=torch.zeros(100, 0)))
    assert_close(found, in_diffusers(adapter, levers=levers, space=keyless))
    plain = sampled(applied(model_of("sd1"), adapter))
    assert_differ(found[0], plain[0])
    assert_differ(found[1], plain[1])


def test_scenes_fit_the_prompt_and_differ_between_images() -> None:
    adapter = adapter_of("sd1")
    space = space_of(adapter)
    given = prompts()
    scenes = SCENES.Scenes(space, given)
    fit, share = space.bank.candidates(space.keys_of(given.pooled, prompts=True))
    assert len(fit) < len(space.bank)
    tokens = torch.zeros(8, 1, adapter.image_proj.num_tokens, adapter.token_width)
    drawn = space.reduce(scenes.recombined(tokens, 1.0, (), range(8)))[:, 0] @ space.scene
    those = space.bank.scenes[fit] @ space.scene
    assert torch.cdist(drawn, those).min(1).values.max() < 1e-4, "of those that fit"
    assert len({tuple(row.tolist()) for row in drawn.round(decimals=3)}) > 1
    assert share == scenes.share == 1.0


def test_the_dial_draws_scenes_where_there_is_a_space(caplog: pytest.LogCaptureFixture) -> None:
    adapter = adapter_of("sd1")
    space = space_of(adapter)
    levers = turned(adapter, 0.5, space=space).levers
    assert levers == default_dial(fused=False, has_space=True).at(0.5)
    assert levers.recombine
    assert turned(adapter, 0.5).levers.recombine == 0
    adapter.spec["dial"] = Dial(((0.0, OFF), (1.0, Levers(cads=0.5))), "by hand").as_spec()
    with caplog.at_level(logging.WARNING):
        turned(adapter, 1.0, space=space)
    assert "this adapter's dial does not use a variation space" in caplog.text


def test_scenes_of_ones_own_are_those_of_the_pictures() -> None:
    adapter = adapter_of("sd1")
    pictures = torch.cat([image(3), image(4), image(5)])
    for keys, width in (("image", models.CLIP_DIM), ("caption", 8)):
        space = space_of(adapter, width, keys)
        (made,) = NODES["IpdiverseScenes"]().read(space, adapter, clip_vision(), pictures)
        with torch.no_grad():
            tokens = adapter.tokens(clip_vision().encode_image(pictures[1:2]).image_embeds)
        torch.testing.assert_close(made.bank.scenes[1:2], space.reduce(tokens))
        assert made.bank.keys.shape == (3, 4 if keys == "image" else 0)


def test_spaces_are_opened_and_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    folder = folders(tmp_path) / "ipdiverse_spaces"
    adapter, node = adapter_of("sd1"), NODES["IpdiverseLoadSpace"]()
    space = space_of(adapter)
    save_space(space, folder / "mine.safetensors")
    choices = node.INPUT_TYPES()["required"]["space_name"][0]
    assert choices == ["the adapter's own", "mine.safetensors"]
    (opened,) = node.load(adapter, "mine.safetensors")
    assert opened.sha256 == space.sha256
    scenes, other = NODES["IpdiverseScenes"](), models.adapter("base", pipeline("sd1").unet, seed=9)
    wide = PROMPTING.Setting(Levers(recombine=1.0), 5, space_of(adapter, 9))
    for call, message in (
        (lambda: node.load(other, "mine.safetensors"), "mine.safetensors: was fitted on another"),
        (lambda: node.load(adapter, choices[0]), "a base adapter: comes without a variation space"),
        (lambda: turned(other, 0.5, space=space), "space: was fitted on another adapter's"),
        (
            lambda: scenes.read(space, adapter, clip_vision(), image()),
            "scenes: hold too little to vary",
        ),
        (
            lambda: applied(model_of("sd1"), adapter, diversity=wide, prompts=prompts()),
            "space: finds scenes with another text encoder .* width 9; found width 8",
        ),
    ):
        with pytest.raises(IpdiverseError, match=message) as said:
            call()
        assert "\n" not in str(said.value)


# --- finding models --------------------------------------------------------------------------


def test_what_fits_is_found_by_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Any = types.ModuleType("comfy.clip_vision")
    opened.load = lambda file: ("opened", file)
    monkeypatch.setitem(sys.modules, "comfy.clip_vision", opened)
    monkeypatch.setattr(sys.modules["comfy"], "clip_vision", opened, raising=False)
    folder, node = folders(tmp_path), NODES["IpdiverseFindModels"]()
    with pytest.raises(ModelError, match=r"models/ipadapter: holds no such .* kind base, 16 l"):
        node.find(model_of("sd1"), "base")
    (folder / "ipadapter/a.txt").write_text("no adapter")
    for name, architecture, kind in (
        ("b", "sdxl", "base"),
        ("c", "sd1", "plus"),
        ("d", "sd1", "base"),
    ):
        file = folder / f"ipadapter/{name}.safetensors"
        save_adapter(adapter_of(architecture, kind), file, {"is": name}, torch.float32)
    with pytest.raises(ModelError, match=r"models/clip_vision: holds no image encoder .* width 48"):
        node.find(model_of("sd1"), "base")
    (folder / "clip_vision/a.bin").write_bytes(b"no tensors")
    for name, width in (("b", 7), ("c", models.CLIP_DIM)):
        shapes = {
            "visual_projection.weight": torch.zeros(width, 5),
            "vision_model.embeddings.class_embedding": torch.zeros(models.CLIP_WIDTH),
        }
        save_file(shapes, folder / f"clip_vision/{name}.safetensors")
    found = node.find(model_of("sd1"), "base")
    assert found[0].spec["is"] == "d"
    assert found[1] == ("opened", str(folder / "clip_vision/c.safetensors"))
    plus = node.find(model_of("sd1"), "plus")
    assert (plus[0].spec["is"], plus[1][1][-13:]) == ("c", "b.safetensors")


# --- words -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ({"l": [[8, 1, 2, 9, 9, 9]]}, "1111.."),  # padded with the mark of the end
        ({"g": [[8, 1, 2, 9, 0, 0]]}, "1111.."),  # padded with 0
        ({"g": [[8, 9, 0, 0, 0, 0]], "l": [[8, 9, 9, 9, 9, 9]]}, "11...."),
        ({"l": [[8, 1, 2, 3, 4, 9]]}, "111111"),  # full
        ({"h": [[8, 1, 2, 3, 4, 9]]}, "111111"),
        ({"l": [[8, 1, 2, 3, 4, 9], [8, 1, 9, 9, 9, 9]]}, "111111111..."),
    ],
)
def test_words_are_told_from_padding(chunks: dict[str, list[list[int]]], expected: str) -> None:
    class Fixed:
        def tokenize(self, text: str) -> Any:
            return {k: [[(i, 1.0) for i in c] for c in part] for k, part in chunks.items()}

    assert "".join(".1"[int(one)] for one in INPUTS.word_mask(Fixed(), "")) == expected


def test_the_readme_says_of_every_lever_what_becomes_of_it() -> None:
    lines = (comfyui.FOLDER / "README.md").read_text().splitlines()
    table = " ".join(line for line in lines if line.startswith("| `"))
    assert not {name for name in LEVERS if f"`{name}`" not in table}


# --- examples --------------------------------------------------------------------------------

WIDGETS = ("FLOAT", "INT", "STRING")
EXAMPLES = sorted((comfyui.FOLDER / "examples").glob("*_api.json"))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_for_the_page_is_its_workflow_of_the_api(file: Path, tmp_path: Path) -> None:
    folders(tmp_path)
    api = json.loads(file.read_text())
    page = json.loads(file.with_name(file.name.replace("_api", "")).read_text())
    links = {link[0]: [str(link[1]), link[2]] for link in page["links"]}
    assert {str(one["id"]): one["type"] for one in page["nodes"]} == {
        name: one["class_type"] for name, one in api.items()
    }
    for one in page["nodes"]:
        given = api[str(one["id"])]["inputs"]
        linked = {part["name"]: links[part["link"]] for part in one["inputs"] if part["link"]}
        assert linked == {name: value for name, value in given.items() if isinstance(value, list)}
        written = [value for value in given.values() if not isinstance(value, list)]
        assert not [value for value in written if value not in one["widgets_values"]]
        if one["type"] not in NODES:
            continue
        node = NODES[one["type"]]
        taken = {k: v for part in node.INPUT_TYPES().values() for k, v in part.items()}
        assert given.keys() <= taken.keys()
        assert set(node.INPUT_TYPES()["required"]) <= given.keys()
        # the page fills widgets by their order: a seed is followed by what becomes of it
        boxes = [k for k, v in taken.items() if isinstance(v[0], list) or v[0] in WIDGETS]
        values = [value for value in one["widgets_values"] if value != "fixed"]
        assert values == [given[name] for name in boxes]
        wires = [(part["name"], part["type"]) for part in one["inputs"]]
        assert wires == [(k, v[0]) for k, v in taken.items() if k not in boxes]
        assert [part["type"] for part in one["outputs"]] == list(node.RETURN_TYPES)


def test_the_picture_holds_its_workflow() -> None:
    folder = comfyui.FOLDER / "examples"
    with Image.open(folder / "variety.png") as picture:
        told = dict(picture.info)
    for key, name in (("workflow", "variety.json"), ("prompt", "variety_api.json")):
        assert json.loads(told[key]) == json.loads((folder / name).read_text())
