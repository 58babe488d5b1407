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

    from ipdiverse.adapter.imagine import VariationSpace
    from ipdiverse.adapter.model import ImagePromptAdapter
    from ipdiverse.adapter.reference import RegionMask
    from ipdiverse.adapter.scale import Layer, Scale
    from ipdiverse.dial import Levers

    from .scenes import Prompts
    from .schedule import Schedule
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
        space: Whence the lever `recombine` draws scenes.
    """

    levers: Levers = field(default_factory=_levers_off)
    seed: int = 0
    space: VariationSpace | None = None


@dataclass(frozen=True, eq=False)
class Given:
    """What an image prompt is made of.

    Args:
        embeds: Of the references, (references, …), one tensor for each that the adapter reads.
        negative: Of the unconditional branch, (1, …) or as many.
        scale: How strongly it acts, by layer.
        schedule: When it acts.
        setting: Levers.
        prompts: The texts of guidance; without them a fusion reads padding, and any scene fits.
        mask: Where it acts; None is everywhere.
    """

    embeds: tuple[Tensor, ...]
    negative: tuple[Tensor, ...]
    scale: Scale
    schedule: Schedule
    setting: Setting
    prompts: Prompts | None = None
    mask: RegionMask | None = None


class ImagePrompt:
    """An adapter's image tokens for the rows of each call, and its scale by layer and step.

    Args:
        adapter: Not changed; a copy on the model's device, in its dtype, computes.
        given: References, scale and levers.

    Raises:
        ModelError: The variation space is of another adapter, or asks for another text encoder.
    """

    def __init__(self, adapter: ImagePromptAdapter, given: Given) -> None:
        from ipdiverse.adapter.model import interpolated

        from .scenes import Scenes

        self.setting, self.scale, self.schedule = given.setting, given.scale, given.schedule
        self.words = given.prompts.words if given.prompts else None
        self.mask, self.scenes = given.mask, None
        levers = self.setting.levers
        if levers.recombine and self.setting.space is not None:
            self.setting.space.check(adapter)
            self.scenes = Scenes(self.setting.space, given.prompts)
        self.adapter = adapter = interpolated(adapter, levers.interpolation)
        with torch.no_grad():
            self._positive = adapter.tokens(*given.embeds)
            self._negative = adapter.tokens(*given.negative)
        self._placed: tuple[torch.device, torch.dtype, ImagePromptAdapter] | None = None
        self._known: tuple[Tensor, Any, Tensor] | None = None
        self._drawn: tuple[Tensor, Tensor] | None = None
        self._imagined: Tensor | None = None

    def add(self, mixed: Tensor, query: Tensor, options: Options, layer: Layer) -> Tensor:
        """Add the image branch to a layer's text attention (arXiv:2308.06721).

        Args:
            mixed: Output of the text attention, (rows, pixels, width).
            query: The same shape.
            options: Of the layer's call.
            layer: The layer.
        """
        from ipdiverse.adapter.attention import ImageBranch, add_image

        if not self.schedule.acts(options):
            return mixed
        scale = self.scale.at(layer, self.schedule.progress(options) if self.scale.by_step else 0.0)
        if not isinstance(scale, torch.Tensor) and scale == 0:
            return mixed
        adapter, heads = self._on(query), options["n_heads"]
        weights = adapter.layers()[layer.number]
        tokens = self.tokens(options[_TEXT].to(query), options)
        if layer.number in self.scale.opposed:
            tokens = self._opposed(tokens, options["cond_or_uncond"])
        key, value = weights.to_k_ip(tokens), weights.to_v_ip(tokens)  # pyright: ignore[reportOptionalCall]
        region = self._region(query, options)
        mixed, query, key, value = (_heads(states, heads) for states in (mixed, query, key, value))
        branch = ImageBranch(key, value, scale, region)
        return add_image(mixed, query, branch).transpose(1, 2).flatten(2)

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
        progress = self.schedule.progress(options) if acts else 0.0
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

    def _opposed(self, tokens: Tensor, branches: Sequence[int]) -> Tensor:
        """Tokens where there were none and none where they were: guidance leads away from them."""
        chunks = tokens.chunk(len(branches))
        if _CONDITIONAL in branches:
            positive = chunks[branches.index(_CONDITIONAL)]
        else:  # where memory is short ComfyUI calls the branches apart, and the text is not known
            items = len(chunks[0])
            positive = self._referred(items).to(tokens).flatten(1, 2)
        return torch.cat(
            [
                positive if branch == _UNCONDITIONAL else torch.zeros_like(rows)
                for branch, rows in zip(branches, chunks, strict=True)
            ]
        )

    def _region(self, query: Tensor, options: Options) -> Tensor | None:
        """The mask over a layer's pixels, one for each row of a call."""
        if self.mask is None:
            return None
        height, width = options["original_shape"][-2:]
        region = self.mask.at(query.shape[1], (height, width))
        items, branches = len(query) // len(options["cond_or_uncond"]), options["cond_or_uncond"]
        # one mask for each image of a batch; the last serves those that are left
        rows = torch.arange(items).clamp_max(len(region) - 1)
        return region[rows].repeat(len(branches), 1)

    def _branch(self, text: Tensor, branch: int, progress: float) -> Tensor:
        """The tokens of one chunk, whose text is given: (items, references · tokens, width)."""
        from ipdiverse.levers import StepContext

        items, levers = len(text), self.setting.levers
        if branch == _CONDITIONAL:
            tokens = self._referred(items)
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

    def _referred(self, items: int) -> Tensor:
        """Every item's reference, perhaps an imagined one: (items, references, tokens, width)."""
        from ipdiverse.levers import StepContext

        tokens = self._positive.expand(items, *self._positive.shape)
        if self.scenes is None:
            return tokens
        imagined = self._imagined
        if imagined is None or len(imagined) != items:
            context = StepContext(self.seeds(items), attachment=self.scenes)
            imagined = self.setting.levers.change("projected", tokens, context)
            self._imagined = imagined
        return imagined

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
        from ipdiverse.provenance import derived_seed

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
    _change_layers(patched, prompt.adapter, sites)
    there = patched.model_options["transformer_options"].get("patches_replace", {})
    before = dict(there.get("attn2", {}))
    for site in sites:
        if not prompt.scale.by_step and prompt.scale.at(site.layer, 0.0) == 0:
            continue
        key = _key(site, before)
        earlier = before.get(key, before.get(site.block)) or _attention
        patched.set_model_attn2_replace(Replacement(prompt, site.layer, earlier), *key)
    if prompt.setting.levers.acting("guidance"):
        patched.set_model_sampler_post_cfg_function(_guided(prompt))
    return patched


def _change_layers(patched: Any, adapter: ImagePromptAdapter, sites: Sequence[Site]) -> None:
    """Change the UNet's own projections where the adapter does: FaceID's files hold a LoRA."""
    changes, names = {}, {}
    for site in sites:
        for attention, number in (("attn1", site.layer.number - 1), ("attn2", site.layer.number)):
            weights = adapter.layers().get(number)
            for part in ("to_q", "to_k", "to_v", "to_out"):
                change = getattr(weights, f"{part}_lora", None)
                if change is None:
                    continue
                place = f"{site.path}.{attention}.{part}{'.0' if part == 'to_out' else ''}"
                names[place] = f"diffusion_model.{place}.weight"
                changes[f"{place}.lora_up.weight"] = change.up.weight.detach()
                changes[f"{place}.lora_down.weight"] = change.down.weight.detach()
    if changes:
        import comfy.lora  # pyright: ignore[reportMissingImports] - ComfyUI's

        patched.add_patches(comfy.lora.load_lora(changes, names))


def _key(site: Site, before: Mapping[Any, Any]) -> tuple[Any, ...]:
    """ComfyUI's key of a layer: its block, with its place in it where there are several.

    A key with the place hides one without, and ComfyUI_IPAdapter_plus uses none on SD 1.x: with the
    same key as that pack's, its node after ours finds our patch and adds to it.
    """
    whole = (*site.block, site.index)
    return site.block if site.alone and whole not in before else whole


def _pass_text_on(
    states: Tensor, context: Tensor, value: Tensor, options: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    options[_TEXT] = context
    return states, context, value


class Replacement:
    """A layer's attention with an image prompt added, and what other nodes add after it.

    `add` is what ComfyUI_IPAdapter_plus calls on a patch that it finds in its place.

    Args:
        prompt: What is added.
        layer: Where.
        attend: The attention before; a patch of another node, or ComfyUI's own.
    """

    def __init__(self, prompt: ImagePrompt, layer: Layer, attend: Attention) -> None:
        self.prompt, self.layer, self.attend = prompt, layer, attend
        self.added: list[tuple[Callable[..., Any], dict[str, Any]]] = []

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
        """What the layer gives, (rows, pixels, width)."""
        mixed = self.attend(query, key, value, options)
        mixed = self.prompt.add(mixed, query, options, self.layer)
        for callback, given in self.added:
            sigma = self.prompt.schedule.sigma(options)
            if given["sigma_end"] <= sigma <= given["sigma_start"]:
                mixed = mixed + callback(mixed, query, key, value, options, **given)
        return mixed

    def add(self, callback: Callable[..., Any], **given: Any) -> None:
        """Add another prompt's share, in its range of noise levels."""
        self.added.append((callback, given))

    def __deepcopy__(self, _: dict[int, Any]) -> Replacement:
        # ComfyUI copies options deeply whenever it clones a model. The prompt is shared: its
        # weights are large. What others added is not: it must not reach the model it came from.
        copied = Replacement(self.prompt, self.layer, copy.deepcopy(self.attend))
        copied.added = list(self.added)
        return copied


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
