"""Which rows of a UNet call are guided by the prompt: told from the text that was encoded.

Pipelines order their rows differently: [negative, prompt] in most, [negative, prompt, prompt] with
perturbed attention, [prompt, negative, negative] in InstructPix2Pix, one branch alone in a second
call. So while an adapter is attached, each row is looked up in what `pipe.encode_prompt` returned.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ipdiverse.adapter.attention import BOTH, NOTHING, TEXT
from ipdiverse.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence

KEPT_PROMPTS = 8
"""Encoded prompts that are kept: a callback may change the prompt on the way."""
_WATCHED = ("encode_prompt", "_encode_prompt")  # InstructPix2Pix has only the second

Layout = tuple[str, ...]
"""The branch of each of the equal blocks of rows in a call."""


@dataclass(eq=False)
class EncodedPrompt:
    """What a pipeline made of a prompt."""

    positive: Tensor  # (items, tokens, width)
    negative: Tensor | None = None  # None where the pipeline does not guide
    words: Tensor | None = None  # of `text_mask`, if it is known
    texts: tuple[str, ...] = ()  # of each item, if they are known
    # where prompt and negative prompt are encoded by a call each (Flux): which one it was, known
    # once the denoiser is called; both are None where one call encodes both
    alone: bool = False
    branch: str | None = None


@dataclass(frozen=True, eq=False)
class Told:
    """A call's branches, and the prompt that its text is from; None if it is not known."""

    layout: Layout
    prompt: EncodedPrompt | None = None

    def words_of(self, layout: Layout, items: int, tokens: int) -> Tensor | None:
        """Words of such rows, (branches × items, tokens); None when they are not known."""
        words = None if self.prompt is None else self.prompt.words
        if words is None or words.shape[1] != tokens or len(words) not in (items, 2 * items):
            return None
        return torch.cat([words[:items] if b == NOTHING else words[-items:] for b in layout])


def tell_branches(pipe: Any, text: Tensor, encoded: Sequence[EncodedPrompt]) -> Told:
    """The branches of a call of the denoiser."""
    if encoded and encoded[-1].alone:
        return _by_turn(pipe, text, list(encoded))
    stated, unclear = _stated(pipe), False
    for prompt in reversed(encoded):
        blocks = text.split(size) if len(text) % (size := len(prompt.positive)) == 0 else [text]
        sources, found = zip(*(_look_up(block, encoded) for block in blocks), strict=True)
        if not all(found):
            continue
        source = sources[0] if len(set(map(id, sources))) == 1 else None
        if all(len(branches) == 1 for branches in found):
            return Told(tuple(branch for (branch,) in found), source)
        unclear = True  # prompt and negative prompt are the same text
        if stated and len(found) % len(stated) == 0:
            each = len(found) // len(stated)
            layout = tuple(branch for branch in stated for _ in range(each))
            if all(branch in branches for branch, branches in zip(layout, found, strict=True)):
                return Told(layout, source)
    if stated and not _watched(pipe) and len(text) % len(stated) == 0:
        return Told(stated)
    raise _unknown(pipe, unclear)


def _by_turn(pipe: Any, text: Tensor, encoded: list[EncodedPrompt]) -> Told:
    """The branch where a call of the denoiser has one: the prompt's comes first in every step.

    So what was encoded after the first text that the denoiser is called with is negative.
    """
    places = range(len(encoded))[::-1]
    same = [at for at in places if encoded[at].positive is text]
    same = same or [at for at in places if _holds(encoded[at].positive, text)]
    if not same:
        raise _unknown(pipe, unclear=False)
    found = encoded[same[0]]
    if found.branch is None:
        found.branch = BOTH
        for later in encoded[same[0] + 1 :]:
            later.branch = NOTHING
    return Told((found.branch,), found)


def _look_up(
    block: Tensor, encoded: Sequence[EncodedPrompt]
) -> tuple[EncodedPrompt | None, set[str]]:
    """The newest prompt that has these rows, and on which sides: both if it says the same twice."""
    for prompt in reversed(encoded):
        sides = ((BOTH, prompt.positive), (NOTHING, prompt.negative))
        if found := {b for b, known in sides if known is not None and _holds(known, block)}:
            return prompt, found
    return None, set()


def _holds(known: Tensor, block: Tensor) -> bool:
    if known.shape[1:] != block.shape[1:] or len(known) % len(block):
        return False
    return any(torch.equal(part, block) for part in known.to(block).split(len(block)))


def _stated(pipe: Any) -> Layout | None:
    """The branches by the pipeline's class and its own word on guidance, in diffusers' orders."""
    guided = getattr(pipe, "do_classifier_free_guidance", None)
    if guided is None:
        return None
    if "InstructPix2Pix" in type(pipe).__name__:
        return (BOTH, NOTHING, NOTHING) if guided else (BOTH,)
    perturbed = getattr(pipe, "do_perturbed_attention_guidance", False)
    return (NOTHING,) * bool(guided) + (BOTH,) * (2 if perturbed else 1)


def _unknown(pipe: Any, unclear: bool) -> ArgumentError:
    expected, found = "text that this pipeline's encode_prompt gave", "other text"
    fix = (
        "Call the pipeline that the adapter is attached to, not another that shares its UNet "
        "(from_pipe) nor the UNet itself; or detach, and attach to the one that you call."
    )
    if unclear:
        expected, found = None, "a prompt and a negative prompt that are the same text"
        fix = "Give a negative prompt that differs from the prompt."
    what = "cannot tell which rows of this call of the UNet are guided by the prompt"
    return ArgumentError(what, where=type(pipe).__name__, expected=expected, found=found, fix=fix)


@dataclass(eq=False)
class GivenWords:
    """What users say of embeddings that they bring: True where a token is a word, or None."""

    positive: Tensor | None = None  # (prompts, tokens)
    negative: Tensor | None = None
    missed: bool = False  # said already


def watch_prompts(
    pipe: Any, encoded: deque[EncodedPrompt], words: GivenWords | None = None
) -> None:
    """Note every prompt that the pipeline encodes, and its words if somebody needs them."""
    if name := _watched(pipe):
        original = getattr(pipe, name)
        pipe.__dict__[name] = _Watching(pipe, name, original, encoded, words)


def forget_prompts(pipe: Any) -> None:
    """Undo `watch_prompts`; what somebody else put there, before or since, stays."""
    for name in _WATCHED:
        watching = pipe.__dict__.get(name)
        if isinstance(watching, _Watching):
            del pipe.__dict__[name]
            if watching.before is not None:
                pipe.__dict__[name] = watching.before


def _watched(pipe: Any) -> str | None:
    return next((name for name in _WATCHED if callable(getattr(pipe, name, None))), None)


class _Watching:
    """A pipeline's `encode_prompt` that also notes what it returns."""

    def __init__(
        self,
        pipe: Any,
        name: str,
        original: Any,
        encoded: deque[EncodedPrompt],
        words: GivenWords | None,
    ) -> None:
        functools.update_wrapper(self, original)
        self.pipe, self.original, self.encoded, self.words = pipe, original, encoded, words
        self.signature = inspect.signature(original)
        self.before = pipe.__dict__.get(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        returned = self.original(*args, **kwargs)
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        positive, negative = self._sides(returned, bound.arguments)
        if isinstance(positive, Tensor) and positive.ndim == 3:
            negative = negative if isinstance(negative, Tensor) else None
            known = self.words
            words = None if known is None else text_mask(self.pipe, bound.arguments, known)
            if words is not None and words.shape[1] != positive.shape[1]:
                raise ArgumentError(
                    "does not fit the embeddings",
                    where="set_words",
                    expected=f"{positive.shape[1]} tokens",
                    found=words.shape[1],
                )
            texts = _texts(bound.arguments.get("prompt"), len(positive))
            alone = self._alone()
            self.encoded.append(EncodedPrompt(positive, negative, words, texts, alone))
        return returned

    def _sides(self, returned: Any, arguments: dict[str, Any]) -> tuple[Any, Any]:
        """Embeddings of the prompt and of the negative prompt."""
        if self._alone():
            return (returned[0] if isinstance(returned, tuple) else None), None
        if isinstance(returned, tuple) and len(returned) > 1:
            return returned[:2]
        if isinstance(returned, Tensor) and "InstructPix2Pix" in type(self.pipe).__name__:
            guided = arguments.get("do_classifier_free_guidance")
            positive, negative, _ = returned.chunk(3) if guided else (returned, None, None)
            return positive, negative
        return None, None  # a tensor whose rows nobody names

    def _alone(self) -> bool:
        """Whether it encodes one prompt at a time."""
        return hasattr(self.pipe, "transformer") and "negative_prompt" not in (
            self.signature.parameters
        )


def _texts(prompt: Any, items: int) -> tuple[str, ...]:
    """Each item's prompt; empty where embeddings were given in its place."""
    texts = [prompt] if isinstance(prompt, str) else list(prompt or ())
    if not texts or items % len(texts) or not all(isinstance(text, str) for text in texts):
        return ()
    return tuple(text for text in texts for _ in range(items // len(texts)))


def text_mask(
    pipe: Any, arguments: dict[str, Any], given: GivenWords | None = None
) -> Tensor | None:
    """True where a token is a word or a mark of begin or end, so that fusion skips padding.

    (branches × items, tokens), unconditional items first; None when embeddings came without.
    """
    if hasattr(pipe, "tokenizer_3"):
        return None  # SD 3's text is of three encoders: fusion reads all of it
    given = given or GivenWords()
    prompt, against = arguments.get("prompt"), arguments.get("negative_prompt") or ""
    # Flux' T5 and Kolors' ChatGLM read as far as the call says: their tokenizers name no limit
    joint, length = hasattr(pipe, "transformer"), arguments.get("max_sequence_length")
    first = None if joint else getattr(pipe, "tokenizer", None)
    tokenizer = first or pipe.tokenizer_2
    masks = [given.positive if prompt is None else _words(pipe, prompt, tokenizer, length)]
    if arguments.get("do_classifier_free_guidance"):
        embedded = arguments.get("negative_prompt_embeds") is not None
        negative = given.negative if embedded else _words(pipe, against, tokenizer, length)
        masks.insert(0, negative)
    known = [mask for mask in masks if mask is not None]
    if len(known) < len(masks):
        if not given.missed:
            warnings.warn(
                "prompt_embeds come without words, so the fusion reads their padding too and the "
                "images differ: give attachment.set_words the tokenizer's attention_mask",
                stacklevel=3,
            )
        given.missed = True
        return None
    repeats, rows = arguments.get("num_images_per_prompt") or 1, max(map(len, known))
    each = [mask.expand(rows, -1) if len(mask) == 1 else mask for mask in known]
    return torch.cat([mask.repeat_interleave(repeats, 0) for mask in each])


def _words(
    pipe: Any, prompts: str | Sequence[str], tokenizer: Any, length: int | None = None
) -> Tensor:
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    convert = getattr(pipe, "maybe_convert_prompt", None)  # textual inversion's several vectors
    texts = [convert(text, tokenizer) for text in prompts] if convert else prompts
    return tokenizer(
        texts,
        padding="max_length",
        max_length=length or tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).attention_mask.bool()


def branch_weights(text: float, image: float) -> dict[str, float]:
    """Weights of ε(∅,∅), ε(T,∅) and ε(T,I) in the guided prediction, zero ones left out.

    ε = ε(∅,∅) + w_T [ε(T,∅) − ε(∅,∅)] + w_I [ε(T,I) − ε(T,∅)], the factorisation of
    InstructPix2Pix (arXiv:2211.09800, equation 3) with the text first. Equal weights need two
    passes, as does w_T = 1.
    """
    weights = {NOTHING: 1 - text, TEXT: text - image, BOTH: image}
    return {branch: weight for branch, weight in weights.items() if weight}


def combine(weights: dict[str, float], predictions: dict[str, Tensor]) -> Tensor:
    """Weighted sum of the branches' predictions."""
    if list(weights) == [NOTHING, BOTH]:  # as pipelines write it, to the bit
        nothing, both = predictions[NOTHING], predictions[BOTH]
        return nothing + weights[BOTH] * (both - nothing)
    return torch.stack([w * predictions[b] for b, w in weights.items()]).sum(0)


def picked(value: Any, rows: list[int], full: int) -> Any:
    """The rows of some branches, of whatever holds one for each of the batch."""
    if isinstance(value, Tensor) and value.ndim and len(value) == full:
        return value[rows]
    if isinstance(value, (list, tuple)):
        return type(value)(picked(part, rows, full) for part in value)
    if isinstance(value, dict):
        return {name: picked(part, rows, full) for name, part in value.items()}
    return value
