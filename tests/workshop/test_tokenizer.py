from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from ipdiverse.critters.scene import caption, sample_scene, vocabulary
from workshop.base.architecture import MAX_TOKENS
from workshop.base.tokenizer import build_tokenizer, word_merges

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import CLIPTokenizer


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return build_tokenizer()


def test_every_caption_word_is_one_token(tokenizer: CLIPTokenizer) -> None:
    assert {w: len(tokenizer(w).input_ids) for w in vocabulary()} == dict.fromkeys(vocabulary(), 3)


def test_captions_hold_no_other_words_and_fit(tokenizer: CLIPTokenizer) -> None:
    rng = np.random.default_rng(0)
    texts = [caption(sample_scene(rng).as_dict(), seed) for seed in range(500)]
    words = {word for text in texts for word in text.replace("-", " ").replace(",", "").split()}
    assert words <= vocabulary()
    assert max(len(tokenizer(text).input_ids) for text in texts) <= MAX_TOKENS


def test_any_text_is_encodable_and_comes_back(tokenizer: CLIPTokenizer) -> None:
    text = "ünïcode 日本 zzz ! 4 2"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_padding_is_the_end_of_text(tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer("a critter", padding="max_length", max_length=8).input_ids
    assert ids[0] == tokenizer.bos_token_id == 0
    assert ids[-4:] == [1, 1, 1, 1]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1


def test_it_is_the_same_each_time_and_after_saving(
    tokenizer: CLIPTokenizer, tmp_path: Path
) -> None:
    from transformers import CLIPTokenizer

    tokenizer.save_pretrained(tmp_path)
    text = "a spotted critter in outer space"
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded(text).input_ids == build_tokenizer()(text).input_ids == tokenizer(text).input_ids
    assert loaded.model_max_length == MAX_TOKENS


def test_merges_of_later_words_leave_earlier_ones_whole() -> None:
    merges = word_merges(["stone", "one", "on", "tone"])
    assert ("on", "e</w>") in merges
    assert len(merges) == len(set(merges))
