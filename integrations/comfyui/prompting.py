"""An image prompt on ComfyUI's MODEL, by patches: the counterpart of our hook on diffusers' UNet.

ComfyUI hands an `attn2` replacement the projected query, key and value of a cross-attention layer,
and its options; an `attn2` patch, called just before with the same options, sees the text itself,
which a fusion reads. Rows are chunks of `cond_or_uncond`: 0 is conditional, 1 unconditional.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from ipdiverse.adapter.model import ImagePromptAdapter
    from ipdiverse.adapter.scale import Layer, Scale
    from ipdiverse.dial import Levers

    from .sites import Site

    Options = Mapping[str, Any]
    Attention = Callable[[Tensor, Tensor, Tensor, Options], Tensor]

_TEXT = "ipdiverse_text"
"""Key of the options under which the patch passes a layer's text to the replacement."""
_CONDITIONAL, _UNCONDITIONAL = 0, 1


def _levers_off() -> Levers:
    from ipdiverse.dial import OFF

    return OFF


@dataclass(frozen=True, eq=False)
class Setting:
    """The levers that the dial sets.

    Args:
        levers: How strongly each acts; off is the adapter as trained.
        seed: Seed of the random levers.
    """

    levers: Levers = field(default_factory=_levers_off)
    seed: int = 0


class ImagePrompt:
    """An adapter's image tokens for the rows of each call, and its scale by layer and step.

    Args:
        adapter: Not changed; a copy on the model's device, in its dtype, computes.
        embeds: Of the references, (references, …).
        negative: Of the unconditional branch, (1, …).
        scale: How strongly it acts.
        setting: Levers.
        words: Which text tokens are words, conditional and unconditional; None attends to all.
    """

    def __init__(
        self,
        adapter: ImagePromptAdapter,
        embeds: Tensor,
        negative: Tensor,
        scale: Scale,
        setting: Setting,
        words: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        from ipdiverse.adapter.model import interpolated

        adapter = interpolated(adapter, setting.levers.interpolation)
        self.adapter, self.embeds, self.scale, self.setting = adapter, embeds, scale, setting
        self.words = words
        with torch.no_grad():
            self._positive = adapter.tokens(embeds)
            self._negative = adapter.tokens(negative)
        self._placed: tuple[torch.device, torch.dtype, ImagePromptAdapter] | None = None
        self._known: tuple[Tensor, Any, Tensor] | None = None
        self._drawn: tuple[Tensor, Tensor] | None = None
        self._now: tuple[Tensor, float] | None = None

    def add(self, mixed: Tensor, query: Tensor, options: Options, layer: Layer) -> Tensor:
        """Add the image branch to a layer's text attention (arXiv:2308.06721).

        Args:
            mixed: Output of the text attention, (rows, pixels, width).
            query: The same shape.
            options: Of the layer's call.
            layer: The layer.
        """
        from ipdiverse.adapter.attention import ImageBranch, add_image

        scale = self.scale.at(layer, self.progress(options) if self.scale.by_step else 0.0)
        if scale == 0:
            return mixed
        adapter, heads = self._on(query), options["n_heads"]
        weights = adapter.layers()[layer.number]
        tokens = self.tokens(options[_TEXT].to(query), options)
        key, value = weights.to_k_ip(tokens), weights.to_v_ip(tokens)  # pyright: ignore[reportOptionalCall]
        mixed, query, key, value = (_heads(states, heads) for states in (mixed, query, key, value))
        return add_image(mixed, query, ImageBranch(key, value, scale)).transpose(1, 2).flatten(2)

    def tokens(self, text: Tensor, options: Options) -> Tensor:
        """Fused image tokens of every row, after the levers: (rows, tokens, width).

        Args:
            text: Of every row, (rows, text, width).
            options: Of the call.

        Raises:
            ArgumentError: Guidance has more than two branches.
        """
        from ipdiverse.errors import ArgumentError

        branches = options["cond_or_uncond"]
        if not set(branches) <= {_CONDITIONAL, _UNCONDITIONAL}:
            raise ArgumentError(
                "has more than two branches", where="guidance", expected="cond and uncond"
            )
        acts = bool(self.setting.levers.acting("tokens"))
        progress = self.progress(options) if acts else 0.0
        known, key = self._known, (tuple(branches), progress)
        if known is not None and known[0] is text and known[1] == key:
            return known[2]
        parts = [
            self._branch(rows, branch, progress)
            for rows, branch in zip(text.chunk(len(branches)), branches, strict=True)
        ]
        tokens = torch.cat(parts)
        self._known = (text, key, tokens)
        return tokens

    def progress(self, options: Options) -> float:
        """Fraction of the sampler's steps that are done, 0 at the first.

        Raises:
            ModelError: This version of ComfyUI does not pass the steps.
        """
        from ipdiverse.errors import ModelError

        # all layers of a call get the same tensor: the steps are searched once a call
        sigmas = options["sigmas"]
        if self._now is not None and self._now[0] is sigmas:
            return self._now[1]
        steps = options.get("sample_sigmas")
        if steps is None:
            raise ModelError(
                "does not tell the sampler's steps", where="ComfyUI", fix="Update ComfyUI."
            )
        steps = steps[:-1].float().cpu()
        done = int((steps - sigmas.flatten()[0].float().cpu()).abs().argmin()) / len(steps)
        self._now = (sigmas, done)
        return done

    def _branch(self, text: Tensor, branch: int, progress: float) -> Tensor:
        """The tokens of one chunk, whose text is given: (items, references · tokens, width)."""
        from ipdiverse.levers import StepContext

        items, levers = len(text), self.setting.levers
        if branch == _CONDITIONAL:
            tokens = self._positive.expand(items, *self._positive.shape)
        else:
            tokens = self._negative.expand(items, *self._positive.shape)
        tokens = tokens.to(text)
        adapter = self._on(text)
        strength = levers.fusion_strength * levers.interpolation
        if adapter.draws:
            if strength and branch == _CONDITIONAL:  # "no image" stays what it is
                # ComfyUI joins the text anew at every step, and drawing costs more than fusing
                if self._drawn is None or not torch.equal(self._drawn[0], text):
                    self._drawn = (text, self._fused(tokens, text, branch, strength))
                tokens = self._drawn[1]
        elif adapter.fusion is not None and strength:
            tokens = self._fused(tokens, text, branch, strength)
        tokens = tokens.flatten(1, 2)
        if branch == _CONDITIONAL:
            context = StepContext(self.seeds(items), progress)
            tokens = levers.change("tokens", tokens, context)
        return tokens

    def _fused(self, tokens: Tensor, text: Tensor, branch: int, strength: float) -> Tensor:
        """Tokens (items, references, tokens, width) with the text of their branch in them."""
        items, references = tokens.shape[:2]
        fused = self._on(text).fuse(
            tokens.flatten(0, 1),
            text.repeat_interleave(references, 0),
            self._mask(branch, items * references, text.shape[1]),
            strength,
            [seed for seed in self.seeds(items) for _ in range(references)],
        )
        return fused.unflatten(0, (items, references))

    def seeds(self, items: int) -> tuple[int, ...]:
        """One for each image of a batch, the same as `ipdiverse generate` takes."""
        from ipdiverse.seeding import derived_seed

        return tuple(derived_seed(self.setting.seed, item, "levers") for item in range(items))

    def _mask(self, branch: int, rows: int, length: int) -> Tensor | None:
        """Words of a branch's text; ComfyUI repeats the shorter of two texts to one length."""
        if self.words is None:
            return None
        words = self.words[branch]
        if length % len(words):
            return None
        return words.repeat(length // len(words)).expand(rows, -1)

    def _on(self, like: Tensor) -> ImagePromptAdapter:
        """A copy of the adapter on the model's device, in its dtype."""
        if self._placed is None or self._placed[:2] != (like.device, like.dtype):
            # a copy: other nodes of the workflow may use the same adapter
            placed = copy.deepcopy(self.adapter).to(like.device, like.dtype).eval()
            self._placed = (like.device, like.dtype, placed)
        return self._placed[2]


def prompted(model: Any, sites: Sequence[Site], prompt: ImagePrompt) -> Any:
    """A clone of a MODEL with an image prompt, in addition to those it has already.

    Args:
        model: ComfyUI's MODEL.
        sites: Its cross-attention layers.
        prompt: What to add.

    Raises:
        ModelError: The adapter was trained for another model.
    """
    _check_fit(prompt, sites)
    patched = model.clone()
    patched.set_model_attn2_patch(_pass_text_on)
    there = patched.model_options["transformer_options"].get("patches_replace", {})
    before = dict(there.get("attn2", {}))
    for site in sites:
        if not prompt.scale.by_step and prompt.scale.at(site.layer, 0.0) == 0:
            continue
        # ComfyUI keys a patch by block and place in it, or by the block alone
        earlier = before.get((*site.block, site.index), before.get(site.block))
        patch = _replacement(prompt, site.layer, earlier or _attention)
        patched.set_model_attn2_replace(patch, *site.block, site.index)
    if prompt.setting.levers.acting("guidance"):
        patched.set_model_sampler_post_cfg_function(_guided(prompt))
    return patched


def _pass_text_on(
    states: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    options[_TEXT] = context
    return states, context, value


def _replacement(prompt: ImagePrompt, layer: Layer, attend: Attention) -> Attention:
    def attention(query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        return prompt.add(attend(query, key, value, options), query, options, layer)

    return attention


def _attention(query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
    """ComfyUI's own attention, whichever is chosen."""
    from comfy.ldm.modules.attention import (  # pyright: ignore[reportMissingImports]
        optimized_attention,
    )

    # older versions do not know this argument, and never have the override
    chosen = "optimized_attention_override" in options
    more = {"transformer_options": options} if chosen else {}
    precision = options.get("attn_precision")
    return optimized_attention(
        query, key, value, options["n_heads"], attn_precision=precision, **more
    )


def _guided(prompt: ImagePrompt) -> Callable[[dict[str, Any]], Tensor]:
    """Guidance as levers change it, on the guess at the clean latents."""
    from ipdiverse.levers import StepContext

    def change(arguments: dict[str, Any]) -> Tensor:
        context = StepContext((), sigma=float(arguments["sigma"].flatten()[0]))
        # any weight but 1: all that ComfyUI's two branches allow is to guide or not
        guides = prompt.setting.levers.change("guidance", (2.0, 2.0), context) != (1.0, 1.0)
        return arguments["denoised" if guides else "cond_denoised"]

    return change


def _check_fit(prompt: ImagePrompt, sites: Sequence[Site]) -> None:
    from ipdiverse.adapter.model import check_layers

    check_layers(prompt.adapter, {site.layer.number: site.widths for site in sites}, "this model")


def _heads(states: Tensor, heads: int) -> Tensor:
    """(rows, tokens, heads · head_dim) to (rows, heads, tokens, head_dim)."""
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)
