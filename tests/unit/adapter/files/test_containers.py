from __future__ import annotations

import json
import os
import pickle
import random
import re
import resource
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch._utils import _rebuild_tensor_v2

from ipdiverse.adapter.files import containers
from ipdiverse.adapter.files.containers import open_checkpoint
from ipdiverse.errors import CheckpointError
from tests.checkpoint_files import assert_equal

TENSORS = {
    "image_proj.weight": torch.arange(7.0),
    "image_proj.half": torch.ones(3, 5, dtype=torch.float16),
    "ip_adapter.1.to_k_ip.weight": torch.eye(4, dtype=torch.bfloat16),
}
NESTED = {
    "image_proj": {"weight": TENSORS["image_proj.weight"], "half": TENSORS["image_proj.half"]},
    "ip_adapter": {"1.to_k_ip.weight": TENSORS["ip_adapter.1.to_k_ip.weight"]},
}
CONTAINERS = ("safetensors", "torch zip", "torch legacy")


def write(container: str, file: Path, content: Any = NESTED) -> Path:
    if container == "safetensors":
        save_file(TENSORS, file, {"a": "b"})
    else:
        torch.save(content, file, _use_new_zipfile_serialization=container == "torch zip")
    return file


def refused(file: Path, message: str) -> None:
    """One line, and at once."""
    start = time.process_time()
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(file)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)
    assert time.process_time() - start < 2


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", ["a.safetensors", "a.bin", "a"])
def test_content_tells_what_a_file_is_not_its_name(
    container: str, name: str, tmp_path: Path
) -> None:
    contents = open_checkpoint(write(container, tmp_path / name))
    assert contents.container == container
    assert contents.size == (tmp_path / name).stat().st_size
    assert_equal(contents.tensors, TENSORS)
    assert contents.metadata == ({"a": "b"} if container == "safetensors" else {})


def test_parameters_and_state_dicts_are_tensors(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 3)
    torch.save({"a": layer.state_dict(), "b": layer.weight}, tmp_path / "a.bin")
    found = open_checkpoint(tmp_path / "a.bin").tensors
    assert found.keys() == {"a.weight", "a.bias", "b"}
    assert not found["b"].requires_grad


@pytest.mark.parametrize("container", CONTAINERS)
def test_truncated_files_are_one_line(container: str, tmp_path: Path) -> None:
    whole = write(container, tmp_path / "whole").read_bytes()
    file = tmp_path / "cut"
    for length in {9, 64, *range(100, len(whole), len(whole) // 12), len(whole) - 1}:
        file.write_bytes(whole[:length])
        refused(file, "is a broken|claims more than it holds|is not a safetensors file")


@pytest.mark.parametrize("container", CONTAINERS)
def test_flipped_bytes_load_or_are_one_error(container: str, tmp_path: Path) -> None:
    whole = write(container, tmp_path / "whole").read_bytes()
    file, dice = tmp_path / "flipped", random.Random(3)
    for _ in range(80):
        data = bytearray(whole)
        data[dice.randrange(len(data))] = dice.randrange(256)
        file.write_bytes(data)
        assert "\n" not in complaint(file)


def complaint(file: Path) -> str:
    """Empty when the file opens."""
    try:
        open_checkpoint(file)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a safetensors file, nor one that torch saved; found an empty file"),
        (b"not tensors at all", r"found a file that starts with b'not tensors at a'"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer. Run `git lfs"),
        (b"\n<!DOCTYPE html><html>", "found a web page. Download the file itself"),
        (b"\x89PNG\r\n\x1a\n" + bytes(80), "is not a safetensors file"),
    ],
)
def test_other_files_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    refused(tmp_path / "a.bin", message)


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "gone.bin", r"gone\.bin: no such file\. Check the path")
    refused(tmp_path, "no such file")


@pytest.mark.parametrize("claim", [10**18, 10**9, 300])
def test_an_absurd_header_is_refused(claim: int, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(claim.to_bytes(8, "little") + b'{"a":1}' + bytes(100))
    refused(file, rf"claims more than it holds; expected a header of at most 107.* found {claim}")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4 * 10**12]},
        {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        [],
    ],
)
def test_safetensors_that_lie_about_tensors_are_refused(entry: Any, tmp_path: Path) -> None:
    header = json.dumps({"a": entry}).encode()
    file = tmp_path / "a.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refused(file, "is a broken safetensors file")


class Code:
    """Runs a command when unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


class Huge:
    """Allocates when unpickled; torch itself allows it."""

    def __init__(self, size: int = 10**11) -> None:
        self.size = size

    def __reduce__(self) -> Any:
        return bytearray, (self.size,)


@pytest.mark.parametrize("container", ["torch zip", "torch legacy", 2, 4])
def test_code_is_named_and_not_run(container: str | int, tmp_path: Path) -> None:
    file, marker = tmp_path / "evil.bin", tmp_path / "it-ran"
    content = {"image_proj": {"weight": torch.zeros(2), "x": Code(f"touch {marker}")}}
    if isinstance(container, int):
        file.write_bytes(pickle.dumps(content["image_proj"]["x"], protocol=container))
    else:
        write(container, file, content)
    refused(file, r"asks for more than tensors, which is never opened.*`(posix|nt)\.system`\. Get")
    assert not marker.exists()


@pytest.mark.parametrize("container", ["torch zip", "torch legacy"])
def test_what_torch_would_allocate_is_refused(container: str, tmp_path: Path) -> None:
    refused(write(container, tmp_path / "a.bin", {"a": Huge()}), r"found `\w+\.bytearray`")


@pytest.mark.parametrize("container", ["torch zip", "torch legacy"])
def test_other_leaves_are_named(container: str, tmp_path: Path) -> None:
    content = {"image_proj": {"a": torch.zeros(1)}, "epoch": 3, "note": "x", "list": [1]}
    file = write(container, tmp_path / "a.bin", content)
    refused(file, r"holds more than tensors; expected dicts of tensors; found .*epoch \(int\)")
    refused(write(container, file, [torch.zeros(1)]), r"found the content \(list\)")
    refused(write(container, file, {3: torch.zeros(1)}), "a key that is not a tensor's name.*int")
    refused(
        write(container, file, {"k" * 400: torch.zeros(1)}), "at most 300 characters; found 400"
    )


@pytest.mark.parametrize("shape", ["itself", "laughs", "empty"])
def test_dicts_without_end_are_refused(shape: str, tmp_path: Path) -> None:
    content: Any = {}
    if shape == "itself":
        content["a"] = content
    else:
        inner: Any = torch.zeros(1) if shape == "laughs" else {}
        for _ in range(7):
            inner = {f"key{number}": inner for number in range(30)}
        content = inner
    refused(write("torch zip", tmp_path / "a.bin", content), "too many tensors|more than tensors")


class Claim:
    """Stands for a storage of any length in `claiming`."""

    def __init__(self, numel: int) -> None:
        self.numel = numel


class View:
    """A tensor of any shape on such a storage."""

    def __init__(self, claim: Claim, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.parts = (claim, 0, shape, stride, False, OrderedDict())

    def __reduce__(self) -> Any:
        return _rebuild_tensor_v2, self.parts


class Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Claim):
            return ("storage", torch.FloatStorage, "0", "cpu", obj.numel)
        return None


def claiming(file: Path, content: Any, stored: bytes = bytes(64), method: int = 0) -> Path:
    """A zip as torch writes it, with whatever claims."""
    with zipfile.ZipFile(file, "w", method) as archive:
        with archive.open("archive/data.pkl", "w") as stream:
            Pickler(stream, protocol=2).dump(content)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/data/0", stored)
    return file


def test_the_claiming_zip_is_otherwise_valid(tmp_path: Path) -> None:
    file = claiming(tmp_path / "a.bin", {"a": View(Claim(16), (4, 4), (4, 1))})
    assert torch.equal(open_checkpoint(file).tensors["a"], torch.zeros(4, 4))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (View(Claim(10**12), (10**12,), (1,)), r"claims more than it holds.* found 1000000000000"),
        (View(Claim(16), (10**6, 10**6), (0, 0)), "claims more than it holds"),
        (View(Claim(16), (10**4, 10**4), (0, 0)), "`a` claims more than the file holds"),
        (View(Claim(16), (17,), (1,)), "is a broken torch file"),
        (View(Claim(4096), (4096,), (1,)), "is a broken torch file|claims more"),
    ],
)
def test_storages_and_views_that_lie_are_refused(
    content: View, message: str, tmp_path: Path
) -> None:
    refused(claiming(tmp_path / "a.bin", {"a": content}), message)


def test_one_storage_under_very_many_names_is_refused(tmp_path: Path) -> None:
    whole = View(Claim(4096), (4096,), (1,))
    content = {f"n{number}": whole for number in range(200)}
    file = claiming(tmp_path / "a.bin", content, bytes(4 * 4096))
    refused(file, "claims more than it holds")


def test_a_central_directory_that_lies_is_refused(tmp_path: Path) -> None:
    file = write("torch zip", tmp_path / "a.bin")
    data = bytearray(file.read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 20 : entry + 28] = 2 * (0x7FFFFFF0).to_bytes(4, "little")
    file.write_bytes(data)
    refused(file, r"claims more than it holds; expected at most \d+ bytes; found 2147\d+")


def test_compressed_and_foreign_zips_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    claiming(file, {"a": View(Claim(16), (16,), (1,))}, method=zipfile.ZIP_DEFLATED)
    refused(file, "is a zip, but not one of tensors.*found compressed entries")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(file, "found 0 entries `data.pkl` among 1")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/constants.pkl", b"")
    refused(file, "found a TorchScript archive")


def test_a_legacy_storage_that_lies_is_refused_before_it_is_allocated(tmp_path: Path) -> None:
    file = write("torch legacy", tmp_path / "a.bin")
    data = file.read_bytes()
    assert data.count(b"K\x07Nt") == 1  # the length of the only storage of 7
    file.write_bytes(data.replace(b"K\x07Nt", b"J\xff\xff\xff\x7fNt"))
    refused(file, r"claims more than it holds; expected numbers from 0 .* found 2147483647")


def test_a_pickle_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "MAX_PICKLE_BYTES", 100)
    refused(write("torch zip", tmp_path / "a.bin"), "holds too many tensors; expected at most")


_LITTLE_ROOM = """
import resource, sys
from pathlib import Path
import torch
from ipdiverse.adapter.files.containers import open_checkpoint
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 400_000_000,) * 2)
try:
    bytearray(700_000_000)
    print("the limit does not hold")
except MemoryError:
    print("limited")
for file in sys.argv[1:]:
    try:
        open_checkpoint(Path(file))
        print("opened")
    except BaseException as error:
        print(error)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's own count")
def test_files_that_lie_are_refused_without_the_memory_that_they_claim(tmp_path: Path) -> None:
    """In a process that cannot take 700 MB: what is refused only after that reads otherwise."""
    claim = 175_000_000  # floats
    legacy = write("torch legacy", tmp_path / "legacy.bin")
    lie = b"J" + claim.to_bytes(4, "little") + b"Nt"
    legacy.write_bytes(legacy.read_bytes().replace(b"K\x07Nt", lie))
    cases = {
        legacy: r"claims more than it holds; expected numbers from 0 .* found 175000000",
        write("torch zip", tmp_path / "zip.bin", {"a": Huge(4 * claim)}): r"`\w+\.bytearray`",
        write("torch legacy", tmp_path / "huge.bin", {"a": Huge(4 * claim)}): r"`\w+\.bytearray`",
        claiming(tmp_path / "storage.bin", {"a": View(Claim(claim), (claim,), (1,))}): (
            r"claims more than it holds.* found 175000000"
        ),
        claiming(tmp_path / "view.bin", {"a": View(Claim(16), (claim,), (0,))}): (
            "claims more than it holds|claims more than the file holds"
        ),
    }
    header = tmp_path / "header.safetensors"
    header.write_bytes((10**9).to_bytes(8, "little") + b'{"a":1}' + bytes(100))
    cases[header] = "claims more than it holds; expected a header of at most 107"
    words = [sys.executable, "-c", _LITTLE_ROOM, *map(str, cases)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    first, *lines = done.stdout.splitlines()
    assert first == "limited"
    for line, expected in zip(lines, cases.values(), strict=True):
        assert re.search(expected, line), line


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's own count")
@pytest.mark.parametrize("container", ["safetensors", "torch zip"])
def test_weights_are_not_read_before_they_are_used(container: str, tmp_path: Path) -> None:
    length, file = 20_000_000, tmp_path / "a"
    if container == "safetensors":
        entry = {"dtype": "F32", "shape": [length], "data_offsets": [0, 4 * length]}
        header = json.dumps({"unet.weight": entry}).encode()
        with file.open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            stream.truncate(8 + len(header) + 4 * length)
    else:
        torch.save({"unet.weight": torch.zeros(length)}, file)
    before = resident()
    contents = open_checkpoint(file)
    assert contents.tensors["unet.weight"].shape == (length,)
    assert resident() - before < 20_000_000
    assert contents.tensors["unet.weight"].sum() == 0
    assert resident() - before > 60_000_000


def resident() -> int:
    """Bytes in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
