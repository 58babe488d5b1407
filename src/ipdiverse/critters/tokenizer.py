"""The embedded model's tokenizer: CLIP's byte-level BPE, its merges learned from captions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ipdiverse.critters.architecture import MAX_TOKENS
from ipdiverse.critters.caption import caption_of
from ipdiverse.critters.scene import sample_scene

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(captions: int = 4000, seed: int = 0) -> CLIPTokenizer:
    """Learn merges from captions; every byte stays encodable, so any prompt is accepted.

    Ids 0 and 1 are start and end of text; padding is the end of text, as in Stable Diffusion.
    """
    from tokenizers import pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    rng = np.random.default_rng(seed)
    texts = [caption_of(sample_scene(rng), index) for index in range(captions)]
    backend = CLIPTokenizer(vocab={_BOS: 0, _EOS: 1}, merges=[]).backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=[_BOS, _EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    vocab, merges = _vocabulary(backend.to_str())
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def _vocabulary(serialized: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The learned vocabulary and merges, with each byte also as a whole word."""
    import json

    model = json.loads(serialized)["model"]
    vocab, merges = dict(model["vocab"]), [tuple(pair) for pair in model["merges"]]
    for symbol in [s for s in vocab if len(s) == 1]:
        vocab.setdefault(f"{symbol}</w>", len(vocab))
    return vocab, merges
