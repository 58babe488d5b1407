"""What is computed once is what would be computed each time."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ipdiverse.cli import main
from ipdiverse.commands.cluster import merge
from ipdiverse.data.cache import Rows
from ipdiverse.data.prepare import PrepareOptions, prepare
from ipdiverse.errors import DataError, ModelError
from ipdiverse.parts import Part
from ipdiverse.training import embed as module
from ipdiverse.training.embed import Embedded, Online, Stored, embed
from ipdiverse.training.frozen import FrozenEncoders, Preprocessing, open_encoders
from tests import models
from tests.conftest import random_pipeline
from tests.unit.test_parts import tree

if TYPE_CHECKING:
    from pathlib import Path

SHOWN = Preprocessing(resolution=64, variants=2, changed=1)


@pytest.fixture(scope="module")
def encoders() -> FrozenEncoders:
    return FrozenEncoders(random_pipeline())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    prepare("critters", tmp_path / "data", PrepareOptions(n=5))
    return tmp_path / "data"


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], exact: float) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == (torch.bool if name == "mask" else torch.float32)
        torch.testing.assert_close(tensor, other[name].to(tensor), atol=exact, rtol=exact)


def same(one: Any, other: Any, exact: float = 1e-5) -> None:
    for index, record in enumerate(one.records):
        equal(one.text(index), other.text(index), exact)
        for variant in range(2):
            equal(one.target(index, variant), other.target(index, variant), exact)
        assert record.reference is not None
        for name in (record.file_name, record.reference):
            for change in range(2):
                equal(one.reference(name, change), other.reference(name, change), exact)
    equal(one.no_text, other.no_text, exact)
    equal(one.no_image, other.no_image, exact)


def test_the_cache_holds_what_the_encoders_give(data: Path, encoders: FrozenEncoders) -> None:
    report = embed(data, encoders, SHOWN, Stored())
    assert (report["images"], report["pictures"], report["shards"]) == (5, 10, 4)
    assert report["computed"] == 4
    embedded = Embedded(data, encoders.fingerprint(), SHOWN, Stored())
    same(embedded, Online(data, encoders, SHOWN))
    assert embedded.target(0, 0)["mean"].shape == (16, 8, 8)
    assert set(embedded.no_image) == {"pooled", "hidden"}
    assert not embedded.no_image["pooled"].any()


def test_half_precision_and_one_kind_of_embedding(data: Path, encoders: FrozenEncoders) -> None:
    stored = Stored(images="pooled", dtype="float16")
    embed(data, encoders, SHOWN, stored)
    embedded = Embedded(data, encoders.fingerprint(), SHOWN, stored)
    assert set(embedded.reference(embedded.records[0].file_name, 1)) == {"pooled"}
    online = Online(data, encoders, SHOWN)
    equal(embedded.target(2, 1), online.target(2, 1), 2e-3)
    assert embedded.target(2, 1)["mean"].dtype == torch.float32


def test_nothing_is_encoded_twice(
    data: Path, encoders: FrozenEncoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed(data, encoders, SHOWN, Stored())

    def refuse(*_: Any) -> None:
        raise AssertionError("encoded again")

    for name in ("moments", "text", "image", "no_image"):
        monkeypatch.setattr(encoders, name, refuse)
    assert embed(data, encoders, SHOWN, Stored())["computed"] == 0
    Embedded(data, encoders.fingerprint(), SHOWN, Stored())


def test_only_what_a_setting_decides_is_computed_anew(data: Path, encoders: FrozenEncoders) -> None:
    embed(data, encoders, SHOWN, Stored())
    computed = [
        embed(data, encoders, shown, stored)["computed"]
        for shown, stored in (
            (replace(SHOWN, changed=2), Stored()),
            (replace(SHOWN, changed=2), Stored("hidden")),
            (replace(SHOWN, changed=2, variants=1), Stored("pooled")),
            (replace(SHOWN, changed=2, variants=1, seed=1), Stored("pooled")),
            (replace(SHOWN, changed=2, variants=1, seed=1), Stored("hidden")),
        )
    ]
    assert computed == [
        1,  # the references; neither targets nor texts
        0,  # both serve those who read one
        1,  # the targets
        3,  # the targets, the references, and with them the constants
        2,  # those of another embedding
    ]
    embedded = Embedded(
        data,
        encoders.fingerprint(),
        replace(SHOWN, changed=2, variants=1, seed=1),
        Stored("hidden"),
    )
    assert set(embedded.no_image) == {"hidden"}


def test_other_encoders_or_settings_are_never_taken_for_these(
    data: Path, encoders: FrozenEncoders
) -> None:
    embed(data, encoders, SHOWN, Stored())
    other = FrozenEncoders(random_pipeline(seed=1)).fingerprint()
    assert other != encoders.fingerprint()
    for fingerprint, shown, stored in (
        (other, SHOWN, Stored()),
        (encoders.fingerprint(), Preprocessing(resolution=64), Stored()),
        (encoders.fingerprint(), SHOWN, Stored(dtype="float16")),
    ):
        with pytest.raises(DataError, match=r"of other data or encoders.*ipdiverse embed"):
            Embedded(data, fingerprint, shown, stored)


def test_both_text_encoders_of_sdxl_are_kept(tmp_path: Path) -> None:
    frozen = FrozenEncoders(models.pipeline("sdxl", fresh=True))
    assert len(frozen.texts) == 2
    text = frozen.text(["a critter", ""])
    assert set(text) == {"states", "mask", "pooled"}
    assert len(text["states"]) == len(text["pooled"]) == 2


def test_the_command_embeds_and_says_what_variants_mean(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["embed", str(data), "--resolution", "64", "--variants", "2"]
    arguments += ["--cache-images", "pooled", "--changed", "0"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "5 images and 10 pictures in 4 shards, 4 of them computed now" in printed
    assert "2 variants of each target are stored; training draws among these alone" in printed
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["computed"] == 0
    assert main(["embed", str(data / "images")]) == 2
    assert "holds no prepared data" in capsys.readouterr().err


def test_a_picture_that_became_a_link_out_of_the_folder_is_not_read(
    data: Path, encoders: FrozenEncoders, tmp_path: Path
) -> None:
    online = Online(data, encoders, SHOWN)
    models.picture(0).save(tmp_path / "secret.png")
    (data / online.records[0].file_name).unlink()
    (data / online.records[0].file_name).symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match="the path leaves its root through a link"):
        online.target_pixels(0, 0)


def test_a_base_without_image_encoder_says_how_to_name_one() -> None:
    pipe = random_pipeline()
    pipe.image_encoder = None
    with pytest.raises(ModelError, match=r"has no image encoder\. Name one with --image-encoder"):
        FrozenEncoders(pipe)


def test_another_image_encoder_is_read_before_the_unet_is_there(tmp_path: Path) -> None:
    models.image_encoder().save_pretrained(tmp_path / "encoder")
    own = open_encoders("critters", unet=False)
    other = open_encoders("critters", str(tmp_path / "encoder"), unet=False)
    assert other.pipe.unet.device.type == "meta"
    assert other.fingerprint() != own.fingerprint()
    assert other.image([models.picture(0)])["pooled"].shape == (1, models.CLIP_DIM)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_a_cache_in_parts_is_that_of_one_process(
    count: int,
    data: Path,
    encoders: FrozenEncoders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "Rows", partial(Rows, size=1))
    shutil.copytree(data, alone := tmp_path / "alone")
    embed(alone, encoders, SHOWN, Stored())
    compute = module.compute

    def killed(rows: Rows, make: Any, missing: list[int], progress: Any) -> None:
        compute(rows, make, missing[:1], progress)
        if missing:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "compute", killed)
        with pytest.raises(KeyboardInterrupt):
            embed(data, encoders, SHOWN, Stored(), Part(1, 2))
    encoded = len(list((data / "embedded").glob("*.safetensors")))
    assert encoded == 1
    encoded += embed(data, encoders, SHOWN, Stored(), Part(1, 2))["computed"]
    with pytest.raises(DataError, match="not finished; found 2/2"):
        merge(data)
    if count == 1:
        encoded += embed(data, encoders, SHOWN, Stored())["computed"]
        assert encoded == embed(alone, encoders, SHOWN, Stored())["shards"]
        assert tree(data / "embedded") == tree(alone / "embedded")
        return
    for part in (Part(number + 1, count) for number in range(count)):  # dealt anew
        encoded += embed(data, encoders, SHOWN, Stored(), part)["computed"]
    lost = next((data / "embedded").glob("texts-*.safetensors"))
    whole = lost.read_bytes()
    lost.unlink()
    with pytest.raises(DataError, match=rf"lacks 1 shards.*found {lost.name}"):
        merge(data)
    lost.write_bytes(whole)
    merge(data)
    assert encoded == embed(alone, encoders, SHOWN, Stored())["shards"]
    made, wanted = (
        {file.name: file.read_bytes() for file in (folder / "embedded").iterdir()}
        for folder in (data, alone)
    )
    assert made == wanted
