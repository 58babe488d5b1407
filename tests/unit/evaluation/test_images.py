"""What decides a study's images: settings, levers and weights, not the names of files."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ipdiverse.adapter.files.conversion import copy_with_spec
from ipdiverse.base.adapters import CRITTERS_ADAPTERS
from ipdiverse.dial import OFF, Dial, Levers
from ipdiverse.errors import DataError
from ipdiverse.evaluation import images
from ipdiverse.evaluation.images import kept, what_decides
from ipdiverse.evaluation.study import Arm

if TYPE_CHECKING:
    from pathlib import Path

PLUS = CRITTERS_ADAPTERS / "ip-adapter-plus_critters.safetensors"
DIAL = Dial(((0.0, OFF), (1.0, Levers(cads=0.2))), "made up").as_spec()


def test_a_dial_stands_for_its_levers_and_a_base_for_what_is_left_to_it(tmp_path: Path) -> None:
    adapter = tmp_path / "a.safetensors"

    def decides(spec: dict[str, Any], guidance: float = 3.0, **settings: Any) -> dict[str, Any]:
        copy_with_spec(PLUS, adapter, spec)
        return what_decides(Arm("a", "a", settings).request(10, guidance), adapter)

    turned = decides({"dial": DIAL}, diversity=0.5)
    assert turned == decides({}, cads=0.1)
    assert turned["levers"] == {"cads": 0.1}
    assert decides({}, diversity=0.5) != turned, "the default path"
    assert decides({}) == decides({}, scale=1.0, fusion_strength=1.0)
    assert decides({}, guidance=4.0) == decides({}, guidance_scale=4.0) != decides({})
    gone = what_decides(Arm("a", "a", {"diversity": 0.5}).request(10, 3.0), None)
    assert gone["levers"] is gone["adapter"] is None
    assert what_decides(Arm("a", "a", {"cads": 0.1}).request(10, 3.0), None)["levers"] == {
        "cads": 0.1
    }


def test_an_adapters_file_is_read_again_only_once_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, read = tmp_path / "a.safetensors", list[str]()
    for name in ("weights_hash", "load_adapter"):
        real = getattr(images, name)
        monkeypatch.setattr(
            images, name, lambda file, name=name, real=real: (read.append(name), real(file))[1]
        )
    copy_with_spec(PLUS, adapter, {"dial": DIAL})
    request = Arm("a", "a", {"diversity": 0.5}).request(10, 3.0)
    first = what_decides(request, adapter)
    assert what_decides(request, adapter) == first
    what_decides(replace(request, steps=11), adapter)
    assert sorted(read) == ["load_adapter", "load_adapter", "weights_hash"]
    copy_with_spec(PLUS, adapter, {})
    assert what_decides(request, adapter) != first, "another dial"


def test_a_kept_file_that_broke_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "00000.npz"
    np.savez_compressed(file, images=np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3))
    whole = file.read_bytes()
    assert kept(file).shape == (1, 4, 4, 3)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    for broken in (whole[:40], b"", bytes(flipped)):
        file.write_bytes(broken)
        with pytest.raises(DataError, match=r"00000\.npz: is broken.*Remove it"):
            kept(file)
