"""Fitting a variation space: the mathematics on tokens whose answer is known, and the command."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ipdiverse.adapter.imagine import load_space
from ipdiverse.base.adapters import adapter_file
from ipdiverse.cli import main
from ipdiverse.data.cache import Rows
from ipdiverse.data.prepare import PrepareOptions, prepare
from ipdiverse.dial import Levers
from ipdiverse.errors import ModelError
from ipdiverse.training import embed as embed_module
from ipdiverse.training.fit import _halves, _Scatter, _scene_directions, check_kind
from tests import models

if TYPE_CHECKING:
    from pathlib import Path

WIDTH, IDENTITY = 12, 4


def pairs(count: int, seed: int = 0) -> list[torch.Tensor]:
    """Pairs whose first directions hold the subject alone, and whose others the scene alone."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        z = torch.randn(2, WIDTH, generator=draw)
        z[1, :IDENTITY] = z[0, :IDENTITY] + 0.2 * z[1, :IDENTITY]
        found.append(z)
    return found


def scatter(count: int, deviations: torch.Tensor | None = None) -> _Scatter:
    made = _Scatter(torch.ones(WIDTH) if deviations is None else deviations)
    for number, z in enumerate(pairs(count)):
        made.add(z, number % 5)
    return made


@pytest.mark.parametrize("shrink", [True, False])
def test_the_scenes_directions_are_found(shrink: bool) -> None:
    scene, held_out = _scene_directions(scatter(400), shrink)
    assert scene.shape == (WIDTH, WIDTH - IDENTITY)
    torch.testing.assert_close(scene.T @ scene, torch.eye(WIDTH - IDENTITY))
    assert float(scene[:IDENTITY].norm()) < 0.3, "none of the subject's"
    assert held_out["identity_kept"] > 0.85
    assert held_out["scene_replaced"] > 0.97


def test_a_pair_counts_as_half_its_difference_and_more_pictures_as_more_pairs() -> None:
    made, z = _Scatter(torch.ones(3)), torch.randn(4, 3)
    made.add(z[:2], 0)
    torch.testing.assert_close(made.squares[0], (z[0] - z[1]).outer(z[0] - z[1]).double() / 2)
    made.add(z, 1)
    apart = (z - z.mean(0)).double()
    torch.testing.assert_close(made.squares[1], apart.T @ apart)
    assert made.count.tolist() == [1, 3, 0, 0, 0]
    made.add(z[:1], 2)
    assert made.count[2] == 0, "one picture alone tells nothing"


def test_shrinkage_is_that_of_ledoit_and_wolf() -> None:
    draws = torch.cat([z[:1] - z[1:] for z in pairs(15)]).double() / 2**0.5
    made = _Scatter(torch.ones(WIDTH))
    for z in pairs(15):
        made.add(z, 0)
    found = draws.T @ draws / len(draws)
    level = found.trace() / WIDTH * torch.eye(WIDTH)
    apart = (found - level).pow(2).sum()
    noise = sum((d.outer(d) - found).pow(2).sum() for d in draws) / len(draws) ** 2
    share = min(1.0, float(noise / apart))
    expected = (1 - share) * found + share * level
    assert 0.02 < share < 1
    torch.testing.assert_close(made.within([0], True), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(made.within([0], False), found, atol=1e-6, rtol=1e-5)


def test_few_pairs_find_more_of_the_subject_with_shrinkage() -> None:
    # the last directions hardly vary before whitening, and few pairs say little about them
    deviations = torch.tensor([1.0] * IDENTITY + [1.0] * 2 + [0.02] * 6)
    lost = {}
    for shrink in (True, False):
        _, vectors = torch.linalg.eigh(scatter(9, deviations).within(range(5), shrink))
        lost[shrink] = float(vectors[:IDENTITY, IDENTITY:].norm())
    assert lost[True] < lost[False]


def test_held_out_prompts_are_halves_of_captions() -> None:
    assert _halves("a cat in the snow") == ["a cat", "in the snow"]
    assert _halves("cat") == ["cat", "cat"] or _halves("cat") == ["cat", ""]


def test_faces_have_no_space() -> None:
    pipe = models.pipeline("sd1")
    with pytest.raises(ModelError) as caught:
        check_kind(models.adapter("faceid", pipe.unet))
    assert str(caught.value) == (
        "a faceid adapter: has no variation space; expected a base or plus adapter. A face's "
        "embedding holds no scene; its adapter copies none either."
    )


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A space of the shipped plain adapter, fitted by the command on 150 pairs."""
    folder = tmp_path_factory.mktemp("fit")
    prepare("critters", folder / "data", PrepareOptions(n=150))
    out = folder / "space.safetensors"
    words = ["fit", str(folder / "data"), "--adapter", "plus", "--bank", "100", "--json"]
    assert main([*words, "--out", str(out)]) == 0
    return folder, out


def test_the_command_fits_reports_and_inspects(fitted: Any, capsys: Any) -> None:
    folder, out = fitted
    spec = load_space(out).spec
    assert (spec["pictures"], spec["bank"], spec["keys"]) == (300, 100, "image")
    assert spec["directions"]["scene"] > spec["directions"]["identity"] > 4
    assert spec["held_out"]["scene_replaced"] > 0.7
    assert not list((folder / "data" / "embedded").glob("t*")), "no latents and no texts"
    assert main(["inspect", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "variation space"
    assert main(["inspect", str(out)]) == 0
    assert "100 scenes, found by what they show" in capsys.readouterr().out


def test_the_cache_is_read_again(fitted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = fitted

    def fail(*_: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr("ipdiverse.training.embed._encoded", fail)
    words = ["fit", str(folder / "data"), "--adapter", "base", "--out", str(folder / "base.st")]
    assert main(words) == 0
    assert load_space(folder / "base.st").spec["kind"] == "base"
    del out


def test_too_few_subjects_are_refused(tmp_path: Path, capsys: Any) -> None:
    prepare("critters", tmp_path / "data", PrepareOptions(n=6))
    out = tmp_path / "space.safetensors"
    assert main(["fit", str(tmp_path / "data"), "--adapter", "plus", "--out", str(out)]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "has too few subjects with several pictures; expected 20 at least" in message
    assert not out.exists()


def test_each_image_gets_a_scene_of_its_own(fitted: Any, references: Any, tmp_path: Path) -> None:
    from ipdiverse import generate

    reference = tmp_path / "reference.png"
    references[0].save(reference)
    options = {"adapter": "plus", "space": str(fitted[1]), "steps": 2, "seed": 3}
    stock = generate(reference, "in the snow", adapter="plus", steps=2, seed=3, n=2)
    off = generate(reference, "in the snow", diversity=0.0, n=2, **options)
    assert off.record()["image_sha256"] == stock.record()["image_sha256"]
    many = generate(reference, "in the snow", diversity=1.0, n=3, **options)
    one = generate(reference, "in the snow", diversity=1.0, n=1, **options)
    assert many.record()["image_sha256"][:1] == one.record()["image_sha256"]
    assert not set(many.record()["image_sha256"]) & set(stock.record()["image_sha256"])


def test_a_space_of_another_adapter_is_refused(fitted: Any, tmp_path: Path, capsys: Any) -> None:
    words = ["generate", "--image", "x.png", "--adapter", "base", "--space", str(fitted[1])]
    picture = tmp_path / "x.png"
    models.picture(1).save(picture)
    words[2] = str(picture)
    assert main([*words, "--recombine", "1", "-n", "1", "--out", str(tmp_path / "out")]) == 2
    assert "was fitted on another adapter's projection" in capsys.readouterr().err


def test_scenes_of_a_folder(fitted: Any, references: Any, tmp_path: Path) -> None:
    from ipdiverse.adapter.attach.attach import attach
    from ipdiverse.adapter.files.checkpoint import load_adapter
    from ipdiverse.base.bases import load_base
    from ipdiverse.sampling.request import Request
    from ipdiverse.sampling.sample import imagine

    for number, picture in enumerate(references[:3]):
        picture.save(tmp_path / f"{number}.png")
    adapter = load_adapter(adapter_file("critters", "plus"))
    request = Request(
        image=("x",), space=str(fitted[1]), scenes=str(tmp_path), levers=Levers(recombine=1.0)
    )
    with attach(load_base().pipe, adapter) as attachment:
        assert imagine(attachment, request) == []
        assert attachment.scenes is not None
        assert len(attachment.scenes.space.bank) == 3
        off = Request(image=("x",), space=str(fitted[1]))
        assert imagine(attachment, off) == ["space has no effect while recombine is 0"]


@pytest.mark.parametrize("count", [3, pytest.param(7, marks=pytest.mark.slow)])
def test_a_fit_in_parts_is_that_of_one_process(
    count: int, fitted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out = fitted
    monkeypatch.setattr("ipdiverse.training.embed.Rows", partial(Rows, size=20))
    prepare("critters", tmp_path / "data", PrepareOptions(n=150))
    space = tmp_path / "space.safetensors"
    words = ["fit", str(tmp_path / "data"), "--adapter", "plus", "--bank", "100"]
    words += ["--out", str(space), "--part"]
    assert main([*words, f"2/{count}"]) == 0
    assert main(["merge", str(tmp_path / "data")]) == 2, "others are missing"
    assert not space.exists()
    others = {*range(1, count + 1)} - {2}
    assert [main([*words, f"{number}/{count}"]) for number in others] == [0] * len(others)

    def fail(*_: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(embed_module, "_encoded", fail)
    assert main(["merge", str(tmp_path / "data")]) == 0
    assert space.read_bytes() == out.read_bytes()
    assert not (tmp_path / "data" / "embedded" / "parts").exists()
    # a cache that is there already, for whatever use, leaves nothing to do
    again = [*words[:-2], str(tmp_path / "again.safetensors"), "--part"]
    assert main([*again, "1/2"]) == main([*again, "2/2"]) == 0
    assert main(["merge", str(tmp_path / "data")]) == 0
    assert (tmp_path / "again.safetensors").read_bytes() == out.read_bytes()
