"""Which text tokens are words, which padding: read off the prompts as the pipeline encodes them.

The UNet sees text states alone. Fusion must not attend to padding, so while an adapter with a
fusion is attached, `pipe.encode_prompt` also counts the words of the prompts it is given.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ipdiverse.adapter.attach.hook import ImagePromptHook


def watch_words(pipe: Any, hook: ImagePromptHook) -> None:
    """Note the words of every prompt that the pipeline encodes, if a fusion needs them."""
    fusing = any(prompt.adapter.fusion is not None for prompt in hook.prompts)
    original = getattr(pipe, "encode_prompt", None)
    if not fusing or original is None:
        return
    pipe.__dict__["encode_prompt"] = _Watched(pipe, hook, original)


def forget_words(pipe: Any) -> None:
    """Undo `watch_words`; what somebody else put there, before or since, stays."""
    watched = pipe.__dict__.get("encode_prompt")
    if isinstance(watched, _Watched):
        del pipe.__dict__["encode_prompt"]
        if watched.before is not None:
            pipe.__dict__["encode_prompt"] = watched.before


class _Watched:
    """A pipeline's `encode_prompt` that notes the words first."""

    def __init__(self, pipe: Any, hook: ImagePromptHook, original: Any) -> None:
        functools.update_wrapper(self, original)
        self.pipe, self.hook, self.original = pipe, hook, original
        self.signature = inspect.signature(original)
        self.before = pipe.__dict__.get("encode_prompt")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        self.hook.text_mask = text_mask(self.pipe, bound.arguments)
        return self.original(*args, **kwargs)


def text_mask(pipe: Any, arguments: dict[str, Any]) -> Tensor | None:
    """True where a token is a word or a mark of begin or end.

    Args:
        pipe: Whose tokenizer reads the prompts.
        arguments: Of `encode_prompt`.

    Returns:
        (branches × items, tokens), unconditional items first; None when the prompt was given as
        embeddings.
    """
    prompt = arguments.get("prompt")
    if prompt is None:
        return None
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    masks = [_words(pipe, prompts)]
    if arguments.get("do_classifier_free_guidance"):
        if arguments.get("negative_prompt_embeds") is not None:
            return None
        negative = arguments.get("negative_prompt") or ""
        negatives = [negative] if isinstance(negative, str) else list(negative)
        mask = _words(pipe, negatives)
        masks.insert(0, mask.expand(len(prompts), -1) if len(mask) == 1 else mask)
    repeats = arguments.get("num_images_per_prompt") or 1
    return torch.cat([mask.repeat_interleave(repeats, 0) for mask in masks])


def _words(pipe: Any, prompts: list[str]) -> Tensor:
    tokenizer = pipe.tokenizer if getattr(pipe, "tokenizer", None) else pipe.tokenizer_2
    convert = getattr(pipe, "maybe_convert_prompt", None)  # textual inversion's several vectors
    texts = [convert(text, tokenizer) for text in prompts] if convert else prompts
    return tokenizer(
        texts,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).attention_mask.bool()
