"""A variation space: its arithmetic, its file, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ipdiverse.adapter.imagine import (
    SceneBank,
    VariationSpace,
    load_space,
    projection_hash,
    save_space,
)
from ipdiverse.errors import CheckpointError, ModelError
from ipdiverse.writing import tensors_hash
from tests import models

if TYPE_CHECKING:
    from pathlib import Path

TOKENS, WIDTH, DIRECTIONS, SCENE, BANK, KEYS = 4, 8, 6, 4, 300, 5


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def space(**changes: Any) -> VariationSpace:
    directions = torch.linalg.qr(drawn(TOKENS * WIDTH, DIRECTIONS)).Q
    scene = torch.linalg.qr(drawn(DIRECTIONS, SCENE, seed=1)).Q
    keys = torch.nn.functional.normalize(drawn(BANK, KEYS, seed=2), dim=-1)
    bank = SceneBank(
        drawn(BANK, DIRECTIONS, seed=3),
        keys,
        tuple(f"picture {number} ☃" for number in range(BANK)),
        (0.2, 0.6),
    )
    made = VariationSpace(
        drawn(TOKENS * WIDTH, seed=4),
        directions,
        torch.linspace(2, 0.5, DIRECTIONS),
        scene,
        bank,
        torch.zeros(2, 7),
        drawn(7, KEYS, seed=5),
        {"projection": "a" * 64, "tokens": [TOKENS, WIDTH], "keys": "image"},
    )
    return replace(made, **changes)


def test_strength_0_gives_back_the_very_tokens() -> None:
    tokens = drawn(2, TOKENS, WIDTH)
    assert space().recombined(tokens, drawn(2, DIRECTIONS), 0.0) is tokens


def test_the_scene_is_the_others_and_the_subject_stays() -> None:
    one, tokens, scene = space(), drawn(2, TOKENS, WIDTH), drawn(2, DIRECTIONS, seed=9)
    before, after = one.reduce(tokens), one.reduce(one.recombined(tokens, scene))
    torch.testing.assert_close(after @ one.scene, scene @ one.scene)
    own = torch.eye(DIRECTIONS) - one.scene @ one.scene.T
    torch.testing.assert_close(after @ own, before @ own)


def test_what_no_direction_holds_stays_the_references() -> None:
    one, tokens = space(), drawn(1, TOKENS, WIDTH)
    moved = (one.recombined(tokens, drawn(1, DIRECTIONS)) - tokens).flatten()
    inside = one.directions @ (one.directions.T @ moved)
    torch.testing.assert_close(moved, inside)


def test_strength_leads_straight_from_one_to_the_other() -> None:
    one, tokens, scene = space(), drawn(1, TOKENS, WIDTH), drawn(1, DIRECTIONS, seed=9)
    whole = one.recombined(tokens, scene) - tokens
    torch.testing.assert_close(one.recombined(tokens, scene, 0.25) - tokens, whole / 4)
    torch.testing.assert_close(one.recombined(tokens, scene, 0.75) - tokens, 0.75 * whole)


def test_a_scene_depends_on_the_prompt_and_the_images_own_seed() -> None:
    one, query = space(), drawn(KEYS)
    assert torch.equal(one.drawn(query, 5)[0], one.drawn(query, 5)[0])
    picks = {tuple(one.drawn(query, seed)[0].tolist()) for seed in range(60)}
    nearest, share = one.bank.candidates(query)
    assert share == 1
    assert 8 <= len(nearest) <= BANK // 10
    similar = one.bank.keys @ query
    assert set(nearest.tolist()) == set(similar.topk(len(nearest)).indices.tolist())
    assert picks <= {tuple(one.bank.scenes[i].tolist()) for i in nearest}
    assert len(picks) > 4
    assert len({tuple(one.drawn(None, seed)[0].tolist()) for seed in range(200)}) > 100


def test_a_prompt_that_nothing_is_near_to_gets_less_of_a_scene() -> None:
    bank = SceneBank(drawn(9, 3), torch.eye(2)[:1].repeat(9, 1), ("",) * 9, (0.4, 0.8))
    shares = [bank.candidates(torch.tensor([best, 0.0]))[1] for best in (0.9, 0.4, 0.2, 0.0, -1)]
    assert shares == pytest.approx([1, 1, 0.5, 0, 0])
    assert replace(bank, near=None).candidates(torch.tensor([-1.0, 0.0]))[1] == 1
    without_keys = replace(bank, keys=torch.zeros(9, 0))
    assert len(without_keys.candidates(torch.zeros(2))[0]) == 9


def test_a_prompt_that_many_pictures_fit_has_more_candidates() -> None:
    """Among 1,000 pictures, 90 show what one prompt says and 9 what the other says."""
    keys = torch.zeros(1000, 3)
    keys[:90, 0], keys[90:99, 1], keys[99:, 2] = 1, 1, 1
    bank = SceneBank(drawn(1000, 3), keys, ("",) * 1000)
    many, few = (bank.candidates(torch.eye(3)[i])[0].tolist() for i in (0, 1))
    assert many == list(range(90))
    assert few == list(range(90, 99))


def test_a_file_gives_back_the_same(tmp_path: Path) -> None:
    one, file = space(), tmp_path / "space.safetensors"
    save_space(one, file)
    read = load_space(file)
    assert (read.spec, read.bank.captions) == (one.spec, one.bank.captions)
    assert read.bank.near == pytest.approx(one.bank.near)
    torch.testing.assert_close(read.bank.scenes, one.bank.scenes, atol=0.02, rtol=0)
    torch.testing.assert_close(read.directions, one.directions, atol=0.004, rtol=0)
    save_space(read, file)
    assert load_space(file).sha256 == read.sha256, "written again it stays the same"


def test_a_space_is_refused_for_another_projection() -> None:
    pipe = models.pipeline("sd1")
    adapter = models.adapter("plus", pipe.unet)
    fits = space(spec={"projection": projection_hash(adapter), "adapter": "mine"})
    fits.check(adapter)
    fits.check(adapter.half().float())
    other = models.adapter("plus", pipe.unet, seed=6)
    with pytest.raises(ModelError) as caught:
        fits.check(other, "a.safetensors")
    assert str(caught.value) == (
        "a.safetensors: was fitted on another adapter's projection; expected projection "
        f"{projection_hash(adapter)[:12]}…, of mine; found projection "
        f"{projection_hash(other)[:12]}… in a plus adapter. Fit one for this adapter: "
        "ipdiverse fit DATA --adapter … --out FILE."
    )


def rewritten(file: Path, spec: Any = None, **changes: torch.Tensor) -> None:
    """A file of other parts whose hash is right all the same, as anybody can make one."""
    tensors = {**load_file(file), **changes}
    told = json.dumps(space().spec if spec is None else spec)
    about = {"ipdiverse.space": told, "ipdiverse.sha256": tensors_hash(tensors)}
    save_file(tensors, file, about)


BROKEN = {
    "directions": {"variation.directions": torch.zeros(3, 32, dtype=torch.int8)},
    "float": {"bank.scenes": torch.zeros(6, BANK)},
    "captions": {"bank.captions": torch.zeros(9, dtype=torch.uint8)},
    "empty": {"bank.scenes": torch.zeros(6, 0, dtype=torch.int8)},
    "nan": {"variation.mean": torch.full((32,), torch.nan)},
    "deviation": {"variation.deviations": torch.zeros(6)},
    "near": {"bank.near": torch.zeros(3)},
}


@pytest.mark.parametrize("parts", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_in_one_line(parts: Any, tmp_path: Path) -> None:
    file = tmp_path / "space.safetensors"
    save_space(space(), file)
    rewritten(file, **parts)
    with pytest.raises(CheckpointError, match="its parts do not fit together; found") as caught:
        load_space(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", [{}, [], "text", {"projection": 3}])
def test_a_broken_spec_is_refused(spec: Any, tmp_path: Path) -> None:
    file = tmp_path / "space.safetensors"
    save_space(space(), file)
    rewritten(file, spec)
    with pytest.raises(CheckpointError, match="its parts do not fit together"):
        load_space(file)


def test_a_caption_that_unpacks_to_gigabytes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "space.safetensors"
    save_space(space(), file)
    monkeypatch.setattr("ipdiverse.adapter.imagine._MAX_CAPTIONS", 100)
    with pytest.raises(CheckpointError, match="cut off, or longer than 100 bytes"):
        load_space(file)


def test_damage_and_other_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "space.safetensors"
    save_space(space(), file)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="is not as it was written"):
        load_space(file)
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError) as caught:
        load_space(file)
    assert str(caught.value) == f"{file}: is not a variation space. `ipdiverse fit` makes one."
