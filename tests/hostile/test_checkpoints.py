"""Checkpoints that claim, lie or are something else: one line each, at the cost of the file."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import pickle
import random
import resource
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

from ipdiverse.adapter.files.checkpoint import load_adapter, save_adapter
from ipdiverse.adapter.files.inspection import inspect_checkpoint
from ipdiverse.cli import main
from ipdiverse.errors import IpdiverseError
from tests.checkpoint_files import adapter, assert_equal, nested, tensors_of

if TYPE_CHECKING:
    from pathlib import Path

Z = torch.zeros(2, 2)
FOREIGN: dict[str, tuple[list[str], str]] = {
    "kohya LoRA": (["lora_unet_mid_block_x.lora_down.weight"], "a LoRA"),
    "diffusers LoRA": (["unet.mid_block.x.to_k.lora_A.weight"], "a LoRA"),
    "old diffusers LoRA": (["unet.x.attn1.processor.to_k_lora.down.weight"], "a LoRA"),
    "text LoRA": (["text_encoder.text_model.x.q_proj.lora_B.weight"], "a LoRA"),
    "LoKr": (["lora_unet_x.lokr_w1", "lora_unet_x.alpha"], "a LyCORIS"),
    "LoHa": (["lora_unet_x.hada_w1_a"], "a LyCORIS"),
    "ControlNet": (["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.x"], "a ControlNet"),
    "original ControlNet": (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
    "T2I-Adapter": (["adapter.body.0.resnets.0.block1.weight"], "a T2I-Adapter"),
    "SD": (["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.x"], "a whole Sta"),
    "SDXL": (["conditioner.embedders.0.x", "model.diffusion_model.x"], "a whole Stable"),
    "Flux": (["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.x"], "a whole Flux"),
    "diffusers Flux": (["single_transformer_blocks.0.attn.to_q.weight"], "a whole Flux"),
    "UNet": (["down_blocks.0.x", "time_embedding.linear_1.weight"], "a UNet"),
    "VAE": (["decoder.up_blocks.0.x", "quant_conv.weight"], "a VAE"),
    "CLIP vision": (["vision_model.embeddings.class_embedding"], "a CLIP image encoder"),
    "OpenCLIP": (["visual.conv1.weight"], "a CLIP image encoder"),
    "CLIP text": (["text_model.embeddings.token_embedding.weight"], "a text encoder"),
    "T5": (["encoder.block.0.layer.0.SelfAttention.q.weight"], "a text encoder"),
    "embedding": (["emb_params"], "a textual inversion"),
    "SDXL embedding": (["clip_l", "clip_g"], "a textual inversion"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_adapter_is_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys, expected = FOREIGN[name]
    for wrap in ("", "module."):
        file = tmp_path / "x.safetensors"
        save_file({wrap + key: Z.clone() for key in keys}, file)
        assert main(["inspect", str(file)]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert f"is {expected}" in said.err
        assert said.err.count("\n") == 1
        with pytest.raises(IpdiverseError, match=f"is {expected}.*not an adapter"):
            load_adapter(file)


STATES: dict[str, tuple[Any, str]] = {
    "random": (
        {"random_state": random.getstate(), "numpy_random_seed": np.random.get_state()},  # noqa: NPY002
        "a trainer's random state",
    ),
    "optimizer": ({"state": {0: {"exp_avg": Z}}, "param_groups": [{"lr": 1}]}, "an optimizer's"),
    "scheduler": ({"last_epoch": 3, "_last_lr": [0.1]}, "a learning rate scheduler's state"),
    "deepspeed": ({"module": None, "ds_version": "0.1", "dp_world_size": 2}, "a DeepSpeed"),
    "inversion": ({"string_to_param": {"*": Z}, "name": "x", "step": 3}, "a textual inversion"),
    "lightning": (
        {"state_dict": {"model.diffusion_model.x": Z}, "global_step": 4},
        "a whole Stable Diffusion model",
    ),
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("new", [True, False])
def test_what_trainers_pickle_is_named(name: str, new: bool, tmp_path: Path) -> None:
    content, expected = STATES[name]
    torch.save(content, tmp_path / "x.bin", _use_new_zipfile_serialization=new)
    with pytest.raises(IpdiverseError, match=f"is {expected}.*not an adapter"):
        inspect_checkpoint(tmp_path / "x.bin")


_INSPECTED = """
import sys
from ipdiverse.cli import main
*others, adapter = sys.argv[1:]
codes = [main(["inspect", file]) for file in others]
torch = "torch" in sys.modules
codes.append(main(["inspect", adapter]))
print(codes, torch, sorted({"sympy", "torch._dynamo", "diffusers"} & sys.modules.keys()))
"""


def test_what_is_no_adapter_is_said_without_torch(tmp_path: Path) -> None:
    """Importing torch takes seconds; its compiler, which a little arithmetic imports, as long."""
    files = {name: tmp_path / f"{name}.safetensors" for name in ("LoRA", "SD", "cut", "page")}
    for name in ("LoRA", "SD", "cut"):
        save_file({FOREIGN["SD" if name == "SD" else "diffusers LoRA"][0][0]: Z}, files[name])
    files["cut"].write_bytes(files["cut"].read_bytes()[:40])
    files["page"].write_bytes(b"<!doctype html>")
    pickled = {"LoRA": {FOREIGN["LoHa"][0][0]: Z}, "state": STATES["random"][0]}
    for new in (True, False):
        for name, content in pickled.items():
            files[f"{name} {new}"] = tmp_path / f"{name} {new}.bin"
            torch.save(content, files[f"{name} {new}"], _use_new_zipfile_serialization=new)
    save_adapter(adapter("plus"), tmp_path / "plus.safetensors", {})
    words = [*map(str, files.values()), str(tmp_path / "plus.safetensors")]
    done = subprocess.run(
        [sys.executable, "-c", _INSPECTED, *words], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == f"{[2] * len(files) + [0]} False []", done.stderr
    assert done.stderr.count("\n") == len(files)


PREFIXES = ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "state_dict.{}"]


@pytest.mark.parametrize("pattern", PREFIXES)
def test_wrapped_names_are_read(pattern: str, tmp_path: Path) -> None:
    expected = tensors_of(adapter("plus"))
    wrapped = {pattern.format(name): tensor for name, tensor in expected.items()}
    save_file(wrapped, tmp_path / "a.safetensors")
    assert_equal(tensors_of(load_adapter(tmp_path / "a.safetensors")), expected)
    inner = {
        name.replace("image_proj.", "image_proj._orig_mod."): t for name, t in expected.items()
    }
    torch.save({"module": nested(inner)}, tmp_path / "a.bin")
    assert_equal(tensors_of(load_adapter(tmp_path / "a.bin")), expected)
    name, tensor = next(iter(expected.items()))
    save_file(expected | {f"module.{name}": tensor.clone()}, tmp_path / "a.safetensors")
    with pytest.raises(IpdiverseError, match="holds a tensor twice"):
        load_adapter(tmp_path / "a.safetensors")


def sharded(folder: Path, tensors: dict[str, Any], shards: int = 2) -> Path:
    names = [f"model-{n + 1:05}-of-{shards:05}.safetensors" for n in range(shards)]
    where = {name: names[i % shards] for i, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({n: t for n, t in tensors.items() if where[n] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


def test_shards_are_read_by_index_by_folder_and_by_one_of_them(tmp_path: Path) -> None:
    expected = tensors_of(adapter())
    index = sharded(tmp_path, expected)
    for source in (index, tmp_path, tmp_path / "model-00002-of-00002.safetensors"):
        assert_equal(tensors_of(load_adapter(source)), expected)
    assert inspect_checkpoint(index)["container"] == "shards"


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "../x.safetensors"},
        {"a": "/etc/passwd"},
        {"a": ""},
        {"a": 3},
        {"a": None},
        [],
        3,
        {"a": "model.safetensors.index.json"},
        {"a": "gone.safetensors"},
        {str(n): f"{n}.safetensors" for n in range(100)},
        {"a": "x\0y"},
        {"a": {}},
    ],
)
def test_an_index_that_lies_is_one_line(weight_map: Any, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(IpdiverseError) as caught:
        load_adapter(index)
    assert "\n" not in str(caught.value)


def test_a_deepspeed_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")
    with pytest.raises(IpdiverseError, match=r"is a DeepSpeed checkpoint\. Run the zero_to_fp32"):
        load_adapter(tmp_path)


def header_only(file: Path, entries: dict[str, list[int]], dtype: str = "F32") -> Path:
    """A safetensors file of these shapes that takes no place on the disk."""
    width, header, end = {"F32": 4, "F16": 2}[dtype], {}, 0
    for name, shape in entries.items():
        size = width * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    told = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(told).to_bytes(8, "little") + told)
        stream.truncate(8 + len(told) + end)
    return file


PLUS = {name: list(tensor.shape) for name, tensor in tensors_of(adapter("plus")).items()}
LAYER = {n: s for n, s in PLUS.items() if n.startswith("image_proj.layers.0.")}
CLAIMS: dict[str, dict[str, list[int]]] = {
    "resampler layers": PLUS
    | {f"image_proj.layers.{n}.0.to_q.weight": [64, 64] for n in range(16_000)},
    "whole resampler layers": PLUS
    | {k.replace(".0.", f".{n}.", 1): s for n in range(1500) for k, s in LAYER.items()},
    "layers": PLUS | {f"ip_adapter.{n}.to_k_ip.weight": [32, 64] for n in range(9_000)},
    "tokens": PLUS | {"image_proj.latents": [1, 10**6, 64]},
    "17 GB": PLUS | {"ip_adapter.1.to_k_ip.weight": [4_300_000, 1000]},
    "20 GB": PLUS | {"ip_adapter.1.to_k_ip.weight": [5_000_000, 1000]},
    "20 GB elsewhere": PLUS | {"x.y": [5_000_000, 1000]},
    "20 GB of base weights": PLUS | {"base_weights.ip_adapter.1.to_k_ip.weight": [5_000_000, 1000]},
    "axes": PLUS | {"image_proj.latents": [1] * 60},
}
_LITTLE_ROOM = """
import resource, sys
from pathlib import Path
from ipdiverse.cli import main
import torch, ipdiverse.adapter.files.conversion, ipdiverse.adapter.files.inspection
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
room = sum(Path(f).stat().st_size for f in sys.argv[1:]) + 600_000_000
resource.setrlimit(resource.RLIMIT_AS, (used + room,) * 2)
for file in sys.argv[1:]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    converting = ["convert", file, "out.safetensors", "--to", "diffusers"]
    codes = [main(["inspect", file]), main(converting)]
    print(codes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("case", CLAIMS)
def test_claims_are_refused_before_modules_are_built(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: Counter[str] = Counter()
    monkeypatch.setattr(
        torch.nn.Linear, "reset_parameters", lambda self: built.update([type(self).__name__])
    )
    file = header_only(tmp_path / "a.safetensors", CLAIMS[case])
    for act in (load_adapter, inspect_checkpoint):
        with pytest.raises(IpdiverseError, match=r"claims more than any adapter has") as caught:
            act(file)
        assert "\n" not in str(caught.value)
    assert not built


@pytest.mark.slow
def test_claims_take_no_memory(tmp_path: Path) -> None:
    """In a process that has room for the files' pages and little else."""
    files = [
        str(header_only(tmp_path / f"{number}.safetensors", shapes))
        for number, shapes in enumerate(CLAIMS.values())
    ]
    words = [sys.executable, "-c", _LITTLE_ROOM, *files]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert len(lines) == len(files)
    for line in lines:
        assert line.startswith("[2, 2]")
        assert int(line.split("]")[1]) * 1024 < 300_000_000
    assert "Traceback" not in done.stderr


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_adapter(adapter(), file, {"steps": 1})
    data = bytearray(file.read_bytes())
    with safe_open(file, "pt") as opened:
        assert "ipdiverse.sha256" in opened.metadata()
    for place in (-1, -1000, -len(data) // 2):
        damaged = bytearray(data)
        damaged[place] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(IpdiverseError, match=r"weights are not those that were written|finite"):
            load_adapter(file)


def mutations(seed: int, count: int) -> list[bytes]:
    """Damaged copies of sound files of every container."""
    rng, made = random.Random(seed), []
    sources = []
    for new in (True, False):
        buffer = io.BytesIO()
        torch.save(nested(tensors_of(adapter())), buffer, _use_new_zipfile_serialization=new)
        sources.append(buffer.getvalue())
    sources += [save(tensors_of(adapter())), pickle.dumps({"a": [1]}), b"{" * 100, b""]
    for source in itertools.islice(itertools.cycle(sources), count):
        data = bytearray(source)
        for _ in range(rng.randint(1, 4)):
            kind = rng.choice(["flip", "cut", "repeat", "zero"])
            at = rng.randrange(min(len(data), rng.choice([64, 2000, len(data) or 1]) or 1) or 1)
            if kind == "cut":
                data = data[:at]
            elif kind == "repeat":
                data[at:at] = data[at : at + rng.randrange(1, 64)] * rng.randrange(1, 9)
            elif at < len(data):
                data[at] = 0 if kind == "zero" else data[at] ^ (1 << rng.randrange(8))
        made.append(bytes(data))
    return made


def damaged(folder: Path, seed: int, count: int) -> None:
    for number, data in enumerate(mutations(seed, count)):
        file = folder / f"{number}.bin"
        file.write_bytes(data)
        for act in (load_adapter, inspect_checkpoint):
            with contextlib.suppress(IpdiverseError):
                act(file)
        file.unlink()


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    damaged(tmp_path, 1, 40)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
def test_many_damaged_files_are_one_line(seed: int, tmp_path: Path) -> None:
    damaged(tmp_path, seed, 120)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 8e9
