"""Encoders through transformers: a CLIP and a DINOv2 with random weights, saved as on the hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from torch import is_tensor
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ipdiverse.errors import DataError, ModelError
from ipdiverse.evaluation import features
from ipdiverse.evaluation.features import feature_sums, made_sets, open_encoder
from workshop.base.tokenizer import build_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

SIZE = {"height": 28, "width": 28}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = build_tokenizer()
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = small | {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = small | {"image_size": 28, "patch_size": 14}
    CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    ).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=SIZE).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dino")
    config = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 28}, crop_size=SIZE).save_pretrained(folder)
    return folder


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), np.uint8))


def test_a_clip_compares_with_images_and_texts(clip: Path) -> None:
    encoder = open_encoder(str(clip))
    assert encoder.reads_text
    seen, said = encoder.images([picture(0), picture(1)]), encoder.texts(["a cat", "a red hat"])
    assert seen.shape == said.shape == (2, 24)
    assert np.linalg.norm(seen, axis=1) == pytest.approx([1, 1])
    assert np.linalg.norm(said, axis=1) == pytest.approx([1, 1])
    whole = CLIPModel.from_pretrained(clip)
    tokens = build_tokenizer()(["a cat", "a red hat"], padding=True, return_tensors="pt")
    pixels = encoder.processor([picture(0), picture(1)], return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = whole(**tokens, pixel_values=pixels).logits_per_image
    cosines = logits / whole.logit_scale.exp()
    assert seen @ said.T == pytest.approx(cosines.detach().numpy(), abs=1e-5)


def test_a_dino_compares_images_alone_by_its_class_token(dino: Path) -> None:
    encoder = open_encoder(str(dino))
    assert not encoder.reads_text
    pixels = encoder.processor([picture(3)], return_tensors="pt").pixel_values
    with torch.no_grad():
        token = Dinov2Model.from_pretrained(dino)(pixel_values=pixels).last_hidden_state[0, 0]
    expected = token / token.norm()
    assert encoder.images([picture(3)])[0] == pytest.approx(expected.numpy(), abs=1e-5)


@pytest.mark.parametrize("text", [False, True])
def test_inputs_go_where_the_model_is_and_as_precise(clip: Path, text: bool) -> None:
    encoder = open_encoder(str(clip))
    before = encoder.texts(["a cat"]) if text else encoder.images([picture(0)])
    encoder.model.double()
    given = list[torch.Tensor]()
    part = encoder.model.text_model if text else encoder.model.vision_model
    part.register_forward_pre_hook(
        lambda _, args, kwargs: given.extend(t for t in (*args, *kwargs.values()) if is_tensor(t)),
        with_kwargs=True,
    )
    after = encoder.texts(["a cat"]) if text else encoder.images([picture(0)])
    assert after == pytest.approx(before, abs=1e-5)
    assert {tensor.device for tensor in given} == {encoder.model.device}


def test_copies_and_clusters_have_the_scores_they_must(clip: Path, dino: Path) -> None:
    reference = picture(0)
    copies, two = [reference] * 4, [picture(1), picture(1), picture(2), picture(2)]
    for folder, texts in ((clip, True), (dino, False)):
        encoder = open_encoder(str(folder))
        parts = feature_sums(encoder, [copies, two], [reference, reference], ["a cat", "a cat"])
        assert len(parts) == 4 + texts
        score = {name.split(" (")[0]: part.total for name, part in parts.items()}
        assert score["vendi"][0] == pytest.approx(1, abs=1e-3)
        assert 1 < score["vendi"][1] <= 2 + 1e-6, "two clusters are at most two"
        assert score["distance"][0] == pytest.approx(0, abs=1e-5)
        assert score["image"][0] == pytest.approx(1, abs=1e-5)
        assert score["copies"][0] == 1


def test_names_stand_for_hub_ids(dino: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(features.ENCODERS, "dino", str(dino))
    assert open_encoder("dino").name == "dino"


def test_an_encoder_that_is_opened_by_name_goes_where_it_is_to_run(dino: Path) -> None:
    assert open_encoder(str(dino)).model.device.type == "cpu"
    assert open_encoder(str(dino), device="meta").model.device.type == "meta"


def test_pickled_weights_are_not_opened(dino: Path, tmp_path: Path) -> None:
    for file in dino.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(Dinov2Model.from_pretrained(dino).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be opened as an encoder"):
        open_encoder(str(tmp_path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("reads", ["images", "texts"])
def test_features_without_a_direction_are_one_line(clip: Path, value: float, reads: str) -> None:
    encoder = open_encoder(str(clip))
    for part in (encoder.model.visual_projection, encoder.model.text_projection):
        part.weight.data.fill_(value)
    with pytest.raises(ModelError, match=r"gives features that cannot be compared.*finite"):
        encoder.images([picture(0)]) if reads == "images" else encoder.texts(["a cat"])


def test_what_a_model_raises_names_the_encoder(clip: Path) -> None:
    encoder = open_encoder(str(clip))
    encoder.model.vision_model = None
    with pytest.raises(ModelError, match=f"{clip.name}: cannot encode images; found "):
        encoder.images([picture(0)])


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """References `cat` and `cat--2`, and two images of each."""
    for name in ("refs/cat.png", "refs/cat--2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        picture(0).save(tmp_path / name)
    for name in ("cat", "cat--2"):
        (tmp_path / "made" / name).mkdir(parents=True)
        for number in range(2):
            picture(number).save(tmp_path / "made" / name / f"{number}.png")
    return tmp_path


def test_a_reference_whose_name_ends_like_a_number_is_found(made: Path) -> None:
    sets = made_sets(made / "made", made / "refs", None)
    assert [one.pair.file.name for one in sets] == ["cat.png", "cat--2.png"]


@pytest.mark.parametrize("name", ["cat--²", "\x1b[31mred", "\u202eevil", "12", "cat--99999", "--1"])
def test_folders_that_name_nothing_are_one_line(made: Path, name: str) -> None:
    (made / "made" / "cat").rename(made / "made" / name)
    with pytest.raises(DataError, match="does not name a") as caught:
        made_sets(made / "made", made / "refs", None)
    assert "\n" not in str(caught.value)


def test_references_of_one_name_are_refused_rather_than_mixed_up(made: Path) -> None:
    picture(1).save(made / "refs" / "cat.jpg")
    with pytest.raises(DataError, match=r"cat\.png: has the name of another; found cat\.jpg"):
        made_sets(made / "made", made / "refs", None)
