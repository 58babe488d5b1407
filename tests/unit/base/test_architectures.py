"""Bases that are transformers: they open, draw, and are refused in one line where they cannot."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import ipdiverse
from ipdiverse.adapter.attach.encoding import text_embeds, text_tower
from ipdiverse.base import memory, pipelines
from ipdiverse.base.memory import Device, MemoryOptions, Plan, arrange, plan_dtype, sizes_of
from ipdiverse.base.pipelines import Opening, is_transformer
from ipdiverse.base.presets import PRESETS
from ipdiverse.cli import main
from ipdiverse.provenance import generator
from ipdiverse.sampling.request import Request
from ipdiverse.sampling.sample import Job, sampled
from ipdiverse.sampling.selection import joint_text
from ipdiverse.sampling.task import Pictures, task_for
from ipdiverse.training.frozen import open_encoders
from tests import joint_models, models
from tests.acceptance.scenes import flux_controlnet, sd3_controlnet
from tests.acceptance.single_file import write_sd3_transformer

TENSORS = {"flux": joint_models.xlabs_tensors, "sd3": joint_models.sd3_tensors}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    models.picture(1).save("a.png")
    return tmp_path


def saved(name: str) -> Any:
    pipe = joint_models.pipeline(name, fresh=True)
    pipe.save_pretrained("base")
    return pipe


def generated(*more: str) -> int:
    words = ["--image", "a.png", "--base", "base", "--adapter", "ad.safetensors", "-n", "1"]
    return main(["generate", *words, "--steps", "2", "--height", "64", *more])


@pytest.mark.parametrize("name", TENSORS)
def test_a_folder_opens_and_draws_what_stock_draws(name: str, folder: Path) -> None:
    pipe = saved(name)
    base = ipdiverse.load_base("base")
    sizes: dict[str, Any] = {"width": 64, "height": 64, "steps": 2, "guidance_scale": 3.0}
    request = Request(("a.png",), ("a cat",), base="base", **sizes)
    task = task_for(base, request, Pictures({}, {}))
    (image,) = sampled(task, [Job("a cat", 0, 0)], request)
    stock = pipe(
        prompt=["a cat"],
        negative_prompt=[""],
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=[generator(0, 0)],
        width=64,
        height=64,
    ).images[0]
    drawn, expected = (np.asarray(one).astype(int) for one in (image, stock))
    assert expected.std() > 0
    # weights that were read lie elsewhere in memory, and kernels round by how they are aligned
    assert np.abs(drawn - expected).max() <= 1


@pytest.mark.parametrize("name", TENSORS)
def test_an_image_prompt_on_a_folder(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(name)
    save_file(TENSORS[name](), "ad.safetensors")
    assert generated("--width", "64", "--out", "with") == 0, capsys.readouterr().err
    assert generated("--width", "64", "--scale", "0", "--out", "without") == 0
    images = [np.asarray(Image.open(f"{out}/0000.png")) for out in ("with", "without")]
    assert images[0].std() > 0
    assert (images[0] != images[1]).any()
    assert generated("--width", "60") == 2
    assert "width: is not a multiple of 8" in capsys.readouterr().err


@pytest.mark.parametrize("name", TENSORS)
def test_a_controlnet_and_a_choice_of_candidates(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stock draws noise of no seed where SD 3's reads its picture: an image is the same again."""
    saved(name)
    save_file(TENSORS[name](), "ad.safetensors")
    scene = flux_controlnet if name == "flux" else sd3_controlnet
    scene().pipe.controlnet.save_pretrained("control")
    models.picture(2).save("b.png")
    small = ["--width", "64", "--dtype", "float32"]
    controlled = [*small, "--controlnet", "control", "--control-image", "b.png"]
    for out, more in (("plain", small), ("two", controlled), ("one", controlled)):
        count = "2" if out == "two" else "1"
        assert generated(*more, "-n", count, "--out", out) == 0, capsys.readouterr().err
    plain, two, other, one = (
        np.asarray(Image.open(f"{file}.png"))
        for file in ("plain/0000", "two/0000", "two/0001", "one/0000")
    )
    np.testing.assert_array_equal(two, one)
    assert (two != plain).any()
    assert (two != other).any()
    assert generated(*controlled, "--init-image", "b.png", "--out", "no") == 2
    assert "base: has no ControlNet with an init image. Leave one" in capsys.readouterr().err
    assert generated(*small, "-n", "2", "--candidates", "3", "--out", "chosen") == 0
    assert len(list(Path("chosen").glob("0*.png"))) == 2
    choice = [*small, "-n", "1", "--image-encoder", "siglip", "--candidates", "2"]
    if name == "sd3":  # its adapter reads states of either encoder here
        joint_models.siglip().save_pretrained("siglip")
        assert generated(*choice, "--out", "siglip-chosen") == 0, capsys.readouterr().err


def test_training_on_a_transformer_is_one_line(folder: Path) -> None:
    (folder / "base").mkdir()
    about = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (folder / "base" / "model_index.json").write_text(json.dumps(about))
    with pytest.raises(ipdiverse.IpdiverseError, match="base: cannot be trained for; expected a"):
        open_encoders("base")


def test_training_on_a_preset_with_a_transformer_offers_no_download(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--base", "sd35-large", "--data", ".", "--out", "run"]) == 2
    line = "sd35-large: cannot be trained for; expected a base with a UNet; found a transformer"
    assert capsys.readouterr().err.splitlines()[-1] == f"ipdiverse: {line}"


@pytest.mark.parametrize("kind", ["PixArtSigmaPipeline", "SanaPipeline", "HunyuanDiTPipeline"])
def test_an_unknown_architecture_is_one_line(kind: str, folder: Path) -> None:
    (folder / "base").mkdir()
    (folder / "base" / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    expected = (
        f"base: is a base of an unknown architecture; expected Stable .* Flux.1; found {kind}"
    )
    with pytest.raises(ipdiverse.IpdiverseError, match=expected):
        ipdiverse.load_base("base")


OTHERS: dict[str, dict[str, Any]] = {
    "PixArtTransformer2DModel": {"in_channels": 4, "out_channels": 8, "cross_attention_dim": 8},
    "AuraFlowTransformer2DModel": {
        "in_channels": 4,
        "out_channels": 4,
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
        "joint_attention_dim": 8,
        "caption_projection_dim": 8,
        "pos_embed_max_size": 16,
    },
}


@pytest.mark.parametrize("kind", OTHERS)
def test_attaching_to_another_transformer_names_what_is_supported(kind: str) -> None:
    import diffusers

    build: Any = getattr(diffusers, kind)
    small = {"sample_size": 8, "num_attention_heads": 2, "attention_head_dim": 4}
    layers = {} if "num_mmdit_layers" in OTHERS[kind] else {"num_layers": 1, "caption_channels": 8}
    pipe = types.SimpleNamespace(transformer=build(**small, **OTHERS[kind], **layers))
    adapter = joint_models.adapter(joint_models.xlabs_tensors())
    line = "image prompts do not know; expected a pipeline of .* or of Flux.1; found " + kind
    for attempt in (ipdiverse.attach, lambda pipe, _: ipdiverse.diversify(pipe)):
        with pytest.raises(ipdiverse.IpdiverseError, match=line):
            attempt(pipe, adapter)


def test_transformers_compute_in_bfloat16() -> None:
    assert [n for n in PRESETS if is_transformer(n)] == [
        n for n in PRESETS if n.startswith(("flux", "sd35"))
    ]
    gpu = Device("cuda", 2**35, bfloat16=True)
    assert plan_dtype(gpu, half="bfloat16") == "bfloat16"
    assert plan_dtype(gpu) == "float16"
    sizes = sizes_of(joint_models.pipeline("sd3"))
    transformer = joint_models.pipeline("sd3").transformer
    assert sizes.unet == sum(p.numel() * p.element_size() for p in transformer.parameters())
    assert sizes.pixels == 64**2


def test_the_text_half_of_an_image_encoder_is_read_if_it_is_at_hand(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SD 1.5's own text encoder is in no image encoder's space."""
    from tests.hub import write_tokenizer

    pipe = models.pipeline("sd1", fresh=True)
    assert joint_text(pipe, ["a cat"], 64) is None
    monkeypatch.setattr(pipelines, "cached", lambda file: folder / "half" / file.name)
    (folder / "half").mkdir()
    write_tokenizer(folder / "half")
    half = models.text_encoder(32, 200, projects=True)
    half.save_pretrained("half")
    clip = PRESETS["sd15"].encoder
    assert clip is not None
    pipe.image_encoder.text_half = lambda: pipelines._text_half(clip.text)
    tower = text_tower(pipe, 64)
    assert tower is not None
    assert all(
        torch.equal(a, b) for a, b in zip(half.parameters(), tower[1].parameters(), strict=True)
    )
    found = text_embeds(pipe, tower, ["a cat", "a dog"])
    assert found.shape == (2, 64)
    assert not torch.equal(found[0], found[1])
    alone = joint_text(pipe, ["a dog"], 64)
    assert alone is not None
    assert torch.equal(alone[0], found[1])
    assert text_tower(pipe, 48) is None, "of another width"
    monkeypatch.setattr(pipelines, "cached", lambda _: None)
    assert text_tower(pipe, 64) is None, "nothing is downloaded for it"


def parts_of(name: str, into: str) -> None:
    """A base's folder without the transformer's weights, as it stands beside a single file."""
    saved(name)
    Path("base").rename(into)
    for weights in Path(into, "transformer").glob("*.safetensors"):
        weights.unlink()


@pytest.mark.parametrize("name", TENSORS)
def test_a_single_file_of_a_transformer_opens_with_the_parts_beside_it(
    name: str, folder: Path
) -> None:
    """Such files hold the transformer alone; Flux' comes with diffusers' names too."""
    parts_of(name, "tuned")
    transformer = joint_models.pipeline(name).transformer
    if name == "flux":  # diffusers converts the original's names at the published width alone
        save_file(transformer.state_dict(), "tuned.safetensors")
    else:
        write_sd3_transformer(transformer, Path("tuned.safetensors"))
    assert is_transformer("tuned.safetensors")
    opened = ipdiverse.load_base("tuned.safetensors", local_files_only=True)
    stock = joint_models.pipeline(name)
    assert type(opened.pipe) is type(stock)
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        found, expected = (getattr(pipe, part).state_dict() for pipe in (opened.pipe, stock))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), part
    with pytest.raises(ipdiverse.IpdiverseError, match="cannot be trained for; expected a base"):
        open_encoders("tuned.safetensors")


@pytest.mark.parametrize(
    ("names", "preset"),
    [
        ("double_blocks.0.x guidance_in.in_layer.bias", "flux-dev"),
        ("model.diffusion_model.double_blocks.0.x", "flux-schnell"),
        ("single_transformer_blocks.0.x time_text_embed.guidance_embedder.a", "flux-dev"),
        ("joint_blocks.37.x_block.mlp.fc1.weight", "sd35-large"),
        ("joint_blocks.23.x_block.attn2.proj.weight", "sd35-medium"),
        ("model.diffusion_model.input_blocks.0.0.weight", ""),
    ],
)
def test_what_a_single_file_lacks_comes_from_the_preset_of_its_kind(
    names: str, preset: str, folder: Path
) -> None:
    save_file({name: torch.zeros(1) for name in names.split()}, "a.safetensors")
    assert is_transformer("a.safetensors") == bool(preset)
    wanted = f"{preset}: .*not in the local cache.*; found no .*/model_index.json"
    with pytest.raises(ipdiverse.IpdiverseError, match=wanted if preset else "a.safetensors"):
        ipdiverse.load_base("a.safetensors", local_files_only=True)


def test_a_repository_is_known_before_its_gigabytes_come(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def answer(repository: str, name: str, **_: Any) -> str:
        asked.append((repository, name))
        kind = "SanaPipeline" if "sana" in repository else "FluxPipeline"
        Path("found.json").write_text(json.dumps({"_class_name": kind, "transformer": ["a", "b"]}))
        return "found.json"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", answer)
    with pytest.raises(ipdiverse.IpdiverseError, match=r"unknown architecture; .*found SanaPipe"):
        ipdiverse.load_base("somebody/sana")
    with pytest.raises(ipdiverse.IpdiverseError, match="cannot be trained for"):
        open_encoders("somebody/flux")
    assert {name for _, name in asked} == {"model_index.json"}


QUANTIZED = {"int8": "torchao", "nf4": "bitsandbytes"}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantising_library_that_is_missing_is_one_line(
    kind: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "find_spec", lambda _: None)
    library = QUANTIZED[kind]
    words = ["generate", "--base", "flux-dev", "--image", "a.png", "--quantize", kind]
    assert main(words) == 2
    line = f"ipdiverse: quantize: {kind} needs {library}. pip install {library}\n"
    assert capsys.readouterr().err == line
    (folder / "base").mkdir()
    about = {"_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "x"]}
    (folder / "base" / "model_index.json").write_text(json.dumps(about))
    with pytest.raises(ipdiverse.IpdiverseError, match=f"{kind} needs {library}"):
        ipdiverse.load_base("base", memory=MemoryOptions(quantize=kind))


def test_what_cannot_be_quantised_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "find_spec", lambda _: object())
    monkeypatch.setattr(memory, "this_device", lambda: Device("cpu", 2**34))
    cases: tuple[tuple[str, Any, str], ...] = (
        ("sd15", "int8", "quantize: is for Flux.1 and Stable Diffusion 3.5; found sd15"),
        ("flux-dev", "nf4", "quantize: nf4 needs a CUDA device; found cpu"),
    )
    for base, kind, message in cases:
        with pytest.raises(ipdiverse.IpdiverseError, match=message):
            Request(("a.png",), ("a",), base=base, quantize=kind).check()


def test_four_bits_are_asked_of_diffusers_and_transformers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """bitsandbytes quantises on a GPU alone, so this looks at what it is given."""
    import diffusers
    import transformers

    version = importlib.metadata.version
    monkeypatch.setattr(
        "importlib.metadata.version",
        lambda name: "0.50.2" if name == "bitsandbytes" else version(name),
    )
    opening = Opening(True, "", True, None, "bfloat16", quantize="nf4")
    mapping = pipelines._quantization(opening).quant_mapping
    assert type(mapping["transformer"]) is diffusers.BitsAndBytesConfig
    assert type(mapping["text_encoder_2"]) is transformers.BitsAndBytesConfig
    for config in mapping.values():
        assert (config.load_in_4bit, config.bnb_4bit_quant_type) == (True, "nf4")
        assert config.bnb_4bit_compute_dtype == torch.bfloat16


@pytest.mark.parametrize("offload", ["none", "model", "sequential"])
@pytest.mark.parametrize("name", TENSORS)
def test_an_image_prompt_on_eight_bits(name: str, offload: str, folder: Path) -> None:
    pytest.importorskip("torchao")
    full, wishes = saved(name), MemoryOptions("float32", quantize="int8")
    pipe = ipdiverse.load_base("base", memory=wishes).pipe
    assert 0.2 < sizes_of(pipe).unet / sizes_of(full).unet < 0.6
    arrange(pipe, Plan("cpu", "float32", offload, False, 2**34))

    def drawn(one: Any = pipe) -> torch.Tensor:
        seeded = torch.Generator().manual_seed(3)
        given = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
        return one("a cat", generator=seeded, max_sequence_length=12, **given).images

    plain, exact = drawn(), drawn(full)
    assert 0 < float((plain - exact).abs().max()) < 0.1 * float(exact.abs().max())
    with ipdiverse.attach(pipe, joint_models.adapter(TENSORS[name]())) as attachment:
        attachment.set_reference(models.picture(1))
        assert not torch.equal(drawn(), plain)
        attachment.set_scale(0.0)
        assert torch.equal(drawn(), plain)
    assert torch.equal(drawn(), plain)


def test_transformers_are_not_imported_until_one_is_opened() -> None:
    """Modules are counted; diffusers' UNet brings its transformer models along by itself."""
    code = (
        "import sys\n"
        "if sys.argv[1] == 'ours':\n"
        "    import ipdiverse\n"
        "    from ipdiverse.base.adapters import adapter_file\n"
        "    ipdiverse.attach(ipdiverse.load_base().pipe, adapter_file('critters'))\n"
        "else:\n"
        "    from diffusers import StableDiffusionPipeline\n"
        "names = ('diffusers.models.transformers.', 'diffusers.pipelines.flux',"
        " 'diffusers.pipelines.stable_diffusion_3', 'transformers.models.t5')\n"
        "found = [name for name in sys.modules if name.startswith(names)]\n"
        "print(len(found), sum('models.transformers.' not in name for name in found))"
    )
    counts = []
    for whose in ("ours", "stock"):
        argv = [sys.executable, "-c", code, whose]
        done = subprocess.run(argv, capture_output=True, check=True, text=True)
        counts.append(tuple(map(int, done.stdout.split()[-2:])))
    (ours, pipelines_of_ours), (stock, _) = counts
    assert (ours, pipelines_of_ours) == (stock, 0)
