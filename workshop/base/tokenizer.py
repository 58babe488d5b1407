"""The embedded model's tokenizer: CLIP's byte-level BPE, each caption word one token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ipdiverse.critters.scene import vocabulary
from workshop.base.architecture import MAX_TOKENS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import CLIPTokenizer

_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"
_END = "</w>"


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with the words of captions; every byte, so any prompt, can be encoded.

    Ids 0 and 1 are start and end of text; padding is the end of text, as in Stable Diffusion. The
    vocabulary is computed, not learned: the trainer of `tokenizers` breaks ties at random.
    """
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    merges = word_merges(vocabulary())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [*alphabet, *(letter + _END for letter in alphabet), *("".join(m) for m in merges)]
    vocab = {symbol: index for index, symbol in enumerate([_BOS, _EOS, *symbols])}
    build: Any = CLIPTokenizer  # the annotation of `merges` is wrong
    return build(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def word_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Merges that make each word one token.

    A word's new merges have lower priority than all earlier ones, so those words stay whole.
    """
    merges: dict[tuple[str, str], None] = {}
    for word in sorted(set(words)):
        pieces = _apply([*word[:-1], word[-1] + _END], merges)
        while len(pieces) > 1:
            merges.setdefault((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    return list(merges)


def _apply(pieces: list[str], merges: Iterable[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding of one word: merges in order of rank."""
    for left, right in merges:
        index = 0
        while index < len(pieces) - 1:
            if (pieces[index], pieces[index + 1]) == (left, right):
                pieces[index : index + 2] = [left + right]
            index += 1
    return pieces
