from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ipdiverse.adapter.files.checkpoint import load_adapter, read_spec, save_adapter
from ipdiverse.adapter.fusion import GatedFusion
from ipdiverse.base.adapters import SHIPPED_ADAPTERS, adapter_file
from ipdiverse.base.bases import CRITTERS
from ipdiverse.critters.make import Example, example
from ipdiverse.critters.scene import marginal
from ipdiverse.errors import ArgumentError
from workshop import arms
from workshop.__main__ import main as workshop
from workshop.arms import ARMS, arm_config, ship_arm, train_arm


def test_every_reference_meets_every_fusion_and_no_two_arms_are_alike(tmp_path: Path) -> None:
    plus = [arm for arm in ARMS.values() if arm.adapter == "plus" and arm.learns != "fusion"]
    kinds = {(arm.reference, arm.fusion, arm.learns) for arm in plus}
    fusions = {("none", "all"), ("blend", "all but fusion"), ("blend", "all"), ("gated", "all")}
    references = ("self", "augmented", "paired")
    crossed = {(r, *f) for r in references for f in fusions}
    controls = {("paired", "none", "projection"), ("paired", "none", "attention")}
    assert kinds == crossed | {("paired", "generative", "all"), *controls}
    alone = [arm for arm in ARMS.values() if arm.learns == "fusion" and not arm.shuffled]
    assert {(arm.reference, arm.fusion) for arm in alone} == {
        (r, f) for r in references for f in ("blend", "gated")
    }
    assert [arm.shared for arm in ARMS.values() if arm.shared] == [0.25, 0.5, 0.75, 1.0]
    configs = [asdict(arm_config(name, tmp_path, None, 0)) for name in ARMS]
    runs = [str({k: v for k, v in c.items() if k != "out"}) for c in configs]
    # A shuffled arm differs by what its fusion reads, one attention by what of the projection
    # learns, which no option of the trainer says.
    assert len(set(runs)) == len(ARMS) - 2
    assert set(SHIPPED_ADAPTERS.values()) <= ARMS.keys()


def test_seeds_and_arms_have_folders_of_their_own(tmp_path: Path) -> None:
    outs = {arm_config(name, tmp_path, 10, seed).out for name in ARMS for seed in (0, 1)}
    assert len(outs) == 2 * len(ARMS)


def test_arms_go_on_from_the_plain_adapter_and_the_default_from_its_own_seed(
    tmp_path: Path,
) -> None:
    starts = {name: arm_config(name, tmp_path, None, 1).init_from for name in ARMS}
    assert starts.pop("plain") is None
    assert starts.pop("base-plain") is None
    assert starts.pop("diverse") == f"{tmp_path}/paired-gated-seed1/adapter.safetensors"
    assert set(starts.values()) == {f"{tmp_path}/plain-seed0/adapter.safetensors"}
    for name, arm in ARMS.items():
        assert arm_config(name, tmp_path, None, 1).steps == arm.steps


def test_an_unknown_arm_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"selfless: unknown arm.*self-none"):
        arm_config("selfless", tmp_path, 10, 0)


def test_an_arm_is_trained_and_shipped_without_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(arms, "CRITTERS_ADAPTERS", tmp_path / "package")
    monkeypatch.setattr(arms, "SHIPPED_ADAPTERS", {"best": "paired-gated"})
    command = ["train-adapters", "--steps", "1", "--images", "4", "--ship"]
    command += ["--arms", "paired-gated", "--folder", str(tmp_path / "runs")]
    assert workshop(command) == 0
    assert "1 of 1: wrote" in capsys.readouterr().out
    file = tmp_path / "package" / "best.safetensors"
    assert isinstance(load_adapter(file).fusion, GatedFusion)
    spec = read_spec(file)
    assert (spec["arm"], spec["reference"], spec["recipe"]["steps"]) == (
        "paired-gated",
        "paired",
        1,
    )
    assert str(tmp_path) not in str(spec)
    assert spec["recipe"]["init_from"] == "plain"
    plain = load_file(tmp_path / "runs" / "plain-seed0" / "adapter.safetensors")
    adapter = tmp_path / "runs" / "paired-gated-seed0" / "adapter.safetensors"
    moved = [(load_file(adapter)[name] - plain[name]).abs().max() for name in plain]
    assert 0 < max(moved) < 2e-3, "one step from where plain ended"
    trained = load_file(adapter)
    assert workshop(command) == 0
    again = load_file(adapter)
    assert all(torch.equal(again[name], trained[name]) for name in trained), "it was finished"


def test_the_default_ships_with_its_base_weights_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    monkeypatch.setattr(arms, "CRITTERS_ADAPTERS", package)
    plus = load_adapter(adapter_file(CRITTERS, "plus"))
    diverse = load_adapter(adapter_file(CRITTERS, "diverse"))
    diverse.base_weights = {}
    (tmp_path / "diverse-seed0").mkdir()
    save_adapter(diverse, tmp_path / "diverse-seed0" / "adapter.safetensors", {}, torch.float32)
    file = ship_arm("diverse", tmp_path)
    assert file is not None
    assert file.stat().st_size < 0.95 * 2 * Path(adapter_file(CRITTERS, "plus")).stat().st_size
    found = load_adapter(file).base_weights
    assert all(torch.equal(found[name], tensor) for name, tensor in plus.state_dict().items())


def test_the_default_follows_base_weights_that_ship_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package"
    shutil.copytree(arms.CRITTERS_ADAPTERS, package)
    monkeypatch.setattr(arms, "CRITTERS_ADAPTERS", package)
    trained = load_adapter(package / "ip-adapter-plus_critters.safetensors")
    trained.state_dict()["image_proj.latents"].add_(1)
    (tmp_path / "plain-seed0").mkdir()
    save_adapter(trained, tmp_path / "plain-seed0" / "adapter.safetensors", {}, torch.float32)
    ship_arm("plain", tmp_path)
    default = package / "ip-adapter-diverse_critters.safetensors"
    latents = load_adapter(default).base_weights["image_proj.latents"]
    torch.testing.assert_close(latents, trained.state_dict()["image_proj.latents"].half().float())
    before = load_adapter(adapter_file(CRITTERS, "diverse"))
    assert read_spec(default)["dial"] == before.spec["dial"]
    own = load_adapter(default).state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in before.state_dict().items())


def test_fusion_alone_leaves_the_adapter_as_it_is(tmp_path: Path) -> None:
    file = train_arm("alone-paired-gated", tmp_path, steps=2, images=4)
    plain = load_file(tmp_path / "plain-seed0" / "adapter.safetensors")
    found = load_file(file)
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    gates = [value for name, value in found.items() if name.endswith("gate")]
    assert len(gates) == 1
    assert gates[0].abs().min() > 0  # it starts shut
    fusion = sum(t.numel() for name, t in found.items() if name not in plain)

    one = load_file(train_arm("alone-paired-attention", tmp_path, steps=2, images=4))
    changed = {name for name in plain if not torch.equal(one[name], plain[name])}
    assert one.keys() == plain.keys()
    assert changed
    assert all(name.startswith(arms.LAST_ATTENTION) for name in changed)
    as_many = sum(t.numel() for name, t in plain.items() if name.startswith(arms.LAST_ATTENTION))
    assert abs(as_many - fusion) < 0.001 * fusion


def test_a_shuffled_fusion_learns_of_the_text_of_others_and_only_while_it_learns() -> None:
    fusion, tokens, text = GatedFusion(8, 2, heads=2), torch.randn(3, 2, 8), torch.randn(3, 5, 8)
    torch.nn.init.ones_(fusion.gate)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] * 4 + [False]])
    plain = fusion(tokens, text, mask)
    with arms.shuffled_text():
        assert torch.equal(fusion.train()(tokens, text.roll(-1, 0), mask.roll(-1, 0)), plain)
        assert torch.equal(fusion.eval()(tokens, text, mask), plain)
    assert torch.equal(fusion.train()(tokens, text, mask), plain)


def test_pairs_share_scenes_by_chance_and_always_their_subject() -> None:
    counts = {}
    for chance in (0.0, 0.5, 1.0):
        with arms.shared_scenes(chance):
            made = [example(i, 0, "train") for i in range(300)]
        assert all(one.scene.subject == one.other.subject for one in made)
        counts[chance] = sum(one.scene.position == one.other.position for one in made)
    assert [example(i, 0, "train") for i in range(9)] == _unpatched(9)
    assert counts[1.0] == 300
    luck = sum(marginal("position") ** 2)
    for chance in (0.0, 0.5):  # within 4 standard deviations
        expected = chance + (1 - chance) * luck
        assert abs(counts[chance] / 300 - expected) < 4 * (expected * (1 - expected) / 300) ** 0.5


def _unpatched(count: int) -> list[Example]:
    with arms.shared_scenes(0.0):
        return [example(i, 0, "train") for i in range(count)]
